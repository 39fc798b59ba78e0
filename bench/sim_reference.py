"""What tiers can win by being apart, and what nobody can beat, before any policy: `python -m bench.sim_reference`.

For every engine and trace: the fixed part t0 of a step, the batch and the cost of each tier on engines of its own,
the rate of a perfectly packed fleet, the rate of one mixed pool at the tightest pace, and the quotient of the two
beside its closed form. With --bounds, the true upper bounds of the same requests, in the long run and in this run.
Numbers of the reference model and the relaxation, not of a simulation. The promises are PolyServe's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import profiles
from scheduling.tiers import Slo
from simulator.bounds import EngineKind, upper_bound
from simulator.build import BLOCK_TOKENS, idle_ttft, kinds_of, shortest_model_tokens
from simulator.campaign.table import INSTANCES, PROFILE, SLOW_PROFILE, SLOW_TPOT, SLOW_TTFT
from simulator.reference import Reference, closed_form_gain, fixed_s, needs_of, reference
from simulator.requests import SimRequest
from simulator.scenario import Cell, Contender, Engines, FleetSpec, Form, Workload
from simulator.workload import offered
from workloads.mix import TierShare

PACES_S = (0.020, 0.030, 0.050, 0.100)
SHARES = (0.1, 0.2, 0.3, 0.4)
TTFT_S = (0.3, 0.5, 1.0)
TRACES = (
    "azure2023_conv",
    "azure2023_code",
    "mooncake_conversation",
    "servegen_deepseekr1",
    "sharegpt_llama31_8b",
    "uniform:64-4096/16-1024",
)
FIXED_MS: tuple[float | None, ...] = (None, 5.0, 8.0, 12.0)
GOALS = ((1.0, False), (0.99, False), (0.95, False), (0.9, False), (0.9, True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--profile", action="append", help="a shipped profile or a path (default: H200 and Qwen3)")
    parser.add_argument("--trace", action="append", help="a trace by name (default: the published table's)")
    parser.add_argument("--instances", type=int, default=INSTANCES)
    parser.add_argument("--requests", type=int, default=30_000, help="drawn from the trace")
    parser.add_argument("--form", choices=[form.value for form in Form], default=Form.COLOCATED.value)
    parser.add_argument("--bounds", action="store_true", help="also the upper bounds")
    chosen = parser.parse_args(arguments)
    print(
        f"{'profile':<26}{'t0 ms':>7}  {'trace':<24}{'batches':>17}{'cost ms':>27}"
        f"{'req/s':>8}{'pool':>8}{'gain':>7}{'closed':>8}{'prefill':>9}"
    )
    for name in chosen.profile or (PROFILE, SLOW_PROFILE):
        slow = name == SLOW_PROFILE
        for fixed_ms in (None,) if slow else FIXED_MS:
            for trace in chosen.trace or TRACES:
                cell = _cell(name, trace, chosen.instances, fixed_ms, chosen.requests)
                _print(cell, Form(chosen.form), with_bounds=chosen.bounds)
        if slow:
            print(f"  {name}: TPOT times {SLOW_TPOT}, TTFT times {SLOW_TTFT}, since an idle step misses 20 ms")


def _cell(profile: str, trace: str, instances: int, fixed_ms: float | None, requests: int) -> Cell:
    """A cell that offers the requests; its rate is 1 per second and its contender never runs."""
    tpot, ttft = (SLOW_TPOT, SLOW_TTFT) if profile == SLOW_PROFILE else (1, 1)
    own_s = fixed_s(profiles.load(profile).step_time)
    fixed = None if fixed_ms is None or fixed_ms / 1e3 < own_s else fixed_ms / 1e3
    prefixes = trace.startswith("mooncake")
    tiers = tuple(
        TierShare(f"t{pace_s * tpot * 1e3:g}", Slo(TTFT_S[-1] * ttft, pace_s * tpot), share)
        for pace_s, share in zip(PACES_S, SHARES, strict=True)
    )
    workload = Workload(trace, tiers, tuple(ttft_s * ttft for ttft_s in TTFT_S), prefixes=prefixes)
    fleet = FleetSpec((Engines(profile, instances, fixed),), prefix_caching=prefixes)
    return Cell(workload, fleet, Contender("random"), 1.0, 0, 0, requests, 0)


def _offered(cell: Cell) -> list[SimRequest]:
    kinds = kinds_of(cell.fleet)
    most = shortest_model_tokens(kinds)
    return list(offered(cell, idle_ttft(kinds, cell.fleet), block_tokens=BLOCK_TOKENS, max_tokens=most))


def _print(cell: Cell, form: Form, *, with_bounds: bool) -> None:
    requests = _offered(cell)
    kind = kinds_of(cell.fleet)[0]
    caching = cell.fleet.prefix_caching
    needs = needs_of(requests, prefix_caching=caching)
    found = reference(kind.step_time, kind.limits, needs, form)
    engines = cell.fleet.engines[0]
    _row(engines, fixed_s(kind.step_time), cell.workload.trace, found)
    if not with_bounds:
        return
    split = found.prefill_backends(engines.count) if form is Form.DISAGGREGATED else None
    kinds = [EngineKind(kind.step_time, kind.limits, engines.count)]
    bound = upper_bound(requests, kinds, rate_rps=cell.rate_rps, prefix_caching=caching, prefill_backends=split)
    rates = []
    for goal, every_tier in GOALS:
        ceiling = bound.ceiling(goal, every_tier=every_tier)
        tiers = " of every tier" if every_tier else ""
        rates.append(f"{goal * 100:g} %{tiers}: {ceiling.long_run_rps:.4g} ({ceiling.run_rps:.4g})")
    print("    no schedule beats, req/s (in this run): " + ", ".join(rates))


def _row(engines: Engines, own_s: float, trace: str, found: Reference) -> None:
    batches = "/".join(str(tier.batch) for tier in found.tiers)
    costs = "/".join(f"{tier.cost_s * 1e3:.4g}" for tier in found.tiers)
    paces_s = [tier.tpot_s for tier in found.tiers]
    closed = closed_form_gain(own_s, paces_s, [tier.share for tier in found.tiers]) if min(paces_s) > own_s else 0
    print(
        f"{engines.profile:<26}{own_s * 1e3:>7.2f}  {trace:<24}{batches:>17}{costs:>27}"
        f"{found.optimal_rate(engines.count):>8.1f}{found.pool_rate(engines.count):>8.1f}"
        f"{found.separation_gain:>7.3f}{closed:>8.3f}{found.prefill_share:>9.2f}"
    )


if __name__ == "__main__":
    main()
