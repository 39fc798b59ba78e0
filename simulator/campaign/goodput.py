"""Goodput: the highest rate at which enough requests are on time, found with few runs.

Rates are tried as parts of a reference rate: first a coarse grid, then inside the bracket of each target in turn.
All seeds are run at all rates, the same seeds for every contender (common random numbers), so each seed has a
curve and a goodput of its own; the estimate is their mean with Student's t interval, and a ratio of two contenders
is paired by seed. One search serves several targets, which share its runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from simulator.campaign.curve import Bound, Crossing, Point, bracket, crossing, falling, shifted
from simulator.campaign.interval import Interval, ratio_interval, t_interval
from simulator.campaign.plan import Known, missing
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender, FleetSpec, Workload

_LEAST_MISSED, _MOST_MISSED = 0.4, 2.5  # of what a target allows to be missed: farther off, a guide is not used


class Judged(StrEnum):
    """Whose attainment must reach the level."""

    OVERALL = "overall"  # of all requests together, as PolyServe scores
    EVERY_TIER = "every tier"  # of the tier that fares worst


@dataclass(frozen=True, slots=True)
class Target:
    """What a rate must keep to count as goodput."""

    judged: Judged
    level: float

    @property
    def label(self) -> str:
        return f"{self.level:.0%} {self.judged}"

    def point(self, rate: float, outcome: CellOutcome) -> Point:
        """A run's place on this target's curve."""
        if self.judged is Judged.OVERALL:
            return Point(rate, outcome.overall.attainment or 0.0, outcome.overall.offered)
        offered = [tier.offered for tier in outcome.tiers if tier.offered]
        return Point(rate, outcome.worst_tier_attainment or 0.0, min(offered, default=0))


MAIN = Target(Judged.OVERALL, 0.90)
EVERY_TIER = Target(Judged.EVERY_TIER, 0.90)
TARGETS = (MAIN, EVERY_TIER, Target(Judged.OVERALL, 0.95), Target(Judged.OVERALL, 0.99))
"""In the order in which runs are spent on them."""


@dataclass(frozen=True, slots=True)
class Length:
    """Requests of a run: warm-up, measured, cool-down."""

    warmup: int
    measured: int
    cooldown: int

    @property
    def requests(self) -> int:
        return self.warmup + self.measured + self.cooldown

    def times(self, factor: float) -> Length:
        """Longer or shorter, in the same proportions."""
        return Length(*(max(1, round(part * factor)) for part in (self.warmup, self.measured, self.cooldown)))


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose goodput is sought, and the rate that is one on its scale."""

    workload: Workload
    fleet: FleetSpec
    contender: Contender
    reference_rps: float

    def cell(self, part: float, seed: int, length: Length) -> Cell:
        rate_rps = float(f"{part * self.reference_rps:.6g}")  # the last digits of a reference must not matter
        return Cell(
            self.workload,
            self.fleet,
            self.contender,
            rate_rps,
            seed,
            length.warmup,
            length.measured,
            length.cooldown,
        )


