"""One request on its way: what came back, until it is a `RequestResult`."""

from __future__ import annotations

import dataclasses
import time
from array import array
from collections.abc import Mapping, Sequence

import orjson

from loadgen.results import Answer, RequestResult
from loadgen.sse import SseCounter, StreamBroken, StreamError, error_of
from scheduling.scoring import RequestEnd, RequestRecord
from workloads.plan import PlannedRequest

_REFUSAL_STATUSES = frozenset({429, 503})


class Exchange:
    """One request on its way: the sink of its answer (`loadgen.http.Sink`)."""

    __slots__ = (
        "_body",
        "_start_s",
        "_streaming",
        "answer",
        "counter",
        "counts",
        "end",
        "ended_s",
        "lateness_s",
        "message",
        "planned",
        "reason",
        "times",
        "tokens",
    )

    errors: tuple[type[Exception], ...] = (StreamBroken, StreamError)

    def __init__(self, planned: PlannedRequest, start_s: float, lateness_s: float) -> None:
        """`start_s` is when the load began, on the clock of `time.perf_counter`."""
        self._start_s = start_s
        self._streaming = False
        self._body: list[bytes] = []
        self.planned = planned
        self.lateness_s = lateness_s
        self.answer = Answer()
        self.counter = SseCounter()
        self.times = array("d")
        self.counts: array[int] | None = None
        self.end = RequestEnd.UNFINISHED
        self.ended_s: float | None = None
        self.reason: str | None = None
        self.message: str | None = None
        self.tokens = 0

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.answer = read_headers(status, headers)
        event_stream = headers.get("content-type", "").startswith("text/event-stream")
        self._streaming = status == 200 and self.planned.streamed and event_stream

    def on_body(self, data: bytes) -> None:
        """Count tokens as they come. Raises StreamError and StreamBroken."""
        if self._streaming:
            count = self.counter.feed(data)
            if count:
                self.note(time.perf_counter() - self._start_s, count)
        else:
            self._body.append(data)

    def finish(self, now_s: float) -> None:
        """The answer came to its end at `now_s`. Raises StreamError and StreamBroken when it is not complete."""
        status = self.answer.status
        if status != 200:
            self._read_error(status, b"".join(self._body))
        elif not self._streaming:
            self._read_whole(b"".join(self._body), now_s)
        elif not self.counter.ended:
            raise StreamBroken("the stream ended without [DONE] or a finish reason")
        elif self.counter.finish_reason == "abort":
            raise StreamError("the engine aborted the request", "aborted", None)
        else:
            self.end = RequestEnd.FINISHED

    def note(self, now_s: float, count: int) -> None:
        """`count` tokens arrived at `now_s`."""
        counts = self.counts
        if counts is not None:
            counts.append(count)
        elif count != 1:
            self.counts = array("l", [1] * len(self.times))
            self.counts.append(count)
        self.times.append(now_s)
        self.tokens += count

    def _read_whole(self, body: bytes, now_s: float) -> None:
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise StreamBroken(f"the answer is not JSON: {body[:80]!r}") from error
        failure = error_of(value)
        if failure is not None:
            raise failure
        usage = value.get("usage") if isinstance(value, dict) else None
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if not isinstance(tokens, int) or tokens < 0:
            raise StreamBroken(f"the answer has no usage.completion_tokens: {body[:80]!r}")
        if tokens:
            self.note(now_s, tokens)
        self.end = RequestEnd.FINISHED

    def _read_error(self, status: int | None, body: bytes) -> None:
        try:
            failure = error_of(orjson.loads(body), status)
        except orjson.JSONDecodeError:
            failure = None
        if failure is None:
            failure = StreamError(body[:200].decode("utf-8", "replace"), f"http_{status}", status)
        self.stopped(StreamError(str(failure), failure.kind, status))

    def stopped(self, error: StreamError) -> None:
        """The server said no: a refusal before the first token, a failure after it."""
        if error.status in _REFUSAL_STATUSES and not self.times:
            self.refuse(error.kind, str(error))
        else:
            self.fail(error.kind, str(error))

    def refuse(self, reason: str, message: str) -> None:
        self.end, self.reason, self.message = RequestEnd.REFUSED, reason, message

    def fail(self, reason: str, message: str) -> None:
        self.end, self.reason, self.message = RequestEnd.FAILED, reason, message

    def result(self) -> RequestResult:
        counts, estimated = self.counts, False
        told = self.counter.usage_tokens
        if told is not None and self.counter.tokens and told > self.counter.tokens:
            counts, estimated = _spread(counts, len(self.times), told), True
        reason = self.reason
        if reason is None and self.end is RequestEnd.UNFINISHED:
            reason = "unfinished"
        return RequestResult(
            planned=self.planned,
            record=RequestRecord(
                tier=self.planned.tier,
                slo=self.planned.slo,
                arrival_s=self.planned.at_s,
                end=self.end,
                ended_s=None if self.end is RequestEnd.UNFINISHED else self.ended_s,
                token_times_s=self.times,
                token_counts=counts,
                streamed=self.planned.streamed,
                prompt_tokens=self.planned.prompt_tokens,
                reason=reason,
            ),
            answer=self.answer if self.message is None else dataclasses.replace(self.answer, message=self.message),
            lateness_s=self.lateness_s,
            counts_estimated=estimated,
        )


def _spread(counts: Sequence[int] | None, events: int, tokens: int) -> array[int]:
    """Share `tokens` out over events in proportion to what each was counted as."""
    weights = counts if counts is not None else [1] * events
    total = sum(weights)
    shares, seen, given = array("l"), 0, 0
    for weight in weights:
        seen += weight
        share = seen * tokens // total - given
        given += share
        shares.append(share)
    return shares


def read_headers(status: int, headers: Mapping[str, str]) -> Answer:
    """What a gateway's answer headers say; a header that is absent or unreadable is None."""
    return Answer(
        status=status,
        tier=headers.get("x-tiergate-tier"),
        backend=headers.get("x-tiergate-backend"),
        decision=headers.get("x-tiergate-decision"),
        queue_s=_milliseconds(headers, "x-tiergate-queue-ms"),
        predicted_ttft_s=_milliseconds(headers, "x-tiergate-ttft-ms"),
        predicted_tpot_s=_milliseconds(headers, "x-tiergate-tpot-ms"),
        retry_after_s=_milliseconds(headers, "retry-after-ms"),
        emulated=headers.get("x-tiergate-emulated") == "1",
    )


def _milliseconds(headers: Mapping[str, str], name: str) -> float | None:
    try:
        return float(headers[name]) / 1e3
    except (KeyError, ValueError):
        return None
