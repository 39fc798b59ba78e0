"""Processes that run cells: each result is stored by the process that made it, so nothing finished is lost.

A process that dies (out of memory, say) costs the cell it had, not the campaign. When the parent dies, its workers
finish the cell they have, store it and end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from time import perf_counter
from types import TracebackType
from typing import Self

from simulator.campaign.store import Store
from simulator.outcome import CellOutcome
from simulator.scenario import Cell

Runner = Callable[[Cell], CellOutcome]
_GRACE_S = 5.0  # for a worker that was told to end


def run_cell(cell: Cell) -> CellOutcome:
    """`simulator.cell.run_cell`, imported in the process that runs it."""
    from simulator.cell import run_cell as run  # noqa: PLC0415  # the parent has no use for the engines

    return run(cell)


@dataclass(frozen=True, slots=True)
class Task:
    """A cell to run and the address to store it under."""

    cell: Cell
    address: str


@dataclass(frozen=True, slots=True)
class Done:
    """A task's end: an outcome (without samples: those are in the store), or why there is none.

    Attributes:
        took_s: wall time in its process.
    """

    task: Task
    outcome: CellOutcome | None
    error: str | None
    took_s: float


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: Task | None = None


class Workers:
    """`jobs` processes that run tasks, one each. Use it in a `with`: leaving it ends them, whatever they do."""

    def __init__(self, jobs: int, store: Store, runner: Runner = run_cell) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, not {jobs}")
        self._context = multiprocessing.get_context("spawn")
        self._store = store
        self._runner = runner
        self._workers: list[_Worker] = []
        self._jobs = jobs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def idle(self) -> int:
        """How many more tasks can start now."""
        return self._jobs - sum(worker.task is not None for worker in self._workers)

    def start(self, task: Task) -> None:
        """Give a task to an idle worker, which is started when there is none yet."""
        worker = next((worker for worker in self._workers if worker.task is None), None)
        if worker is None:
            if len(self._workers) >= self._jobs:
                raise RuntimeError("all workers are busy")
            worker = self._new()
            self._workers.append(worker)
        worker.task = task
        # A worker that has died meanwhile is noticed by `wait`, with the task it was given.
        with contextlib.suppress(OSError):
            worker.connection.send(task)

    def wait(self, timeout_s: float | None = None) -> list[Done]:
        """What has ended, after the first task ends or the timeout."""
        busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
        ended = []
        for ready in wait(list(busy), timeout_s):
            assert isinstance(ready, Connection)
            worker = busy[ready]
            task = worker.task
            assert task is not None
            try:
                done: Done = ready.recv()
            except (EOFError, OSError):
                done = Done(task, None, self._bury(worker), 0.0)
            worker.task = None
            ended.append(done)
        return ended

    def stop(self) -> None:
        """End all workers now; a cell that is not finished is lost."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_GRACE_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            if worker.process.pid is not None:
                self._store.remove_unfinished(worker.process.pid)
            worker.process.close()
        self._workers.clear()

    def _new(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._store, self._runner), name="tiergate-cell", daemon=True
        )
        with _interrupts_ignored():
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _bury(self, worker: _Worker) -> str:
        """Put away a worker that died; how it did, in words."""
        worker.process.join(_GRACE_S)
        code = worker.process.exitcode
        if worker.process.pid is not None:
            self._store.remove_unfinished(worker.process.pid)
        worker.connection.close()
        self._workers.remove(worker)
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return f"its process ended with {how}"


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A child is born deaf to Ctrl-C, which the terminal sends to all: its parent decides when it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, store: Store, runner: Runner) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            task: Task = connection.recv()
            connection.send(_run(task, store, runner))


def _run(task: Task, store: Store, runner: Runner) -> Done:
    started_s = perf_counter()
    try:
        outcome = runner(task.cell)
        store.put(task.address, task.cell, outcome)
    except Exception:  # noqa: BLE001  # a cell that fails is told with its address and must not stop the others
        return Done(task, None, traceback.format_exc(), perf_counter() - started_s)
    return Done(task, replace(outcome, samples=()), None, perf_counter() - started_s)


def default_jobs() -> int:
    """One process for each core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
