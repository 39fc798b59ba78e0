"""What a campaign shows while it runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from time import perf_counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from simulator.campaign.run import Failure, Status

_LINE_EVERY_S = 30.0


class ConsoleProgress:
    """A `simulator.campaign.run.Progress` for a console; use it in a `with`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told_s: float | None = None
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), console=console
            )
            self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, status: Status) -> None:
        total = status.done_requests + status.ahead_requests
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=status.done_requests, description=in_words(status))
            return
        now_s = perf_counter()
        ended = not status.ahead_requests
        if ended or self._told_s is None or now_s - self._told_s >= _LINE_EVERY_S:
            self._told_s = now_s
            part = status.done_requests / total if total else 1.0
            self._console.print(f"{part:4.0%}  {in_words(status)}", highlight=False)

    def failed(self, failure: Failure) -> None:
        cell = failure.cell
        self._console.print(
            f"cell {failure.address} failed: {cell.contender.label} on {cell.workload.trace} at "
            f"{cell.rate_rps:.4g} requests/s, seed {cell.seed}\n{failure.error}",
            markup=False,
            highlight=False,
        )


def in_words(status: Status) -> str:
    """A status in a line."""
    cells = f"{status.ran} cells ran"
    if status.stored:
        cells += f", {status.stored} were stored"
    if status.failed:
        cells += f", {status.failed} failed"
    left = "" if status.left_s is None else f", about {duration(status.left_s)} left"
    return cells + left


def duration(seconds: float) -> str:
    """`3 h 05 min`, `12 min`, `40 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    if minutes:
        return f"{minutes} min"
    return f"{rest} s"
