"""`chunk_tokens=best`: which short runs are made, and which budget they choose."""

from __future__ import annotations

from dataclasses import replace

from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender
from tests.simulator.report.conftest import CONTENDERS, made_cell, made_outcome
from tiergate.simulate.tuning import VALUES, settle, trials

OPEN = Contender("lmetric", (("chunk_tokens", "best"), ("margin", 1.1)))
CELLS = tuple(
    replace(made_cell(rate_rps=rate, seed=seed), contender=OPEN) for rate in (30.0, 60.0) for seed in (1, 2)
)


def outcome_with(cell: Cell, kept: int) -> CellOutcome:
    model = made_outcome(replace(cell, contender=CONTENDERS[0]))
    tiers = [replace(tier, offered=1000, attained=1000) for tier in model.tiers]
    return replace(model, tiers=(replace(tiers[0], attained=kept), *tiers[1:]))


def test_every_budget_is_tried_once_at_every_rate_with_another_seed() -> None:
    short = trials(CELLS)
    assert len(short) == 2 * len(VALUES)
    assert {dict(cell.contender.knobs)["chunk_tokens"] for cell in short} == set(VALUES)
    assert {(cell.seed, cell.measured_requests, cell.warmup_requests) for cell in short} == {(0, 1000, 500)}
    assert trials((made_cell(),)) == ()


def test_the_budget_that_keeps_most_in_the_worst_tier_is_used_and_named() -> None:
    kept = {128: 100, 256: 700, 512: 990, 1024: 990, 2048: 500, 4096: 10}
    outcomes = {
        cell: outcome_with(cell, kept[int(dict(cell.contender.knobs)["chunk_tokens"])]) for cell in trials(CELLS)
    }
    settled = settle((*CELLS, made_cell()), outcomes)
    assert [cell.contender.label for cell in settled.cells] == 4 * ["lmetric(chunk_tokens=512, margin=1.1)"] + [
        "polyserve_co"
    ]
    assert [cell.seed for cell in settled.cells[:4]] == [1, 2, 1, 2]
    assert "lmetric(chunk_tokens=512, margin=1.1): the best budget" in settled.notes[0]
    assert "512 keeps 99.0 %" in settled.notes[0]
