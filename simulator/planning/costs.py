"""What each promise costs: capacity of one fleet with a promise relaxed, or without its requests.

On a fixed fleet the highest rate that keeps the target is sought (`simulator.campaign.goodput`), as the tiers
are and with each change; one over it is the backend-seconds a request costs, which whole backends are too coarse
to tell apart. Differences are paired by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.campaign.curve import Bound, Point
from simulator.campaign.goodput import Judged as Scored
from simulator.campaign.goodput import Search, SearchSettings, Target
from simulator.campaign.goodput import Subject as SearchSubject
from simulator.campaign.interval import Interval, t_interval
from simulator.campaign.plan import Known, missing
from simulator.outcome import CellOutcome
from simulator.planning.sizing import Curve, Judge
from simulator.scenario import Cell, Workload

_FIRST = (0.75, 0.95)  # rates as parts of the reference, where most policies' answers lie between
_AROUND = (0.93, 1.07)  # of where the answer is expected once the fleet is known as it is
_TOLERANCE = 0.16  # narrower brackets are interpolated
_MOST_RATES = 5


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the promises.

    Attributes:
        relaxed_to: the tier whose TPOT it gets; None: its requests are gone.
        workload: with the change.
        share: of the requests that remain.
        cost_s: instance-seconds one of these costs in the tier-packed reference.
    """

    tier: str
    relaxed_to: str | None
    workload: Workload
    share: float
    cost_s: float


@dataclass(frozen=True, slots=True)
class Saving:
    """What a change saves.

    Attributes:
        tier_share: of all requests that are the tier's.
        per_request_s: backend-seconds saved for each request of any tier.
        exact: false when a rate was not found in the range that was searched, and the number is a bound.
    """

    tier: str
    relaxed_to: str | None
    tier_share: float
    per_request_s: Interval
    exact: bool

    @property
    def per_thousand_s(self) -> float:
        """Backend-seconds saved for 1,000 requests of the tier."""
        return 1e3 * self.per_request_s.mean / self.tier_share


@dataclass(frozen=True, slots=True)
class Judged(Target):
    """A target that a planner's judge scores, in place of the worst tier's plain attainment."""

    judge: Judge | None = None

    def point(self, rate: float, outcome: CellOutcome) -> Point:
        """A run's place on this target's curve."""
        assert self.judge is not None, "a target of the planner has its judge"
        offered = [tier.offered for tier in outcome.tiers if tier.tier in self.judge.tiers and tier.offered]
        return Point(rate, self.judge.score([outcome]), min(offered, default=0))


@dataclass(frozen=True, slots=True)
class Costs:
    """A `Plan`: the search for the fleet as it is, then those for the changes, near where they are expected.

    Attributes:
        curve: as it is.
        cost_s: instance-seconds a request costs in the tier-packed reference, as it is.
        backends: of the fleet that this is measured on.
    """

    curve: Curve
    cost_s: float
    changes: tuple[Change, ...]
    shares: tuple[tuple[str, float], ...]
    backends: int
    seeds: tuple[int, ...]

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        unloaded = missing(self.curve.unloaded, known)
        if unloaded:
            return unloaded
        base = self._base(known)
        cells = base.wanted(known)
        if cells or not self.changes:
            return cells
        return tuple(dict.fromkeys(cell for one in self._searches(known) for cell in one.wanted(known)))

    def ahead(self, known: Known) -> int:
        each = self.curve.runs.length(self.backends / self.cost_s).requests * len(self.seeds)
        open_ = [len(_AROUND)] * len(self.changes)
        unloaded = missing(self.curve.unloaded, known)
        if unloaded:
            return sum(cell.requests for cell in unloaded) + each * (len(_FIRST) + sum(open_))
        base = self._base(known)
        if base.wanted(known):
            return each * (max(1, len(_FIRST) - len(base.parts(known))) + sum(open_))
        return each * sum(
            max(1, len(_AROUND) - len(one.parts(known))) for one in self._searches(known) if one.wanted(known)
        )

    def savings(self, known: Known) -> tuple[Saving, ...]:
        """What every change saves. Raises ValueError before all is known."""
        target = self._target(known)
        base = self._base(known).goodput(target, known)
        shares = dict(self.shares)
        found = []
        for change, search in zip(self.changes, self._searches(known), strict=True):
            other = search.goodput(target, known)
            per_request_s = [
                self.backends / before.rate - change.share * self.backends / after.rate
                for before, after in zip(base.by_seed, other.by_seed, strict=True)
            ]
            exact = base.bound is Bound.EXACT and other.bound is Bound.EXACT
            found.append(
                Saving(change.tier, change.relaxed_to, shares[change.tier], t_interval(per_request_s), exact)
            )
        return tuple(found)

    def request_cost_s(self, known: Known) -> Interval:
        """Backend-seconds a request costs as the tiers are."""
        base = self._base(known).goodput(self._target(known), known)
        return t_interval([self.backends / one.rate for one in base.by_seed])

    def _target(self, known: Known) -> Judged:
        judge = self.curve.judge(known)
        return Judged(Scored.EVERY_TIER, judge.target, judge)

    def _base(self, known: Known) -> Search:
        return self._search(self.curve.subject.workload, self.cost_s, _FIRST, known)

    def _searches(self, known: Known) -> Sequence[Search]:
        base = self._base(known).goodput(self._target(known), known)
        part = base.estimate.mean * self.cost_s / self.backends
        grid = tuple(round(min(1.4, max(0.15, part * by)), 3) for by in _AROUND)
        return [self._search(change.workload, change.cost_s, grid, known) for change in self.changes]

    def _search(self, workload: Workload, cost_s: float, grid: tuple[float, ...], known: Known) -> Search:
        reference_rps = self.backends / cost_s
        length = self.curve.runs.length(reference_rps)
        (cell, *_) = self.curve.subject.cells(1.0, self.backends, length)
        settings = SearchSettings(
            length,
            self.seeds,
            grid=tuple(dict.fromkeys(grid)),
            lowest=0.1,
            highest=1.6,
            most_rates=_MOST_RATES,
            tolerance=_TOLERANCE,
            targets=(self._target(known),),
        )
        return Search(SearchSubject(workload, cell.fleet, cell.contender, reference_rps), settings)
