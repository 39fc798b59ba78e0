"""The way of the bytes: open an engine's answer, wait for its first real event, and pass it on unchanged.

Bytes of a stream change in one case: the usage event that only the gateway asked for is taken out (`gateway.sse`).
Nothing is read from the engine while the client does not take what was read before, so memory stays bounded.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from adapters.contract import (
    Adapter,
    Capabilities,
    Failure,
    OutgoingRequest,
    Support,
    UpstreamCall,
    UpstreamError,
    UpstreamResponse,
)
from gateway.merged import UNKNOWN_RATE, TextRate
from gateway.request import Call
from gateway.sse import SseScanner, StreamTooWide, Usage, data_of
from gateway.ticket import Ticket
from scheduling.scoring import DeadlineMeter
from tiergate_engine.control import Promise

_ERROR_BODY_BYTES = 1 << 20
_PEEK_BYTES = 1 << 20
_JSON = {"content-type": "application/json"}
_PROMPT_COUNT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d+)')
_OUTPUT_COUNT = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d+)')


class Rejected(Exception):
    """The engine calls the request itself wrong: its own answer goes to the client.

    When it said so as the first event of a stream, the body is that event's data. `too_long`: for this engine;
    another one may take it.
    """

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes, error: UpstreamError) -> None:
        super().__init__(str(error))
        self.too_long = error.failure is Failure.TOO_LONG
        self.status = status
        self.headers = headers
        self.body = body


class Sink(Protocol):
    """Where a stream's bytes go. `write` returns when the client has room for more."""

    def write(self, data: bytes) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine may send at most, and how long its answer's head may take."""

    answer_bytes: int
    event_bytes: int
    head_s: float


@dataclass(slots=True)
class Opened:
    """An engine's answer that has begun. `scanner` is None when it came in one piece, which is `head` then."""

    response: UpstreamResponse
    scanner: SseScanner | None
    head: bytes
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """How one call goes to one backend."""

    adapter: Adapter
    capabilities: Capabilities
    headers: Mapping[str, str]
    request_id: str
    left_ms: int | None  # until its first token is due
    due_ms: int | None  # when that is, by the wall clock
    want_usage: bool
    promise: Promise | None = None


