"""Streams through a running gateway: bytes, peeking, retries, failures, cancels, back-pressure."""

from __future__ import annotations

import asyncio
from importlib import resources
from pathlib import Path

import orjson
import pytest

from adapters.contract import Failure, UpstreamCall, UpstreamError, UpstreamResponse
from gateway.app import running
from gateway.config import BackendSettings, LimitSettings
from tests.gateway.rig import (
    DONE,
    MODEL,
    PROFILE,
    ROLE,
    USAGE,
    WHOLE,
    chunk,
    client,
    engine,
    gateway,
    idle,
    settings_for,
    settled,
    until,
)
from tiergate.root import wire

_SCRIPT = ROLE + chunk("a") + chunk(" b") + chunk(" c", "stop") + DONE


def _shipped(name: str) -> bytes:
    return (resources.files("profiles") / "shipped" / f"{name}.json").read_bytes()


async def test_a_stream_passes_unchanged_with_answer_headers() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        async with ask.chat(headers={"x-request-id": "mine-1"}) as answer:
            body = await answer.read()
        assert body == _SCRIPT
        assert answer.status == 200
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["x-tiergate-tier"] == "chat"
        assert answer.headers["x-tiergate-backend"] == "e0"
        assert answer.headers["x-tiergate-decision"] in {"own_tier", "claimed"}
        assert float(answer.headers["x-tiergate-queue-ms"]) >= 0
        await settled(made)
        assert idle(made)
        assert made.shell.counts.finished == 1
        assert made.shell.counts.tokens == 3


async def test_the_usage_that_only_we_asked_for_is_taken_out() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        _, body = await ask.read_chat()
        assert one.seen[-1]["stream_options"] == {"include_usage": True}
        assert body == _SCRIPT
        _, body = await ask.read_chat(stream_options={"include_usage": True})
        assert body == _SCRIPT.replace(DONE, USAGE + DONE)


async def test_a_whole_answer_passes_unchanged() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        status, body = await ask.read_chat(stream=False)
        assert (status, body) == (200, WHOLE)
        await settled(made)
        assert made.shell.counts.tokens == 3
        assert idle(made)


async def test_roles_and_comments_do_not_end_the_wait_for_the_first_token() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(ask.read_chat("role_first"))
            await until(lambda: one.streams > 0)
            await asyncio.sleep(0.1)
            assert [ticket.stage.value for ticket in made.shell.tickets()] == ["opening"]
            one.release.set()
        assert asking.result() == (200, b": hello\n\n" + _SCRIPT)


async def test_an_overload_goes_to_another_backend_before_the_first_byte() -> None:
    async with engine() as bad, engine() as good:
        for behaviour in ("overload", "overload_in_stream", "garbage", "noise"):
            bad.always = behaviour
            settings = settings_for(bad, good, policy={"name": "round_robin"})
            async with gateway(settings) as made, client(made) as ask:
                answers = [await ask.read_chat() for _ in range(4)]
                assert answers == [(200, _SCRIPT)] * 4, behaviour
                assert made.shell.counts.retried >= 1
                await settled(made)
                assert idle(made)


async def test_comments_without_end_are_not_read_for_ever() -> None:
    """Megabytes before a first token: the gateway gives up in the second one, and asks another backend."""
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        status, body = await ask.read_chat("comments")
        error = orjson.loads(body)["error"]
        assert (status, error["code"]) == (502, "broken")
        assert "no token in the first" in error["message"]
        await until(lambda: not one.streams)
        assert one.sent_bytes < 16_000_000
        await settled(made)
        assert idle(made)
    async with engine() as one, engine() as two:
        one.always = "comments"
        async with (
            gateway(settings_for(one, two, policy={"name": "round_robin"})) as made,
            client(made) as ask,
        ):
            assert [await ask.read_chat() for _ in range(4)] == [(200, _SCRIPT)] * 4
            assert made.shell.counts.retried >= 1
            await settled(made)
            assert idle(made)


async def test_when_every_backend_fails_the_client_is_told_once() -> None:
    async with engine() as one, engine() as two:
        one.always = two.always = "overload"
        async with gateway(settings_for(one, two)) as made, client(made) as ask:
            status, body = await ask.read_chat()
            error = orjson.loads(body)["error"]
            assert status == 502
            assert error["code"] == "overloaded"
            assert "busy" in error["message"]
            await settled(made)
            assert idle(made)
            assert made.shell.counts.refused == 1


