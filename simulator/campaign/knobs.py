"""Plans made of searches: a baseline at its best knob, and a goodput confirmed by a longer run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.campaign.curve import Bound
from simulator.campaign.goodput import MAIN, Goodput, Length, Search, Target
from simulator.campaign.plan import Known, missing
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender, Knob


@dataclass(frozen=True, slots=True)
class KnobSweep:
    """A `Plan` that tries a contender's values of one knob with short runs, to find the best of them.

    Attributes:
        search: for the contender without the knob; its settings are those of the final search.
        length, seed, most_rates: of the short runs.
    """

    search: Search
    knob: str
    values: tuple[Knob, ...]
    length: Length
    seed: int = 1
    most_rates: int = 4

    def searches(self) -> tuple[Search, ...]:
        """A short search for each value, in order."""
        settings = replace(
            self.search.settings,
            length=self.length,
            seeds=(self.seed,),
            most_rates=self.most_rates,
            targets=(MAIN,),
        )
        return tuple(Search(self.with_value(value).subject, settings) for value in self.values)

    def with_value(self, value: Knob) -> Search:
        """The final search with one of the values."""
        subject = self.search.subject
        kept = [(name, other) for name, other in subject.contender.knobs if name != self.knob]
        knobs = tuple(sorted([*kept, (self.knob, value)], key=lambda knob: knob[0]))
        return replace(self.search, subject=replace(subject, contender=Contender(subject.contender.name, knobs)))

    def best(self, known: Known) -> Knob:
        """The value with the highest goodput; the first of equals. Where none reaches the target, the one with
        the highest attainment at the lowest rate."""
        ranked = [
            (_rank(search.goodput(MAIN, known)), _lowest_attainment(search, known)) for search in self.searches()
        ]
        return self.values[ranked.index(max(ranked))]

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        return missing((cell for search in self.searches() for cell in search.wanted(known)), known)

    def ahead(self, known: Known) -> int:
        return sum(search.ahead(known) for search in self.searches() if search.wanted(known))


def _rank(goodput: Goodput) -> tuple[bool, float]:
    return goodput.bound is not Bound.AT_MOST, goodput.estimate.mean


def _lowest_attainment(search: Search, known: Known) -> float:
    return search.curve(MAIN, search.settings.seeds[0], known)[0].attainment


@dataclass(frozen=True, slots=True)
class SweptSearch:
    """A `Plan`: the sweep, then the search with its best value."""

    sweep: KnobSweep

    def search(self, known: Known) -> Search | None:
        """The search with the best value; None until the sweep is done."""
        return None if self.sweep.wanted(known) else self.sweep.with_value(self.sweep.best(known))

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        search = self.search(known)
        return self.sweep.wanted(known) if search is None else search.wanted(known)

    def ahead(self, known: Known) -> int:
        search = self.search(known)
        if search is None:
            return self.sweep.ahead(known) + self.sweep.search.ahead({})
        return search.ahead(known)


@dataclass(frozen=True, slots=True)
class FixedSearch:
    """A `Plan`: a search whose contender is known from the start."""

    of: Search

    def search(self, known: Known) -> Search | None:  # as `SweptSearch.search`
        return self.of

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        return self.of.wanted(known)

    def ahead(self, known: Known) -> int:
        return self.of.ahead(known)


Searched = SweptSearch | FixedSearch


@dataclass(frozen=True, slots=True)
class Confirm:
    """A `Plan`: a search, then its goodput run again, longer.

    Attributes:
        seeds: of the longer runs; others than the search's make them a test and not a repetition.
    """

    searched: Searched
    target: Target
    length: Length
    seeds: tuple[int, ...]

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
