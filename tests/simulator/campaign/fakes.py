"""Stand-ins for the simulator: a cell's outcome from a formula, in no time."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from scheduling.scoring import PredictionScore
from scheduling.tiers import Slo
from simulator.outcome import CellOutcome, Sample, TierOutcome, Timing
from simulator.scenario import Cell, Contender, Engines, FleetSpec, Workload
from workloads.mix import TierShare

TIERS = (TierShare("t20", Slo(None, 0.020), 0.5), TierShare("t100", Slo(None, 0.100), 0.5))
WORKLOAD = Workload("uniform:100-200/50-100", TIERS, (0.3, 0.5))
FLEET = FleetSpec((Engines("h200-llama-3.1-8b-bf16", 4),))


def cell(rate_rps: float = 10.0, seed: int = 1, measured: int = 1000, contender: str = "random") -> Cell:
    return Cell(WORKLOAD, FLEET, Contender(contender), rate_rps, seed, 10, measured, 10)


def tier(name: str, offered: int, attained: int) -> TierOutcome:
    return TierOutcome(name, offered, attained, attained, offered, 0, 0, 0.1, 0.2, 0.01, 0.02)


def outcome(overall: float, worst: float | None = None, offered: int = 1000) -> CellOutcome:
    """One with these attainments; the two tiers have half of the requests each."""
    half = offered // 2
    tight = round(half * (overall if worst is None else worst))
    total = round(offered * overall)
    return CellOutcome(
        tiers=(tier("t20", half, tight), tier("t100", half, min(half, max(0, total - tight)))),
        overall=tier("all", offered, total),
        refusals={"late": 3},
        outcomes={"own": offered},
        backend_seconds=10.0,
        backend_seconds_busy=9.5,
        instance_s_per_request=0.1,
        window_s=20.0,
        ended_s=30.0,
        preemptions=0,
        decisions=offered,
        left_out=0.0,
        predicted_ttft=PredictionScore(1, 0.1, 0.2, 0.0),
        predicted_tpot=PredictionScore(0, None, None, None),
        samples=(Sample(1.0, 0, {"t20": (0.5, 0.1)}),),
        timing=Timing(0.5, 1e-5, 2e-5),
    )


@dataclass(frozen=True, slots=True)
class Knee:
    """Attainment falls around a capacity, steeply; a seed moves it a little, the same for all contenders."""

    capacity_rps: float = 10.0
    width: float = 0.05
    noise: float = 0.0
    spread: float = 0.01

    def attainment(self, rate_rps: float, seed: int) -> float:
        capacity = self.capacity_rps * (1 + self.spread * (seed % 10 - 2))
        rng = Random(f"{rate_rps}:{seed}")
        smooth = 1 / (1 + math.exp((rate_rps / capacity - 1) / self.width))
        return min(1.0, max(0.0, smooth + self.noise * rng.uniform(-1, 1)))

    def crossing_rps(self, level: float, seed: int) -> float:
        capacity = self.capacity_rps * (1 + self.spread * (seed % 10 - 2))
        return capacity * (1 + self.width * math.log((1 - level) / level))

    def __call__(self, of: Cell) -> CellOutcome:
        overall = self.attainment(of.rate_rps, of.seed)
        return outcome(overall, self.attainment(of.rate_rps * 1.1, of.seed), 100_000)


def quick(of: Cell) -> CellOutcome:
    """A runner that answers at once; the CPU time differs from call to call."""
    return replace(outcome(min(1.0, 5 / of.rate_rps)), timing=Timing(time.process_time(), None, None))


def failing_at_seed_2(of: Cell) -> CellOutcome:
    if of.seed == 2:
        raise RuntimeError("no such luck")
    return quick(of)


def dying_at_seed_2(of: Cell) -> CellOutcome:
    if of.seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return quick(of)


@dataclass(frozen=True, slots=True)
class Counted:
    """Leaves a mark for every cell it runs, after `slow_s` seconds for seeds beyond `slow_from`."""

    marks: Path
    slow_from: int = 1_000_000
    slow_s: float = 0.0

    def __call__(self, of: Cell) -> CellOutcome:
        if of.seed >= self.slow_from:
            (self.marks / f"started-{of.seed}-{os.getpid()}").touch()
            time.sleep(self.slow_s)
        (self.marks / f"{time.monotonic_ns()}-{of.seed}-{of.measured_requests}").touch()
        return quick(of)

    def ran(self) -> list[str]:
        """`SEED-MEASURED` of every run that ended, in order."""
        names = sorted(path.name for path in self.marks.iterdir() if not path.name.startswith("started"))
        return [name.partition("-")[2] for name in names]


Runner = Callable[[Cell], CellOutcome]