async def test_the_engines_own_rejection_reaches_the_client() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        status, body = await ask.read_chat("reject", top_p=2)
        assert status == 400
        assert orjson.loads(body)["error"]["param"] == "top_p"
        await settled(made)
        assert idle(made)


async def test_a_rejection_as_a_streams_first_event_is_told_as_an_answer() -> None:
    """vLLM tells some mistakes of a request only in the stream that it has begun."""
    error = {"error": {"message": "top_p must be at most 1", "type": "BadRequestError", "code": 400}}
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        one.script = (ROLE, b"data: " + orjson.dumps(error) + b"\n\n", DONE)
        async with asyncio.timeout(10), ask.chat() as answer:  # a bound for a hang
            assert (answer.status, await answer.json()) == (400, error)
        await settled(made)
        assert idle(made)
        assert (made.shell.counts.failed, made.shell.counts.retried) == (1, 0)


async def test_a_request_that_cannot_be_put_into_http_is_the_clients_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(_: UpstreamCall) -> UpstreamResponse:
        raise UpstreamError(Failure.REJECTED, "the request cannot be put into HTTP", 400)

    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        monkeypatch.setattr(made.fleet.adapter("e0").upstream, "open", refuse)
        async with asyncio.timeout(10), ask.chat() as answer:  # a bound for a hang
            assert answer.status == 400
            assert "cannot be put into HTTP" in (await answer.json())["error"]["message"]
        await settled(made)
        assert idle(made)


async def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    settings = {"timeouts": {"stall_s": 0.3}}
    async with engine() as one, gateway(settings_for(one, **settings)) as made, client(made) as ask:
        for behaviour, code in (("cut", "broken"), ("ends_early", "broken"), ("stall", "timeout")):
            status, body = await ask.read_chat(behaviour)
            assert status == 200
            *_, last, done, rest = body.split(b"\n\n")
            assert (done, rest) == (b"data: [DONE]", b"")
            assert orjson.loads(last.removeprefix(b"data: "))["error"]["code"] == code
            await settled(made)
            assert idle(made)
        assert made.shell.counts.failed == 3
        await until(lambda: not one.streams)


async def test_an_error_event_in_the_middle_is_passed_on_and_counts_as_failed() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        _, body = await ask.read_chat("error_later")
        assert body.startswith(ROLE + chunk("a"))
        assert body.count(b'"error"') == 1
        await settled(made)
        assert made.shell.counts.failed == 1


async def test_a_client_that_leaves_aborts_the_engine() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        async with ask.chat("stall") as answer:
            await answer.content.readany()
            answer.close()
        await until(lambda: not one.streams)
        await settled(made)
        assert one.disconnects == 1
        assert made.shell.counts.cancelled == 1
        assert idle(made)


async def test_a_client_that_leaves_before_any_byte_aborts_the_engine() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        for behaviour in ("silent", "role_first"):
            async with asyncio.TaskGroup() as tasks:
                asking = tasks.create_task(ask.read_chat(behaviour))
                await until(lambda: one.streams > 0)
                asking.cancel()
            await until(lambda: not one.streams)
            await settled(made)
            assert idle(made)
        assert made.shell.counts.cancelled == 2


async def test_a_held_request_leaves_the_queue_when_its_client_goes() -> None:
    limits = LimitSettings(max_running_seqs=1)
    async with engine() as one, gateway(settings_for(one, engine_limits=limits)) as made, client(made) as ask:
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(ask.read_chat("wait"))
            await until(lambda: one.streams > 0)
            second = tasks.create_task(ask.read_chat())
            third = tasks.create_task(ask.read_chat())
            await until(lambda: made.shell.held >= 2)
            second.cancel()
            await until(lambda: made.shell.held <= 1)
            assert len(one.seen) == 1
            assert made.view.conserved()
            one.release.set()
        assert first.result()[0] == third.result()[0] == 200
        await settled(made)
        assert made.shell.counts.cancelled == 1
        assert idle(made)


