"""Prompts sent ahead in chunks to the prefix cache of a real vLLM, seen in its own account of its steps.

Its plug-in is there to tell them. The gateway is told not to drive it, so steps are filled as stock fills them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import openai
import pytest

from adapters.vllm import VllmAdapter
from deploy.server_process import free_port
from tests.conftest import StartServer
from tests.real_engine.conftest import RealEngine, RealGateway

CHUNK = 256
TEXT = "".join(f"Bada {number} koru meni, zuna fera. " for number in range(150))


@pytest.fixture(scope="module")
def chunking(vllm: RealEngine, start_session_server: StartServer, tiergate_command: list[str]) -> RealGateway:
    """A gateway that sends long prompts ahead."""
    port = free_port()
    backend = f"{vllm.url},chunks_outside_tokens={CHUNK},driving=off"
    start_session_server(
        [*tiergate_command, "serve", "--backend", backend, "--port", str(port)], port, ready_path="/readyz"
    )
    return RealGateway(f"http://127.0.0.1:{port}")


@pytest.fixture
async def client(chunking: RealGateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{chunking.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(autouse=True)
async def _told(adapter: VllmAdapter) -> None:
    """The engine keeps an account of its steps from the first time that it is asked for one."""
    await adapter.probe()
    await adapter.read_steps(0)


async def _chunks(adapter: VllmAdapter, since: int) -> list[int]:
    return [
        fact.step.prefill_tokens for fact in (await adapter.read_steps(since)).facts if fact.step.prefill_tokens
    ]


async def test_a_long_prompt_comes_in_chunks_and_is_answered_as_ever(
    client: openai.AsyncOpenAI, vllm: RealEngine, adapter: VllmAdapter
) -> None:
    """The salts keep what one of the two left in the cache from the other."""

    async def ask(asked: openai.AsyncOpenAI, salt: str) -> tuple[str, int, list[int]]:
        first = (await adapter.read_state()).steps
        answer = await asked.completions.create(
            model=vllm.model,
            prompt=TEXT,
            max_tokens=24,
            temperature=0,
            extra_body={"cache_salt": salt, "ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.choices[0].text, answer.usage.prompt_tokens, await _chunks(adapter, first)

    async with openai.AsyncOpenAI(base_url=f"{vllm.url}/v1", api_key="unused") as direct:
        text, tokens, whole = await ask(direct, "whole")
    assert whole == [tokens]
    chunked, told, chunks = await ask(client, "chunked")
    assert (chunked, told) == (text, tokens)
    full, rest = divmod(tokens - 1, CHUNK)
    assert full >= 5
    assert chunks == [CHUNK] * full + [rest + 1]


async def test_a_chat_is_cut_beside_a_stream_that_goes_on(
    client: openai.AsyncOpenAI, vllm: RealEngine, adapter: VllmAdapter
) -> None:
    async with await client.completions.create(
        model=vllm.model, prompt="Zuna", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    ) as beside:
        async for _ in beside:
            break
        first = (await adapter.read_state()).steps
        stream = await client.chat.completions.create(
            model=vllm.model,
            messages=[{"role": "system", "content": "Meni."}, {"role": "user", "content": TEXT}],
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
        usages = [event.usage async for event in stream if event.usage]
        facts = [fact.step for fact in (await adapter.read_steps(first)).facts]
    filled = [index for index, step in enumerate(facts) if step.prefill_tokens]
    sizes = [facts[index].prefill_tokens for index in filled]
    assert sum(sizes) == usages[-1].prompt_tokens
    assert set(sizes[:-1]) == {CHUNK}
    assert all(facts[index].decode_seqs == 1 for index in filled)
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(filled)), "a step in between"


async def test_a_client_that_leaves_ends_its_chunks_too(
    client: openai.AsyncOpenAI, vllm: RealEngine, adapter: VllmAdapter
) -> None:
    first = (await adapter.read_state()).steps
    async with asyncio.TaskGroup() as tasks:
        ask = client.completions.create(model=vllm.model, prompt="Fera " + TEXT * 2, max_tokens=500)
        asked = tasks.create_task(ask)
        async with asyncio.timeout(30):
            while not await _chunks(adapter, first):  # noqa: ASYNC110 (another process's state)
                await asyncio.sleep(0.005)
        asked.cancel()
    async with asyncio.timeout(20):
        while (load := await adapter.read_load()).running or load.waiting:  # noqa: ASYNC110 (another process's state)
            await asyncio.sleep(0.05)
    begun = await _chunks(adapter, first)
    await asyncio.sleep(0.3)
    assert await _chunks(adapter, first) == begun
    assert set(begun) == {CHUNK}
