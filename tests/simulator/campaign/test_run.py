"""Campaigns: in parallel, resumed, interrupted, with cells that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from simulator.campaign.address import Addresser
from simulator.campaign.goodput import MAIN, Length, Search, SearchSettings, Subject
from simulator.campaign.progress import ConsoleProgress, duration, in_words
from simulator.campaign.run import Failure, Pool, Status, run_cells, run_plans
from simulator.campaign.store import Store, StoreWarning
from simulator.campaign.workers import Runner, Workers
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender
from tests.simulator.campaign.fakes import (
    FLEET,
    WORKLOAD,
    Counted,
    Knee,
    cell,
    dying_at_seed_2,
    failing_at_seed_2,
    quick,
)

ROOT = Path(__file__).resolve().parents[3]
CODE = Addresser("code")
CELLS = [cell(seed=seed) for seed in range(1, 6)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cells")


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def untimed(outcomes: dict[Cell, CellOutcome]) -> dict[Cell, CellOutcome]:
    return {one: replace(outcome, timing=None) for one, outcome in outcomes.items()}


def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    stores = [Store(tmp_path / str(jobs)) for jobs in (1, 3)]
    results = [
        run_cells(CELLS, store, Pool(jobs, quick), addresser=CODE)
        for jobs, store in zip((1, 3), stores, strict=True)
    ]
    assert untimed(results[0].outcomes) == untimed(results[1].outcomes)
    assert set(results[0].outcomes) == set(CELLS)
    for one in CELLS:
        paths = [store.path(CODE.address(one)) for store in stores]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_stored_cells_are_not_run_again(store: Store, marks: Path) -> None:
    pool = Pool(1, Counted(marks))
    first = run_cells(CELLS[:3], store, pool, addresser=CODE)
    second = run_cells(CELLS, store, pool, addresser=CODE)
    assert len(Counted(marks).ran()) == len(CELLS)
    assert (first.status.ran, first.status.stored) == (3, 0)
    assert (second.status.ran, second.status.stored) == (2, 3)
    assert set(second.outcomes) == set(CELLS)


def test_a_damaged_result_is_run_again(store: Store) -> None:
    run_cells(CELLS[:1], store, Pool(1, quick), addresser=CODE)
    path = store.path(CODE.address(CELLS[0]))
    good = path.read_bytes()
    path.write_bytes(good[:100])
    with pytest.warns(StoreWarning, match="damaged"):
        run_cells(CELLS[:1], store, Pool(1, quick), addresser=CODE)
    assert path.read_bytes() == good


def test_other_code_runs_everything_again(store: Store) -> None:
    run_cells(CELLS, store, Pool(1, quick), addresser=CODE)
    again = run_cells(CELLS, store, Pool(1, quick), addresser=Addresser("changed"))
    assert again.status.ran == len(CELLS)


def test_the_longest_run_first(store: Store, marks: Path) -> None:
    cells = [cell(seed=seed, measured=measured) for seed, measured in ((1, 10), (2, 1000), (3, 100))]
    run_cells(cells, store, Pool(1, Counted(marks)), addresser=CODE)
    assert Counted(marks).ran() == ["2-1000", "3-100", "1-10"]


@pytest.mark.parametrize(("runner", "words"), [(failing_at_seed_2, "no such luck"), (dying_at_seed_2, "signal 9")])
def test_a_cell_that_fails_is_told_and_stops_no_other(store: Store, runner: Runner, words: str) -> None:
    console = Console(file=StringIO(), width=200)
    with ConsoleProgress(console) as progress:
        result = run_cells(CELLS, store, Pool(2, runner), progress=progress, addresser=CODE)
    (failure,) = result.failures
    assert failure.cell.seed == 2
    assert failure.address == CODE.address(failure.cell)
    assert words in failure.error
    assert set(result.outcomes) == {one for one in CELLS if one.seed != 2}
    assert isinstance(console.file, StringIO)
    told = console.file.getvalue()
    assert f"cell {failure.address} failed: random on uniform:100-200/50-100 at 10 requests/s, seed 2" in told
    assert "1 failed" in told


def test_searches_advance_together_and_a_failing_one_stops_alone(store: Store) -> None:
    settings = SearchSettings(Length(10, 1000, 10))
    good = Search(Subject(WORKLOAD, FLEET, Contender("random"), 10.0), replace(settings, seeds=(1, 3)))
    bad = Search(Subject(WORKLOAD, FLEET, Contender("minimal"), 10.0), settings)
    result = run_plans([bad, good], store, Pool(2, failing_at_seed_2), addresser=CODE)
    assert good.wanted(result.outcomes) == ()
    assert good.goodput(MAIN, result.outcomes).estimate.mean == pytest.approx(5 / 0.9, rel=0.02)
    assert {failure.cell.contender.name for failure in result.failures} == {"minimal"}
    assert result.status.ahead_requests == 0


def test_plans_share_cells(store: Store, marks: Path) -> None:
    search = Search(Subject(WORKLOAD, FLEET, Contender("random"), 10.0), SearchSettings(Length(10, 1000, 10)))
    run_plans([search, search], store, Pool(2, Counted(marks)), addresser=CODE)
    ran = Counted(marks).ran()
    assert len(ran) == len(list(store.stored())) > 9


def test_a_search_is_resumed_from_the_store(store: Store) -> None:
    search = Search(Subject(WORKLOAD, FLEET, Contender("random"), 10.0), SearchSettings(Length(10, 1000, 10)))
    knee = Knee(9.0)
    first = run_plans([search], store, Pool(1, knee), addresser=CODE)
    again = run_plans([search], store, Pool(1, knee), addresser=CODE)
    assert again.status.ran == 0
    assert search.goodput(MAIN, again.outcomes) == search.goodput(MAIN, first.outcomes)


CAMPAIGN = """
import sys
from pathlib import Path
from simulator.campaign.address import Addresser
from simulator.campaign.run import Pool, run_cells
from simulator.campaign.store import Store
from tests.simulator.campaign.fakes import Counted, cell

