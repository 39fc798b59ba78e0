"""Request traces: read, named, cut, scaled. `workloads.formats` has their formats; any may be gzip (``.gz``).

No public trace carries latency targets; tiers are assigned by `workloads.plan` and by the simulator.
"""

from __future__ import annotations

import csv
import gzip
import importlib.resources
import itertools
import math
import random
import re
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from workloads.formats import Row, TraceError, TraceRequest, detect

__all__ = [
    "Trace",
    "TraceError",
    "TraceRequest",
    "limit_lengths",
    "load_trace",
    "named_trace",
    "scale_rate",
    "shipped",
    "shipped_trace",
    "spread_ticks",
    "time_window",
    "uniform_trace",
]


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace, sorted by arrival, the first at 0 s; all at 0 s where it holds lengths only.

    Attributes:
        dropped: rows left out because the request had no prompt or no answer (failed when it was recorded).
        block_tokens: tokens in one prefix block; None when the trace has none.
        tick_s: the clock tick that arrivals were rounded to; None when they are fine.
        guessed: requests whose answer the recording gateway refused or lost: demand all the same, with an answer
            as long as another one's of their tier.
    """

    name: str
    requests: tuple[TraceRequest, ...]
    dropped: int = 0
    block_tokens: int | None = None
    tick_s: float | None = None
    guessed: int = 0

    @property
    def duration_s(self) -> float:
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def rate_rps(self) -> float:
        return len(self.requests) / self.duration_s if self.duration_s else 0.0


_SHIPPED = ".csv.gz"


def load_trace(path: Path, limit: int | None = None) -> Trace:
    """Read a trace; at most `limit` rows of it.

    Raises TraceError when the format is unknown, a field is wrong or nothing is in it, and OSError when the file
    cannot be read.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        try:
            return _read(file, str(path), path.name, limit)
        except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError, csv.Error) as error:
            raise TraceError(f"{path}: not a readable text file: {error}") from error


def shipped() -> tuple[str, ...]:
    """The names of the traces that come with the package (workloads/data/README.md)."""
    files = (importlib.resources.files("workloads") / "data").iterdir()
    return tuple(sorted(file.name[: -len(_SHIPPED)] for file in files if file.name.endswith(_SHIPPED)))


def shipped_trace(name: str) -> Trace:
    """A trace that comes with the package, by its name in `shipped`. Raises TraceError for another name."""
    if name not in shipped():
        raise TraceError(f"no shipped trace is called {name!r}: it is one of {', '.join(shipped())}")
    resource = importlib.resources.files("workloads") / "data" / f"{name}{_SHIPPED}"
    with importlib.resources.as_file(resource) as path:
        return load_trace(path)


_UNIFORM = re.compile(r"uniform:(\d+)-(\d+)/(\d+)-(\d+)")
_UNIFORM_ROWS = 10_000


def named_trace(name: str) -> Trace:
    """A trace by what a scenario calls it: ``uniform:64-4096/16-1024``, a shipped trace's name, or a path.

    Raises TraceError when there is no such trace or it cannot be read.
    """
    if name.startswith("uniform:"):
        return uniform_trace(name)
    if name in shipped():
        return shipped_trace(name)
    if not Path(name).is_file():
        raise TraceError(
            f"no trace {name!r}: it is a file, uniform:LOW-HIGH/LOW-HIGH (prompt and output tokens), or one of "
            + ", ".join(shipped())
        )
    try:
        return load_trace(Path(name))
    except OSError as error:
        raise TraceError(f"{name}: cannot be read: {error.strerror}") from error


def uniform_trace(name: str) -> Trace:
    """Lengths drawn evenly from ``uniform:PROMPT_LOW-PROMPT_HIGH/OUTPUT_LOW-OUTPUT_HIGH`` tokens, no arrivals.

    The same name gives the same trace. Raises TraceError when the name reads otherwise.
    """
    match = _UNIFORM.fullmatch(name)
    low, high, least, most = (int(part) for part in match.groups()) if match else (0, 0, 0, 0)
    if not (1 <= low <= high and 1 <= least <= most):
        raise TraceError(f"{name!r} must read uniform:LOW-HIGH/LOW-HIGH, prompt and output tokens from 1")
    rng = random.Random(name)
    requests = (TraceRequest(0.0, rng.randint(low, high), rng.randint(least, most)) for _ in range(_UNIFORM_ROWS))
    return Trace(name, tuple(requests))


