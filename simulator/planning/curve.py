"""What every number of backends serves, over the loads of one group of windows: a plan for a campaign."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from simulator.campaign.goodput import Length
from simulator.campaign.interval import Interval
from simulator.campaign.plan import Known, missing
from simulator.planning.sizing import Forgiven, Runs, Sizing, Subject, unloaded_cells
from simulator.scenario import Cell, Contender

MARGIN = 1.15
"""First guess: so many times the reference's backends."""
MOST_RATES = 5
"""Rates that are tried with one number of backends, beside the least and the greatest of the group."""
_APART = 0.03  # rates nearer to each other than this count as the greater one


@dataclass(frozen=True, slots=True)
class Served:
    """What one number of backends serves.

    Attributes:
        rate_rps: the greatest rate that kept the target; None: none of those that were tried.
        cells: the runs there, or at `over_rps` where no rate kept it.
        over_rps: the least rate that missed the target; None: none was tried.
        over: attainment of the worst tier there, over seeds.
        tried: rates, rising, with the worst tier's attainment over all seeds.
    """

    backends: int
    rate_rps: float | None
    cells: tuple[Cell, ...]
    over_rps: float | None
    over: Interval | None
    tried: tuple[tuple[float, float], ...]

    def nearly(self, rate_rps: float, target: float) -> bool:
        """Whether it missed the target at this rate, or one above, by less than the interval over seeds."""
        if self.over is None or self.over_rps is None or self.over.half is None:
            return False
        return rate_rps <= self.over_rps * (1 + 1e-9) and self.over.mean + self.over.half >= target


