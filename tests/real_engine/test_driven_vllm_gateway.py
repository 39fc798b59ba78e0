"""A real gateway drives a real vLLM, is killed, and comes back; all is seen over HTTP."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import yaml

from adapters.vllm import VllmAdapter
from deploy.server_process import ServerProcess
from tests.conftest import StartServer
from tests.real_engine.conftest import RealEngine
from tiergate_engine.control import EngineState, Mode, Orders
from tiergate_engine.drive import Rules
from tiergate_engine.steptime import RooflineStepTime

LAPSE_S = 3.0
LONGEST_S = 60.0
ADMIN = {"authorization": "Bearer secret"}
TIERS = [{"name": "tight", "ttft_ms": 100, "tpot_ms": 15}, {"name": "loose", "ttft_ms": 60_000, "tpot_ms": 1_000}]
# By it a step of some decodes takes 7 ms, and one with 3,000 prompt tokens half a second: tight streams lack that.
PROFILE = RooflineStepTime(c0_s=7e-3, per_token_s=45e-6, per_seq_s=80e-6, per_kv_s=4e-7, per_attention_s=8e-8)


@dataclass(slots=True)
class Answer:
    """What a client got of a stream so far."""

    tokens: int = 0
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Gateway:
    """How to start the gateway, and where it is."""

    url: str
    start: Callable[[], ServerProcess]


@pytest.fixture
async def driven(adapter: VllmAdapter) -> AsyncIterator[VllmAdapter]:
    """The engine, which forgets its orders behind the test."""
    await adapter.probe()
    await adapter.give_orders(Orders())
    yield adapter
    await adapter.give_orders(Orders())


@pytest.fixture
def gateway(
    vllm: RealEngine,
    driven: VllmAdapter,
    start_server: StartServer,
    free_port: Callable[[], int],
    tiergate_command: list[str],
    tmp_path: Path,
) -> Gateway:
    """A gateway that knows nothing of how long the engine's steps take."""
    port = free_port()
    config = tmp_path / "gateway.yaml"
    settings = {
        "backends": [{"url": vllm.url, "name": "one", "tier": "tight"}],
        "tiers": TIERS,
        "default_tier": "loose",
        "policy": {"name": "minimal"},
        "orders_lapse_s": LAPSE_S,
        "admin_token": "secret",
        "log_requests": False,
    }
    config.write_text(yaml.safe_dump(settings))
    command = [*tiergate_command, "serve", "--config", str(config), "--port", str(port)]
    return Gateway(f"http://127.0.0.1:{port}", partial(start_server, command, port, ready_path="/readyz"))


