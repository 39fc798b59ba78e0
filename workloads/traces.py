"""Request traces: read in their native formats, cut, scaled.

Formats, told apart by the header or the first line:

* ours: CSV ``arrival_s,prompt_tokens,output_tokens[,client][,prefix_blocks]``
* Azure LLM inference 2023 and 2024: CSV ``TIMESTAMP,ContextTokens,GeneratedTokens``
* BurstGPT: CSV ``Timestamp,...,Request tokens,Response tokens,...``
* Mooncake: JSON lines ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` (512-token blocks)
* Qwen-Bailian: JSON lines with ``chat_id`` and ``timestamp`` in seconds (16-token blocks)

Any of them may be compressed with gzip (``.gz``). No public trace carries latency targets; tiers are assigned by
`workloads.plan`.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import orjson


class TraceError(ValueError):
    """A trace cannot be read; the message names file, line and field."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace. `prefix_blocks`: equal ids in two requests mean the same text at that place."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    client: str | None = None
    prefix_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace, sorted by arrival, the first at 0 s.

    Attributes:
        dropped: rows left out because the request had no prompt or no answer (failed when it was recorded).
        block_tokens: tokens in one prefix block; None when the trace has none.
        tick_s: the clock tick that arrivals were rounded to; None when they are fine.
    """

    name: str
    requests: tuple[TraceRequest, ...]
    dropped: int = 0
    block_tokens: int | None = None
    tick_s: float | None = None

    @property
    def duration_s(self) -> float:
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def rate_rps(self) -> float:
        return len(self.requests) / self.duration_s if self.duration_s else 0.0


@dataclass(frozen=True, slots=True)
class _Line:
    """One line with what an error message needs."""

    path: str
    number: int
    fields: Mapping[str, object]

    def _number(self, field: str) -> float:
        value = self.fields.get(field)
        if value is None or value == "":
            raise TraceError(f"{self.path}, line {self.number}: {field} is missing")
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise TraceError(f"{self.path}, line {self.number}: {field} must be a number, not {value!r}")
        return number

    def seconds(self, field: str, scale: float = 1.0) -> float:
        return self._number(field) * scale

    def tokens(self, field: str) -> int:
        number = self._number(field)
        if number < 0 or number != int(number):
            raise TraceError(f"{self.path}, line {self.number}: {field} must be a count of tokens, not {number:g}")
        return int(number)

    def instant_s(self, field: str) -> float:
        value = str(self.fields.get(field) or "")
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise TraceError(
                f"{self.path}, line {self.number}: {field} must be a date and time, not {value!r}"
            ) from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

    def blocks(self, field: str) -> tuple[int, ...]:
        value = self.fields.get(field)
        if value is None or value == "":
            return ()
        try:
            items = value.split() if isinstance(value, str) else value
            return tuple(int(item) for item in items)  # type: ignore[attr-defined]  # TypeError is the answer
        except (TypeError, ValueError):
            raise TraceError(f"{self.path}, line {self.number}: {field} must be a list of block ids") from None


def _ours(line: _Line) -> TraceRequest:
    client = line.fields.get("client")
    return TraceRequest(
        line.seconds("arrival_s"),
        line.tokens("prompt_tokens"),
        line.tokens("output_tokens"),
        str(client) if client not in {None, ""} else None,
        line.blocks("prefix_blocks"),
    )


def _azure(line: _Line) -> TraceRequest:
    return TraceRequest(line.instant_s("TIMESTAMP"), line.tokens("ContextTokens"), line.tokens("GeneratedTokens"))


def _burstgpt(line: _Line) -> TraceRequest:
    session = line.fields.get("Session ID")
    return TraceRequest(
        line.seconds("Timestamp"),
        line.tokens("Request tokens"),
        line.tokens("Response tokens"),
        str(session) if session not in {None, ""} else None,
    )


def _mooncake(line: _Line) -> TraceRequest:
    return TraceRequest(
        line.seconds("timestamp", 1e-3),
        line.tokens("input_length"),
        line.tokens("output_length"),
        prefix_blocks=line.blocks("hash_ids"),
    )


def _bailian(line: _Line) -> TraceRequest:
    return TraceRequest(
        line.seconds("timestamp"),
        line.tokens("input_length"),
        line.tokens("output_length"),
        str(line.fields["chat_id"]),
        line.blocks("hash_ids"),
    )


_Reader = Callable[[_Line], TraceRequest]
_CSV_FORMATS: tuple[tuple[frozenset[str], _Reader, int | None], ...] = (
    (frozenset({"arrival_s", "prompt_tokens", "output_tokens"}), _ours, 512),
    (frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), _azure, None),
    (frozenset({"Timestamp", "Request tokens", "Response tokens"}), _burstgpt, None),
)

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
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
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
    first = file.readline()
    file.seek(0)
    lines: Iterator[_Line]
    reader: _Reader
    block_tokens: int | None
    if first.lstrip("\ufeff \t").startswith("{"):
        lines = _json_lines(file, path)
        is_bailian = '"chat_id"' in first
        reader, block_tokens = (_bailian, 16) if is_bailian else (_mooncake, 512)
    else:
        rows = csv.DictReader(file)
        columns = {column.strip("\ufeff ") for column in rows.fieldnames or ()}
        for needed, csv_reader, csv_blocks in _CSV_FORMATS:
            if needed <= columns:
                reader, block_tokens = csv_reader, csv_blocks
                break
        else:
            raise TraceError(
                f"{path}, line 1: unknown trace format with columns {sorted(columns)}: expected "
                "arrival_s,prompt_tokens,output_tokens, an Azure or BurstGPT header, or JSON lines"
            )
        lines = (_Line(path, rows.line_num, {str(k).strip("\ufeff "): v for k, v in row.items()}) for row in rows)
    requests: list[TraceRequest] = []
    dropped = 0
    for line in lines:
        if limit is not None and len(requests) >= limit:
            break
        request = reader(line)
        if request.prompt_tokens and request.output_tokens:
            requests.append(request)
        else:
            dropped += 1
    if not requests:
        raise TraceError(f"{path}: no usable request in it ({dropped} had no prompt or no answer)")
    has_blocks = any(request.prefix_blocks for request in requests)
    return _normalised(name, requests, dropped, block_tokens if has_blocks else None)


def _json_lines(file: IO[str], path: str) -> Iterator[_Line]:
    for number, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            fields = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise TraceError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise TraceError(f"{path}, line {number}: must be a JSON object")
        yield _Line(path, number, fields)


def _normalised(name: str, requests: list[TraceRequest], dropped: int, block_tokens: int | None) -> Trace:
    requests.sort(key=lambda request: request.arrival_s)
    start_s = requests[0].arrival_s
    # Recorded clocks have microseconds at best; rounding removes the noise of the subtraction.
    shifted = tuple(
        request if not start_s else replace(request, arrival_s=round(request.arrival_s - start_s, 6))
        for request in requests
    )
    return Trace(name, shifted, dropped, block_tokens, _tick_s(shifted))


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
