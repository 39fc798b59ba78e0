"""Made-up outcomes: what a report is given, without a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from scheduling.scoring import PredictionScore
from scheduling.tiers import Slo
from simulator.campaign.curve import Bound, Crossing
from simulator.campaign.goodput import Goodput, Judged, Ratio, Target
from simulator.campaign.interval import Interval
from simulator.outcome import CellOutcome, Sample, TierOutcome, Timing
from simulator.report.values import (
    AblationRow,
    GainRow,
    GoodputRow,
    Mark,
    MarkKind,
    ProfileNote,
    Run,
    Setting,
    Study,
)
from simulator.scenario import Cell, Contender, Engines, FleetSpec, Workload
from workloads.mix import TierShare

TIERS = (
    TierShare("20ms", Slo(0.5, 0.02), 0.1),
    TierShare("30ms", Slo(0.5, 0.03), 0.2),
    TierShare("50ms", Slo(0.5, 0.05), 0.3),
    TierShare("100ms", Slo(0.5, 0.1), 0.4),
)
CONTENDERS = (
    Contender("polyserve_co"),
    Contender("co_chunk", (("chunk_tokens", 512),)),
    Contender("random"),
)
NO_SCORE = PredictionScore(0, None, None, None)


def made_cell(contender: Contender = CONTENDERS[0], rate_rps: float = 40.0, seed: int = 0) -> Cell:
    fleet = FleetSpec((Engines("h200-llama-3.1-8b-bf16", 8),))
    workload = Workload("azure2023_conv", TIERS, ttft_s=(0.3, 0.5, 1.0))
    return Cell(workload, fleet, contender, rate_rps, seed, 500, 2000, 500)


def _tier(name: str, offered: int, share: float, tpot_s: float) -> TierOutcome:
    attained = int(offered * share)
    refused = (offered - attained) // 2
    return TierOutcome(
        tier=name,
        offered=offered,
        attained=attained,
        attained_one_based=min(offered, attained + 5),
        finished=offered - refused,
        refused=refused,
        failed=0,
        ttft_p50_s=0.12 / share,
        ttft_p99_s=0.45 / share,
        tpot_p50_s=0.6 * tpot_s,
        tpot_p99_s=0.9 * tpot_s / share,
    )


def _samples(tiers: Sequence[str], busy: int) -> tuple[Sample, ...]:
    found = []
    for second in range(30):
        held = {tier: tuple(max(0.0, 0.95 - 0.2 * place) for place in range(1 + second % 3)) for tier in tiers}
        used = sum(map(len, held.values()))
        found.append(Sample(2.0 * second, second % 4, {**held, "pool": (0.0,) * max(0, busy - used)}))
    return tuple(found)


def made_outcome(cell: Cell) -> CellOutcome:
    """An outcome that gets worse with the rate, later for the first contender; seeds differ a little."""
    place = CONTENDERS.index(cell.contender)
    over = max(0.0, cell.rate_rps / (60.0 - 10.0 * place) - 0.8)
    share = max(0.05, 1.0 - over - 0.004 * (cell.seed % 3))
    tiers = tuple(
        _tier(tier.name, 200 * (number + 1), max(0.02, share - 0.1 * over * (3 - number)), tier.slo.tpot_s or 0.1)
        for number, tier in enumerate(TIERS)
    )
    overall = _tier("overall", sum(tier.offered for tier in tiers), share, 0.05)
    window_s = cell.measured_requests / cell.rate_rps
    return CellOutcome(
        tiers=tiers,
        overall=overall,
        refusals={"no_capacity": overall.refused} if overall.refused else {},
        outcomes={"own_tier": overall.finished},
        backend_seconds=8.0 * window_s,
        backend_seconds_busy=min(8.0, 0.12 * cell.rate_rps) * window_s,
        instance_s_per_request=0.1 + 0.02 * place + 0.01 * cell.seed,
        window_s=window_s,
        ended_s=window_s + 20.0,
        preemptions=place,
        decisions=3000,
        left_out=0.012,
        predicted_ttft=NO_SCORE,
        predicted_tpot=NO_SCORE,
        samples=_samples([tier.name for tier in TIERS], 8),
        timing=Timing(1.5, 4e-5, 2e-4),
    )


def made_runs(rates_rps: Sequence[float] = (30.0, 40.0, 50.0, 60.0), seeds: int = 3) -> tuple[Run, ...]:
    cells = [
        made_cell(contender, rate, seed) for contender in CONTENDERS for rate in rates_rps for seed in range(seeds)
    ]
    return tuple(Run(cell, made_outcome(cell)) for cell in cells)


def found(rate_rps: float, judged: Judged = Judged.OVERALL, bound: Bound = Bound.EXACT) -> Goodput:
    by_seed = tuple(Crossing(rate_rps * part, bound) for part in (0.98, 1.0, 1.02))
    estimate = Interval(rate_rps, 0.97 * rate_rps, 1.03 * rate_rps, 3)
    return Goodput(Target(judged, 0.9), by_seed, estimate, bound, 0.02 * rate_rps)


def ratio_of(value: float) -> Ratio:
    return Ratio(Interval(value, value - 0.03, value + 0.03, 3), Bound.EXACT)


@pytest.fixture(scope="session")
def study() -> Study:
    """A study with every kind of table and figure."""
    runs = made_runs()
    setting = Setting.of(runs[0].cell)
    larger = replace(setting, fleet=replace(setting.fleet, engines=(Engines("h200-llama-3.1-8b-bf16", 20),)))
    goodputs = tuple(
        GoodputRow(where, contender.label, found((6.0 - number - 0.5 * place) * count, judged), 7.0 * count)
        for where, count in ((setting, 8), (larger, 20))
        for number, contender in enumerate(CONTENDERS)
        for place, judged in enumerate(Judged)
    )
    gains = tuple(
        GainRow("azure2023_conv", "polyserve_co", "co_chunk", Target(judged, 0.9), ratio_of(at), t0)
        for judged in Judged
        for t0, at in ((None, 1.04), (0.005, 1.15), (0.008, 1.22), (0.012, 1.3))
    )
    ablations = tuple(
        AblationRow("azure2023_conv", mechanism, Target(Judged.OVERALL, 0.9), ratio_of(at))
        for mechanism, at in (("lazy promotion", 0.95), ("gradient", 0.9), ("wait-time awareness", 1.0))
    )
    return Study(
        title="Made-up <study> & more",
        runs=runs,
        findings=("polyserve_co serves 1.2 times as much as random.",),
        marks=(
            Mark(setting, MarkKind.REFERENCE, "tier-packed reference", 56.0),
            Mark(setting, MarkKind.UPPER, "upper bound", 70.0),
        ),
        goodputs=goodputs,
        gains=gains,
        ablations=ablations,
        profiles=(ProfileNote("h200", "Llama", "H200", "composed", "somebody", "Apache-2.0", "idle engine"),),
        rerun="tiergate simulate --rate 40",
    )
