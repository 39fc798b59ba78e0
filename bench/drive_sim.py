"""What driving engines is worth, simulated: `python -m bench.drive_sim`.

Attainment of `polyserve_co` on simulated H200 engines, and the rate it keeps at 90 %, with engines

* as they are started (stock, at the static token budget that does best of those tried),
* paced (chunks at the host's pace, PolyServe §4.7),
* driven (chunks from slack, prompts by deadline, loose decodes skipping, late prompts relegated), and
* driven without one of these at a time;

on the same requests. Driven ones come twice: with a policy that counts on the pace, and with one that looks at
the residents' slack. A router without tiers (`minimal`) shows the mechanisms where admission keeps less away from
the engines. Runs are short: differences below two per cent are noise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduling.tiers import Slo
from simulator.campaign.curve import Bound, Point, crossing
from simulator.campaign.scale import scale_of
from simulator.cell import run_cell
from simulator.scenario import Cell, Contender, Engines, FleetSpec, Knob, Workload
from workloads.mix import TierShare

PROFILE = "h200-llama-3.1-8b-bf16"
TRACES = ("azure2023_conv", "azure2023_code", "sharegpt_llama31_8b")
TIERS = tuple(
    TierShare(f"t{pace}", Slo(1.0, pace / 1e3), share)
    for pace, share in ((20, 0.1), (30, 0.2), (50, 0.3), (100, 0.4))
)
TTFT_S = (0.3, 0.5, 1.0)
PARTS = (1.0, 1.1, 1.2, 1.3, 1.4)
"""Rates, as parts of the tier-packed reference, which small fleets and short runs exceed."""
LEVEL = 0.9
BUDGETS = (512, 1024, 2048, 0)
MECHANISMS = ("chunk_from_slack", "deadline_order", "skip_loose", "relegate_late")
ALL: Mapping[str, Knob] = dict.fromkeys(MECHANISMS, True)


@dataclass(frozen=True, slots=True)
class Variant:
    """How the engines are run, in words and in knobs."""

    name: str
    policy: str
    knobs: Mapping[str, Knob]

    @property
    def contender(self) -> Contender:
        return Contender(self.policy, tuple(sorted(self.knobs.items())))


def variants() -> tuple[Variant, ...]:
    """All that are compared; those named `stock N` are one line, the best of them."""
    polyserve, minimal = "polyserve_co", "minimal"
    slack_aware = {**ALL, "driven": False}
    found = [
        Variant(f"stock {budget}", polyserve, {"driven": False, "chunk_tokens": budget}) for budget in BUDGETS
    ]
    found += [
        Variant("paced", polyserve, {}),
        Variant("driven", polyserve, ALL),
        Variant("driven, policy looks at slack", polyserve, slack_aware),
    ]
    found += [Variant(f"  without {name}", polyserve, {**slack_aware, name: False}) for name in MECHANISMS]
    found += [Variant(f"minimal, stock {budget}", minimal, {"chunk_tokens": budget}) for budget in BUDGETS]
    found += [Variant("minimal, driven", minimal, {**ALL, "chunk_tokens": 2048})]
    found += [
        Variant(f"  without {name}", minimal, {**ALL, "chunk_tokens": 2048, name: False}) for name in MECHANISMS
    ]
    return tuple(found)


def cell(trace: str, contender: Contender, rate_rps: float, size: argparse.Namespace) -> Cell:
    """One run."""
    return Cell(
        Workload(trace, TIERS, TTFT_S),
        FleetSpec((Engines(PROFILE, size.backends),)),
        contender,
        rate_rps,
        size.seed,
        warmup_requests=size.requests // 3,
        measured_requests=size.requests,
        cooldown_requests=size.requests // 10,
    )


def _curve(trace: str, variant: Variant, rates: Sequence[float], size: argparse.Namespace) -> list[Point]:
    points = []
    for rate_rps in rates:
        overall = run_cell(cell(trace, variant.contender, rate_rps, size)).overall
        points.append(Point(rate_rps, overall.attainment or 0.0, overall.offered))
    return points


def _line(name: str, points: Sequence[Point]) -> str:
    found = crossing(points, LEVEL)
    mark = {Bound.AT_LEAST: ">", Bound.AT_MOST: "<"}.get(found.bound, " ")
    shares = " ".join(f"{100 * point.attainment:5.1f}" for point in points)
    return f"  {name:34s} {shares}   {mark}{found.rate:6.1f} requests/s"


def compare(trace: str, size: argparse.Namespace) -> None:
    """All variants on one trace."""
    some = cell(trace, Contender("polyserve_co"), 1.0, size)
    optimal_rps = scale_of(some.workload, some.fleet).optimal_rps
    rates = [part * optimal_rps for part in PARTS]
    print(
        f"{trace}: attainment in % at {', '.join(f'{rate:.0f}' for rate in rates)} requests/s; rate kept at 90 %"
    )
    best: tuple[float, Variant, list[Point]] | None = None
    for variant in variants():
        if size.only and size.only not in variant.name:
            continue
        points = _curve(trace, variant, rates, size)
        if "stock" not in variant.name:
            if best is not None:
                print(_line(best[1].name, best[2]))
                best = None
            print(_line(variant.name, points), flush=True)
            continue
        kept = math.fsum(point.attainment for point in points)
        if best is None or kept > best[0]:
            best = (kept, variant, points)
    if best is not None:
        print(_line(best[1].name, best[2]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare on the traces asked for."""
    parser = argparse.ArgumentParser(description="What driving engines is worth, simulated.")
    parser.add_argument("--traces", nargs="+", default=list(TRACES))
    parser.add_argument("--backends", type=int, default=4)
    parser.add_argument("--requests", type=int, default=2500, help="measured requests of a run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="variants whose name holds this")
    size = parser.parse_args(arguments)
    for trace in size.traces:
        compare(trace, size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
