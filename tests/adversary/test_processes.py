"""Signals, dying engines and faults on purpose: the gateway goes on, and what it says is true."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from tests.adversary.stand import Stand, body_of, chat, http, standing, start_engines, status_of, stopped


async def _streams(stand: Stand, count: int, **fields: object) -> list[bytes]:
    data = http(chat(stream=True, **fields))
    return list(await asyncio.gather(*(stand.send(data, wait_s=30.0) for _ in range(count))))


def _last_events(answer: bytes) -> list[bytes]:
    return [line for line in answer.splitlines() if line.startswith(b"data: ")][-2:]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda text: b"a: [", id="no YAML"),
        pytest.param(lambda text: b"tiers: 5", id="wrong type"),
        pytest.param(lambda text: text.replace(b'"t150"', b'"zz"', 1), id="unknown tier"),
        pytest.param(lambda text: b"", id="empty, as while an editor writes"),
        pytest.param(lambda text: b"\xff\xfe\0", id="no text"),
        pytest.param(lambda text: text.replace(b"http://127.0.0.1:", b"http://127.0.0.1:9", 1), id="no such port"),
    ],
)
async def test_a_broken_configuration_on_sighup_changes_nothing(
    tmp_path: Path, broken: Callable[[bytes], bytes]
) -> None:
    with standing(tmp_path, engines=1) as stand:
        good = stand.config.read_bytes()
        async with asyncio.TaskGroup() as tasks:
            streams = tasks.create_task(_streams(stand, 2, max_tokens=20))
            await asyncio.sleep(0.3)
            stand.config.write_bytes(broken(good))
            stand.gateway.signal(signal.SIGHUP)
        for answer in streams.result():
            assert _last_events(answer)[-1] == b"data: [DONE]"
        assert stand.gateway.poll() is None
        assert status_of(await stand.send(http(chat()))) == 200
        await stand.settled()


async def test_sigterm_cuts_streams_after_the_grace_time(tmp_path: Path) -> None:
    """A stream of a minute, a grace time of a second: the gateway may not wait for the stream's end."""
    with standing(tmp_path, engines=1, drain_grace_s=1) as stand:
        async with asyncio.TaskGroup() as tasks:
            answers = tasks.create_task(_streams(stand, 1, max_tokens=1500, ignore_eos=True))
            await asyncio.sleep(1.0)
            stand.gateway.signal(signal.SIGTERM)
            code = await _ended(stand, 12.0)
            answers.cancel()
        assert code == 0


async def _ended(stand: Stand, within_s: float) -> int | None:
    """The gateway's exit code, as soon as it has one."""
    for _ in range(int(within_s / 0.1)):
        code = stand.gateway.poll()
        if code is not None:
            return code
        await asyncio.sleep(0.1)
    return None


async def test_an_engine_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    with standing(tmp_path, health={"every_s": 0.3, "failures": 2}) as stand:
        state = await stand.state()
        backends = state["backends"]
        assert isinstance(backends, list)
        ports = [int(one["url"].rpartition(":")[2]) for one in backends]
        async with asyncio.TaskGroup() as tasks:
            streams = tasks.create_task(_streams(stand, 10, max_tokens=200, ignore_eos=True))
            await asyncio.sleep(0.8)
            stand.engines.signal(signal.SIGKILL)
        for answer in streams.result():
            told = (
                orjson.loads(_last_events(answer)[0].removeprefix(b"data: ")) if status_of(answer) == 200 else {}
            )
            assert status_of(answer) in {502, 503} or told["error"]["type"] == "upstream_error", answer[-300:]
        await _phase(stand, "down")
        answer = await stand.send(http(chat()))
        assert (status_of(answer), orjson.loads(body_of(answer))["error"]["code"]) == (503, "no_backend")
        with start_engines(ports, tmp_path):
            await _phase(stand, "up")
            assert status_of(await stand.send(http(chat()))) == 200
            await stand.settled()


async def _phase(stand: Stand, phase: str) -> None:
    """Wait until every backend is in this phase."""
    for _ in range(200):
        backends = (await stand.state())["backends"]
        assert isinstance(backends, list)
        if {one["phase"] for one in backends} == {phase}:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"the backends did not become {phase}")


async def test_engines_that_stand_still_are_waited_for(stand: Stand) -> None:
    async with asyncio.TaskGroup() as tasks:
        streams = tasks.create_task(_streams(stand, 5, max_tokens=40, ignore_eos=True))
        await asyncio.sleep(0.5)
        with stopped(stand.engines):
            await asyncio.sleep(1.5)
            assert status_of(await stand.send(http(b"", "/healthz", method="GET"))) == 200
    for answer in streams.result():
        assert _last_events(answer)[-1] == b"data: [DONE]"
        assert answer.count(b'"content"') >= 40
    await stand.settled()


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--fail-after-tokens", "3"), "broken"),
        (("--stall-after-tokens", "3"), "timeout"),
        (("--refuse-every", "1"), "overloaded"),
        (("--refuse-every", "1", "--refuse-in-stream"), "overloaded"),
    ],
)
async def test_a_faulty_engine_is_named_in_the_error(tmp_path: Path, flags: tuple[str, ...], code: str) -> None:
    with standing(tmp_path, *flags, engines=1, timeouts={"stall_s": 0.5}) as stand:
        for answer in await _streams(stand, 3, max_tokens=10):
            if status_of(answer) == 200:
                error = orjson.loads(_last_events(answer)[0].removeprefix(b"data: "))["error"]
                assert answer.count(b'"content"') >= 3
            else:
                error = orjson.loads(body_of(answer))["error"]
                assert status_of(answer) == 502
            assert (error["type"], error["code"]) == ("upstream_error", code)
        await stand.settled()