async def test_long_holds_are_kept_alive_with_comments() -> None:
    limits = LimitSettings(max_running_seqs=1)
    settings = settings_for
    async with (
        engine() as one,
        gateway(settings(one, engine_limits=limits, hold={"keep_alive_s": 0.05})) as made,
        client(made) as ask,
    ):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask.read_chat("wait"))
            await until(lambda: one.streams > 0)
            held = tasks.create_task(ask.read_chat())
            await until(lambda: made.shell.held >= 1)
            await asyncio.sleep(0.3)
            one.release.set()
        status, body = held.result()
        assert status == 200
        comments, events = body.split(b"data: ", 1)
        assert comments.startswith(b": ")
        assert b"data: " + events == _SCRIPT


async def test_a_refusal_after_a_kept_alive_hold_is_an_error_event() -> None:
    limits = LimitSettings(max_running_seqs=1)
    more = {"hold": {"keep_alive_s": 0.05}, "engine_limits": limits}
    async with engine() as one, gateway(settings_for(one, **more)) as made, client(made) as ask:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask.read_chat("wait"))
            await until(lambda: one.streams > 0)
            status, body = await ask.read_chat(headers={"x-slo-tier": "chat", "x-slo-ttft-ms": "300"})
            one.release.set()
        assert status == 200
        *_, last, _, _ = body.split(b"\n\n")
        assert orjson.loads(last.removeprefix(b"data: "))["error"]["code"] == "saturated"


async def test_a_refusal_says_when_to_come_back() -> None:
    limits = LimitSettings(max_running_seqs=1)
    async with engine() as one, gateway(settings_for(one, engine_limits=limits)) as made, client(made) as ask:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask.read_chat("wait"))
            await until(lambda: one.streams > 0)
            async with ask.chat(headers={"x-slo-tier": "chat", "x-slo-ttft-ms": "200"}) as answer:
                error = orjson.loads(await answer.read())["error"]
            one.release.set()
        assert answer.status == 429
        assert error["code"] == "saturated"
        assert int(answer.headers["Retry-After"]) >= 1
        assert float(answer.headers["retry-after-ms"]) > 0
        async with ask.chat(headers={"x-slo-ttft-ms": "0.01"}) as answer:
            assert answer.status == 429
            assert answer.headers["x-should-retry"] == "false"
        await settled(made)
        assert idle(made)
        assert made.shell.counts.refused == 2


async def test_a_slow_reader_holds_the_engine_back() -> None:
    async with engine() as one, gateway(settings_for(one)) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port, limit=1024)
        body = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-behave: flood\r\ncontent-length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await writer.drain()
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        try:
            before = -1
            async with asyncio.timeout(10):
                while one.sent_bytes != before and one.sent_bytes < 32_000_000:
                    before = one.sent_bytes
                    await asyncio.sleep(0.3)
            assert one.sent_bytes < 32_000_000, "the engine was not held back"
        finally:
            writer.transport.abort()
        await settled(made)
        assert idle(made)


