"""The smallest fleet that keeps the target at one load: a plan for a campaign.

A plan keeps no state: what it wants next follows from what is known (`simulator.campaign.plan`). At every number
of backends all seeds offer the same requests, so that numbers are compared under common random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from simulator.campaign.goodput import Length
from simulator.campaign.interval import Interval, t_interval
from simulator.campaign.plan import Known, missing
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender, FleetSpec, Workload

_MOST_TIMES = 4.0  # this many times the guess without reaching the target: it is not a matter of backends
_LEAST_MORE = 8


ALL = "all"
"""Where attainments are named by tier: of all tiers that are judged together."""
UNLOADED_BACKENDS = 8
_UNLOADED_PART = 0.1  # of what the reference would serve on them: hardly anybody meets anybody


@dataclass(frozen=True, slots=True)
class Judge:
    """What a fleet must keep: `target` of all requests and of each of these tiers."""

    target: float
    tiers: tuple[str, ...]

    def attainments(self, outcomes: Sequence[CellOutcome]) -> dict[str, float]:
        """By tier and for `all`, of everything that the seeds offered together."""
        offered = dict.fromkeys(self.tiers, 0)
        attained = dict.fromkeys(self.tiers, 0)
        for outcome in outcomes:
            for tier in outcome.tiers:
                if tier.tier in offered:
                    offered[tier.tier] += tier.offered
                    attained[tier.tier] += tier.attained
        found = {name: attained[name] / count for name, count in offered.items() if count}
        whole = sum(offered.values())
        return found | ({ALL: sum(attained.values()) / whole} if whole else {})

    def score(self, outcomes: Sequence[CellOutcome]) -> float:
        """The least attainment; 1 where nothing was judged."""
        return min(self.attainments(outcomes).values(), default=1.0)

    def reached(self, outcomes: Sequence[CellOutcome]) -> bool:
        return self.score(outcomes) >= self.target

    def interval(self, outcomes: Sequence[CellOutcome]) -> Interval:
        """Of the score, over seeds."""
        return t_interval([self.score([outcome]) for outcome in outcomes])


@dataclass(frozen=True, slots=True)
class Forgiven:
    """Misses of a fleet without load: no number of backends mends them, so they are not held against a fleet.

    Runs of one length and seed offer the same requests, so they are taken off the misses of the same seed.

    Attributes:
        misses: by seed, by tier; only of tiers whose attainment without load is below the target.
        unloaded: those attainments, over all seeds.
    """

    misses: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    unloaded: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, judge: Judge, cells: Sequence[Cell], known: Known) -> Forgiven:
        """What runs without load tell."""
        outcomes = [known[cell] for cell in cells]
        short = tuple((name, value) for name, value in judge.attainments(outcomes).items() if value < judge.target)
        names = {name for name, _ in short}
        if ALL in names:
            names |= set(judge.tiers)
        misses = {
            cell.seed: {
                tier.tier: tier.offered - tier.attained
                for tier in outcome.tiers
                if tier.tier in names and tier.tier in judge.tiers
            }
            for cell, outcome in zip(cells, outcomes, strict=True)
        }
        return cls(misses if short else {}, short)

    def seen(self, known: Known) -> Known:
        """Results as they are judged."""
        return _Seen(known, self.misses) if self.misses else known


class _Seen(Mapping[Cell, CellOutcome]):
    """Known results with some of their misses forgiven."""

    def __init__(self, known: Known, misses: Mapping[int, Mapping[str, int]]) -> None:
        self._known = known
        self._misses = misses

    def __getitem__(self, cell: Cell) -> CellOutcome:
        outcome, own = self._known[cell], self._misses.get(cell.seed, {})
        tiers = tuple(
            replace(tier, attained=min(tier.offered, tier.attained + own.get(tier.tier, 0)))
            for tier in outcome.tiers
        )
        return replace(outcome, tiers=tiers)

    def __contains__(self, cell: object) -> bool:
        return cell in self._known

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is sized: `fleet` has one kind of engine, whose count is replaced.

    Attributes:
        least: fewer backends are not tried.
    """

    workload: Workload
    fleet: FleetSpec
    contender: Contender
    seeds: tuple[int, ...]
    judge: Judge
    least: int = 1

    def cells(self, rate_rps: float, backends: int, length: Length) -> tuple[Cell, ...]:
        (engines,) = self.fleet.engines
        fleet = replace(self.fleet, engines=(replace(engines, count=backends),))
        return tuple(
            Cell(
                self.workload,
                fleet,
                self.contender,
                rate_rps,
                seed,
                length.warmup,
                length.measured,
                length.cooldown,
            )
            for seed in self.seeds
        )


