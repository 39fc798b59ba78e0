"""10,000 streams cut by engines and cancelled by clients at random places leave nothing behind.

Engine and client are small protocols on loopback in this process, so the gateway is most of what is run.
"""

from __future__ import annotations

import asyncio
import gc
import random
import resource
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

import orjson
import pytest

from gateway.app import Gateway, running
from gateway.config import BackendSettings, LimitSettings, Settings
from state.contract import Store
from tests.gateway.rig import DONE, MODEL, OVERLOAD, PROFILE, ROLE, USAGE, chunk, idle, settled, until
from tiergate.root import wire

_STREAMS = 10_000
_TRACED_FROM = 8_000  # tracing memory makes everything slow
_MARK_AT = 9_000  # the last 2,000 decisions are kept, so a thousand of them are in what comes after
_AT_ONCE = 72
_GROWTH_BYTES = 2 << 20
_NUMBER = b"x-number: "


class Fate(Enum):
    """What becomes of a stream by the engine's doing."""

    WHOLE = "whole"
    CUT = "cut"  # the connection closes at a random byte of the answer, head included
    ENDS = "ends"  # the body ends in order, at a random byte
    GARBAGE = "garbage"  # something that is not HTTP
    NOISE = "noise"  # an event stream without events
    ERROR = "error"  # an error event at a random place
    BUSY = "busy"
    SILENT = "silent"  # no answer until the gateway gives up


class Leaving(Enum):
    """When the client goes away."""

    STAYS = "stays"
    EARLY = "early"  # before the answer's head: held, or waiting for the first token
    LATER = "later"  # some bytes into the stream


_FATES = (
    *((Fate.WHOLE, 60), (Fate.CUT, 14), (Fate.ENDS, 6), (Fate.GARBAGE, 4), (Fate.NOISE, 4), (Fate.ERROR, 6)),
    *((Fate.BUSY, 5), (Fate.SILENT, 1)),
)
_LEAVINGS = ((Leaving.STAYS, 70), (Leaving.EARLY, 15), (Leaving.LATER, 15))


@dataclass(frozen=True, slots=True)
class Plan:
    """One stream: what its engine sends, in pieces, and when its client leaves."""

    number: int
    fate: Fate
    first_only: bool  # another backend that is tried after the first does well
    leaving: Leaving
    leave_after: int  # bytes, or milliseconds when early
    tokens: int
    pieces: int
    seed: int


def _plan(number: int, rng: random.Random) -> Plan:
    return Plan(
        number,
        rng.choices([fate for fate, _ in _FATES], [weight for _, weight in _FATES])[0],
        rng.random() < 0.5,
        rng.choices([leaving for leaving, _ in _LEAVINGS], [weight for _, weight in _LEAVINGS])[0],
        rng.randrange(1, 40) if rng.random() < 0.5 else rng.randrange(1, 2_000),
        rng.randrange(1, 8),
        rng.randrange(1, 4),
        rng.randrange(1 << 30),
    )


def _events(plan: Plan) -> list[bytes]:
    return [ROLE, *(chunk(f"{plan.number}.{index} ") for index in range(plan.tokens)), chunk("", "stop")]