class Relay:
    """Opens and passes on answers. Holds no state between requests."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock

    @property
    def head_s(self) -> float:
        """How long the head of an answer may take."""
        return self._limits.head_s

    async def open(self, ticket: Ticket, call: Call, out: Outgoing, head_s: float | None = None) -> Opened:
        """Open the answer and wait for its first token. `head_s`: what is left of the time for its head.

        Raises UpstreamError or Rejected, and has closed the answer then.
        """
        capabilities = out.capabilities
        want_usage = out.want_usage and not call.usage_asked and call.request.streamed
        prepared = out.adapter.prepare(
            OutgoingRequest(
                call.route.path,
                out.headers,
                call.body,
                out.request_id,
                call.request.streamed,
                out.left_ms,
                out.due_ms,
                want_usage,
                out.promise,
            )
        )
        ticket.opened_s = ticket.last_bytes_s = self._clock()
        ticket.stalled = False
        # Built anew rather than with dataclasses.replace, which costs more than all of `prepare`.
        head_s = self._limits.head_s if head_s is None else head_s
        timed = UpstreamCall(prepared.method, prepared.path, prepared.headers, prepared.body, head_s)
        response = await out.adapter.upstream.open(timed)
        ticket.last_bytes_s = self._clock()
        ticket.abort = response.abort
        try:
            if response.status >= 400:
                await self._raise_failure(response, out.adapter)
            kind = response.headers.get("content-type", "")
            if not call.request.streamed or kind.startswith("application/json"):
                opened = await self._whole(ticket, response)
            elif not kind.startswith("text/event-stream"):
                raise UpstreamError(Failure.BROKEN, f"the engine answered a stream request with {kind[:80]!r}")
            else:
                scanner = SseScanner(
                    call.route.api,
                    strip_usage=want_usage,
                    counts_from_usage=(
                        capabilities.tokens_per_event is None and capabilities.continuous_usage is Support.YES
                    ),
                    limit_bytes=self._limits.event_bytes,
                )
                opened = await self._peek(ticket, response, scanner, out.adapter)
        except BaseException:
            ticket.abort = None
            response.abort()
            raise
        return opened

    async def _raise_failure(self, response: UpstreamResponse, adapter: Adapter) -> None:
        body = await response.read_all(_ERROR_BODY_BYTES)
        error = adapter.response_failure(response.status, body)
        if error.retryable:
            raise error
        raise Rejected(response.status, response.headers, body, error)

    async def _whole(self, ticket: Ticket, response: UpstreamResponse) -> Opened:
        body = await self._stall_named(ticket, response.read_all(self._limits.answer_bytes))
        text = body.strip()
        if not (text.startswith(b"{") and text.endswith(b"}")) and not response.headers.get(
            "content-type", ""
        ).startswith("text/"):
            raise UpstreamError(Failure.BROKEN, "the engine's answer is not a JSON object")
        return Opened(response, None, body, usage_in(body))

    async def _peek(
        self, ticket: Ticket, response: UpstreamResponse, scanner: SseScanner, adapter: Adapter
    ) -> Opened:
        head = b""
        seen = 0
        while not scanner.opened:
            chunk = await self._stall_named(ticket, response.read())
            if not chunk:
                raise UpstreamError(Failure.BROKEN, "the engine closed its stream before the first token")
            ticket.last_bytes_s = self._clock()
            seen += len(chunk)
            if seen > _PEEK_BYTES:
                raise UpstreamError(Failure.BROKEN, f"no token in the first {seen} bytes of the engine's stream")
            try:
                head += scanner.feed(chunk)
            except StreamTooWide:
                raise UpstreamError(Failure.BROKEN, "the engine's answer is not a stream of events") from None
        if scanner.error_first and scanner.error is not None:
            failure = adapter.stream_failure(scanner.error)
            if failure is not None and failure.retryable:
                raise failure
            if failure is not None:
                told = data_of(scanner.error)
                raise Rejected(failure.status or 400, _JSON, told, failure)
        return Opened(response, scanner, head)

    async def _stall_named(self, ticket: Ticket, reading: Awaitable[bytes]) -> bytes:
        """Read; a break that the stall watch made is called what it is."""
        try:
            data = await reading
        except UpstreamError:
            if not ticket.stalled:
                raise
            data = b""
        if not data and ticket.stalled:
            raise UpstreamError(Failure.TIMEOUT, "the engine stopped sending")
        return data

    async def stream(
        self,
        ticket: Ticket,
        opened: Opened,
        meter: DeadlineMeter,
        sink: Sink,
        rate: TextRate = UNKNOWN_RATE,
    ) -> UpstreamError | None:
        """Pass a stream on to its end; the error that broke it off, if one did. `rate` is the model's.

        Raises ConnectionError when the client is gone; the engine's answer is closed on every way out.
        """
        scanner = opened.scanner
        assert scanner is not None
        response = opened.response
        read, feed, clock = response.read, scanner.feed, self._clock
        tokens = events = 0
        wide_bytes = rate.wide_bytes
        data = opened.head
        now_s = ticket.last_bytes_s
        whole = False
        try:
            while True:
                counted = scanner.tokens
                if counted != events:
                    events = counted
                    # Four tokens more: a few long ones at the beginning prove nothing.
                    if scanner.text_bytes > wide_bytes * (events + 4):
                        ticket.merged = True
                        counted = max(events, int(scanner.text_bytes / rate.bytes_per_token))
                    if counted > tokens:
                        meter.on_tokens(now_s, counted - tokens)
                        ticket.output_tokens = tokens = counted
                    ticket.last_token_s = now_s
                if data:
                    ticket.waits_for_client = True
                    await sink.write(data)
                    ticket.waits_for_client = False
                chunk = await read()
                if not chunk:
                    break
                ticket.last_bytes_s = now_s = clock()
                data = feed(chunk)
            whole = scanner.complete
            rest = scanner.flush()
            if rest:
                await sink.write(rest)
        except UpstreamError as error:
            return UpstreamError(Failure.TIMEOUT, "the engine stopped sending") if ticket.stalled else error
        except StreamTooWide:
            return UpstreamError(Failure.BROKEN, "the engine sent an event beyond the size limit")
        finally:
            ticket.abort = ticket.abort_client = None
            if whole:
                response.release()
            else:
                response.abort()
        if ticket.stalled:
            return UpstreamError(Failure.TIMEOUT, "the engine stopped sending")
        return None if whole else UpstreamError(Failure.BROKEN, "the engine closed its stream in the middle")


def usage_in(body: bytes) -> Usage | None:
    """The usage near the end of a whole answer, without decoding the answer."""
    start = body.rfind(b'"usage"')
    if start < 0:
        return None
    prompt = _PROMPT_COUNT.search(body, start)
    output = _OUTPUT_COUNT.search(body, start)
    if prompt is None and output is None:
        return None
    return Usage(
        None if prompt is None else int(prompt.group(1)), None if output is None else int(output.group(1))
    )
