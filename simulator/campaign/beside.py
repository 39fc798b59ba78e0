"""A search that begins where another one ended: both are then run at the same rates, and compared there too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.campaign.goodput import Search, SearchSettings
from simulator.campaign.knobs import Searched
from simulator.campaign.plan import Known
from simulator.scenario import Cell

_WIDER = 1.1  # of the first two rates: a crossing between them needs no third


@dataclass(frozen=True, slots=True)
class Beside:
    """A `Plan`: the leader's search, then `of` (and its sweep), begun a little below and above what that found.

    All that are beside one leader share their first two rates and seeds, so that their attainment there is paired.

    Attributes:
        leader: its first target decides where the others begin; a few seeds do.
        spread: how far the first two rates lie from the leader's goodput, as a part of it.
    """

    leader: Search
    of: Searched
    spread: float = 0.13

    def common(self, known: Known) -> tuple[float, ...]:
        """The rates that all beside the leader begin with, as parts of its reference; none until it is done."""
        return () if self.leader.wanted(known) else self._begun(self.of.of.settings, known).grid

    def searched(self, known: Known) -> Searched | None:
        """What is run; None until the leader is done."""
        if self.leader.wanted(known):
            return None
        of, sweep = self.of.of, self.of.sweep
        if sweep is not None:
            sweep = replace(
                sweep, search=replace(sweep.search, settings=self._begun(sweep.search.settings, known))
            )
        return Searched(replace(of, settings=self._begun(of.settings, known)), sweep)

    def search(self, known: Known) -> Search | None:
        """The search, with the best value of a sweep; None until that is known."""
        searched = self.searched(known)
        return None if searched is None else searched.search(known)

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        searched = self.searched(known)
        return self.leader.wanted(known) if searched is None else searched.wanted(known)

    def ahead(self, known: Known) -> int:
        searched = self.searched(known)
        if searched is not None:
            return searched.ahead(known)
        return self.leader.ahead(known) + self.of.ahead({})

    def _begun(self, settings: SearchSettings, known: Known) -> SearchSettings:
        target = self.leader.settings.targets[0]
        part = self.leader.goodput(target, known).estimate.mean / self.leader.subject.reference_rps
        begun = settings.around(part, self.spread)
        return replace(begun, tolerance=max(_WIDER * 2 * self.spread * part, settings.tolerance))