class _Engine(asyncio.Protocol):
    """One connection of an engine: vLLM's few routes, and streams as planned."""

    def __init__(self, plans: Sequence[Plan], tried: Counter[int], wires: set[_Engine]) -> None:
        self._plans = plans
        self._tried = tried
        self._wires = wires
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not of that class
        self._wires.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._wires.discard(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end]
            at = head.lower().find(b"content-length: ")
            length = int(head[at + 16 :].split(b"\r\n")[0]) if at >= 0 else 0
            if len(self._data) < end + 4 + length:
                return
            body, self._data = self._data[end + 4 : end + 4 + length], self._data[end + 4 + length :]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        at = head.find(_NUMBER)
        if at < 0:
            card = {"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 8192}
            models = head.startswith(b"GET /v1/models")
            self._send_whole(orjson.dumps({"object": "list", "data": [card]}) if models else b"{}")
            return
        plan = self._plans[int(head[at + len(_NUMBER) :].split(b"\r\n")[0])]
        self._tried[plan.number] += 1
        fate = Fate.WHOLE if plan.first_only and self._tried[plan.number] > 1 else plan.fate
        self._stream(plan, fate, b"include_usage" in body, random.Random(plan.seed))

    def _send_whole(self, body: bytes, status: bytes = b"200 OK") -> None:
        kind = b"content-type: application/json\r\n"
        self._write(b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\n\r\n%b" % (status, kind, len(body), body))

    def _stream(self, plan: Plan, fate: Fate, usage: bool, rng: random.Random) -> None:
        events = _events(plan)
        if fate is Fate.SILENT:
            return
        if fate is Fate.BUSY:
            self._send_whole(OVERLOAD[6:].strip(), b"503 Service Unavailable")
            return
        if fate is Fate.GARBAGE:
            self._write(rng.randbytes(rng.randrange(1, 400)))
            self._close()
            return
        if fate is Fate.ERROR:
            events.insert(rng.randrange(len(events) + 1), OVERLOAD)
        text = b"".join((*events, USAGE if usage else b"", DONE))
        if fate is Fate.NOISE:
            text = rng.randbytes(rng.randrange(1, 4_000))
        if fate is Fate.ENDS:
            text = text[: rng.randrange(len(text))]
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(plan.pieces))
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True) if i < j]
        sent = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        raw = [sent, *(b"%x\r\n%b\r\n" % (len(part), part) for part in parts), b"0\r\n\r\n"]
        if fate is Fate.CUT:
            whole = b"".join(raw)
            raw = [whole[: rng.randrange(len(whole))]]
        self._send_slowly(raw, fate is Fate.CUT)

    def _send_slowly(self, raw: list[bytes], close: bool) -> None:
        if self._transport is None:
            return
        if not raw:
            if close:
                self._close()
            return
        self._write(raw[0])
        asyncio.get_running_loop().call_later(0.002, self._send_slowly, raw[1:], close)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class _Client(asyncio.Protocol):
    """One request on one connection; `done` has what came, once the connection is over."""

    def __init__(self, plan: Plan) -> None:
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[bytes] = loop.create_future()
        self._plan = plan
        self._seen = bytearray()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        body = orjson.dumps(
            {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}], "stream": True}
        )
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        told = b"%b%d\r\ncontent-length: %d\r\n\r\n" % (_NUMBER, self._plan.number, len(body))
        self._transport.write(head + told + body)
        if self._plan.leaving is Leaving.EARLY:
            self._timer = asyncio.get_running_loop().call_later(
                self._plan.leave_after / 2e4, self._transport.abort
            )

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if self._plan.leaving is Leaving.LATER and len(self._seen) > self._plan.leave_after:
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.done.done():
            lost = f"connection lost: {exc!r}".encode()
            self.done.set_result(bytes(self._seen) or lost)


