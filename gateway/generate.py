"""One generating request from its bytes to its last byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web
from multidict import CIMultiDict

from adapters.contract import Adapter, Capabilities, Failure, UpstreamError
from gateway.ahead import ChunksAhead, open_in_chunks
from gateway.asked import Caller
from gateway.client import ClientStream, forwarded, whole, without_keys
from gateway.dispatch import Shell
from gateway.errors import ApiError, InvalidRequest, NotFound, UpstreamFailed, of_refusal
from gateway.live import Live
from gateway.merged import TextRates
from gateway.recent import Decisions
from gateway.relay import Opened, Outgoing, Rejected, Relay
from gateway.request import Call, RequestParser
from gateway.requestlog import RequestLine, RequestLog, wall_clock
from gateway.routes import Route
from gateway.sse import SseScanner, Usage
from gateway.telemetry import Telemetry
from gateway.ticket import Ticket
from gateway.tokens import TokenCounter
from scheduling.decisions import Decision, Outcome, RefusalKind
from scheduling.events import EndKind, Open, Refuse
from scheduling.requests import Request
from scheduling.scoring import DeadlineMeter
from scheduling.tiers import Slo
from tiergate_engine.control import Promise

_SSE_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
_WAITING = b": waiting for a place\n\n"
_USAGE_FIRST = 20  # every one of the first answers teaches, later ones are sampled


class Endpoints(Protocol):
    """What is needed of the fleet to open a stream."""

    def adapter(self, backend: str) -> Adapter: ...

    def capabilities(self, backend: str) -> Capabilities: ...

    def takes_promises(self, backend: str) -> bool:
        """Whether its engine plans its steps by what requests were promised."""
        ...

    def chunks_ahead(self, backend: str) -> ChunksAhead | None:
        """How long prompts are sent ahead to it; None where they go whole."""
        ...

    def longer_than(self, backend: str, model: str) -> bool:
        """Whether another backend of the model takes longer requests than this one."""
        ...

    def suspect(self, backend: str) -> None:
        """A backend could not be reached: look at it now."""
        ...

    def abandon(self, backend: str, request_id: str) -> None:
        """A request's connection to a backend was closed before its end: see that the engine stops too."""
        ...

    def learn_length(self, request: Request, output_tokens: int, *, complete: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What handling a request takes."""

    live: Live
    shell: Shell
    endpoints: Endpoints
    parser: RequestParser
    counter: TokenCounter
    rates: TextRates
    relay: Relay
    telemetry: Telemetry
    decisions: Decisions
    log: RequestLog
    clock: Callable[[], float]


class Exchange:
    """One request while it is handled."""

    __slots__ = (
        "_call",
        "_client",
        "_failure",
        "_http",
        "_kind",
        "_meter",
        "_parts",
        "_public_id",
        "_refused",
        "_sent_to",
        "_ticket",
        "_too_long",
        "_usage",
    )

    def __init__(self, parts: Parts, http: web.BaseRequest, call: Call, public_id: str, ticket: Ticket) -> None:
        request = call.request
        pace = request.slo
        if request.sequences > 1 and pace.tpot_s is not None:
            # Tokens of all sequences are counted together, so together they are due faster.
            pace = Slo(pace.ttft_s, pace.tpot_s / request.sequences)
        self._parts = parts
        self._http = http
        self._call = call
        self._public_id = public_id
        self._ticket = ticket
        self._client = ClientStream(http)
        self._meter = DeadlineMeter(pace, request.arrival_s)
        self._failure: UpstreamError | None = None
        self._kind = EndKind.CANCELLED
        self._refused: str | None = None
        self._sent_to: str | None = None
        self._too_long: Rejected | None = None  # what an engine with shorter limits said
        self._usage: Usage | None = None

    async def run(self) -> web.StreamResponse:
        """Handle it to the end. Raises ApiError while nothing was sent yet."""
        error: ApiError | None = None
        try:
            return await self._run()
        except ApiError as raised:
            error = raised
            if not self._client.begun:
                raise
            await self._client.write(raised.event(self._call.route.dialect))
            return await self._client.end()
        finally:
            if self._sent_to is not None and self._kind is not EndKind.FINISHED:
                self._parts.endpoints.abandon(self._sent_to, self._public_id)
            self._account(error)

    async def _run(self) -> web.StreamResponse:
        ticket = self._ticket
        while True:
            order = await self._wait()
            if isinstance(order, Refuse):
                if self._too_long is not None and order.refusal.kind is RefusalKind.FAILED:
                    self._refused = order.refusal.kind.value
                    self._parts.telemetry.refused(self._call.request, self._refused)
                    return await self._pass_rejection(self._too_long)
                raise self._refusal(order)
            try:
                self._sent_to = order.backend
                opened = await self._open(order)
            except UpstreamError as error:
                self._failure = error
                self._sent_to = None
                if not error.retryable:
                    self._kind = EndKind.FAILED
                    ticket.ended(EndKind.FAILED)
                    raise InvalidRequest(str(error), code=error.failure.value) from error
                self._suspect(order, error)
                at_fault = error.failure is not Failure.UNSUPPORTED
                ticket.open_failed(retryable=True, cause=str(error), at_fault=at_fault)
                continue
            except Rejected as rejected:
                if rejected.too_long and self._parts.endpoints.longer_than(
                    order.backend, self._call.request.model
                ):
                    self._too_long, self._sent_to = rejected, None
                    ticket.open_failed(retryable=True, cause=str(rejected), at_fault=False)
                    continue
                self._kind = EndKind.FAILED
                ticket.ended(EndKind.FAILED)
                return await self._pass_rejection(rejected)
            return await self._answer(order, opened)

    async def _open(self, order: Open) -> Opened:
        parts, out = self._parts, self._outgoing(order)
        chunks = parts.endpoints.chunks_ahead(order.backend)
        if chunks is None or not chunks.takes(self._call):
            return await parts.relay.open(self._ticket, self._call, out)
        return await open_in_chunks(parts.relay, self._ticket, self._call, out, chunks, parts.clock)

    async def _wait(self) -> Open | Refuse:
        """Wait for the core's word; long waits may be kept alive with comments."""
        ticket = self._ticket
        keep_alive_s = self._parts.live.now.settings.hold.keep_alive_s
        if keep_alive_s is None or not self._call.request.streamed:
            order = await ticket.next_order()
            assert order is not None
            return order
        while (order := await ticket.next_order(keep_alive_s)) is None:
            if not self._client.begun:
                await self._client.begin({**_SSE_HEADERS, "x-request-id": self._public_id})
            await self._client.write(_WAITING)
        return order

    def _suspect(self, order: Open, error: UpstreamError) -> None:
        """Have a backend looked at that cannot be reached, or breaks off what it began."""
        if error.failure in {Failure.UNREACHABLE, Failure.BROKEN, Failure.TIMEOUT}:
            self._parts.endpoints.suspect(order.backend)

    def _outgoing(self, order: Open) -> Outgoing:
        parts = self._parts
        headers: Mapping[str, str] = self._http.headers
        settings = parts.live.now.settings
        if settings.keys:
            headers = without_keys(headers)
        arrived = parts.shell.counts.arrived
        told = parts.endpoints.takes_promises(order.backend)
        left_ms = None if math.isinf(order.priority) else int(order.priority * 1e3)
        return Outgoing(
            parts.endpoints.adapter(order.backend),
            parts.endpoints.capabilities(order.backend),
            headers,
            self._public_id,
            left_ms,
            None if left_ms is None else int(wall_clock() * 1e3) + left_ms,
            arrived <= _USAGE_FIRST or arrived % settings.tokens.usage_every == 0,
            promise_of(self._call.request, order, parts.clock(), settings.delivery_ms / 1e3) if told else None,
        )

    def _refusal(self, order: Refuse) -> ApiError:
        failure = self._failure
        self._refused = order.refusal.kind.value
        self._parts.telemetry.refused(self._call.request, self._refused)
        if failure is not None and failure.failure is Failure.UNSUPPORTED and self._refused == "upstream_failed":
            return NotFound(f"{order.refusal.message} (last: {failure})", code="unsupported_path")
        if failure is not None and self._refused == "upstream_failed":
            return UpstreamFailed(f"{order.refusal.message} (last: {failure})", code=failure.failure.value)
        return of_refusal(order.refusal, self._call.route.prompt_field)

    async def _pass_rejection(self, rejected: Rejected) -> web.StreamResponse:
        if self._client.begun:
            raise UpstreamFailed(str(rejected), code="rejected")
        return whole(rejected.status, self._headers(forwarded(rejected.headers), None), rejected.body)

    async def _answer(self, order: Open, opened: Opened) -> web.StreamResponse:
        ticket = self._ticket
        self._parts.telemetry.decided(
            order.decision, self._call.request.tier, max(0.0, order.decision.at_s - self._call.request.arrival_s)
        )
        if opened.scanner is None:
            return await self._answer_whole(order, opened)
        ticket.first_token()
        if not self._client.begun:
            try:
                await self._client.begin(self._headers(forwarded(opened.response.headers), order.decision))
            except BaseException:
                opened.response.abort()
                raise
        ticket.abort_client = self._client.abort
        rate = self._parts.rates.of(self._call.request.model)
        error = await self._parts.relay.stream(ticket, opened, self._meter, self._client, rate)
        self._kind = EndKind.FINISHED if error is None and opened.scanner.error is None else EndKind.FAILED
        self._count(opened.scanner)
        ticket.ended(self._kind)
        self._learn(opened.scanner.usage)
        if error is not None:
            self._failure = error
            self._suspect(order, error)
            told = UpstreamFailed(str(error), code=error.failure.value)
            cut = b"" if opened.scanner.between_events else b"\n\n"
            await self._client.write(cut + told.event(self._call.route.dialect))
        return await self._client.end()

    async def _answer_whole(self, order: Open, opened: Opened) -> web.StreamResponse:
        ticket = self._ticket
        usage = opened.usage
        ticket.output_tokens = (usage and usage.output_tokens) or 0
        now_s = self._parts.clock()
        if ticket.output_tokens:
            self._meter.on_tokens(now_s, ticket.output_tokens)
        ticket.abort = None
        opened.response.release()
        self._kind = EndKind.FINISHED
        ticket.ended(EndKind.FINISHED)
        self._learn(usage)
        if self._client.begun:
            await self._client.write(b"data: " + opened.head + b"\n\ndata: [DONE]\n\n")
            return await self._client.end()
        headers = self._headers(forwarded(opened.response.headers), order.decision)
        return whole(opened.response.status, headers, opened.head)

    def _count(self, scanner: SseScanner) -> None:
        """Replace what was counted in the stream by what the engine says it was."""
        ticket, request = self._ticket, self._call.request
        told = None if scanner.usage is None else scanner.usage.output_tokens
        if told is None or self._kind is not EndKind.FINISHED:
            return
        events = scanner.tokens
        # The token that ends a sequence has no text, and so no event.
        missing = told - events - request.sequences
        ticket.merged = events > 0 and missing > 0
        ticket.output_tokens = told
        if events:
            self._meter.tokens = told if ticket.merged else events
            self._parts.shell.pace.told(ticket, told / (events + request.sequences))
        if ticket.merged:
            self._parts.telemetry.merged(missing)
        if scanner.plain:
            self._parts.rates.learn(request.model, scanner.text_bytes, told)

    def _learn(self, usage: Usage | None) -> None:
        call = self._call
        self._usage = usage
        if usage is not None and usage.prompt_tokens is not None:
            self._parts.counter.learn(call.request.model, call.prompt_chars, usage.prompt_tokens)
        if self._ticket.output_tokens:
            self._parts.endpoints.learn_length(
                call.request, self._ticket.output_tokens, complete=self._kind is EndKind.FINISHED
            )

    def _headers(self, engine: dict[str, str], decision: Decision | None) -> CIMultiDict[str]:
        """The engine's headers and ours."""
        headers = CIMultiDict(engine)
        headers["x-request-id"] = self._public_id
        headers["x-tiergate-tier"] = self._call.request.tier
        decision = decision or self._ticket.decision
        if decision is None:
            return headers
        waited_s = max(0.0, decision.at_s - self._call.request.arrival_s)
        headers["x-tiergate-queue-ms"] = f"{waited_s * 1e3:.1f}"
        headers["x-tiergate-decision"] = decision.outcome.value
        if decision.backend is not None:
            headers["x-tiergate-backend"] = decision.backend
            ttft_s, tpot_s = predicted(decision)
            if ttft_s is not None:
                headers["x-tiergate-ttft-ms"] = f"{ttft_s * 1e3:.1f}"
            if tpot_s is not None:
                headers["x-tiergate-tpot-ms"] = f"{tpot_s * 1e3:.2f}"
        return headers

    def _account(self, error: ApiError | None) -> None:
        """Count and log, whatever the way out."""
        parts, ticket, request = self._parts, self._ticket, self._call.request
        now_s = parts.clock()
        decision = ticket.decision
        attained: bool | None = None
        placed = ticket.backend is not None
        if decision is not None:
            parts.decisions.add(self._public_id, decision, merged=ticket.merged)
        if placed:
            ttft_s, tpot_s = (None, None) if decision is None else predicted(decision)
            kind = self._kind
            attained = parts.telemetry.ended(request, self._meter, kind, now_s, (ttft_s, tpot_s))
        if parts.log.on:
            end = self._kind.value if placed else ("refused" if error is not None else "cancelled")
            if self._refused is not None:
                end = "refused"
            parts.log.add(self._line(end, attained, now_s))

    def _line(self, end: str, attained: bool | None, now_s: float) -> RequestLine:
        ticket, request, meter = self._ticket, self._call.request, self._meter
        decision, usage = ticket.decision, self._usage
        told = None if usage is None or request.sequences > 1 else usage.prompt_tokens
        timed = request.streamed and meter.tokens > 0
        return RequestLine(
            request_id=self._public_id,
            tenant=request.tenant,
            model=request.model,
            tier=request.tier,
            backend=ticket.backend,
            decision=None if decision is None else decision.outcome.value,
            reason=self._refused,
            end=end,
            attained=attained,
            streamed=request.streamed,
            slo_stated=request.slo_stated,
            promised_ttft_s=request.slo.ttft_s,
            promised_tpot_s=request.slo.tpot_s,
            sequences=request.sequences,
            prompt_tokens=request.prompt_tokens if told is None else told,
            cached_tokens=None if usage is None else usage.cached_tokens,
            output_tokens=ticket.output_tokens,
            merged=ticket.merged,
            seconds=now_s - request.arrival_s,
            ttft_s=meter.first_s - request.arrival_s if timed else None,
            tpot_s=meter.mean_tpot_s * request.sequences if timed and meter.mean_tpot_s is not None else None,
            time=wall_clock(),
        )


def promise_of(request: Request, order: Open, now_s: float, delivery_s: float) -> Promise:
    """What the request was promised, as an engine is told that plans by it: times from now on, without what a
    token takes from the engine's step to the client."""
    ttft_s, tpot_s = request.slo.ttft_s, request.slo.tpot_s
    if ttft_s is not None:
        ttft_s += request.arrival_s - now_s - delivery_s
    return Promise(ttft_s, tpot_s, order.decision.outcome is Outcome.RELEGATED)


def predicted(decision: Decision) -> tuple[float | None, float | None]:
    """(TTFT from arrival on, TPOT) that were predicted for the chosen backend, in seconds."""
    for candidate in decision.candidates:
        if candidate.backend == decision.backend:
            return candidate.ttft_s, candidate.tpot_s
    return None, None


class Generator:
    """Reads, checks and serves requests of the generating routes."""

    def __init__(self, parts: Parts, instance: str) -> None:
        self._parts = parts
        self._instance = instance
        self._count = 0

    def new_id(self) -> str:
        """An id that no other request of any gateway has."""
        self._count += 1
        return f"{self._instance}-{self._count:x}"

    async def handle(
        self, http: web.BaseRequest, route: Route, body: bytes, caller: Caller, given_id: str | None
    ) -> web.StreamResponse:
        """Serve one request. Raises ApiError before anything was sent."""
        request_id = self.new_id()
        parts = self._parts
        call = await parts.parser.parse(
            route,
            body,
            http.headers,
            caller=caller,
            tiers=lambda: parts.live.now.tiers,
            request_id=request_id,
            arrival_s=parts.clock(),
        )
        async with parts.shell.admit(call.request) as ticket:
            return await Exchange(parts, http, call, given_id or request_id, ticket).run()
