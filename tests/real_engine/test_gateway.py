"""The whole gateway in front of a real vLLM, used by the official openai client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import openai
import pytest

from adapters.vllm import VllmAdapter
from tests.real_engine.conftest import RealEngine, RealGateway

PROMPT = "Bada koru meni, zuna fera."
CHAT: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": PROMPT}]
TOOL: openai.types.chat.ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "set_light",
        "parameters": {
            "type": "object",
            "properties": {"state": {"type": "string", "enum": ["on", "off"]}},
            "required": ["state"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
async def client(gateway: RealGateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


async def _wait_idle(adapter: VllmAdapter) -> None:
    async with asyncio.timeout(20):
        while (load := await adapter.read_load()).running or load.waiting:  # noqa: ASYNC110 (another process's state)
            await asyncio.sleep(0.05)


async def test_the_model_list_is_the_engines(client: openai.AsyncOpenAI, vllm: RealEngine) -> None:
    assert [model.id async for model in client.models.list()] == [vllm.model]


async def test_a_chat_and_what_its_headers_tell(client: openai.AsyncOpenAI, vllm: RealEngine) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model=vllm.model, messages=CHAT, max_tokens=12, extra_headers={"x-slo-tier": "summary"}
    )
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert raw.headers["x-tiergate-tier"] == "summary"
    assert raw.headers["x-tiergate-backend"] == vllm.url.removeprefix("http://")
    assert raw.headers["x-request-id"]


async def test_a_streamed_chat_is_the_same_text_as_a_whole_one(
    client: openai.AsyncOpenAI, vllm: RealEngine
) -> None:
    whole = await client.chat.completions.create(model=vllm.model, messages=CHAT, max_tokens=30, temperature=0)
    stream = await client.chat.completions.create(
        model=vllm.model,
        messages=CHAT,
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text = ""
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == 30


async def test_completions_are_the_engines_own(client: openai.AsyncOpenAI, vllm: RealEngine) -> None:
    async with openai.AsyncOpenAI(base_url=f"{vllm.url}/v1", api_key="unused") as direct:
        own = await direct.completions.create(model=vllm.model, prompt=PROMPT, max_tokens=30, temperature=0)
    whole = await client.completions.create(model=vllm.model, prompt=PROMPT, max_tokens=30, temperature=0)
    stream = await client.completions.create(
        model=vllm.model, prompt=PROMPT, max_tokens=30, temperature=0, stream=True
    )
    streamed = "".join([choice.text async for chunk in stream for choice in chunk.choices])
    assert own.choices[0].text == whole.choices[0].text == streamed
    assert whole.usage == own.usage


async def test_usage_that_nobody_asked_for_is_not_sent(client: openai.AsyncOpenAI, vllm: RealEngine) -> None:
    stream = await client.completions.create(model=vllm.model, prompt=PROMPT, max_tokens=5, stream=True)
    assert all([chunk.usage is None and chunk.choices async for chunk in stream])


async def test_a_tool_is_called(client: openai.AsyncOpenAI, vllm: RealEngine) -> None:
    answer = await client.chat.completions.create(
        model=vllm.model,
        messages=CHAT,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "set_light"}},
        max_tokens=200,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].type == "function"
    assert calls[0].function.name == "set_light"
    assert json.loads(calls[0].function.arguments)["state"] in {"on", "off"}


async def test_tools_that_are_not_used_are_only_a_field(client: openai.AsyncOpenAI, vllm: RealEngine) -> None:
    stream = await client.chat.completions.create(
        model=vllm.model, messages=CHAT, tools=[TOOL], tool_choice="none", max_tokens=8, stream=True
    )
    assert "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])


@pytest.mark.parametrize(
    ("options", "headers", "error", "named"),
    [
        ({"model": "no-such-model"}, {}, openai.NotFoundError, "no-such-model"),
        ({"max_tokens": 1_000_000}, {}, openai.BadRequestError, "max_tokens"),
        ({"temperature": "warm"}, {}, openai.BadRequestError, "temperature"),
        ({}, {"x-slo-tpot-ms": "-5"}, openai.BadRequestError, "x-slo-tpot-ms"),
        ({}, {"x-slo-tier": "no-such-tier"}, openai.BadRequestError, "x-slo-tier"),
    ],
)
async def test_wrong_requests_are_told_what_is_wrong(
    client: openai.AsyncOpenAI,
    vllm: RealEngine,
    options: dict[str, object],
    headers: dict[str, str],
    error: type[openai.APIStatusError],
    named: str,
) -> None:
    body = {"model": vllm.model, "messages": CHAT, "max_tokens": 5, **options}
    with pytest.raises(error) as refused:
        await client.post("/chat/completions", body=body, cast_to=object, options={"headers": headers})
    assert named in str(refused.value)


async def test_a_cancelled_stream_frees_the_engine(
    client: openai.AsyncOpenAI, vllm: RealEngine, adapter: VllmAdapter
) -> None:
    stream = await client.completions.create(model=vllm.model, prompt=PROMPT, max_tokens=7000, stream=True)
    async for _ in stream:
        break
    assert (await adapter.read_load()).running == 1
    await stream.close()
    await _wait_idle(adapter)


async def test_a_cancelled_whole_answer_frees_the_engine(
    client: openai.AsyncOpenAI, vllm: RealEngine, adapter: VllmAdapter
) -> None:
    async with asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(client.completions.create(model=vllm.model, prompt=PROMPT, max_tokens=7000))
        async with asyncio.timeout(20):
            while not (await adapter.read_load()).running:  # noqa: ASYNC110 (another process's state)
                await asyncio.sleep(0.02)
        asked.cancel()
    await _wait_idle(adapter)


async def test_many_at_once_all_end_and_leave_no_load(
    client: openai.AsyncOpenAI, vllm: RealEngine, gateway: RealGateway, adapter: VllmAdapter
) -> None:
    async def ask(number: int) -> int:
        stream = await client.completions.create(
            model=vllm.model,
            prompt=f"{PROMPT} {number}",
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"x-slo-tier": "batch"},
            extra_body={"ignore_eos": True},  # a random model may end its answer at any token
        )
        usages = [chunk.usage async for chunk in stream if chunk.usage]
        return usages[-1].completion_tokens

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(number)) for number in range(24)]
    assert [task.result() for task in asked] == [20] * 24
    await _wait_idle(adapter)


async def test_the_anthropic_route(gateway: RealGateway, vllm: RealEngine) -> None:
    body = {"model": vllm.model, "max_tokens": 10, "messages": [{"role": "user", "content": PROMPT}]}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{gateway.url}/v1/messages", json=body) as answer,
    ):
        assert answer.status == 200
        message = await answer.json()
    assert message["role"] == "assistant"
    assert message["usage"]["output_tokens"] == 10
