"""The load generator against a real server on a loopback port."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from aiohttp import web

from loadgen.client import LoadOptions, Progress, run_load
from loadgen.prompts import TokenIdPrompts, WordPrompts
from loadgen.results import LoadResult, predictions, refusals, summarise
from loadgen.target import Lengths, Route, Target
from scheduling.scoring import RequestEnd, judge
from scheduling.tiers import Slo
from tests.loadgen.conftest import DONE_EVENT, ROLE_EVENT, Server, stream_bytes, token_event, usage_event
from workloads.mix import TierMix, TierShare
from workloads.plan import PlannedRequest

EASY = Slo(60.0, 10.0)
MIX = TierMix((TierShare("chat", EASY, 1.0),))


def target(server: Server, lengths: Lengths = Lengths.EXACT, route: Route = Route.CHAT) -> Target:
    return Target(server.url, "m", WordPrompts(1), route=route, lengths=lengths)


def planned(count: int, *, gap_s: float = 0.0, measured: bool = True, tokens: int = 5) -> list[PlannedRequest]:
    return [
        PlannedRequest(index, index * gap_s, "chat", EASY, 12, tokens, measured=measured) for index in range(count)
    ]


async def load(server: Server, workload: Sequence[PlannedRequest], **options: float) -> LoadResult:
    return await run_load(target(server), workload, 1.0, LoadOptions(**options))  # type: ignore[arg-type]


def ends(result: LoadResult) -> list[RequestEnd]:
    return [item.record.end for item in result.results]


async def respond(request: web.Request, *parts: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for part in parts:
        await response.write(part)
        await asyncio.sleep(0.001)
    await response.write_eof()
    return response


async def test_every_request_is_sent_and_counted(server: Server) -> None:
    result = await load(server, planned(40, gap_s=0.005))
    score = summarise(result, MIX)
    assert ends(result) == [RequestEnd.FINISHED] * 40
    assert (score.offered, score.overall.attained, score.overall.output_tokens) == (40, 40, 200)
    assert [item.planned.index for item in result.results] == list(range(40))
    assert result.results[0].answer.backend == "b0"
    assert all(item.record.token_times_s[0] >= item.record.arrival_s for item in result.results)


async def test_what_is_sent(server: Server) -> None:
    await load(server, planned(1))
    body = server.bodies[0]
    assert server.headers[0]["x-slo-tier"] == "chat"
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("m", 5, True, True)
    message = body["messages"]
    assert isinstance(message, list)
    assert len(message[0]["content"].split()) == 12


async def test_the_true_length_goes_to_the_emulated_engine_only(server: Server) -> None:
    where = target(server, Lengths.EMULATED)
    body = where.body_of(planned(1, tokens=77)[0])
    assert b'"vllm_xargs":{"emulated_output_tokens":77}' in body
    assert b"max_tokens" not in body
    limited = Target(server.url, "m", WordPrompts(1), lengths=Lengths.EMULATED, max_tokens=500)
    assert b'"max_tokens":500' in limited.body_of(planned(1, tokens=77)[0])
    assert b'"max_tokens":900' in limited.body_of(planned(1, tokens=900)[0])


async def test_what_cannot_be_a_header_is_refused(server: Server) -> None:
    with pytest.raises(ValueError, match="API key cannot be sent"):
        Target(server.url, "m", WordPrompts(1), api_key="a\r\nx: y")


async def test_token_ids_go_to_completions(server: Server) -> None:
    where = Target(server.url, "m", TokenIdPrompts(1, 512), route=Route.COMPLETIONS)
    result = await run_load(where, planned(2), 1.0)
    assert ends(result) == [RequestEnd.FINISHED] * 2
    prompt = server.bodies[0]["prompt"]
    assert isinstance(prompt, list)
    assert len(prompt) == 12
    with pytest.raises(ValueError, match="completions route"):
        Target(server.url, "m", TokenIdPrompts(1, 512))


async def test_a_stalled_server_delays_no_arrival(server: Server) -> None:
    """The first answer comes only when the last request has arrived: a closed loop would wait for ever."""
    everyone = asyncio.Event()

    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        if len(server.bodies) == 100:
            everyone.set()
        await everyone.wait()
        return await respond(request, stream_bytes(5))

    server.handler = handle
    result = await load(server, planned(100, gap_s=0.002), drain_s=60.0)
    assert ends(result) == [RequestEnd.FINISHED] * 100
    assert result.peak_in_flight == 100
    # The wait is in every latency: nobody's first token came before the last arrival.
    last_s = result.results[-1].record.arrival_s
    assert all(item.record.token_times_s[0] >= last_s for item in result.results)
    assert all((judge(item.record).ttft_s or 0) >= last_s - item.record.arrival_s for item in result.results)


async def test_latency_counts_from_the_scheduled_arrival(server: Server) -> None:
    """A generator that is two seconds late has two seconds in its TTFT, and says so."""
    late = PlannedRequest(0, -2.0, "chat", Slo(1.0, 1.0), 12, 5)
    result = await run_load(target(server), [late], 1.0)
    item = result.results[0]
    assert item.lateness_s >= 2.0
    assert (judge(item.record).ttft_s or 0) >= 2.0
    assert not judge(item.record).attained
    assert (result.timekeeping.lateness_max_s or 0) >= 2.0


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
async def test_tokens_are_counted_right_however_the_bytes_are_cut(server: Server, size: int) -> None:
    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        data = stream_bytes(23)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for start in range(0, len(data), size):
            await response.write(data[start : start + size])
        await response.write_eof()
        return response

    server.handler = handle
    result = await load(server, planned(3))
    assert [judge(item.record).output_tokens for item in result.results] == [23] * 3
    assert not any(item.counts_estimated for item in result.results)


async def test_usage_corrects_events_of_several_tokens(server: Server) -> None:
    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        events = [token_event(" two words", finish="stop" if last else None) for last in (False, False, True)]
        return await respond(request, *events, usage_event(7), DONE_EVENT)

    server.handler = handle
    result = await load(server, planned(1))
    item = result.results[0]
    assert item.counts_estimated
    assert judge(item.record).output_tokens == 7
    assert item.record.token_counts is not None
    assert sorted(item.record.token_counts) == [2, 2, 3]


async def test_answers_in_one_piece_are_judged_by_their_end(server: Server) -> None:
    workload = [PlannedRequest(0, 0.0, "chat", EASY, 12, 5, streamed=False)]
    result = await load(server, workload)
    record = result.results[0].record
    assert (record.end, record.output_tokens, record.streamed) == (RequestEnd.FINISHED, 5, False)
    assert "stream" not in server.bodies[0]
    assert judge(record).ttft_s is None


ABORT_EVENT = b'data: {"choices":[{"delta":{},"finish_reason":"abort"}]}\n\n'
ERROR = {"error": {"message": "why", "type": "kind", "param": None, "code": "saturated"}}


@pytest.mark.parametrize(
    ("status", "end", "reason"),
    [
        (429, RequestEnd.REFUSED, "saturated"),
        (503, RequestEnd.REFUSED, "saturated"),
        (400, RequestEnd.FAILED, "saturated"),
        (500, RequestEnd.FAILED, "saturated"),
    ],
)
async def test_errors_are_refusals_or_failures(server: Server, status: int, end: RequestEnd, reason: str) -> None:
    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        return web.json_response(ERROR, status=status, headers={"retry-after-ms": "1500"})

    server.handler = handle
    result = await load(server, planned(3))
    assert ends(result) == [end] * 3
    assert refusals(result.results) == {reason: 3}
    assert result.results[0].answer.message == "why"
    assert result.results[0].answer.retry_after_s == pytest.approx(1.5)
    assert summarise(result, MIX).attainment == 0.0


@pytest.mark.parametrize(
    ("parts", "end", "reason"),
    [
        ((b'data: {"error":{"message":"busy","code":503}}\n\n',), RequestEnd.REFUSED, "error"),
        ((token_event(), b'data: {"error":{"message":"x","code":503}}\n\n'), RequestEnd.FAILED, "error"),
        ((token_event(),), RequestEnd.FAILED, "stream_broken"),
        ((b"data: nonsense\n\n",), RequestEnd.FAILED, "stream_broken"),
        (
            (ROLE_EVENT, ABORT_EVENT),
            RequestEnd.FAILED,
            "aborted",
        ),
    ],
)
async def test_streams_that_go_wrong(
    server: Server, parts: tuple[bytes, ...], end: RequestEnd, reason: str
) -> None:
    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        return await respond(request, *parts)

    server.handler = handle
    result = await load(server, planned(1))
    assert (result.results[0].record.end, result.results[0].record.reason) == (end, reason)


async def test_a_dead_server_loses_no_request(server: Server) -> None:
    nobody = Target("http://127.0.0.1:1/v1", "m", WordPrompts(1))
    result = await run_load(nobody, planned(5), 1.0)
    assert refusals(result.results) == {"connection": 5}


async def test_what_does_not_end_is_unfinished_and_missed(server: Server) -> None:
    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(token_event())
        await asyncio.sleep(60)
        return response

    server.handler = handle
    result = await load(server, planned(4), drain_s=0.3)
    assert ends(result) == [RequestEnd.UNFINISHED] * 4
    score = summarise(result, MIX)
    assert (score.overall.unfinished, score.overall.attained, score.overall.output_tokens) == (4, 0, 4)


async def test_too_many_open_requests_fail_and_delay_nobody(server: Server) -> None:
    release = asyncio.Event()

    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        await release.wait()
        return await respond(request, stream_bytes(5))

    def watch(now: Progress) -> None:
        if now.sent == 10:
            release.set()

    server.handler = handle
    options = LoadOptions(max_in_flight=4, progress_s=0.05)
    result = await run_load(target(server), planned(10, gap_s=0.001), 1.0, options, watch)
    assert refusals(result.results) == {"generator_limit": 6}
    assert ends(result).count(RequestEnd.FINISHED) == 4


async def test_warm_up_is_sent_but_not_scored_and_cool_down_ends_with_the_measured(server: Server) -> None:
    workload = [
        *planned(5, measured=False),
        PlannedRequest(5, 0.05, "chat", EASY, 12, 5),
        PlannedRequest(6, 500.0, "chat", EASY, 12, 5, measured=False),
    ]
    result = await load(server, workload, drain_s=60.0)
    assert len(server.bodies) == 6
    assert summarise(result, MIX).offered == 1


async def test_a_server_slower_than_the_measured_window_is_followed_to_the_end(server: Server) -> None:
    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        await asyncio.sleep(0.3)
        return await respond(request, stream_bytes(5))

    server.handler = handle
    result = await run_load(target(server), planned(3), 0.01)
    assert ends(result) == [RequestEnd.FINISHED] * 3


async def test_progress_ends_with_the_whole(server: Server) -> None:
    seen: list[Progress] = []
    options = LoadOptions(progress_s=0.01)
    await run_load(target(server), planned(20, gap_s=0.01), 1.0, options, seen.append)
    last = seen[-1]
    assert (last.sent, last.planned, last.in_flight, last.tokens) == (20, 20, 0, 100)
    assert (last.tiers[0].tier, last.tiers[0].attained) == ("chat", 20)


async def test_cancelling_a_load_closes_its_requests(server: Server) -> None:
    gone = asyncio.Event()

    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await asyncio.sleep(60)
        finally:
            gone.set()
        return response

    server.handler = handle
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await load(server, planned(1))
    async with asyncio.timeout(10):
        await gone.wait()


async def test_predictions_are_read_from_headers(server: Server) -> None:
    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "x-tiergate-tier": "fast",
                "x-tiergate-decision": "promoted",
                "x-tiergate-queue-ms": "12.5",
                "x-tiergate-ttft-ms": "1000000",
                "x-tiergate-tpot-ms": "nonsense",
                "x-tiergate-emulated": "1",
            }
        )
        await response.prepare(request)
        await response.write(stream_bytes(5))
        await response.write_eof()
        return response

    server.handler = handle
    result = await load(server, planned(2))
    answer = result.results[0].answer
    assert (answer.tier, answer.decision, answer.queue_s, answer.emulated) == ("fast", "promoted", 0.0125, True)
    scores = predictions(result.results)
    assert (scores.ttft.count, scores.tpot.count) == (2, 0)
    assert (scores.ttft.bias or 0) > 1