@dataclass(frozen=True, slots=True)
class Sized:
    """What was found at one load.

    Attributes:
        backends: None: the target was not reached by any number that was tried.
        tried: numbers of backends with the worst tier's attainment over all seeds.
        cells: the runs at `backends`, or at the most that were tried.
    """

    rate_rps: float
    backends: int | None
    tried: tuple[tuple[int, float], ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Sizing:
    """A `Plan`: from a guess in growing steps until the answer is between two numbers, then by halves."""

    subject: Subject
    rate_rps: float
    length: Length
    guess: int

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        backends = self._next(self._tried(known))
        return () if backends is None else missing(self._cells(backends), known)

    def ahead(self, known: Known) -> int:
        done = len(self._tried(known))
        return max(1, 3 - done) * len(self.subject.seeds) * self.length.requests if self.wanted(known) else 0

    def sized(self, known: Known) -> Sized | None:
        """The answer; None while there is none."""
        tried = self._tried(known)
        if self._next(tried) is not None:
            return None
        target = self.subject.judge.target
        enough = [backends for backends, worst in tried.items() if worst >= target]
        backends = min(enough, default=None)
        shown = max(tried) if backends is None else backends
        return Sized(self.rate_rps, backends, tuple(sorted(tried.items())), self._cells(shown))

    def _cells(self, backends: int) -> tuple[Cell, ...]:
        return self.subject.cells(self.rate_rps, backends, self.length)

    def _tried(self, known: Known) -> dict[int, float]:
        """Replays the search: numbers in the order they were tried, with what they gave."""
        tried: dict[int, float] = {}
        while (backends := self._next(tried)) is not None:
            cells = self._cells(backends)
            if not all(cell in known for cell in cells):
                break
            tried[backends] = self.subject.judge.score([known[cell] for cell in cells])
        return tried

    def _next(self, tried: Mapping[int, float]) -> int | None:
        least = self.subject.least
        guess = max(self.guess, least)
        most = max(math.ceil(_MOST_TIMES * guess), guess + _LEAST_MORE)
        if not tried:
            return guess
        enough = [backends for backends, worst in tried.items() if worst >= self.subject.judge.target]
        too_few = [backends for backends in tried if backends not in enough]
        step = 2 ** (len(tried) - 1)
        if not enough:
            top = max(tried)
            return None if top >= most else min(top + step, most)
        low, high = max((one for one in too_few if one < min(enough)), default=None), min(enough)
        if low is None:
            return None if high <= least else max(high - step, least)
        return None if high - low <= 1 else (low + high) // 2


@dataclass(frozen=True, slots=True)
class Runs:
    """How long a run is, by its rate.

    Attributes:
        residence_s: mean time a request stays at its full pace.
        least_measured: requests measured at least, whatever the time.
    """

    residence_s: float
    least_measured: int
    warmup: float = 1.0
    measured: float = 3.0
    cooldown: float = 0.5

    def length(self, rate_rps: float) -> Length:
        """Warm-up, measured and cool-down last these many residence times."""
        each = self.residence_s * rate_rps
        return Length(
            math.ceil(max(self.warmup * each, self.least_measured / 6)),
            math.ceil(max(self.measured * each, self.least_measured)),
            math.ceil(max(self.cooldown * each, self.least_measured / 12)),
        )


def unloaded_cells(subject: Subject, backends_per_rps: float, length: Length) -> tuple[Cell, ...]:
    """Runs of a fleet with hardly anything to do, where a request costs that much in the tier-packed reference."""
    rate_rps = float(f"{_UNLOADED_PART * UNLOADED_BACKENDS / backends_per_rps:.5g}")
    return subject.cells(rate_rps, UNLOADED_BACKENDS, length)
