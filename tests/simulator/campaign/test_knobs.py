"""Sweeps find the best value, and confirmations run what was found, longer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.campaign.goodput import MAIN, Length, Search, Subject
from simulator.campaign.knobs import Confirm, FixedSearch, KnobSweep, SweptSearch
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender
from tests.simulator.campaign.fakes import FLEET, WORKLOAD, Knee, outcome
from tests.simulator.campaign.test_goodput import SETTINGS, carried_out

SEARCH = Search(Subject(WORKLOAD, FLEET, Contender("co_chunk", (("margin", 1.0),)), 10.0), SETTINGS)
SWEEP = KnobSweep(SEARCH, "chunk_tokens", (128, 512, 2048), Length(5, 100, 5))


def best_at_512(cell: Cell) -> CellOutcome:
    chunk = dict(cell.contender.knobs)["chunk_tokens"]
    return Knee({128: 5.0, 512: 9.0, 2048: 8.0}[int(chunk)])(cell)


def test_a_sweep_takes_the_best_value() -> None:
    known = carried_out(SWEEP, best_at_512)
    assert SWEEP.best(known) == 512
    assert {cell.seed for cell in known} == {1}
    assert {cell.measured_requests for cell in known} == {100}
    assert len(known) <= 3 * 4


def test_where_none_reaches_the_target_the_best_attainment_decides() -> None:
    levels = {128: 0.2, 512: 0.3, 2048: 0.7}
    known = carried_out(SWEEP, lambda cell: outcome(levels[int(dict(cell.contender.knobs)["chunk_tokens"])]))
    assert SWEEP.best(known) == 2048


def test_the_first_of_equals() -> None:
    assert SWEEP.best(carried_out(SWEEP, lambda _: outcome(1.0))) == 128


def test_the_search_follows_with_the_best_value_beside_the_other_knobs() -> None:
    plan = SweptSearch(SWEEP)
    assert plan.search({}) is None
    known = carried_out(plan, best_at_512, 100)
    search = plan.search(known)
    assert search is not None
    assert search.subject.contender == Contender("co_chunk", (("chunk_tokens", 512), ("margin", 1.0)))
    assert search.goodput(MAIN, known).estimate.mean == pytest.approx(Knee(9.0).crossing_rps(0.9, 2), rel=0.02)


def test_a_confirmation_runs_the_goodput_longer_with_its_own_seeds() -> None:
    fixed = Search(replace(SEARCH.subject, contender=Contender("minimal")), SETTINGS)
    plan = Confirm(FixedSearch(fixed), MAIN, Length(50, 5000, 50), (11,))
    assert plan.cells({}) == ()
    known = carried_out(plan, Knee(9.0), 100)
    (cell,) = plan.cells(known)
    assert (cell.seed, cell.measured_requests) == (11, 5000)
    assert cell.rate_rps == pytest.approx(fixed.goodput(MAIN, known).estimate.mean, rel=1e-3)
    assert plan.outcomes(known) == (known[cell],)


def test_what_is_never_reached_is_not_confirmed() -> None:
    plan = Confirm(FixedSearch(SEARCH), MAIN, Length(50, 5000, 50), (11,))
    known = carried_out(plan, lambda _: outcome(0.1), 100)
    assert plan.outcomes(known) == ()
    assert {cell.measured_requests for cell in known} == {1000}