async def _stream(
    session: aiohttp.ClientSession, url: str, answer: Answer, prompt_tokens: int, tokens: int, tier: str = "loose"
) -> None:
    """Read a stream into `answer` until it ends. Raises aiohttp.ClientError when it breaks off."""
    body = {
        "model": "tiny",
        "prompt": [(id(answer) + index * 7) % 400 + 50 for index in range(prompt_tokens)],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with session.post(f"{url}/v1/completions", json=body, headers={"x-slo-tier": tier}) as got:
        assert got.status == 200, await got.text()
        async for line in got.content:
            if line.strip() == b"data: [DONE]":
                answer.ended = True
            elif line.startswith(b"data: "):
                answer.tokens += len(orjson.loads(line.removeprefix(b"data: "))["choices"][0]["token_ids"])


async def _breaks_off(session: aiohttp.ClientSession, url: str, answer: Answer) -> None:
    """A stream that is not read to its end, since its server dies."""
    with pytest.raises(aiohttp.ClientError):
        await _stream(session, url, answer, 50, 7_000)


async def _until(adapter: VllmAdapter, holds: Callable[[EngineState], bool]) -> EngineState:
    """The engine's state once it is so."""
    async with asyncio.timeout(LONGEST_S):
        while True:
            state = await adapter.read_state()
            if holds(state):
                return state
            await asyncio.sleep(0.05)


async def _backend(session: aiohttp.ClientSession, gateway: Gateway) -> dict[str, Any]:
    """What the gateway says of the engine."""
    async with session.get(f"{gateway.url}/admin/v1/state", headers=ADMIN) as answer:
        (told,) = (await answer.json())["backends"]
    found: dict[str, Any] = told
    return found


async def _renewed(adapter: VllmAdapter, orders: Orders) -> None:
    """Give orders again and again, so that the gateway leaves the engine to who gives them."""
    while True:
        await adapter.give_orders(orders)
        await asyncio.sleep(LAPSE_S / 10)


async def _promises_come_with_requests(
    session: aiohttp.ClientSession, vllm: RealEngine, adapter: VllmAdapter, gateway: Gateway
) -> None:
    """Tight streams through the gateway keep a long prompt, sent past it, from filling a step beside them.

    Orders with a profile of the test's own stand for that, as the gateway knows none yet. Nothing but a promise
    makes vLLM cut a prompt that fits its budget.
    """
    async with asyncio.timeout(LONGEST_S):
        while (await _backend(session, gateway))["engine"] != "vllm":  # noqa: ASYNC110 (another process's state)
            await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)  # it looks twice a second whether an engine takes promises
    tight = [Answer() for _ in range(3)]
    async with asyncio.TaskGroup() as tasks:
        giving = tasks.create_task(_renewed(adapter, Orders(Mode.DRIVEN, PROFILE, Rules())))
        await _until(adapter, lambda state: state.mode is Mode.DRIVEN)
        first = (await adapter.read_state()).steps
        streams = [tasks.create_task(_stream(session, gateway.url, one, 10, 150, "tight")) for one in tight]
        await _until(adapter, lambda state: state.running == 3)
        await _stream(session, vllm.url, Answer(), 3_000, 2)
        await asyncio.wait(streams)
        giving.cancel()
    assert [one.tokens for one in tight] == [150] * 3
    facts = (await adapter.read_steps(first)).facts
    chunks = [
        fact.step.prefill_tokens for fact in facts if fact.step.prefill_tokens and fact.step.decode_seqs == 3
    ]
    assert sum(chunks) > 2_500
    assert max(chunks) < 2_500


async def test_a_gateway_drives_is_killed_and_comes_back(
    vllm: RealEngine, driven: VllmAdapter, gateway: Gateway
) -> None:
    """The engine carries on alone, and then as stock; behind the restart it is driven again."""
    process = await asyncio.to_thread(gateway.start)
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        await _promises_come_with_requests(session, vllm, driven, gateway)

        # What the engine tells of its steps teaches the gateway, which then gives orders.
        await driven.give_orders(Orders())
        taught = Answer()
        await _stream(session, gateway.url, taught, 100, 300)
        state = await _until(driven, lambda state: state.mode is Mode.DRIVEN)
        assert (taught.tokens, taught.ended, state.failures) == (300, True, 0)
        told = await _backend(session, gateway)
        assert (told["calibrated"], told["driven"]) == (True, True)
        assert [one["rung"] for one in told["control"]][-1] == "unset", "it was not known at first"
        assert told["control"][0]["rung"] == "driven"

        # Killed in the middle of streams: its clients' are ended, the others' go on.
        direct, cut = Answer(), [Answer() for _ in range(3)]
        alone = tasks.create_task(_stream(session, vllm.url, direct, 50, 3_000))
        broken = [tasks.create_task(_breaks_off(session, gateway.url, one)) for one in cut]
        await _until(driven, lambda state: state.running == 4)
        async with asyncio.timeout(LONGEST_S):
            while not all(one.tokens for one in (direct, *cut)):  # noqa: ASYNC110 (the streams' own tasks)
                await asyncio.sleep(0.02)
        process.signal(signal.SIGKILL)
        state = await driven.read_state()
        assert state.mode is Mode.DRIVEN
        await asyncio.wait(broken)
        assert not any(one.ended for one in cut)
        state = await _until(driven, lambda state: state.running == 1)
        before = direct.tokens
        state = await _until(driven, lambda state: state.mode is Mode.STOCK)
        assert state.note is not None
        assert state.orders_age_s is not None
        assert state.orders_age_s >= LAPSE_S
        assert direct.tokens > before

        # Started again, it learns anew, and drives.
        await asyncio.to_thread(process.wait)
        await asyncio.to_thread(gateway.start)
        after = Answer()
        await _stream(session, gateway.url, after, 100, 300)
        await _until(driven, lambda state: state.mode is Mode.DRIVEN)
        assert (await _backend(session, gateway))["driven"] is True
        assert after.ended
        await alone
        assert (direct.tokens, direct.ended) == (3_000, True)
    state = await _until(driven, lambda state: state.running == 0)
    assert state.failures == 0
