"""Good traffic beside every kind of bad: nothing is lost, nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator

from gateway.app import Gateway
from tests.gateway.rig import (
    DONE,
    MODEL,
    ROLE,
    Client,
    Engine,
    chunk,
    client,
    engine,
    gateway,
    idle,
    settings_for,
    settled,
    until,
)

_GOOD = ROLE + chunk("a") + chunk(" b") + chunk(" c", "stop") + DONE
_BAD = (
    "overload",
    "overload_in_stream",
    "reject",
    "garbage",
    "noise",
    "cut",
    "ends_early",
    "error_later",
    "stall",
)
_WRONG = (b"{", b"[]", b'{"model":"nobody"}', b'{"model":"test-model"}', b"\xff\xfe")


async def _cancel_soon(ask: Client, behave: str, after_s: float) -> None:
    try:
        async with asyncio.timeout(after_s):
            await ask.read_chat(behave)
    except TimeoutError:
        pass


async def _wrong(ask: Client, body: bytes) -> None:
    async with ask.session.post(f"{ask.base}/v1/chat/completions", data=body) as answer:
        assert answer.status in {400, 404}
        assert "error" in await answer.json()


async def _good(ask: Client, seen: Counter[bytes]) -> None:
    status, body = await ask.read_chat()
    seen[body if status == 200 else b"%d" % status] += 1


def _open_upstreams(made: Gateway) -> int:
    """Answers of engines that the gateway has neither read to the end nor closed."""
    total = 0
    for member in made.fleet.members():
        upstream = member.adapter.upstream if member.adapter is not None else None
        total += getattr(upstream, "open_exchanges", 0)
    return total


async def test_good_traffic_garbage_and_500_cancels_leave_nothing_behind() -> None:
    rng = random.Random(7)
    seen: Counter[bytes] = Counter()
    settings = {"timeouts": {"stall_s": 0.5}, "policy": {"name": "round_robin"}, "log_requests": False}
    async with engine() as one, engine() as two:
        async with gateway(settings_for(one, two, **settings)) as made, client(made) as ask:
            gate = asyncio.Semaphore(100)

            async def limited(kind: int) -> None:
                async with gate:
                    if kind < 200:
                        await _good(ask, seen)
                    elif kind < 300:
                        await ask.read_chat(rng.choice(_BAD), stream=rng.random() < 0.9)
                    elif kind < 350:
                        await _wrong(ask, rng.choice(_WRONG))
                    else:
                        behave = rng.choice(("stall", "silent", "role_first", "flood", "good"))
                        await _cancel_soon(ask, behave, rng.uniform(0.0, 0.15))

            kinds = list(range(850))
            rng.shuffle(kinds)
            async with asyncio.TaskGroup() as tasks:
                for kind in kinds:
                    tasks.create_task(limited(kind))
            await settled(made)
            await until(lambda: not one.streams and not two.streams)
            counts = made.shell.counts
            assert seen[_GOOD] + seen[b"502"] + seen[b"503"] == 200
            assert seen[_GOOD] >= 150, seen
            assert made.view.conserved()
            assert idle(made)
            assert _open_upstreams(made) == 0
            assert counts.arrived == counts.finished + counts.failed + counts.refused + counts.cancelled
            assert counts.cancelled > 200
        await _no_sockets(one, two)


async def _no_sockets(*engines: Engine) -> None:
    """After the gateway is gone no engine has a connection left."""
    await until(lambda: not any(made.server.connections for made in engines))


async def test_pipelined_and_broken_http_is_told_as_json() -> None:
    async with engine() as one, gateway(settings_for(one)) as made:
        for junk, status in (
            (b"GARBAGE\r\n\r\n", b"400"),
            (b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: -4\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % i for i in range(500)) + b"\r\n", b"400"),
            (b"GET / HTTP/1.1\r\nh: " + b"x" * 100_000 + b"\r\n\r\n", b"400"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            writer.write(junk)
            answer = await reader.read(65_536)
            assert answer.split(b" ")[1] == status, junk[:40]
            assert b'"error"' in answer, junk[:40]
            writer.transport.abort()
        assert idle(made)


async def test_many_streams_with_random_cuts_are_identical() -> None:
    """The engine's bytes arrive in pieces cut anywhere; the client gets the same bytes."""
    rng = random.Random(3)
    async with engine() as one, gateway(settings_for(one, log_requests=False)) as made, client(made) as ask:
        whole = ROLE + b"".join(chunk(f"t{i}") for i in range(30)) + chunk("", "stop") + DONE
        for _ in range(20):
            cuts = sorted(rng.sample(range(1, len(whole)), 12))
            one.script = [whole[i:j] for i, j in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
            for usage in (True, False):
                _, body = await ask.read_chat(stream_options={"include_usage": True} if usage else None)
                assert body == whole
        await settled(made)
        assert idle(made)
        assert made.shell.counts.tokens == 40 * 30
        assert made.telemetry.merged_streams == 0


async def test_a_client_that_half_sends_its_body_is_told() -> None:
    settings = {"timeouts": {"body_s": 0.2}}
    async with engine() as one, gateway(settings_for(one, **settings)) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert (await reader.readline()).split(b" ")[1] == b"400"
        writer.transport.abort()


async def test_a_body_beyond_the_limit_is_413() -> None:
    async with (
        engine() as one,
        gateway(settings_for(one, limits={"body_bytes": 1000})) as made,
        client(made) as ask,
    ):
        async with ask.chat(messages=[{"role": "user", "content": "x" * 2000}]) as answer:
            assert answer.status == 413
            assert (await answer.json())["error"]["code"] == "body_too_large"

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b"x" * 100

        async with ask.session.post(f"{ask.base}/v1/completions", data=endless()) as answer:
            assert answer.status == 413


async def test_a_client_that_expects_100_continue_gets_it() -> None:
    async with engine() as one, gateway(settings_for(one)) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
        writer.write(head)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 Continue")
        writer.write(b"{}")
        assert (await reader.readline()).split(b" ")[1] == b"400"
        writer.transport.abort()


async def test_a_prompt_longer_than_any_backend_takes() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        prompt = {"model": MODEL, "prompt": [1] * 9_000}
        async with ask.session.post(f"{ask.base}/v1/completions", json=prompt) as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
        assert "8191" in error["message"]
        await settled(made)
        assert idle(made)
