"""`chunk_tokens=best`: a policy's budgets are tried in short runs, and the best is the one that is compared.

A contender that is still open carries the word as its knob's value; its cells never run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulator.campaign.interval import t_interval
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender

CHUNK = "chunk_tokens"
BEST = "best"
VALUES = (128, 256, 512, 1024, 2048, 4096)
_SEED = 0  # none of the seeds that are compared, so that the choice does not fit their luck
_PART = 2  # short runs measure so much less


@dataclass(frozen=True, slots=True)
class Settled:
    """Cells whose contenders are closed, and a sentence for each choice."""

    cells: tuple[Cell, ...]
    notes: tuple[str, ...]


def is_open(contender: Contender) -> bool:
    """Whether its budget is still to be found."""
    return (CHUNK, BEST) in contender.knobs


def with_chunk(contender: Contender, value: int) -> Contender:
    """An open contender with this budget; a closed one as it is."""
    knobs = tuple((name, value if (name, set_to) == (CHUNK, BEST) else set_to) for name, set_to in contender.knobs)
    return dataclasses.replace(contender, knobs=knobs)


def trials(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The short runs that the open contenders of these cells need: one seed, every budget at every rate."""
    return tuple(
        dict.fromkeys(_short(cell, value) for cell in cells if is_open(cell.contender) for value in VALUES)
    )


def _short(cell: Cell, value: int) -> Cell:
    return dataclasses.replace(
        cell,
        contender=with_chunk(cell.contender, value),
        seed=_SEED,
        measured_requests=-(-cell.measured_requests // _PART),
        cooldown_requests=cell.cooldown_requests // _PART,
    )


def settle(cells: Sequence[Cell], outcomes: Mapping[Cell, CellOutcome]) -> Settled:
    """Close the contenders with what `trials` gave: the budget that keeps most in the worst tier.

    Mean over the rates; then most of all requests, then the smaller budget. Raises KeyError for a missing trial.
    """
    closed: dict[Contender, Contender] = {}
    notes = []
    for contender in dict.fromkeys(cell.contender for cell in cells if is_open(cell.contender)):
        own = [cell for cell in cells if cell.contender == contender]
        ranks = {value: _rank([outcomes[_short(cell, value)] for cell in own]) for value in VALUES}
        best = max(VALUES, key=ranks.__getitem__)
        closed[contender] = with_chunk(contender, best)
        told = ", ".join(f"{value} keeps {100 * ranks[value][0]:.1f} %" for value in VALUES)
        notes.append(
            f"{closed[contender].label}: the best budget of short runs (one seed, {_measured(own):,} requests, "
            f"mean over the rates, worst tier): {told}."
        )
    compared = (dataclasses.replace(cell, contender=closed.get(cell.contender, cell.contender)) for cell in cells)
    return Settled(tuple(dict.fromkeys(compared)), tuple(notes))


def _measured(cells: Sequence[Cell]) -> int:
    return _short(cells[0], VALUES[0]).measured_requests


def _rank(outcomes: Sequence[CellOutcome]) -> tuple[float, float]:
    worst = [outcome.worst_tier_attainment or 0.0 for outcome in outcomes]
    overall = [outcome.overall.attainment or 0.0 for outcome in outcomes]
    return t_interval(worst).mean, t_interval(overall).mean
