"""Engines that put several tokens into one event: exact at the end, nearly right before, nothing wrong learned."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import orjson
import pytest

from gateway.config import TokenSettings
from gateway.dispatch import Shell
from gateway.merged import UNKNOWN_RATE, TextRates
from gateway.pace import Pace, StepSample
from gateway.relay import Limits, Opened, Relay
from gateway.sse import Api, SseScanner
from gateway.ticket import Stage, Ticket
from scheduling.requests import Request
from scheduling.scoring import DeadlineMeter
from scheduling.tiers import Slo
from tests.gateway.rig import DONE, ROLE, chunk, client, engine, gateway, idle, settings_for, settled

_PLAIN = [ROLE, *(chunk("abcd") for _ in range(40)), chunk("", "stop"), DONE]
_MERGED = [ROLE, *(chunk("abcd" * 2) for _ in range(8)), *(chunk("abcd" * 3) for _ in range(8)), chunk("", "stop")]
_MERGED_TOKENS = 8 * 2 + 8 * 3


def _ticket(request: Request) -> Ticket:
    ticket = Ticket(cast("Shell", None), request)  # nobody asks the shell anything here
    ticket.backend, ticket.lease_id = "b", request.request_id
    return ticket


class _Response:
    """An engine's answer, one read an event; all come at the same moment."""

    status = 200
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, events: list[bytes]) -> None:
        self._events = events

    async def read(self) -> bytes:
        return self._events.pop(0) if self._events else b""

    async def read_all(self, limit_bytes: int) -> bytes:
        raise NotImplementedError

    def abort(self) -> None: ...

    def release(self) -> None: ...


class _Sink:
    def __init__(self) -> None:
        self.seen: list[bytes] = []

    async def write(self, data: bytes) -> None:
        self.seen.append(data)


def _taught() -> TextRates:
    rates = TextRates()
    for _ in range(6):
        rates.learn("m", 4 * 40, 40)
    return rates


async def _streamed(rates: TextRates, events: list[bytes]) -> tuple[Ticket, DeadlineMeter]:
    request = Request("r", "m", "chat", Slo(1.0, 0.05), 10, 0.0)
    ticket, meter, sink = _ticket(request), DeadlineMeter(request.slo, 0.0), _Sink()
    opened = Opened(_Response(list(events)), SseScanner(Api.CHAT), b"")
    relay = Relay(Limits(1 << 20, 1 << 20, 1.0), lambda: 2.0)
    assert await relay.stream(ticket, opened, meter, sink, rates.of("m")) is None
    assert b"".join(sink.seen) == b"".join(events)
    return ticket, meter


async def test_the_text_tells_in_the_stream_that_events_carry_several_tokens() -> None:
    ticket, meter = await _streamed(_taught(), [*_MERGED, DONE])
    assert ticket.merged
    assert ticket.output_tokens == pytest.approx(_MERGED_TOKENS, abs=2)
    assert meter.tokens == ticket.output_tokens


async def test_events_of_one_token_are_counted_as_they_are() -> None:
    uneven = [ROLE, *(chunk("abcdefgh" if i % 4 == 0 else "abc") for i in range(40)), chunk("", "stop"), DONE]
    for events in (_PLAIN, uneven):
        ticket, meter = await _streamed(_taught(), events)
        assert (ticket.merged, ticket.output_tokens, meter.tokens) == (False, 40, 40)


async def test_before_anything_is_learned_an_event_is_a_token() -> None:
    rates = TextRates()
    assert rates.of("m") is UNKNOWN_RATE
    ticket, _ = await _streamed(rates, [*_MERGED, DONE])
    assert (ticket.merged, ticket.output_tokens) == (False, 16)


def test_models_whose_streams_differ_are_given_more_room() -> None:
    same, mixed = TextRates(), TextRates()
    for index in range(20):
        same.learn("m", 400, 100)
        mixed.learn("m", 250 if index % 2 else 550, 100)
    assert same.of("m").wide_bytes == pytest.approx(1.3 * 4)
    assert mixed.of("m").wide_bytes > 7