@dataclass(frozen=True, slots=True)
class Guide:
    """Curves of an earlier, longer campaign, means over seeds by rate as part of the reference.

    One rate a seed then tells how far a curve has moved since; see `simulator.campaign.curve.shifted`.
    """

    curves: tuple[tuple[Target, tuple[Point, ...]], ...]

    def curve(self, target: Target) -> tuple[Point, ...] | None:
        return next((points for known, points in self.curves if known == target), None)


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How a search spends its runs.

    Attributes:
        grid: the first rates, as parts of the reference.
        lowest, highest: the range; a rate outside is never tried.
        most_rates: runs per seed at most.
        tolerance: a bracket this narrow is narrow enough.
        guide: with it, a first rate whose mean attainment is near the first target's level is enough.
    """

    length: Length
    seeds: tuple[int, ...] = (1, 2, 3)
    grid: tuple[float, ...] = (0.5, 0.8, 1.0)
    lowest: float = 0.2
    highest: float = 1.2
    most_rates: int = 8
    tolerance: float = 0.02
    targets: tuple[Target, ...] = TARGETS
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if not self.seeds or not self.grid or not self.targets:
            raise ValueError("a search needs seeds, a grid and targets")
        if not 0 < self.lowest <= min(self.grid) <= max(self.grid) <= self.highest:
            raise ValueError(f"the grid {self.grid} must lie in {self.lowest:g} to {self.highest:g}")

    def guided(self, guide: Guide) -> SearchSettings:
        """The same search with one rate: where the guide crosses the first target's level.

        Unchanged where the guide does not cross it.
        """
        target = self.targets[0]
        found = crossing(guide.curve(target) or (), target.level) if guide.curve(target) else None
        if found is None or found.bound is not Bound.EXACT or not self.lowest <= found.rate <= self.highest:
            return self
        return replace(self, grid=(_rounded(found.rate),), guide=guide)

    def around(self, part: float, spread: float = 0.06) -> SearchSettings:
        """The same search begun where the answer is expected: less to run if it is there."""
        grid = {_rounded(min(self.highest, max(self.lowest, part * by))) for by in (1 - spread, 1 + spread)}
        return replace(self, grid=tuple(sorted(grid)))


@dataclass(frozen=True, slots=True)
class Goodput:
    """A goodput in requests/s.

    Attributes:
        by_seed: what each seed gave, in the order of the search's seeds.
        estimate: over seeds; where `bound` is not exact, of the ends of the range for the seeds that are bounded.
        resolution_rps: distance of the two tested rates the mean curve crosses between; None where it is a bound
            or comes from a guide.
    """

    target: Target
    by_seed: tuple[Crossing, ...]
    estimate: Interval
    bound: Bound
    resolution_rps: float | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """One goodput over another, paired by seed."""

    estimate: Interval
    bound: Bound


@dataclass(frozen=True, slots=True)
class Search:
    """A `Plan` for one contender's goodputs."""

    subject: Subject
    settings: SearchSettings

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        cells = missing((cell for part in self._tried(known) for cell in self._cells(part)), known)
        if cells:
            return cells
        part = self._next(known)
        return () if part is None else missing(self._cells(part), known)

    def ahead(self, known: Known) -> int:
        done = sum(cell in known for part in self._tried(known) for cell in self._cells(part))
        return (self.settings.most_rates * len(self.settings.seeds) - done) * self.settings.length.requests

    def parts(self, known: Known) -> tuple[float, ...]:
        """The rates tried so far with every seed, as parts of the reference, rising."""
        return tuple(
            sorted(part for part in self._tried(known) if all(cell in known for cell in self._cells(part)))
        )

    def outcomes(self, part: float, known: Known) -> tuple[CellOutcome, ...]:
        """What the seeds gave at a rate, in their order."""
        return tuple(known[cell] for cell in self._cells(part))

    def curve(self, target: Target, seed: int, known: Known) -> tuple[Point, ...]:
        """A seed's runs, by rate as part of the reference."""
        length = self.settings.length
        return tuple(
            target.point(part, known[self.subject.cell(part, seed, length)]) for part in self.parts(known)
        )

    def goodput(self, target: Target, known: Known) -> Goodput:
        """What is known of a goodput. Raises ValueError while no rate was tried with every seed."""
        scale = self.subject.reference_rps
        found = [self._crossing(self.curve(target, seed, known), target) for seed in self.settings.seeds]
        by_seed = tuple(Crossing(one.rate * scale, one.bound) for one in found)
        return Goodput(
            target,
            by_seed,
            t_interval([one.rate for one in by_seed]),
            _joined(one.bound for one in by_seed),
            self._resolution(target, known),
        )

    def is_guided(self, known: Known) -> bool:
        """Whether the goodputs rest on a guide's curves and one rate."""
        return self.settings.guide is not None and len(self.parts(known)) == 1

    def _crossing(self, points: Sequence[Point], target: Target) -> Crossing:
        guide = self.settings.guide
        curve = guide.curve(target) if guide is not None else None
        if curve and len(points) == 1:
            return shifted(curve, points[0], target.level)
        return crossing(points, target.level)

    def _resolution(self, target: Target, known: Known) -> float | None:
        found = bracket([self._mean(target, part, known) for part in self.parts(known)], target.level)
        if found.low is None or found.high is None:
            return None
        return (found.high - found.low) * self.subject.reference_rps

    def _cells(self, part: float) -> tuple[Cell, ...]:
        return tuple(self.subject.cell(part, seed, self.settings.length) for seed in self.settings.seeds)

    def _tried(self, known: Known) -> list[float]:
        """The rates wanted up to what is known: the plan replayed from its beginning, which keeps no state."""
        tried = [*self.settings.grid]
        while all(cell in known for part in tried for cell in self._cells(part)):
            part = self._proposal(tried, known)
            if part is None or not all(cell in known for cell in self._cells(part)):
                break
            tried.append(part)
        return tried

    def _next(self, known: Known) -> float | None:
        return self._proposal(self._tried(known), known)

    def _proposal(self, tried: Sequence[float], known: Known) -> float | None:
        """The next rate, for the first target that still needs one."""
        if len(tried) >= self.settings.most_rates or self._guide_holds(tried, known):
            return None
        for target in self.settings.targets:
            part = self._refined([self._mean(target, part, known) for part in tried], target.level)
            if part is not None:
                return part
        return None

    def _guide_holds(self, tried: Sequence[float], known: Known) -> bool:
        """Whether the first rate is near enough to the first target's level to be moved along the guide."""
        if self.settings.guide is None or len(tried) != 1:
            return False
        target = self.settings.targets[0]
        missed = 1 - self._mean(target, tried[0], known).attainment
        return _LEAST_MISSED <= missed / (1 - target.level) <= _MOST_MISSED

    def _mean(self, target: Target, part: float, known: Known) -> Point:
        points = [target.point(part, known[cell]) for cell in self._cells(part)]
        attainment = math.fsum(point.attainment for point in points) / len(points)
        return Point(part, attainment, sum(point.offered for point in points))

    def _refined(self, points: Sequence[Point], level: float) -> float | None:
        """A rate that narrows the bracket of `level`; None when it is narrow, or outside the range."""
        settings, found = self.settings, bracket(points, level)
        if found.low is None or found.high is None or found.guess is None:
            return self._outside(found.low, found.high)
        width = found.high - found.low
        if width <= settings.tolerance * 1.001:
            return None
        # The interpolated crossing is nearly always close; but on a plateau near the level it creeps along, so
        # every third step halves. A step from an end by the tolerance closes the bracket when the guess is right.
        steps = len(points) - len(settings.grid)
        middle = (found.low + found.high) / 2
        edge = min(settings.tolerance, width / 3)
        guess = middle if steps % 3 == 2 else min(found.high - edge, max(found.low + edge, found.guess))
        return _rounded(guess)

    def _outside(self, low: float | None, high: float | None) -> float | None:
        if high is not None and high > self.settings.lowest:
            return _rounded(max(self.settings.lowest, high * (0.6 if self.settings.guide is None else 0.9)))
        if low is not None and low < self.settings.highest:
            return _rounded(min(self.settings.highest, low * (1.3 if self.settings.guide is None else 1.1)))
        return None