def _read(file: IO[str], path: str, name: str, limit: int | None) -> Trace:
    form, lines = detect(file, path)
    requests: list[TraceRequest] = []
    unanswered: list[Row] = []
    dropped = kept = 0
    for line in lines:
        if limit is not None and kept >= limit:
            break
        row = form.read(line)
        if not row.request.prompt_tokens or (row.answered and not row.request.output_tokens):
            dropped += 1
            continue
        kept += 1
        if row.answered:
            requests.extend([row.request] * row.sequences)
        else:
            unanswered.append(row)
    if not requests:
        lost = dropped + len(unanswered)
        raise TraceError(f"{path}: no usable request in it ({lost} had no prompt or no answer)")
    guessed = _with_lengths(unanswered, requests, name)
    requests += guessed
    has_blocks = any(request.prefix_blocks for request in requests)
    return _normalised(name, requests, dropped, form.block_tokens if has_blocks else None, len(guessed))


def _with_lengths(rows: Sequence[Row], answered: Sequence[TraceRequest], name: str) -> list[TraceRequest]:
    """Give requests without an answer the length of one in their tier, drawn by the trace's name."""
    by_tier: dict[str | None, list[int]] = {}
    for request in answered:
        by_tier.setdefault(request.tier, []).append(request.output_tokens)
    every = [request.output_tokens for request in answered]
    rng = random.Random(name)
    return [
        replace(row.request, output_tokens=rng.choice(by_tier.get(row.request.tier, every)))
        for row in rows
        for _ in range(row.sequences)
    ]


def _normalised(
    name: str, requests: list[TraceRequest], dropped: int, block_tokens: int | None, guessed: int
) -> Trace:
    requests.sort(key=lambda request: request.arrival_s)
    start_s = requests[0].arrival_s
    # Recorded clocks have microseconds at best; rounding removes the noise of the subtraction.
    shifted = tuple(
        request if not start_s else replace(request, arrival_s=round(request.arrival_s - start_s, 6))
        for request in requests
    )
    return Trace(name, shifted, dropped, block_tokens, _tick_s(shifted), guessed)


def _tick_s(requests: Sequence[TraceRequest]) -> float | None:
    """The coarse clock behind arrivals that come in heaps: the usual gap between heaps, at least one second."""
    distinct = sorted({request.arrival_s for request in requests})
    if len(distinct) < 3 or 2 * len(distinct) > len(requests):
        return None
    tick_s = statistics.median(later - earlier for earlier, later in itertools.pairwise(distinct))
    return tick_s if tick_s >= 0.999 else None


def spread_ticks(trace: Trace, rng: random.Random) -> Trace:
    """Spread the requests of each clock tick evenly at random inside it; a trace with a fine clock is unchanged.

    Mooncake's arrivals are rounded to 3 s: replayed as they are, every tick would be a burst that never was.
    """
    tick_s = trace.tick_s
    if tick_s is None:
        return trace
    spread = [replace(request, arrival_s=request.arrival_s + rng.random() * tick_s) for request in trace.requests]
    spread.sort(key=lambda request: request.arrival_s)
    return replace(trace, requests=tuple(spread), tick_s=None)


def time_window(trace: Trace, start_s: float, duration_s: float) -> Trace:
    """The requests that arrive in [`start_s`, `start_s + duration_s`), moved to start at 0.

    Raises TraceError when there are none.
    """
    end_s = start_s + duration_s
    kept = tuple(
        replace(request, arrival_s=request.arrival_s - start_s)
        for request in trace.requests
        if start_s <= request.arrival_s < end_s
    )
    if not kept:
        raise TraceError(f"{trace.name}: nothing arrives between {start_s:g} s and {end_s:g} s")
    return replace(trace, requests=kept)


def scale_rate(trace: Trace, factor: float) -> Trace:
    """Play the trace `factor` times as fast; its bursts keep their shape. Raises ValueError unless positive."""
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"the rate factor must be positive, not {factor!r}")
    return replace(
        trace, requests=tuple(replace(item, arrival_s=item.arrival_s / factor) for item in trace.requests)
    )


def limit_lengths(
    trace: Trace, max_prompt_tokens: int | None = None, max_output_tokens: int | None = None
) -> Trace:
    """Shorten longer prompts and answers to a limit; no request is dropped."""
    prompt_limit = math.inf if max_prompt_tokens is None else max_prompt_tokens
    output_limit = math.inf if max_output_tokens is None else max_output_tokens
    return replace(
        trace,
        requests=tuple(
            replace(
                item,
                prompt_tokens=int(min(item.prompt_tokens, prompt_limit)),
                output_tokens=int(min(item.output_tokens, output_limit)),
            )
            for item in trace.requests
        ),
    )