def _body(answer: bytes) -> tuple[int, bytes]:
    """Status and body of a whole HTTP answer; status 0 when there is none."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return 0, b""
    if b"chunked" not in head:
        return int(head[9:12]), rest
    parts: list[bytes] = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        parts.append(rest[:length])
        rest = rest[length + 2 :]
    return int(head[9:12]), b"".join(parts)


async def _one(plan: Plan, port: int, ends: Counter[str]) -> None:
    _, talk = await asyncio.get_running_loop().create_connection(lambda: _Client(plan), "127.0.0.1", port)
    answer = await talk.done
    if plan.leaving is not Leaving.STAYS:
        ends["left"] += 1
        return
    status, body = _body(answer)
    assert status in {200, 502, 503}, (plan, answer[:200])
    if status != 200:
        assert b'"error"' in body
        ends["refused"] += 1
        return
    whole = b"".join(_events(plan)) + DONE
    if b'"error"' in body:
        assert plan.fate is not Fate.WHOLE
        assert body.endswith(DONE)
        ends["broken"] += 1
    elif body == whole:
        ends["whole"] += 1
    else:
        # Ended after its last token was told, but in [DONE] or the usage event: as the engine sent it.
        assert plan.fate in {Fate.ENDS, Fate.CUT}
        assert whole[: -len(DONE)].rstrip() in body
        assert whole.startswith(body) or (whole[: -len(DONE)] + USAGE).startswith(body)
        ends["without [DONE]"] += 1


def _exchanges(made: Gateway) -> tuple[int, int]:
    """Answers of engines that are open, and sockets to engines, idle ones included."""
    exchanges = sockets = 0
    for member in made.fleet.members():
        upstream = member.adapter.upstream if member.adapter is not None else None
        exchanges += getattr(upstream, "open_exchanges", 0)
        sockets += getattr(upstream, "open_connections", 0)
    return exchanges, sockets


async def _run(plans: Sequence[Plan], port: int, ends: Counter[str]) -> None:
    waiting = iter(plans)

    async def worker() -> None:
        for plan in waiting:
            await _one(plan, port, ends)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(_AT_ONCE):
            tasks.create_task(worker())


async def _nothing_is_left(made: Gateway, store: Store) -> None:
    await settled(made)
    assert idle(made)
    assert not made.shell.tickets()
    assert _exchanges(made)[0] == 0
    for load in (await store.view()).values():
        assert not any((load.own.decodes, load.own.peak_kv_tokens, load.own.queued_prefill_tokens))
        assert not any(load.own.residents.values())


def _settings(ports: Sequence[int]) -> Settings:
    limits = LimitSettings(max_running_seqs=14)
    backends = [
        BackendSettings(url=f"http://127.0.0.1:{port}", name=f"e{port}", profile=PROFILE, limits=limits)
        for port in ports
    ]
    more = {"timeouts": {"head_s": 0.3, "stall_s": 1.0}, "health": {"every_s": 3600}, "log_requests": False}
    policy = {"name": "polyserve", "options": {"cooldown_s": 0.001, "max_attempts": 2}}
    return Settings.model_validate({"port": 0, "backends": backends, "tick_ms": 20, "policy": policy} | more)


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_10_000_streams_cut_and_cancelled_at_random_leave_nothing() -> None:
    rng = random.Random(11)
    plans = [_plan(number, rng) for number in range(_STREAMS)]
    loop = asyncio.get_running_loop()
    wires: set[_Engine] = set()
    tried: Counter[int] = Counter()
    ends: Counter[str] = Counter()
    before = asyncio.all_tasks()
    servers = [await loop.create_server(lambda: _Engine(plans, tried, wires), "127.0.0.1", 0) for _ in range(4)]
    settings = _settings([server.sockets[0].getsockname()[1] for server in servers])
    wiring = await asyncio.to_thread(wire, settings)
    started_s = time.perf_counter()
    try:
        async with running(settings, wiring) as made:
            await until(lambda: made.fleet.up == len(servers))
            own = len(asyncio.all_tasks())
            await _run(plans[:_TRACED_FROM], made.port, ends)
            await _nothing_is_left(made, wiring.store)
            tracemalloc.start(1)
            await _run(plans[_TRACED_FROM:_MARK_AT], made.port, ends)
            await _nothing_is_left(made, wiring.store)
            marked_bytes = _traced()
            await _run(plans[_MARK_AT:], made.port, ends)
            await _nothing_is_left(made, wiring.store)
            growth_bytes = _traced() - marked_bytes
            tracemalloc.stop()
            await until(lambda: len(asyncio.all_tasks()) <= own)
            await until(lambda: _exchanges(made)[1] == 0)  # idle ones are closed after a few seconds
            counts = made.shell.counts
            took_s = time.perf_counter() - started_s
    finally:
        tracemalloc.stop()
        for server in servers:
            server.close()
            await server.wait_closed()
    await until(lambda: not wires)
    assert asyncio.all_tasks() == before
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n{_STREAMS} streams in {took_s:.1f} s: {dict(ends)}; {counts}")
    print(f"memory traced from stream {_MARK_AT} to the last: {growth_bytes:+,} bytes; peak RSS {peak_mb:.0f} MB")
    assert counts.arrived == counts.finished + counts.failed + counts.refused + counts.cancelled
    assert counts.arrived > 0.9 * _STREAMS
    assert min(counts.finished, counts.failed, counts.refused, counts.cancelled, counts.retried) > 100, counts
    assert growth_bytes < _GROWTH_BYTES
