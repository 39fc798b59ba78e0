"""One JSON line about each request, written in batches beside the hot path. Never a word of a prompt."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson

log = logging.getLogger("tiergate.requestlog")

_EVERY_S = 0.2
_MOST_LINES = 10_000  # a sink that does not keep up loses lines, never memory


@dataclass(frozen=True, slots=True)
class RequestLine:
    """What is told of one request. Times are seconds from its arrival; None is not known.

    Attributes:
        decision: how it was placed; `reason`: why it was refused.
        end: finished, failed, cancelled or refused.
        promised_ttft_s: what it was promised; None is no promise.
        slo_stated: whether the client or its key asked for a pace.
        prompt_tokens: as the engine says, else as they were counted or estimated.
        cached_tokens: how many of them the engine had in its prefix cache, if it told.
        output_tokens: of all `sequences` together.
        merged: its events carried several tokens, so times of single tokens are not exact.
        seconds: until it ended; `time`: when that was, in Unix seconds.
    """

    request_id: str
    tenant: str
    model: str
    tier: str
    backend: str | None
    decision: str | None
    reason: str | None
    end: str
    attained: bool | None
    streamed: bool
    slo_stated: bool
    promised_ttft_s: float | None
    promised_tpot_s: float | None
    sequences: int
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    merged: bool
    seconds: float
    ttft_s: float | None
    tpot_s: float | None
    time: float = 0.0


def _forget(_lines: int) -> None:
    """Nobody counts."""


class RequestLog:
    """Collects lines; a task of its own makes the text and hands it to `write`, in a thread."""

    def __init__(self, write: Callable[[bytes], None] | None, on_lost: Callable[[int], None] = _forget) -> None:
        """`write` None keeps the log off. `on_lost` is told how many lines found no place or were not written."""
        self._write = write
        self._on_lost = on_lost
        self._lines: list[RequestLine] = []
        self._broken = False

    @property
    def on(self) -> bool:
        return self._write is not None

    def add(self, line: RequestLine) -> None:
        if len(self._lines) < _MOST_LINES:
            self._lines.append(line)
        else:
            self._on_lost(1)

    def flush(self) -> None:
        """Write what was collected. Blocks; nothing may be added meanwhile."""
        self._tell(self._put(self._taken()))

    async def run(self) -> None:
        """Write until cancelled. A sink that fails loses its lines and is tried again."""
        while True:
            await asyncio.sleep(_EVERY_S)
            if self._lines:
                self._tell(await asyncio.to_thread(self._put, self._taken()))

    def _taken(self) -> list[RequestLine]:
        lines, self._lines = self._lines, []
        return lines

    def _put(self, lines: list[RequestLine]) -> tuple[int, OSError | None]:
        """How many lines were lost, and to what."""
        if self._write is None or not lines:
            return 0, None
        try:
            self._write(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
        except OSError as error:
            return len(lines), error
        return 0, None

    def _tell(self, lost: tuple[int, OSError | None]) -> None:
        count, error = lost
        if count:
            self._on_lost(count)
        if error is not None and not self._broken:
            log.warning("the request log cannot be written, its lines are lost: %s", error)
        self._broken = error is not None


class LogFile:
    """A file that lines are appended to, and that another program may move away: `reopen` follows.

    Raises OSError when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file = self._open()
        self._torn = False

    def _open(self) -> io.FileIO:
        return io.FileIO(self._path, "a")

    def write(self, lines: bytes) -> None:
        """Append whole lines. Raises OSError; what was written of them then stays, and the next begin anew."""
        with self._lock:
            left = memoryview(b"\n" + lines if self._torn else lines)
            self._torn = True
            while left:
                left = left[self._file.write(left) or 0 :]
            self._torn = False

    def reopen(self) -> None:
        """Go on in the file that has the name now. Raises OSError and goes on in the old one."""
        opened = self._open()
        with self._lock:
            old, self._file, self._torn = self._file, opened, False
        old.close()

    def close(self) -> None:
        with self._lock:
            self._file.close()


def unwritable(path: Path) -> str | None:
    """Why a log cannot be kept at `path`, without making it; None when it can."""
    if path.is_dir():
        return "is a folder"
    if not path.parent.is_dir():
        return f"the folder {path.parent} is not there"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return "may not be written"
    return None


def wall_clock() -> float:
    """The time of day: for lines, and for deadlines that several gateways give to one engine."""
    return time.time()
