"""What `tiergate simulate plan` prints: tables for 80 columns, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiles.catalogue import load
from simulator.planning.costs import Saving
from simulator.planning.result import CapacityPlan, Held, Level, PlannedWindow, Priced
from simulator.planning.sizing import ALL
from simulator.report import formats

_MOST_TIERS = 4  # beside each other in one table
_NAME = 8  # letters of a tier's name in a heading
LIMITS = (
    "Every number is simulated: engines are a model whose step times come from the profile. The network, failures "
    "and hits of prefix caches are not modelled; a backend that is added serves at once unless --startup-s says "
    "otherwise. Loads are steady inside a window. Windows between two simulated loads are interpolated and "
    "rounded up, under the lengths of all windows of their group. A tier without a promise asks for no backends: "
    "it takes what is left."
)


def clock(start_s: float, window_s: float) -> str:
    """`09:15`, with the day before it after the first, `2+09:15`, and with seconds where windows are short."""
    days, rest = divmod(round(start_s), 86_400)
    told = f"{f'{days}+' if days else ''}{rest // 3600:02}:{rest // 60 % 60:02}"
    return told if window_s % 60 == 0 else f"{told}:{rest % 60:02}"


def title(plan: CapacityPlan) -> str:
    """What was planned, in a line."""
    (engines,) = plan.asked.fleet.engines
    return f"{plan.asked.demand.trace.name} on {engines.profile}, {plan.asked.contender.label}"


def conditions(plan: CapacityPlan) -> tuple[str, ...]:
    """Under what it was planned, in sentences."""
    asked = plan.asked
    trace = asked.demand.trace
    own = "each request keeps its tier from the log" if asked.demand.own_tiers else "tiers drawn by share"
    lines = [
        (
            f"{len(trace.requests):,} requests in {_span(trace.duration_s)}, played at {asked.rate_factor:g} x "
            f"their rate; {len(plan.windows)} windows of {_span(plan.window_s)}; {own}."
        ),
        (
            f"Target: {100 * asked.target:g} % of all requests and of every tier's are on time to their last "
            f"token, over {_seeds(asked.seeds)}. Arrivals in a window: {asked.arrivals.value}."
        ),
        _profile_line(plan),
    ]
    if trace.guessed:
        lines.append(f"{trace.guessed:,} requests that the log saw refused or lost count with another's length.")
    return tuple(line for line in lines if line)


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"


def _profile_line(plan: CapacityPlan) -> str:
    (engines,) = plan.asked.fleet.engines
    profile = load(engines.profile)
    regimes, error = profile.file.regimes, profile.p90_error
    told = "not known" if error is None else f"{100 * error:.2g} % (p90, cross-validated)"
    return (
        f"Step times of {profile.file.model} on {profile.file.hardware}: decode {regimes.decode.source.value}, "
        f"with prefill {regimes.mixed.source.value}; error of a step {told}."
    )


def warnings(plan: CapacityPlan) -> tuple[str, ...]:
    """What no number of backends can mend, and loads for which no fleet was found."""
    asked, lines = plan.asked, []
    impossible = [each for each in asked.demand.impossible if each.share > 0]
    if impossible:
        told = ", ".join(f"{_percent(each.share)} of {each.tier}" for each in impossible)
        over = [each.tier for each in impossible if each.share > 1 - asked.target]
        verdict = f" The target is out of reach for {', '.join(over)}." if over else ""
        lines.append(
            f"even an idle engine misses the promise of {told}: no number of backends helps, so they are left "
            f"out.{verdict}"
        )
    for name, value in plan.unloaded:
        what = "all tiers together" if name == ALL else name
        target = _percent(asked.target)
        lines.append(
            f"{what}: {asked.contender.label} attains {_percent(value)} even on a fleet without load, so no "
            f"number of backends reaches {target}. The plan does not count these misses."
        )
    failed = [one for one in plan.windows if one.backends is None]
    if failed:
        most = max(backends for level in plan.levels if level.backends is None for backends, _ in level.tried)
        lines.append(
            f"{len(failed)} windows: the target was not reached with up to {most} backends. Loosen a tier, lower "
            "--target, or try another --policy."
        )
    return tuple(lines)


def answer(plan: CapacityPlan, price: float | None) -> RenderableType:
    """Everything a person wants to see."""
    parts: list[RenderableType] = [Text(f"SIMULATED, no engine ran: {title(plan)}")]
    parts += [Text(line) for line in conditions(plan)]
    parts += [Text(f"Note: {line}", style="bold") for line in warnings(plan)]
    parts += [Text(""), *_day(plan), _simulated(plan)]
    parts += [Text(line) for line in totals(plan, price)]
    if plan.priced is not None and plan.priced.savings:
        parts += [Text(""), _costs(plan, plan.priced, price)]
    parts += [Text(""), Text(LIMITS)]
    return Group(*parts)


def _table(heading: str, columns: Sequence[str]) -> Table:
    table = Table(title=heading, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def held_names(plan: CapacityPlan) -> tuple[str, ...]:
    """The tiers that held backends at any time; none for a policy without tiers."""
    held = {name for level in plan.levels for name, _ in level.held.tiers}
    own = (tier.name for tier in plan.asked.demand.tiers)
    return tuple(name for name in dict.fromkeys([*own, *sorted(held)]) if name in held)


def _day(plan: CapacityPlan) -> list[RenderableType]:
    names = held_names(plan)
    groups = [names[start : start + _MOST_TIERS] for start in range(0, len(names), _MOST_TIERS)] or [()]
    parts: list[RenderableType] = []
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        heads = [name[:_NAME] for name in group]
        table = _table(
            "Backends over the day" if number == 0 else "",
            ["from", "req/s", "load", "fleet", *heads, *(["pool", "worst"] if last else [])],
        )
        for one in plan.windows:
            own = dict(one.held.tiers)
            cells = [formats.NOTHING if not one.backends else f"{own.get(name, 0.0):.1f}" for name in group]
            ends = [_pool(one.held, names), _worst(plan, one)] if last else []
            table.add_row(*_window(one, plan.window_s), *cells, *ends)
        parts.append(table)
    return parts


def _window(one: PlannedWindow, window_s: float) -> tuple[str, ...]:
    backends = "none" if one.backends is None else f"{one.backends}{'*' if one.scaled else ''}"
    return clock(one.window.start_s, window_s), f"{one.window.rate_rps:.3g}", f"{one.window.load:.2f}", backends


def _pool(held: Held, names: Sequence[str]) -> str:
    return f"{held.pool:.1f}" if names else "shared"


def _worst(plan: CapacityPlan, one: PlannedWindow) -> str:
    if one.level is None:
        return formats.NOTHING
    level = plan.levels[one.level]
    tiers = [value for name, value in level.attainments if name != ALL]
    return f"{100 * min(tiers, default=1.0):.1f}"


def _simulated(plan: CapacityPlan) -> RenderableType:
    promised = plan.asked.demand.promised[:_MOST_TIERS]
    table = _table(
        "Simulated loads: attainment in %, all seeds together",
        ["req/s", "backends", "all", *(name[:_NAME] for name in promised), "seeds", "1 fewer"],
    )
    for level in plan.levels:
        own = dict(level.attainments)
        table.add_row(
            f"{level.rate_rps:.4g}",
            "none" if level.backends is None else str(level.backends),
            _hundred(own.get(ALL)),
            *(_hundred(own.get(name)) for name in promised),
            f"{level.seeds_reached}/{level.worst.count}",
            formats.NOTHING if level.one_fewer is None else f"{100 * level.one_fewer:.2f}",
        )
    told = (
        "load: backends the tier-packed reference would need. fleet: backends planned, then by tier those it "
        "held, mean over time. worst: attainment in % of the tier that fares worst at the next simulated load "
        "above. seeds: how many keep the target alone. 1 fewer: the worst tier with one backend fewer, "
        "without the misses that a fleet without load has too."
    )
    scaled = (
        " *: beyond the greatest simulated load, in proportion." if any(one.scaled for one in plan.windows) else ""
    )
    return Group(table, Text(told + scaled))


def _hundred(value: float | None) -> str:
    return formats.NOTHING if value is None else f"{100 * value:.1f}"


def totals(plan: CapacityPlan, price: float | None) -> tuple[str, ...]:
    """Peak, mean, backend-hours, and what a static fleet or silos would take."""
    peak, hours = plan.peak, plan.backend_hours
    if peak is None or hours is None:
        return ()
    whole = plan.hours

    def money(backend_hours: float) -> str:
        return "" if price is None else f", costs {backend_hours * price:,.2f}"

    lines = [
        "",
        (
            f"Peak {peak} {'backend' if peak == 1 else 'backends'}, mean {hours / whole:.2f}, "
            f"{hours:.3g} backend-hours in {_span(3600 * whole)}{money(hours)}."
        ),
        (
            f"A static fleet of the peak's size: {peak * whole:.3g} backend-hours{money(peak * whole)}"
            f"{_more(peak * whole, hours)}."
        ),
    ]
    silos = plan.silos
    if silos is not None and silos.backends is not None:
        most = silos.backends * whole
        lines.append(
            f"Silos, one pool a tier: {silos.backends} backends at the peak, static {most:.3g} backend-hours"
            f"{money(most)}{_more(most, hours)}."
        )
    elif silos is not None:
        lines.append("Silos, one pool a tier, did not reach the target with any number that was tried.")
    return tuple(lines)


def _more(value: float, than: float) -> str:
    return f", {100 * (value / than - 1):+.0f} %" if than else ""


def _costs(plan: CapacityPlan, priced: Priced, price: float | None) -> RenderableType:
    columns = ["tier", "change", "backends at peak", "backend-s/1,000"]
    table = _table("What each promise costs", [*columns, *(["money"] if price is not None else [])])
    for one in priced.savings:
        saved = one.per_request_s
        half = "" if saved.half is None else f" ±{plan.peak_rps * saved.half:.1f}"
        money = [] if price is None else [f"{one.per_thousand_s * price / 3600:,.4f}"]
        bound = "" if one.exact else " (bound)"
        table.add_row(
            one.tier,
            change(one),
            f"{plan.peak_rps * saved.mean:.2f}{half}{bound}",
            f"{one.per_thousand_s:,.0f}",
            *money,
        )
    whole_s = priced.request_cost_s.mean
    told = (
        "Saved by the change, at the peak and for 1,000 requests of the tier; measured on "
        f"{priced.backends} backends at the greatest rate that keeps the target: "
        f"1,000 requests of the whole mix cost {1e3 * whole_s:,.0f} backend-s there"
        + ("" if price is None else f" ({1e3 * whole_s * price / 3600:,.4f} of money)")
        + ". ±: half a 95 % interval over seeds; a saving smaller than it is none."
    )
    return Group(table, Text(told))


def change(saving: Saving) -> str:
    return "without it" if saving.relaxed_to is None else f"TPOT as {saving.relaxed_to}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.4g} %"


def _span(seconds: float) -> str:
    """`58 min`, `1 h 30 min`, `7 days`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest:02} min" if rest else f"{hours} h"
    return f"{hours / 24:.3g} days"


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
        "tried": [{"backends": backends, "score": score} for backends, score in level.tried],
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
