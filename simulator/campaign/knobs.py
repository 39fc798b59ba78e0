"""Plans made of searches: a baseline at its best knob, fixed rates, and a goodput confirmed by longer runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.campaign.curve import Bound
from simulator.campaign.goodput import MAIN, Goodput, Length, Search, Subject, Target
from simulator.campaign.plan import Known, missing
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender, Knob


def with_knob(subject: Subject, name: str, value: Knob) -> Subject:
    """The subject with one knob of its contender set."""
    kept = [(other, set_to) for other, set_to in subject.contender.knobs if other != name]
    knobs = tuple(sorted([*kept, (name, value)], key=lambda knob: knob[0]))
    return replace(subject, contender=Contender(subject.contender.name, knobs))


@dataclass(frozen=True, slots=True)
class KnobSweep:
    """A `Plan` that tries a contender's values of one knob with short runs, to find the best of them.

    Attributes:
        search: a short search for the contender without the knob; its first target decides.
    """

    search: Search
    knob: str
    values: tuple[Knob, ...]

    def searches(self) -> tuple[Search, ...]:
        """The short search with each value, in order."""
        return tuple(
            replace(self.search, subject=with_knob(self.search.subject, self.knob, value)) for value in self.values
        )

    def best(self, known: Known) -> Knob:
        """The value with the highest goodput; the first of equals. Where none reaches the target, the one with
        the highest attainment at the lowest rate. Raises ValueError while the sweep is not done."""
        target = self.search.settings.targets[0]
        ranked = [
            (_rank(search.goodput(target, known)), _lowest_attainment(search, target, known))
            for search in self.searches()
        ]
        return self.values[ranked.index(max(ranked))]

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        return missing((cell for search in self.searches() for cell in search.wanted(known)), known)

    def ahead(self, known: Known) -> int:
        return sum(search.ahead(known) for search in self.searches() if search.wanted(known))


def _rank(goodput: Goodput) -> tuple[bool, float]:
    return goodput.bound is not Bound.AT_MOST, goodput.estimate.mean


def _lowest_attainment(search: Search, target: Target, known: Known) -> float:
    return search.curve(target, search.settings.seeds[0], known)[0].attainment


@dataclass(frozen=True, slots=True)
class Searched:
    """A `Plan`: a search, with the best value of a sweep where there is one."""

    of: Search
    sweep: KnobSweep | None = None

    def search(self, known: Known) -> Search | None:
        """The search with the best value; None until the sweep is done."""
        if self.sweep is None:
            return self.of
        if self.sweep.wanted(known):
            return None
        return replace(self.of, subject=with_knob(self.of.subject, self.sweep.knob, self.sweep.best(known)))

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        search = self.search(known)
        if search is not None:
            return search.wanted(known)
        assert self.sweep is not None
        return self.sweep.wanted(known)

    def ahead(self, known: Known) -> int:
        search = self.search(known)
        if search is not None:
            return search.ahead(known)
        assert self.sweep is not None
        return self.sweep.ahead(known) + self.of.ahead({})


@dataclass(frozen=True, slots=True)
class Trial:
    """A `Plan`: a contender at fixed rates, with the best value of a sweep where there is one."""

    of: Subject
    parts: tuple[float, ...]
    length: Length
    seeds: tuple[int, ...]
    sweep: KnobSweep | None = None

    def subject(self, known: Known) -> Subject | None:
        """The subject with the best value; None until the sweep is done."""
        if self.sweep is None:
            return self.of
        if self.sweep.wanted(known):
            return None
        return with_knob(self.of, self.sweep.knob, self.sweep.best(known))

    def outcomes(self, part: float, known: Known) -> tuple[CellOutcome, ...]:
        """What the seeds gave at a rate, as far as it is known."""
        subject = self.subject(known)
        if subject is None:
            return ()
        cells = (subject.cell(part, seed, self.length) for seed in self.seeds)
        return tuple(known[cell] for cell in cells if cell in known)

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        subject = self.subject(known)
        if subject is None:
            assert self.sweep is not None
            return self.sweep.wanted(known)
        return missing(
            (subject.cell(part, seed, self.length) for part in self.parts for seed in self.seeds), known
        )

    def ahead(self, known: Known) -> int:
        subject = self.subject(known)
        if subject is None:
            assert self.sweep is not None
            return self.sweep.ahead(known) + len(self.parts) * len(self.seeds) * self.length.requests
        return sum(cell.requests for cell in self.wanted(known))


@dataclass(frozen=True, slots=True)
class Confirm:
    """A `Plan`: a search, then its goodput run again, longer.

    Attributes:
        seeds: of the longer runs; others than the search's make them a test and not a repetition.
    """

    searched: Searched
    length: Length
    seeds: tuple[int, ...]
    target: Target = MAIN

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        return self.searched.wanted(known) or missing(self.cells(known), known)

    def ahead(self, known: Known) -> int:
        own = self.length.requests * len(self.seeds)
        return (self.searched.ahead(known) if self.searched.wanted(known) else 0) + own

    def cells(self, known: Known) -> tuple[Cell, ...]:
        """The longer runs; none until the search is done, or where the target is never reached."""
        search = self.searched.search(known)
        if search is None or search.wanted(known):
            return ()
        goodput = search.goodput(self.target, known)
        if goodput.bound is Bound.AT_MOST:
            return ()
        part = goodput.estimate.mean / search.subject.reference_rps
        return tuple(search.subject.cell(part, seed, self.length) for seed in self.seeds)

    def outcomes(self, known: Known) -> tuple[CellOutcome, ...]:
        """What the longer runs gave."""
        return tuple(known[cell] for cell in self.cells(known) if cell in known)
