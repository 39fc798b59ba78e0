"""Run plans: cells in parallel processes, longest first, and none that is stored already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from time import perf_counter
from typing import Protocol

from simulator.campaign.address import Addresser
from simulator.campaign.plan import Cells, Plan
from simulator.campaign.store import Store
from simulator.campaign.workers import Done, Runner, Task, Workers, default_jobs, run_cell
from simulator.outcome import CellOutcome
from simulator.scenario import Cell

_TICK_S = 1.0  # how often the time left is told while nothing ends


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell that gave no result. `error` is its traceback, or how its process ended."""

    cell: Cell
    address: str
    error: str


@dataclass(frozen=True, slots=True)
class Status:
    """How far a campaign is.

    Attributes:
        ran, stored, failed: cells that ran here, were found in the store, failed.
        running: cells running now.
        done_requests: in cells that ended here or were found.
        ahead_requests: in cells still to run; for searches an upper estimate.
        left_s: time left; None until a cell has ended.
    """

    ran: int
    stored: int
    failed: int
    running: int
    done_requests: int
    ahead_requests: int
    left_s: float | None


class Progress(Protocol):
    """Who shows it."""

    def show(self, status: Status) -> None: ...

    def failed(self, failure: Failure) -> None: ...


class Silent:
    """Shows nothing."""

    def show(self, status: Status) -> None: ...

    def failed(self, failure: Failure) -> None: ...


@dataclass(frozen=True, slots=True)
class Pool:
    """How cells are run.

    Attributes:
        jobs: processes.
        runner: what runs a cell; importable by name, because other processes call it.
    """

    jobs: int = field(default_factory=default_jobs)
    runner: Runner = run_cell


@dataclass(frozen=True, slots=True)
class CampaignResult:
    """Outcomes (without samples, which are in the store), and the cells that failed."""

    outcomes: dict[Cell, CellOutcome]
    failures: tuple[Failure, ...]
    status: Status


class Campaign:
    """Runs plans to their ends.

    A plan one of whose cells failed goes no further; all others do.
    """

    def __init__(
        self, plans: Iterable[Plan], store: Store, addresser: Addresser, progress: Progress | None = None
    ) -> None:
        self._plans = tuple(plans)
        self._store = store
        self._addresser = addresser
        self._progress: Progress = progress or Silent()
        self._known: dict[Cell, CellOutcome] = {}
        self._failures: dict[Cell, Failure] = {}
        self._queue: list[tuple[int, int, Task]] = []  # longest first, then in order
        self._open: dict[Cell, set[int]] = {}  # cells queued or running, and the plans that wait for them
        self._waits: list[int] = [0] * len(self._plans)  # how many cells each plan waits for
        self._ahead: list[int] = [0] * len(self._plans)
        self._order = 0
        self._ran = self._found = 0
        self._done_requests = 0
        self._spent_s = 0.0
        self._spent_requests = 0
        self._running: dict[Cell, float] = {}

    def run(self, pool: Pool) -> CampaignResult:
        """Run everything. KeyboardInterrupt ends the workers; what they had finished is stored."""
        for number in range(len(self._plans)):
            self._ask(number)
        with Workers(pool.jobs, self._store, pool.runner) as workers:
            while self._queue or self._running:
                while self._queue and workers.idle:
                    task = heappop(self._queue)[-1]
                    self._running[task.cell] = perf_counter()
                    workers.start(task)
                self._progress.show(self._status(pool.jobs))
                for done in workers.wait(_TICK_S):
                    self._ended(done)
        status = self._status(pool.jobs)
        self._progress.show(status)
        return CampaignResult(self._known, tuple(self._failures.values()), status)

    def _ask(self, number: int) -> None:
        """Ask a plan what it wants until it waits for something or is done; stored results are known at once."""
        plan = self._plans[number]
        while True:
            wanted = plan.wanted(self._known)
            self._ahead[number] = plan.ahead(self._known) if wanted else 0
            if not wanted:
                return
            if any(cell in self._failures for cell in wanted):
                self._ahead[number] = 0
                return
            waits = [cell for cell in wanted if not self._find(cell)]
            for cell in waits:
                self._open.setdefault(cell, set()).add(number)
            self._waits[number] = len(waits)
            if waits:
                return

    def _find(self, cell: Cell) -> bool:
        """Whether a cell is known, or stored; else it is queued, once."""
        if cell in self._known:
            return True
        if cell in self._open:
            return False
        address = self._addresser.address(cell)
        outcome = self._store.get(address, cell)
        if outcome is not None:
            self._known[cell] = _slim(outcome)
            self._found += 1
            self._done_requests += cell.requests
            return True
        self._order += 1
        heappush(self._queue, (-cell.requests, self._order, Task(cell, address)))
        return False

    def _ended(self, done: Done) -> None:
        cell = done.task.cell
        del self._running[cell]
        if done.outcome is None:
            failure = Failure(cell, done.task.address, done.error or "")
            self._failures[cell] = failure
            self._progress.failed(failure)
        else:
            self._known[cell] = done.outcome
            self._ran += 1
            self._spent_s += done.took_s
            self._spent_requests += cell.requests
        self._done_requests += cell.requests
        for number in sorted(self._open.pop(cell)):
            self._waits[number] -= 1
            self._ahead[number] -= cell.requests
            if self._waits[number] == 0:
                self._ask(number)

    def _status(self, jobs: int) -> Status:
        ahead = self._ahead_requests()
        return Status(
            self._ran,
            self._found,
            len(self._failures),
            len(self._running),
            self._done_requests,
            ahead,
            self._left_s(ahead, jobs),
        )

    def _ahead_requests(self) -> int:
        """What plans may still want, cells shared between them once as far as that is known."""
        waiting = sum(cell.requests for cell in self._open)
        shared = sum(cell.requests * len(plans) for cell, plans in self._open.items())
        return max(sum(self._ahead) - shared + waiting, waiting)

    def _left_s(self, ahead: int, jobs: int) -> float | None:
        if not self._spent_requests:
            return None
        each_s = self._spent_s / self._spent_requests
        now_s = perf_counter()
        begun_s = sum(min(now_s - since, each_s * cell.requests) for cell, since in self._running.items())
        return max(0.0, each_s * ahead - begun_s) / jobs


def _slim(outcome: CellOutcome) -> CellOutcome:
    return replace(outcome, samples=())


def run_plans(
    plans: Sequence[Plan],
    store: Store,
    pool: Pool,
    *,
    progress: Progress | None = None,
    addresser: Addresser | None = None,
) -> CampaignResult:
    """Run plans in parallel processes; see `Campaign`. Raises AddressError for a trace or profile not there."""
    return Campaign(plans, store, addresser or Addresser.of_this_code(), progress).run(pool)


def run_cells(
    cells: Sequence[Cell],
    store: Store,
    pool: Pool,
    *,
    progress: Progress | None = None,
    addresser: Addresser | None = None,
) -> CampaignResult:
    """Run fixed cells; see `run_plans`."""
    return run_plans([Cells(tuple(cells))], store, pool, progress=progress, addresser=addresser)