@dataclass(frozen=True, slots=True)
class Curve:
    """A `Plan`: for each number of backends the greatest of the windows' rates that keeps the target.

    First the smallest fleets for the greatest and for the least rate. Then, for every number between the two, a
    search over the rates of the windows: begun where proportion expects the answer, then in growing steps until
    it is between two rates, then by halves. All runs of a seed offer the same requests.

    Attributes:
        rates_rps: of the windows, rising; at least one.
        backends_per_rps: of the tier-packed reference.
        yardstick: whose fleet without load tells what can be reached.
        more: backends added to the first guess, for a policy that packs less well.
    """

    subject: Subject
    rates_rps: tuple[float, ...]
    backends_per_rps: float
    runs: Runs
    yardstick: Contender
    more: int = 0

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        unloaded = missing(self.unloaded, known)
        return unloaded or self._state(known).wanted

    def ahead(self, known: Known) -> int:
        """As if every number of backends between the ends took two rates more."""
        unloaded = missing(self.unloaded, known)
        if unloaded:
            return 6 * sum(cell.requests for cell in unloaded)
        state = self._state(known)
        each = self.length.requests * len(self.subject.seeds)
        return sum(cell.requests for cell in state.wanted) + each * state.ahead if state.wanted else 0

    @property
    def length(self) -> Length:
        """One for all runs, so that a seed measures the same requests at every load."""
        return self.runs.length(self.rates_rps[-1])

    @property
    def unloaded(self) -> tuple[Cell, ...]:
        """Runs that tell what a fleet attains that has hardly anything to do."""
        return unloaded_cells(replace(self.subject, contender=self.yardstick), self.backends_per_rps, self.length)

    @property
    def steps_rps(self) -> tuple[float, ...]:
        """The rates that are tried: those of the windows, of near neighbours the greatest."""
        kept: list[float] = []
        for rate_rps in reversed(self.rates_rps):
            if not kept or rate_rps < kept[-1] * (1 - _APART):
                kept.append(rate_rps)
        return tuple(reversed(kept))

    def forgiven(self, known: Known) -> Forgiven:
        """What the fleet without load misses."""
        return Forgiven.of(self.subject.judge, self.unloaded, known)

    def fleets(self, known: Known) -> tuple[Served, ...]:
        """What was found, by number of backends."""
        seen = self.forgiven(known).seen(known)
        tests = self._state(known).tests
        return tuple(self._served(backends, tests[backends], seen) for backends in sorted(tests))

    def _served(self, backends: int, tried: Mapping[float, float], seen: Known) -> Served:
        judge = self.subject.judge
        over_rps = min((rate for rate, worst in tried.items() if worst < judge.target), default=None)
        rate_rps = max((rate for rate, worst in tried.items() if worst >= judge.target), default=None)
        over = None
        if over_rps is not None:
            over = judge.interval([seen[cell] for cell in self._cells(backends, over_rps)])
        shown_rps = rate_rps if rate_rps is not None else over_rps
        cells = () if shown_rps is None else self._cells(backends, shown_rps)
        return Served(backends, rate_rps, cells, over_rps, over, tuple(sorted(tried.items())))

    def _cells(self, backends: int, rate_rps: float) -> tuple[Cell, ...]:
        return self.subject.cells(rate_rps, backends, self.length)

    def _state(self, known: Known) -> _State:
        """The search replayed from its beginning."""
        seen, steps = self.forgiven(known).seen(known), self.steps_rps
        tests: dict[int, dict[float, float]] = {}
        guess = math.ceil(MARGIN * self.backends_per_rps * steps[-1]) + self.more
        most = self._ends(steps[-1], guess, seen, tests)
        if isinstance(most, tuple):
            return _State(tests, most, 2 * guess)
        if most is None or most <= self.subject.least or len(steps) == 1:
            return _State(tests, (), 0)
        least = self._ends(steps[0], math.ceil(most * steps[0] / steps[-1] - 1e-9), seen, tests)
        if isinstance(least, tuple):
            return _State(tests, least, 2 * most)
        between = range(most if least is None else least, most)
        wanted: list[Cell] = []
        for backends in between:
            wanted += self._next(backends, most, seen, tests)
        return _State(tests, tuple(dict.fromkeys(wanted)), len(between) if wanted else 0)

    def _ends(
        self, rate_rps: float, guess: int, seen: Known, tests: dict[int, dict[float, float]]
    ) -> int | tuple[Cell, ...] | None:
        """The smallest fleet at a rate, None where there is none, or the runs that are to tell."""
        sizing = Sizing(self.subject, rate_rps, self.length, max(guess, self.subject.least))
        sized = sizing.sized(seen)
        if sized is None:
            return sizing.wanted(seen)
        for backends, worst in sized.tried:
            tests.setdefault(backends, {})[rate_rps] = worst
        return sized.backends

    def _next(
        self, backends: int, most: int, seen: Known, tests: dict[int, dict[float, float]]
    ) -> tuple[Cell, ...]:
        """The runs at the next rate for this number of backends, or none; what is known of others is noted.

        `most`: the fleet for the greatest rate, so that this one is too small for it.
        """
        steps, target = self.steps_rps, self.subject.judge.target
        low, high = 0, len(steps) - 1
        place = bisect.bisect_right(steps, steps[-1] * backends / most) - 1
        answers: list[bool] = []
        for stride in (1, 2, 4, 8, 16)[:MOST_RATES]:
            if high - low <= 1:
                return ()
            place = min(max(place, low + 1), high - 1)
            cells = self._cells(backends, steps[place])
            if not all(cell in seen for cell in cells):
                return missing(cells, seen)
            worst = self.subject.judge.score([seen[cell] for cell in cells])
            tests.setdefault(backends, {})[steps[place]] = worst
            answers.append(worst >= target)
            low, high = (place, high) if answers[-1] else (low, place)
            if len(set(answers)) == 2:  # it is between two rates that were tried
                place = (low + high) // 2
            else:
                place += stride if answers[-1] else -stride
        return ()


@dataclass(frozen=True, slots=True)
class _State:
    """How far a search is.

    Attributes:
        tests: the worst tier's attainment by number of backends and rate.
        ahead: rates still to be tried, about, beside `wanted`.
    """

    tests: Mapping[int, Mapping[float, float]]
    wanted: tuple[Cell, ...]
    ahead: int


def fleet_for(rate_rps: float, fleets: Sequence[Served]) -> Served | None:
    """The smallest fleet that serves a rate; None where there is none, or the rate is beyond those tried."""
    enough = (one for one in fleets if one.rate_rps is not None and one.rate_rps >= rate_rps * (1 - 1e-9))
    return min(enough, key=lambda one: one.backends, default=None)


def top_fleet(fleets: Sequence[Served]) -> Served | None:
    """The smallest fleet for the greatest rate that was tried; None where no fleet serves that."""
    top_rps = max((rate for one in fleets for rate, _ in one.tried), default=0.0)
    return fleet_for(top_rps, fleets)


def backends_at(rate_rps: float, fleets: Sequence[Served]) -> int | None:
    """Backends for a rate: of the smallest fleet that serves it; beyond the greatest rate in proportion to that.

    None where no fleet serves the rate.
    """
    found = fleet_for(rate_rps, fleets)
    if found is not None:
        return found.backends
    top = top_fleet(fleets)
    if top is None or top.rate_rps is None or rate_rps <= top.rate_rps:
        return None
    return math.ceil(top.backends * rate_rps / top.rate_rps - 1e-9)
