"""A capacity plan as files: `plan.json` and `plan.html`."""

from __future__ import annotations

from pathlib import Path

import orjson

from simulator.planning.result import CapacityPlan, Level, Priced
from tiergate.simulate.plan_show import warnings


def plan_json(plan: CapacityPlan, price: float | None) -> bytes:
    """The whole plan, keys sorted; the same plan gives the same bytes. Times in seconds."""
    asked = plan.asked
    content = {
        "simulated": True,
        "trace": asked.demand.trace.name,
        "requests": len(asked.demand.trace.requests),
        "guessed": asked.demand.trace.guessed,
        "own_tiers": asked.demand.own_tiers,
        "tiers": asked.demand.tiers,
        "profile": asked.fleet.engines[0].profile,
        "default_profile": asked.default_profile,
        "policy": asked.contender.label,
        "target": asked.target,
        "seeds": asked.seeds,
        "rate_factor": asked.rate_factor,
        "arrivals": asked.arrivals.value,
        "window_s": plan.window_s,
        "reached": plan.reached,
        "impossible": asked.demand.impossible,
        "unloaded_below_target": dict(plan.unloaded),
        "warnings": warnings(plan),
        "windows": [
            {
                "start_s": one.window.start_s,
                "duration_s": one.window.duration_s,
                "requests": one.window.requests,
                "rate_rps": one.window.rate_rps,
                "reference_backends": one.window.load,
                "backends": one.backends,
                "backends_by_tier": dict(one.held.tiers),
                "pool": one.held.pool,
                "level": one.level,
                "scaled": one.scaled,
                "borderline": one.borderline,
            }
            for one in plan.windows
        ],
        "levels": [_level_json(level) for level in plan.levels],
        "peak_backends": plan.peak,
        "backend_hours": plan.backend_hours,
        "static_backend_hours": None if plan.peak is None else plan.peak * plan.hours,
        "silos": plan.silos,
        "price_per_hour": price,
        "costs": None if plan.priced is None else _costs_json(plan, plan.priced),
    }
    option = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(content, option=option)


def _level_json(level: Level) -> dict[str, object]:
    return {
        "group": level.group,
        "rate_rps": level.rate_rps,
        "backends": level.backends,
        "attainment": dict(level.attainments),
        "score": level.worst,
        "seeds_reached": level.seeds_reached,
        "backends_by_tier": dict(level.held.tiers),
        "pool": level.held.pool,
        "over_rps": level.over_rps,
        "over": level.over,
        "tried": [
            {"backends": backends, "rate_rps": rate_rps, "score": score}
            for backends, rate_rps, score in level.tried
        ],
    }


def _costs_json(plan: CapacityPlan, priced: Priced) -> dict[str, object]:
    return {
        "backends": priced.backends,
        "request_cost_s": priced.request_cost_s,
        "savings": [
            {
                "tier": one.tier,
                "relaxed_to": one.relaxed_to,
                "tier_share": one.tier_share,
                "backends_at_peak": plan.peak_rps * one.per_request_s.mean,
                "per_request_s": one.per_request_s,
                "per_thousand_s": one.per_thousand_s,
                "exact": one.exact,
                "measurable": one.measurable,
            }
            for one in priced.savings
        ],
    }


def write_files(plan: CapacityPlan, price: float | None, folder: Path, rerun: str) -> tuple[Path, ...]:
    """`plan.json` and `plan.html`. Raises OSError and FiguresUnavailable."""
    from tiergate.simulate.plan_page import page  # noqa: PLC0415 - only where a page is wanted

    folder.mkdir(parents=True, exist_ok=True)
    content = {
        folder / "plan.json": plan_json(plan, price),
        folder / "plan.html": page(plan, price, rerun).encode(),
    }
    for path, data in content.items():
        path.write_bytes(data)
    return tuple(content)
