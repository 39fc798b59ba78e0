"""A plan: which cells a result needs, told step by step as results come in.

A plan keeps nothing: what it wants next follows from what is known. So a campaign that was interrupted goes on by
itself once the stored results are known again, and many plans advance side by side in one pool of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from simulator.outcome import CellOutcome
from simulator.scenario import Cell

Known = Mapping[Cell, CellOutcome]


class Plan(Protocol):
    """What a campaign runs."""

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        """Cells to run next that are not known; none: the plan is done."""
        ...

    def ahead(self, known: Known) -> int:
        """About how many requests the cells hold that it may still want, the next ones included."""
        ...


@dataclass(frozen=True, slots=True)
class Cells:
    """Fixed cells."""

    cells: tuple[Cell, ...]

    def wanted(self, known: Known) -> tuple[Cell, ...]:
        return missing(self.cells, known)

    def ahead(self, known: Known) -> int:
        return sum(cell.requests for cell in self.wanted(known))


def missing(cells: Iterable[Cell], known: Known) -> tuple[Cell, ...]:
    """Those cells that are not known, each once, in order."""
    return tuple(dict.fromkeys(cell for cell in cells if cell not in known))