@pytest.mark.parametrize(
    ("text", "size"), [("abc", 3), ('say "x" now', 13), ("back\\slash", 11), ("line\n", 6), ("ü", 2)]
)
def test_the_text_of_an_event_is_measured_as_it_stands(text: str, size: int) -> None:
    scanner = SseScanner(Api.CHAT)
    scanner.feed(chunk(text))
    assert (scanner.text_bytes, scanner.plain) == (size, True)
    tool = {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}}]}
    scanner.feed(b"data: " + orjson.dumps(tool) + b"\n\n")
    assert (scanner.text_bytes, scanner.plain) == (size, False)


async def test_the_engines_usage_corrects_every_count() -> None:
    """Every stream's usage is asked for, so also the first merged one is counted exactly, byte-identical."""
    lines: list[bytes] = []
    async with engine() as one, gateway(settings_for(one), write_log=lines.append) as made, client(made) as ask:
        one.script, one.usage_tokens = [*_MERGED, DONE], _MERGED_TOKENS + 1  # one ends the answer
        async with ask.chat(headers={"x-request-id": "merged"}) as answer:
            assert await answer.read() == b"".join(one.script)
        one.script, one.usage_tokens = _PLAIN, 41
        async with ask.chat(headers={"x-request-id": "plain"}) as answer:
            assert await answer.read() == b"".join(one.script)
        await settled(made)
        assert idle(made)
        assert made.shell.counts.tokens == _MERGED_TOKENS + 1 + 41
        assert (made.telemetry.merged_streams, made.telemetry.merged_tokens) == (1, _MERGED_TOKENS - 16)
        for name, merged in (("merged", True), ("plain", False)):
            async with ask.session.get(
                f"{ask.base}/admin/v1/decisions/{name}", headers={"authorization": "Bearer secret"}
            ) as answer:
                assert (await answer.json())["merged_events"] is merged
        async with ask.session.get(f"{ask.base}/metrics") as answer:
            text = await answer.text()
        assert "tiergate_merged_streams_total 1.0" in text
        await asyncio.to_thread(made.log.flush)
    told = {line["request_id"]: line for line in map(orjson.loads, b"".join(lines).splitlines())}
    assert (told["merged"]["output_tokens"], told["merged"]["merged"]) == (_MERGED_TOKENS + 1, True)
    assert (told["plain"]["output_tokens"], told["plain"]["merged"]) == (41, False)


class _Learner:
    def __init__(self) -> None:
        self.steps: list[StepSample] = []

    def learn_step(self, sample: StepSample) -> None:
        self.steps.append(sample)

    def learn_prefill(self, sample: object) -> None: ...


@pytest.mark.parametrize(("per_event", "step_s"), [(1.0, 0.02), (1.2, 0.02 / 1.2), (2.4, None)])
def test_steps_are_not_learned_from_events_that_carry_many_tokens(per_event: float, step_s: float | None) -> None:
    pace, learner = Pace(), _Learner()
    pace.learner = learner
    request = Request("r", "m", "chat", Slo(None, None), 10, 0.0)
    ticket = _ticket(request)
    pace.opening(ticket)
    pace.opened(ticket)
    for _ in range(50):  # as the last streams ended
        pace.told(ticket, per_event)
    ticket.stage, ticket.output_tokens = Stage.RUNNING, 1
    now_s = ticket.last_token_s = 1.0
    progress = 0
    for _ in range(60):
        now_s += 0.02
        ticket.output_tokens += 1
        ticket.last_token_s = now_s
        event = pace.look([ticket], now_s)
        progress = event[0].progress[0][1] if event else progress
    assert progress == pytest.approx(61 * per_event, rel=0.05)
    if step_s is None:
        assert not learner.steps
    else:
        assert learner.steps
        assert all(sample.step_s == pytest.approx(step_s, rel=0.01) for sample in learner.steps)
    learner.steps.clear()
    ticket.merged = True
    for _ in range(60):
        now_s += 0.02
        ticket.output_tokens += 1
        ticket.last_token_s = now_s
        pace.look([ticket], now_s)
    assert not learner.steps


def test_usage_is_asked_of_every_stream() -> None:
    assert TokenSettings().usage_every == 1