async def test_other_apis_stream_unchanged_and_are_counted() -> None:
    anthropic = [
        b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":7}}}\n\n',
        b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ]
    responses = [
        b'event: response.created\ndata: {"type":"response.created","response":{"instructions":"text"}}\n\n',
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n',
        b'data: {"type":"response.completed","response":{"usage":{"output_tokens":1}}}\n\n',
    ]
    completions = [b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\n', DONE]
    messages = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        for path, script, more, tokens in (
            ("/v1/messages", anthropic, messages, 1),
            ("/v1/responses", responses, {"input": "x"}, 1),
            ("/v1/completions", completions, {"prompt": "x"}, 3),  # by the engine's usage
        ):
            one.script = script
            before = made.shell.counts.tokens
            body = {"model": MODEL, "stream": True} | more
            async with ask.session.post(ask.base + path, json=body) as answer:
                assert (answer.status, await answer.read()) == (200, b"".join(script)), path
            await settled(made)
            assert made.shell.counts.tokens == before + tokens, path
        assert made.shell.counts.finished == 3
        assert idle(made)


async def test_plain_questions_are_passed_to_an_engine() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        async with ask.session.post(f"{ask.base}/tokenize", json={"model": MODEL, "prompt": "x"}) as answer:
            assert (await answer.json())["count"] == 3
            assert answer.headers["x-tiergate-backend"] == "e0"
        async with ask.session.get(f"{ask.base}/v1/models") as answer:
            assert [card["id"] for card in (await answer.json())["data"]] == [MODEL]
        async with ask.session.get(f"{ask.base}/v1/models/nope") as answer:
            assert answer.status == 404


async def test_draining_finishes_streams_and_lets_nobody_in() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        async with asyncio.TaskGroup() as tasks:
            open_stream = tasks.create_task(ask.read_chat("role_first"))
            await until(lambda: one.streams > 0)
            draining = tasks.create_task(made.drain(10))
            await asyncio.sleep(0.05)
            async with ask.session.get(f"{ask.base}/readyz") as answer:
                assert answer.status == 503
            assert (await ask.read_chat())[0] == 503
            assert not draining.done()
            one.release.set()
        assert open_stream.result() == (200, b": hello\n\n" + _SCRIPT)
        assert draining.result() == 0


async def test_streams_that_outlast_the_grace_are_cut() -> None:
    async with engine() as one:
        async with gateway(settings_for(one)) as made, client(made) as ask, ask.chat("stall") as answer:
            await answer.content.readany()
            assert await made.drain(0.05) == 1
        await until(lambda: not one.streams)
        assert idle(made)


async def test_shutting_does_not_wait_for_a_client_that_does_not_read_nor_for_a_silent_engine() -> None:
    async with engine() as one:
        for behaviour in ("flood", "stall", "silent"):
            body = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True})
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-behave: {behaviour}\r\n"
            async with asyncio.timeout(15):
                async with gateway(settings_for(one)) as made:
                    _, writer = await asyncio.open_connection("127.0.0.1", made.port, limit=1024)
                    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                    await until(lambda: one.streams > 0)
                    await asyncio.sleep(0.2)
                assert idle(made)
            await until(lambda: one.streams == 0)
            writer.transport.abort()


async def test_without_any_backend_the_answer_is_503() -> None:
    async with engine() as one:
        settings = settings_for(one)
    async with gateway(settings, up=0) as made, client(made) as ask:
        status, body = await ask.read_chat()
        assert status == 503
        assert orjson.loads(body)["error"]["code"] == "no_backend"
        async with ask.session.get(f"{ask.base}/readyz") as answer:
            assert answer.status == 503


async def test_a_backend_that_goes_down_and_comes_back() -> None:
    health = {"every_s": 0.1, "failures": 1}
    async with (
        engine() as one,
        engine() as two,
        gateway(settings_for(one, two, health=health)) as made,
        client(made) as ask,
    ):
        one.down = True
        await until(lambda: made.fleet.up <= 1)
        assert (await ask.read_chat())[0] == 200
        assert len(two.seen) == 1
        one.down = False
        await until(lambda: made.fleet.up >= 2)


async def test_a_backend_is_down_after_exactly_as_many_failures_as_configured() -> None:
    for failures in (1, 2, 3):
        health = {"every_s": 3600, "failures": failures}
        async with engine() as one, gateway(settings_for(one, health=health)) as made:
            one.down = True
            before = one.health_asked
            made.fleet.suspect("e0")
            await until(lambda: not made.fleet.up)
            assert one.health_asked - before == failures


async def test_one_backend_that_cannot_be_used_does_not_end_the_others(tmp_path: Path) -> None:
    """Its profile is gone when it is wanted, though it was there at the start; it is tried again."""
    profile = tmp_path / "own.json"
    shipped = await asyncio.to_thread(_shipped, PROFILE)
    profile.write_bytes(shipped)
    async with engine() as one, engine() as two:
        lost = BackendSettings(url=two.url, name="lost", profile=str(profile))
        settings = settings_for(one)
        settings = settings.model_copy(update={"backends": (*settings.backends, lost)})
        wiring = await asyncio.to_thread(wire, settings)
        profile.unlink()
        async with running(settings, wiring) as made, client(made) as ask:
            await until(lambda: all(member.adapter is not None for member in made.fleet.members()))
            member = made.fleet.members()[1]
            await until(lambda: member.problem is not None)
            assert "own.json" in (member.problem or "")
            assert (await ask.read_chat())[0] == 200
            profile.write_bytes(shipped)
            await until(lambda: made.fleet.up == 2)
