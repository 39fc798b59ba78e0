"""One JSON line about each request, written in batches beside the hot path. Never a word of a prompt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import orjson

_EVERY_S = 0.2
_MOST_LINES = 10_000  # a sink that does not keep up loses lines, never memory


@dataclass(frozen=True, slots=True)
class RequestLine:
    """What is told of one request. Times are seconds from its arrival; None is not known."""

    request_id: str
    tenant: str
    model: str
    tier: str
    backend: str | None
    decision: str | None
    end: str
    attained: bool | None
    streamed: bool
    prompt_tokens: int
    output_tokens: int
    merged: bool  # its events carried several tokens, so times of single tokens are not exact
    seconds: float
    ttft_s: float | None
    tpot_s: float | None
    time: float = 0.0


class RequestLog:
    """Collects lines; a task of its own makes the text and hands it to `write`, in a thread."""

    def __init__(self, write: Callable[[bytes], None] | None) -> None:
        """`write` None keeps the log off."""
        self._write = write
        self._lines: list[RequestLine] = []
        self.dropped = 0

    @property
    def on(self) -> bool:
        return self._write is not None

    def add(self, line: RequestLine) -> None:
        if len(self._lines) < _MOST_LINES:
            self._lines.append(line)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Write what was collected. Blocks."""
        lines, self._lines = self._lines, []
        if self._write is not None and lines:
            self._write(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            if self._lines:
                await asyncio.to_thread(self.flush)


def wall_clock() -> float:
    """The time of day in a line; the only use of it in the gateway."""
    return time.time()