def _rounded(part: float) -> float:
    return round(part, 4)


def _joined(bounds: Iterable[Bound]) -> Bound:
    kinds = set(bounds) - {Bound.EXACT}
    if not kinds:
        return Bound.EXACT
    return kinds.pop() if len(kinds) == 1 else Bound.UNKNOWN


def ratio(above: Goodput, below: Goodput) -> Ratio:
    """One goodput over another, paired by seed, and whether that is a value or a bound.

    Raises ValueError where the two were not measured with the same number of seeds.
    """
    upside_down = {Bound.AT_LEAST: Bound.AT_MOST, Bound.AT_MOST: Bound.AT_LEAST}
    return Ratio(
        ratio_interval([one.rate for one in above.by_seed], [one.rate for one in below.by_seed]),
        _joined((above.bound, upside_down.get(below.bound, below.bound))),
    )


def attainment(target: Target, outcomes: Sequence[CellOutcome]) -> Interval:
    """The attainment a target judges, over seeds at one rate."""
    return t_interval([target.point(0.0, outcome).attainment for outcome in outcomes])


def mean_curve(search: Search, target: Target, known: Known) -> tuple[Point, ...]:
    """The mean over seeds, not increasing, for a figure."""
    curves = [search.curve(target, seed, known) for seed in search.settings.seeds]
    return falling(
        Point(
            points[0].rate,
            math.fsum(point.attainment for point in points) / len(points),
            sum(point.offered for point in points),
        )
        for points in zip(*curves, strict=True)
    )
