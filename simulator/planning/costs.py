"""What each promise costs: capacity of one fleet with a promise relaxed, or without its requests.

On a fixed fleet the highest rate that keeps the target is sought (`simulator.campaign.goodput`), as the tiers
are and with each change; one over it is the backend-seconds a request costs, which whole backends are too coarse
to tell apart. Differences are paired by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from simulator.campaign.goodput import Goodput, Judged, Search, SearchSettings, Target
from simulator.campaign.goodput import Subject as SearchSubject
from simulator.campaign.interval import Interval, t_interval
from simulator.campaign.plan import Known, missing
from simulator.planning.curve import Curve
from simulator.planning.sizing import Forgiven, unloaded_cells
from simulator.scenario import Cell, Workload

_FIRST = (0.75, 0.95)  # rates as parts of the reference, where most policies' answers lie between
_AROUND = (0.88, 1.12)  # of where the answer is expected once the fleet is known as it is
_TOLERANCE = 0.3  # narrower brackets are interpolated
_MOST_RATES = 3


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
        exact: false when a mean curve does not cross the target between two rates that were tried, and the number
            is a bound.
    """

    tier: str
    relaxed_to: str | None
    tier_share: float
    per_request_s: Interval
    exact: bool

    @property
    def measurable(self) -> bool:
        """Whether anything is saved, by more than half the interval over seeds."""
        return self.per_request_s.mean > max(self.per_request_s.half or 0.0, 1e-9)

    @property
    def per_thousand_s(self) -> float:
        """Backend-seconds saved for 1,000 requests of the tier."""
        return 1e3 * self.per_request_s.mean / self.tier_share


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
        cells = self._base().wanted(self._seen(None, known))
        if cells:
            return cells
        alone = missing((cell for one in self.changes for cell in self._alone(one, known)), known)
        if alone:
            return alone
        wanted = (cell for one, search in self._searches(known) for cell in search.wanted(self._seen(one, known)))
        return tuple(dict.fromkeys(wanted))

    def ahead(self, known: Known) -> int:
        each = self.curve.length.requests * len(self.seeds)
        rates = len(_AROUND) * len(self.changes)
        if missing(self.curve.unloaded, known):
            return each * (1 + len(_FIRST) + rates)
        base, seen = self._base(), self._seen(None, known)
        if base.wanted(seen):
            return each * (max(1, len(_FIRST) - len(base.parts(seen))) + rates)
        alone = missing((cell for one in self.changes for cell in self._alone(one, known)), known)
        if alone:
            return sum(cell.requests for cell in alone) + each * rates
        open_ = 0
        for one, search in self._searches(known):
            seen = self._seen(one, known)
            if search.wanted(seen):
                open_ += max(1, len(_AROUND) - len(search.parts(seen)))
        return each * open_

    def savings(self, known: Known) -> tuple[Saving, ...]:
        """What every change saves. Raises ValueError before all is known."""
        base = self._goodput(known)
        shares = dict(self.shares)
        found = []
        for change, search in self._searches(known):
            other = search.goodput(self._target, self._seen(change, known))
            per_request_s = [
                self.backends / before.rate - change.share * self.backends / after.rate
                for before, after in zip(base.by_seed, other.by_seed, strict=True)
            ]
            exact = base.resolution_rps is not None and other.resolution_rps is not None
            found.append(
                Saving(change.tier, change.relaxed_to, shares[change.tier], t_interval(per_request_s), exact)
            )
        return tuple(found)

    def request_cost_s(self, known: Known) -> Interval:
        """Backend-seconds a request costs as the tiers are."""
        return t_interval([self.backends / one.rate for one in self._goodput(known).by_seed])

    def _goodput(self, known: Known) -> Goodput:
        return self._base().goodput(self._target, self._seen(None, known))

    @property
    def _target(self) -> Target:
        return Target(Judged.EVERY_TIER, self.curve.subject.judge.target)

    def _alone(self, change: Change, known: Known) -> tuple[Cell, ...]:
        """Runs without load of a change that deals tiers anew, where such runs miss anything at all."""
        if change.relaxed_to is not None or not self.curve.forgiven(known).misses:
            return ()
        subject = replace(self.curve.subject, workload=change.workload)
        return unloaded_cells(subject, change.cost_s, self.curve.length)

    def _seen(self, change: Change | None, known: Known) -> Known:
        """Results as they are judged. A relaxed promise keeps the requests, so what is forgiven is the same."""
        forgiven = self.curve.forgiven(known)
        if change is not None:
            cells = self._alone(change, known)
            if cells:
                judge = self.curve.subject.judge
                left = tuple(name for name in judge.tiers if name != change.tier)
                forgiven = Forgiven.of(replace(judge, tiers=left), cells, known)
        return forgiven.seen(known)

    def _base(self) -> Search:
        return self._search(self.curve.subject.workload, self.cost_s, _FIRST)

    def _searches(self, known: Known) -> Sequence[tuple[Change, Search]]:
        part = self._goodput(known).estimate.mean * self.cost_s / self.backends
        grid = tuple(round(min(1.4, max(0.15, part * by)), 3) for by in _AROUND)
        return [(change, self._search(change.workload, change.cost_s, grid)) for change in self.changes]

    def _search(self, workload: Workload, cost_s: float, grid: tuple[float, ...]) -> Search:
        (cell, *_) = self.curve.subject.cells(1.0, self.backends, self.curve.length)
        settings = SearchSettings(
            self.curve.length,
            self.seeds,
            grid=tuple(dict.fromkeys(grid)),
            lowest=0.1,
            highest=1.6,
            most_rates=_MOST_RATES,
            tolerance=_TOLERANCE,
            targets=(self._target,),
        )
        return Search(SearchSubject(workload, cell.fleet, cell.contender, self.backends / cost_s), settings)
