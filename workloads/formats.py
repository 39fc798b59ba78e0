"""Trace formats, row by row. Told apart by the header of a CSV or the fields of the first JSON line:

* ours: CSV ``[arrival_s,]prompt_tokens,output_tokens[,client][,prefix_blocks]``; blocks read ``0-13 40``. Without
  ``arrival_s`` it holds lengths only.
* Azure LLM inference 2023 and 2024: CSV ``TIMESTAMP,ContextTokens,GeneratedTokens``
* BurstGPT: CSV ``Timestamp,[Session ID,Elapsed time,]Model,Request tokens,Response tokens,Total tokens,Log Type``
* Mooncake: JSON lines ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` (512-token blocks)
* Qwen-Bailian: JSON lines with ``chat_id`` and ``timestamp`` in seconds (16-token blocks)
* Tiergate's request log: JSON lines with ``request_id`` and ``end`` (docs/configuration.md)
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO

import orjson

from scheduling.tiers import Slo

_MOST_BLOCKS = 1_000_000  # of one run: a longer one is a slip, not a prompt


class TraceError(ValueError):
    """A trace cannot be read; the message names file, line and field."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        client: who sent it, where the trace tells.
        prefix_blocks: equal ids in two requests mean the same text at that place.
        tier: only Tiergate's own log knows it, the promise and the model; None elsewhere.
        slo: the pace that was promised, which may be no pace.
        model: by its name.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    client: str | None = None
    prefix_blocks: tuple[int, ...] = ()
    tier: str | None = None
    slo: Slo | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What one line of a trace says.

    Attributes:
        answered: false when the answer never came or was cut short by a failure, so that its length is not known
            and the request still is demand.
        sequences: parallel answers; `request.output_tokens` is each one's.
    """

    request: TraceRequest
    answered: bool = True
    sequences: int = 1


@dataclass(frozen=True, slots=True)
class Line:
    """One line with what an error message needs."""

    path: str
    number: int
    fields: Mapping[str, object]

    def wrong(self, field: str, what: str) -> TraceError:
        return TraceError(f"{self.path}, line {self.number}: {field} {what}")

    def number_of(self, field: str) -> float:
        value = self.fields.get(field)
        if value is None or value == "":
            raise self.wrong(field, "is missing")
        try:
            # JSON's true is an int to Python.
            number = (
                float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
            )
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.wrong(field, f"must be a number, not {value!r}")
        return number

    def optional(self, field: str) -> float | None:
        return None if self.fields.get(field) in {None, ""} else self.number_of(field)

    def tokens(self, field: str) -> int:
        number = self.number_of(field)
        if number < 0 or number != int(number):
            raise self.wrong(field, f"must be a count of tokens, not {number:g}")
        return int(number)

    def instant_s(self, field: str) -> float:
        value = str(self.fields.get(field) or "")
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise self.wrong(field, f"must be a date and time, not {value!r}") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

    def text(self, field: str) -> str | None:
        value = self.fields.get(field)
        return None if value is None or value == "" else str(value)

    def blocks(self, field: str) -> tuple[int, ...]:
        value = self.fields.get(field)
        if value is None or value == "":
            return ()
        try:
            if isinstance(value, str):
                return _block_runs(value)
            if isinstance(value, list):
                return tuple(int(item) for item in value)
        except (TypeError, ValueError):
            pass
        raise self.wrong(field, "must be a list of block ids")


def _block_runs(text: str) -> tuple[int, ...]:
    """``0-3 7`` is 0 1 2 3 7."""
    blocks: list[int] = []
    for run in text.split():
        first, _, last = run.partition("-")
        ids = range(int(first), int(last or first) + 1)
        if len(ids) > _MOST_BLOCKS:
            raise ValueError(run)
        blocks.extend(ids)
    return tuple(blocks)


def _ours(line: Line) -> Row:
    return Row(
        TraceRequest(
            line.number_of("arrival_s") if "arrival_s" in line.fields else 0.0,
            line.tokens("prompt_tokens"),
            line.tokens("output_tokens"),
            line.text("client"),
            line.blocks("prefix_blocks"),
        )
    )


def _azure(line: Line) -> Row:
    return Row(
        TraceRequest(line.instant_s("TIMESTAMP"), line.tokens("ContextTokens"), line.tokens("GeneratedTokens"))
    )


def _burstgpt(line: Line) -> Row:
    return Row(
        TraceRequest(
            line.number_of("Timestamp"),
            line.tokens("Request tokens"),
            line.tokens("Response tokens"),
            line.text("Session ID"),
        )
    )


def _mooncake(line: Line) -> Row:
    return Row(
        TraceRequest(
            line.number_of("timestamp") * 1e-3,
            line.tokens("input_length"),
            line.tokens("output_length"),
            prefix_blocks=line.blocks("hash_ids"),
        )
    )


def _bailian(line: Line) -> Row:
    return Row(
        TraceRequest(
            line.number_of("timestamp"),
            line.tokens("input_length"),
            line.tokens("output_length"),
            line.text("chat_id"),
            line.blocks("hash_ids"),
        )
    )


def _tiergate(line: Line) -> Row:
    end = line.text("end")
    sequences = max(1, line.tokens("sequences")) if "sequences" in line.fields else 1
    try:
        slo = Slo(line.optional("promised_ttft_s"), line.optional("promised_tpot_s"))
    except ValueError as error:
        raise line.wrong("promised_ttft_s, promised_tpot_s", f"are no promise: {error}") from None
    output_tokens = line.tokens("output_tokens")
    return Row(
        TraceRequest(
            line.number_of("time") - line.number_of("seconds"),
            line.tokens("prompt_tokens"),
            -(-output_tokens // sequences),
            line.text("tenant"),
            tier=line.text("tier"),
            slo=slo,
            model=line.text("model"),
        ),
        # A client that went away did get what it got; what a failure cut short, it would have got.
        answered=output_tokens > 0 and end in {"finished", "cancelled"},
        sequences=sequences,
    )


@dataclass(frozen=True, slots=True)
class Format:
    """One format: the columns or fields that tell it, how a line reads, and its prefix blocks."""

    name: str
    needs: frozenset[str]
    read: Callable[[Line], Row]
    block_tokens: int | None = None


_CSV = (
    Format("ours", frozenset({"prompt_tokens", "output_tokens"}), _ours, 512),
    Format("Azure", frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), _azure),
    Format("BurstGPT", frozenset({"Timestamp", "Request tokens", "Response tokens"}), _burstgpt),
)
_JSON = (
    Format("Tiergate", frozenset({"request_id", "end"}), _tiergate),
    Format("Qwen-Bailian", frozenset({"chat_id", "input_length", "output_length"}), _bailian, 16),
    Format("Mooncake", frozenset({"timestamp", "input_length", "output_length"}), _mooncake, 512),
)


def detect(file: IO[str], path: str) -> tuple[Format, Iterator[Line]]:
    """A file's format and its lines. Raises TraceError when no format fits, now or (a bad line) on the way."""
    first = file.readline()
    while first and not first.strip():
        first = file.readline()
    file.seek(0)
    if first.lstrip("\ufeff \t").startswith("{"):
        fields = next(_json_lines(file, path)).fields
        file.seek(0)
        return _fitting(_JSON, frozenset(fields), path, "fields"), _json_lines(file, path)
    rows = csv.DictReader(file)
    columns = frozenset(column.strip("\ufeff ") for column in rows.fieldnames or ())
    return _fitting(_CSV, columns, path, "columns"), _csv_lines(rows, path)


def _fitting(formats: tuple[Format, ...], names: frozenset[str], path: str, kind: str) -> Format:
    for one in formats:
        if one.needs <= names:
            return one
    known = "; ".join(f"{one.name}: {', '.join(sorted(one.needs))}" for one in (*_CSV, *_JSON))
    raise TraceError(f"{path}, line 1: unknown trace format with {kind} {sorted(names)}; expected one of {known}")


def _csv_lines(rows: csv.DictReader[str], path: str) -> Iterator[Line]:
    rows.fieldnames = [column.strip("\ufeff ") for column in rows.fieldnames or ()]
    for row in rows:
        yield Line(path, rows.line_num, row)


def _json_lines(file: IO[str], path: str) -> Iterator[Line]:
    for number, text in enumerate(file, start=1):
        stripped = text.strip("\ufeff \t\r\n")
        if not stripped:
            continue
        try:
            fields = orjson.loads(stripped)
        except orjson.JSONDecodeError as error:
            if number > 1 and not text.endswith("\n"):
                return  # a log that is still being written ends anywhere
            raise TraceError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise TraceError(f"{path}, line {number}: must be a JSON object")
        yield Line(path, number, fields)