if __name__ == "__main__":
    folder, slow_s = Path(sys.argv[1]), float(sys.argv[2])
    # Seeds 1 and 2 are done at once, longest first; 3 and 4 keep both workers busy.
    cells = [cell(seed=seed, measured=10_000 - seed) for seed in range(1, 7)]
    runner = Counted(folder / "marks", 3, slow_s)
    run_cells(cells, Store(folder / "cells"), Pool(2, runner), addresser=Addresser("code"))
    print("done", flush=True)
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def waited_for(condition: object, timeout_s: float = 60.0) -> None:
    assert callable(condition)
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "waited too long"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_campaign_keeps_what_it_has_and_leaves_no_process(
    how: signal.Signals, store: Store, marks: Path, tmp_path: Path
) -> None:
    script = tmp_path / "campaign.py"
    script.write_text(textwrap.dedent(CAMPAIGN))
    slow_s = 60.0 if how is signal.SIGINT else 2.0  # when the parent is killed, workers end what they have
    command = [sys.executable, str(script), str(tmp_path), str(slow_s)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    campaign = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    try:
        waited_for(lambda: len(list(marks.glob("started-*"))) == 2)
        workers = [int(path.name.rpartition("-")[2]) for path in marks.glob("started-*")]
        if how is signal.SIGINT:
            os.killpg(campaign.pid, how)  # as a terminal does: to all processes
        else:
            campaign.kill()
        campaign.wait(30)
    finally:
        campaign.kill()
        assert campaign.stderr is not None
        campaign.stderr.close()
    waited_for(lambda: not any(alive(pid) for pid in workers))
    kept = {stored.cell.seed for stored in store.stored()}
    assert kept == ({1, 2} if how is signal.SIGINT else {1, 2, 3, 4})
    assert not list(store.folder.glob("??/.*"))
    finished = subprocess.run(
        [*command[:-1], "0"], env=environment, cwd=ROOT, check=True, capture_output=True, timeout=60
    )
    assert finished.stdout == b"done\n"
    assert {stored.cell.seed for stored in store.stored()} == {1, 2, 3, 4, 5, 6}
    assert sum(name.startswith(("1-", "2-")) for name in Counted(marks).ran()) == 2


def test_no_more_tasks_than_workers(store: Store) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Workers(0, store, quick)


def test_status_in_words() -> None:
    status = Status(5, 2, 1, 2, 700, 300, 4000.0)
    assert in_words(status) == "5 cells ran, 2 were stored, 1 failed, about 1 h 06 min left"
    assert [duration(seconds) for seconds in (40, 130, 3600)] == ["40 s", "2 min", "1 h 00 min"]


def test_the_time_left_is_told_by_requests(store: Store) -> None:
    told: list[Status] = []

    class Told:
        def show(self, status: Status) -> None:
            told.append(status)

        def failed(self, failure: Failure) -> None:
            raise AssertionError(failure)

    cells = [cell(seed=1, measured=980), cell(seed=2, measured=80)]
    run_cells(cells, store, Pool(1, quick), progress=Told(), addresser=CODE)
    assert [(status.done_requests, status.ahead_requests) for status in (told[0], told[-1])] == [
        (0, 1100),
        (1100, 0),
    ]
    assert told[0].left_s is None
    assert told[-1].left_s == 0.0
    middle = next(status for status in told if status.done_requests == 1000)
    assert middle.ahead_requests == 100
    assert middle.left_s is not None
