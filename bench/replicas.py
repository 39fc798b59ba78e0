"""Several gateway replicas on one shared store beside one replica alone: `python -m bench.replicas`.

Everything here is simulated: engines are models with a measured profile's step times, the store is the one in
memory on a virtual clock, reservations see the truth (as a script inside Redis does), and what replicas know of
each other is told every 50 ms and as old as is said. The same seeds give the same requests to every fleet.

Printed are, for the same engines and rates: attainment and goodput by replicas, and what they differ by from one
replica's, seed by seed; how far predictions of the first token were off, by replicas and by the age of what they
know; and how evenly replicas serve: attainment and wait of the best and the worst replica, and how often a request
was placed while one of its tier that was due earlier waited, on whichever replica.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from bench.compiled import NotBuilt, build
from scheduling import events as ev
from scheduling.dispatcher import Dispatcher
from scheduling.lengths import FixedLength
from scheduling.scoring import score_predictions
from scheduling.tiers import Slo
from simulator.build import (
    BLOCK_TOKENS,
    dispatchers,
    engine_makers,
    idle_ttft,
    kinds_of,
    shortest_model_tokens,
)
from simulator.contenders import setup_for
from simulator.fleet import FleetOptions, SimFleet
from simulator.replica import Replica
from simulator.requests import SimRequest
from simulator.scenario import Cell, Contender, Engines, FleetSpec, Workload
from simulator.served import Served
from simulator.workload import MODEL, offered, tier_set
from tiergate_engine.model import EngineModel
from workloads.mix import TierShare


@dataclass(frozen=True, slots=True)
class Scene:
    """Engines and what is offered to them. The gateway runs as on stock engines: a static token budget, residents'
    slack checked."""

    profile: str
    workload: Workload
    contender: Contender


def _tiers(promises: Sequence[tuple[float, int]]) -> tuple[TierShare, ...]:
    """A tenth, two, three and four tenths of the requests, tight to loose; (TTFT in s, TPOT in ms)."""
    return tuple(
        TierShare(f"t{tpot_ms}", Slo(ttft_s, tpot_ms / 1e3), share / 10)
        for (ttft_s, tpot_ms), share in zip(promises, (1, 2, 3, 4), strict=True)
    )


SCENES = {
    "slow": Scene(
        "rtxpro6000-qwen3-32b-bf16",
        Workload("azure2023_conv", _tiers(((1.5, 75), (2.0, 100), (3.0, 150), (5.0, 300)))),
        Contender("polyserve_co", (("chunk_tokens", 512), ("driven", False))),
    ),
    "fast": Scene(
        "h200-llama-3.1-8b-bf16",
        Workload("sharegpt_llama31_8b", _tiers(((1.0, 20), (1.0, 30), (1.0, 50), (1.0, 100))), (0.3, 0.5, 1.0)),
        Contender("polyserve_co", (("driven", False),)),
    ),
}
"""Steps of tens of milliseconds under promises to match, and steps of a few (PolyServe's promises)."""

FEW, ALL = (1, 4), (1, 2, 4, 8)
"""Replicas."""

USUAL_S = (0.02, 0.05)
"""How old a replica's knowledge is: what Redis and a gateway with time add to the 50 ms between two tellings."""
AGES_S = (0.0, *USUAL_S, 0.1, 0.2)
GOODPUT_AT = 0.9


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run, of which scene."""

    scene: Scene
    backends: int
    rates_rps: tuple[float, ...]
    busy_rps: float  # where requests are held, and some are refused
    seeds: int
    measured: int
    replicas: tuple[int, ...]
    ages_s: tuple[float, ...]


SIZES = {
    ("slow", "quick"): Size(SCENES["slow"], 4, (8.0, 10.0, 12.0), 10.0, 2, 300, FEW, (0.0, 0.1)),
    ("slow", "full"): Size(SCENES["slow"], 4, (8.0, 9.0, 10.0, 11.0, 12.0), 10.0, 6, 1500, FEW, AGES_S),
    ("fast", "quick"): Size(SCENES["fast"], 4, (50.0, 56.0, 62.0), 56.0, 2, 600, FEW, (0.0, 0.1)),
    ("fast", "full"): Size(SCENES["fast"], 4, (48.0, 52.0, 56.0, 60.0, 64.0), 56.0, 6, 2000, ALL, AGES_S),
}


class Watched(SimFleet):
    """A fleet that notes who served what, how long it waited, and whom it passed by."""

    def __init__(
        self, made: Sequence[Dispatcher], engines: Mapping[str, Callable[[], EngineModel]], options: FleetOptions
    ) -> None:
        self.placed_by: dict[str, int] = {}  # requests, by the replica they came to
        self.waited_s: dict[str, float] = {}
        self.overtook: set[str] = set()
        super().__init__(made, engines, options)

    def arrive(self, sim: SimRequest) -> None:
        self.placed_by[sim.request.request_id] = len(self.placed_by) % len(self.replicas)
        super().arrive(sim)

    def open(
        self, replica: Replica, sim: SimRequest, lease_id: str, backend: str, *, relegated: bool = False
    ) -> bool:
        request = sim.request
        self.waited_s[request.request_id] = self.agenda.now_s - request.arrival_s
        due_s = request.slo.deadline_s(request.arrival_s, 0)
        for other in self.replicas:
            for waiting in other.dispatcher.first_held():
                if waiting.tier == request.tier and self.agenda.now_s < waiting.due_s < due_s:
                    self.overtook.add(request.request_id)
        return super().open(replica, sim, lease_id, backend, relegated=relegated)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run's measured requests."""

    attainment: float
    by_replica: tuple[float, ...]
    waits_s: tuple[float, ...]  # the mean of each replica
    overtook: float
    ttft_p50: float
    ttft_p90: float
    ttft_bias: float


def run(
    size: Size, replicas: int, rate_rps: float, age_s: float, seed: int, yield_s: float | None = None
) -> Outcome:
    """One run; `yield_s` in place of the default."""
    scene = size.scene
    spec = FleetSpec((Engines(scene.profile, size.backends),), replicas=replicas, view_age_s=age_s)
    counts = size.measured // 2, size.measured, size.measured // 8
    cell = Cell(scene.workload, spec, scene.contender, rate_rps, seed, *counts)
    kinds, setup, tiers = kinds_of(spec), setup_for(scene.contender), tier_set(scene.workload)
    if yield_s is not None:
        setup = replace(setup, options=replace(setup.options, yield_s=yield_s))
    requests = offered(
        cell, idle_ttft(kinds, spec), block_tokens=BLOCK_TOKENS, max_tokens=shortest_model_tokens(kinds)
    )
    names = [f"b{index:04}" for index in range(len(kinds))]
    made = dispatchers(names, kinds, spec, setup, tiers, seed)
    for dispatcher in made:
        for tier in tiers.tiers:
            lengths = FixedLength(requests.mean_output_tokens)
            dispatcher.handle(ev.LengthsChanged(MODEL, tier.name, lengths), 0.0)
    fleet = Watched(made, engine_makers(names, kinds, spec, setup), FleetOptions(view_age_s=age_s))
    result = fleet.run(requests)
    return _outcome(fleet, [served for served in result.served if served.sim.measured])


def _outcome(fleet: Watched, measured: Sequence[Served]) -> Outcome:
    by_replica: list[list[Served]] = [[] for _ in fleet.replicas]
    for served in measured:
        by_replica[fleet.placed_by[served.sim.request.request_id]].append(served)
    score = score_predictions(
        (served.predicted_ttft_s, served.ttft_s)
        for served in measured
        if served.predicted_ttft_s is not None and served.ttft_s is not None
    )
    names = [served.sim.request.request_id for served in measured]
    placed = [name for name in names if name in fleet.waited_s]
    return Outcome(
        attainment=_attained(measured),
        by_replica=tuple(map(_attained, by_replica)),
        waits_s=tuple(_mean_wait_s(fleet, some) for some in by_replica),
        overtook=sum(name in fleet.overtook for name in placed) / len(placed),
        ttft_p50=score.p50 or 0.0,
        ttft_p90=score.p90 or 0.0,
        ttft_bias=score.bias or 0.0,
    )


def _attained(some: Sequence[Served]) -> float:
    return sum(served.attained for served in some) / len(some)


def _mean_wait_s(fleet: Watched, some: Iterable[Served]) -> float:
    names = [served.sim.request.request_id for served in some]
    return statistics.mean([fleet.waited_s[name] for name in names if name in fleet.waited_s])


# --- tables ------------------------------------------------------------------------------------------------


class Runs:
    """Runs by what they are of, each made once, the seeds side by side."""

    def __init__(self, size: Size, pool: Executor) -> None:
        self.size = size
        self._pool = pool
        self._made: dict[tuple[int, float, float, float | None], list[Outcome]] = {}

    def of(self, replicas: int, rate_rps: float, age_s: float, yield_s: float | None = None) -> list[Outcome]:
        age_s = age_s if replicas > 1 else 0.0  # one alone hears of nobody
        key = replicas, rate_rps, age_s, yield_s
        if key not in self._made:
            one = partial(run, self.size, replicas, rate_rps, age_s, yield_s=yield_s)
            self._made[key] = list(self._pool.map(one, range(1, self.size.seeds + 1)))
        return self._made[key]


def mean(outcomes: Sequence[Outcome], of: Callable[[Outcome], float]) -> float:
    return statistics.mean(map(of, outcomes))


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean, with Student's t for few seeds."""
    student = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    count = len(values)
    if count < 2:
        return float("nan")
    return student.get(count, 2.0) * statistics.stdev(values) / math.sqrt(count)


def goodput_rps(runs: Runs, replicas: int, age_s: float) -> float | None:
    """Where attainment crosses 90 %, on straight lines between the rates; None when it does not."""
    curve = [
        (rate, mean(runs.of(replicas, rate, age_s), lambda one: one.attainment)) for rate in runs.size.rates_rps
    ]
    for (low, above), (high, below) in pairwise(curve):
        if above >= GOODPUT_AT > below:
            return low + (high - low) * (above - GOODPUT_AT) / (above - below)
    return None


def attainment_table(runs: Runs, age_s: float) -> list[str]:
    size = runs.size
    lines = [
        f"attainment by rate (req/s), {size.backends} backends, what is known of others {age_s * 1e3:g} ms old",
        "replicas " + " ".join(f"{rate:>8g}" for rate in size.rates_rps) + "   goodput (90 %)  of one replica's",
    ]
    alone = goodput_rps(runs, 1, age_s)
    for replicas in size.replicas:
        each = [mean(runs.of(replicas, rate, age_s), lambda one: one.attainment) for rate in size.rates_rps]
        goodput = goodput_rps(runs, replicas, age_s)
        told = "-" if goodput is None else f"{goodput:.1f}"
        part = "-" if goodput is None or alone is None else f"{100 * goodput / alone:.1f} %"
        lines.append(f"{replicas:>8} " + " ".join(f"{value:>8.4f}" for value in each) + f"{told:>17}{part:>18}")
    return lines


def difference_table(runs: Runs, age_s: float) -> list[str]:
    """Attainment minus one replica's, seed by seed."""
    size = runs.size
    lines = [f"attainment minus one replica's, {age_s * 1e3:g} ms old (mean and 95 % half width over seeds)"]
    for replicas in size.replicas[1:]:
        cells = []
        for rate in size.rates_rps:
            pairs = zip(runs.of(replicas, rate, age_s), runs.of(1, rate, age_s), strict=True)
            apart = [several.attainment - alone.attainment for several, alone in pairs]
            cells.append(f"{statistics.mean(apart):+.4f} ±{half_width(apart):.4f}")
        lines.append(f"{replicas:>8} " + "  ".join(cells))
    return lines


def prediction_table(runs: Runs, ages_s: Sequence[float]) -> list[str]:
    rate = runs.size.busy_rps
    lines = [
        f"TTFT predictions at {rate:g} req/s: median and p90 of the relative error, bias (+: too long)",
        "replicas " + " ".join(f"{f'{age * 1e3:g} ms old':>22}" for age in ages_s),
    ]
    for replicas in runs.size.replicas:
        cells = []
        for age_s in ages_s:
            some = runs.of(replicas, rate, age_s)
            p50, p90 = mean(some, lambda one: one.ttft_p50), mean(some, lambda one: one.ttft_p90)
            cells.append(f"{p50:>7.1%} {p90:>6.1%} {mean(some, lambda one: one.ttft_bias):>+7.1%}")
        lines.append(f"{replicas:>8} " + " ".join(cells))
    return lines


def fairness_table(runs: Runs, ages_s: Sequence[float]) -> list[str]:
    rate = runs.size.busy_rps
    lines = [
        f"fairness at {rate:g} req/s: how many were placed while an earlier one of their tier waited anywhere",
        "replicas  age ms  yields  overtook  attainment (worst best all)  mean wait ms (worst best)",
    ]
    for replicas in runs.size.replicas:
        for age_s in ages_s if replicas > 1 else (0.0,):
            for yield_s, told in ((0.0, "no"), (None, "yes")) if replicas > 1 else ((None, "-"),):
                some = runs.of(replicas, rate, age_s, yield_s)
                attained = [
                    mean(some, lambda one: min(one.by_replica)),
                    mean(some, lambda one: max(one.by_replica)),
                    mean(some, lambda one: one.attainment),
                ]
                waits_ms = [
                    mean(some, lambda one: max(one.waits_s)) * 1e3,
                    mean(some, lambda one: min(one.waits_s)) * 1e3,
                ]
                overtook = mean(some, lambda one: one.overtook)
                lines.append(
                    f"{replicas:>8} {age_s * 1e3:>7g} {told:>7} {overtook:>9.2%}        "
                    + " ".join(f"{value:.4f}" for value in attained)
                    + "        "
                    + " ".join(f"{value:>8.1f}" for value in waits_ms)
                )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["quick", "full"], default="quick", help="quick takes a few minutes")
    parser.add_argument("--scene", choices=list(SCENES), default="slow", help="steps of tens of ms, or of a few")
    parser.add_argument("--only", choices=["attainment", "prediction", "fairness"], help="one of the tables")
    args = parser.parse_args(arguments)
    size = SIZES[args.scene, args.size]
    try:
        sys.path.insert(0, str(build()))  # for the processes that run; they inherit the path
    except NotBuilt as error:
        print(f"the core runs interpreted, at about twice the cost: {error}", file=sys.stderr)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        _print(args, size, Runs(size, pool))
    return 0


def _print(args: argparse.Namespace, size: Size, runs: Runs) -> None:
    full = args.size == "full"
    print(f"simulated, {size.backends} x {size.scene.profile}")
    print(f"{size.seeds} seeds of {size.measured} measured requests a run")
    if args.only in (None, "attainment"):
        for age_s in USUAL_S if full else USUAL_S[1:]:
            print("\n".join(["", *attainment_table(runs, age_s)]), flush=True)
            print("\n".join(["", *difference_table(runs, age_s)]), flush=True)
    if args.only in (None, "prediction"):
        print("\n".join(["", *prediction_table(runs, size.ages_s)]), flush=True)
    if args.only in (None, "fairness"):
        print("\n".join(["", *fairness_table(runs, USUAL_S[1:] if full else (0.1,))]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
