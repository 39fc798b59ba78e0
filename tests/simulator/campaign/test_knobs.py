"""Sweeps find the best value, and confirmations run what was found, longer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.campaign.goodput import MAIN, Length, Search, Subject
from simulator.campaign.knobs import Confirm, KnobSweep, Searched, Trial
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender
from tests.simulator.campaign.fakes import FLEET, WORKLOAD, Knee, outcome
from tests.simulator.campaign.test_goodput import SETTINGS, carried_out

SUBJECT = Subject(WORKLOAD, FLEET, Contender("co_chunk", (("margin", 1.0),)), 10.0)
SHORT = replace(SETTINGS, length=Length(5, 100, 5), seeds=(1,), most_rates=4, targets=(MAIN,))
SWEEP = KnobSweep(Search(SUBJECT, SHORT), "chunk_tokens", (128, 512, 2048))
BEST = Contender("co_chunk", (("chunk_tokens", 512), ("margin", 1.0)))


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
    plan = Searched(Search(SUBJECT, SETTINGS), SWEEP)
    assert plan.search({}) is None
    known = carried_out(plan, best_at_512, 100)
    search = plan.search(known)
    assert search is not None
    assert search.subject.contender == BEST
    assert search.goodput(MAIN, known).estimate.mean == pytest.approx(Knee(9.0).crossing_rps(0.9, 2), rel=0.02)


def test_a_trial_runs_fixed_rates_with_the_best_value() -> None:
    plan = Trial(SUBJECT, (0.6, 0.9), Length(5, 2000, 5), (1, 2), SWEEP)
    assert plan.outcomes(0.6, {}) == ()
    known = carried_out(plan, best_at_512, 100)
    own = [cell for cell in known if cell.measured_requests == 2000]
    assert {(cell.rate_rps, cell.seed, cell.contender) for cell in own} == {
        (rate_rps, seed, BEST) for rate_rps in (6.0, 9.0) for seed in (1, 2)
    }
    assert plan.outcomes(0.9, known) == tuple(known[cell] for cell in own if cell.rate_rps == 9.0)
    without = Trial(SUBJECT, (0.6, 0.9), Length(5, 2000, 5), (1, 2))
    assert len(carried_out(without, Knee())) == 4


def test_a_confirmation_runs_the_goodput_longer_with_its_own_seeds() -> None:
    fixed = Search(replace(SUBJECT, contender=Contender("minimal")), SETTINGS)
    plan = Confirm(Searched(fixed), Length(50, 5000, 50), (11,))
    assert plan.cells({}) == ()
    known = carried_out(plan, Knee(9.0), 100)
    (cell,) = plan.cells(known)
    assert (cell.seed, cell.measured_requests) == (11, 5000)
    assert cell.rate_rps == pytest.approx(fixed.goodput(MAIN, known).estimate.mean, rel=1e-3)
    assert plan.outcomes(known) == (known[cell],)


def test_what_is_never_reached_is_not_confirmed() -> None:
    plan = Confirm(Searched(Search(SUBJECT, SETTINGS)), Length(50, 5000, 50), (11,))
    known = carried_out(plan, lambda _: outcome(0.1), 100)
    assert plan.outcomes(known) == ()
    assert {cell.measured_requests for cell in known} == {1000}
