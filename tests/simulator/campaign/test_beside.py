"""Searches beside a leader begin where it ended, at the same rates and seeds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.campaign.beside import Beside
from simulator.campaign.goodput import MAIN, Search, Subject
from simulator.campaign.knobs import KnobSweep, Searched
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender
from tests.simulator.campaign.fakes import FLEET, WORKLOAD, Knee
from tests.simulator.campaign.test_goodput import SETTINGS, carried_out

LEADS = replace(SETTINGS, seeds=(1, 2), grid=(0.5, 1.0), tolerance=0.25, targets=(MAIN,))
OWN = replace(LEADS, seeds=(1, 2, 3), tolerance=0.02)
CAPACITY = {"leader": 9.0, "near": 8.9, "far": 4.0}


def search(name: str, settings: object = OWN) -> Search:
    assert isinstance(settings, type(OWN))
    return Search(Subject(WORKLOAD, FLEET, Contender(name), 10.0), settings)


def beside(name: str, sweep: KnobSweep | None = None) -> Beside:
    return Beside(search("leader", LEADS), Searched(search(name), sweep))


def runner(cell: Cell) -> CellOutcome:
    return Knee(CAPACITY[cell.contender.name])(cell)


def test_nothing_of_the_follower_runs_before_the_leader_is_done() -> None:
    plan = beside("near")
    assert {cell.contender.name for cell in plan.wanted({})} == {"leader"}
    assert plan.searched({}) is None
    assert plan.search({}) is None
    assert plan.common({}) == ()
    assert plan.ahead({}) > 0


def test_all_beside_one_leader_share_two_rates_around_its_goodput() -> None:
    known = carried_out(beside("leader"), runner) | carried_out(beside("near"), runner)
    common = beside("leader").common(known)
    assert common == beside("near").common(known)
    found = search("leader", LEADS).goodput(MAIN, known).estimate.mean / 10.0
    assert common == pytest.approx((found * 0.87, found * 1.13), abs=1e-4)
    for name in ("leader", "near"):
        followed = beside(name).search(known)
        assert followed is not None
        assert followed.parts(known) == common, "a crossing between them needs no third rate"


def test_one_that_crosses_elsewhere_is_run_there_too() -> None:
    known = carried_out(beside("far"), runner)
    followed = beside("far").search(known)
    assert followed is not None
    assert set(beside("far").common(known)) < set(followed.parts(known))
    goodput = followed.goodput(MAIN, known)
    expected = sum(Knee(4.0).crossing_rps(0.9, seed) for seed in (1, 2, 3)) / 3
    assert goodput.estimate.mean == pytest.approx(expected, rel=0.1)


def test_a_sweep_begins_there_as_well() -> None:
    plan = beside("near", KnobSweep(search("near", replace(OWN, seeds=(1,))), "chunk_tokens", (512, 1024)))

    def swept(cell: Cell) -> CellOutcome:
        return Knee({512: 8.0, 1024: 9.5}.get(int(dict(cell.contender.knobs).get("chunk_tokens", 0)), 9.0))(cell)

    known = carried_out(plan, swept)
    followed = plan.search(known)
    assert followed is not None
    assert dict(followed.subject.contender.knobs) == {"chunk_tokens": 1024}
    rates = {cell.rate_rps / 10.0 for cell in known if dict(cell.contender.knobs).get("chunk_tokens") == 512}
    assert {round(part, 4) for part in plan.common(known)} <= {round(rate, 4) for rate in rates}
