"""A real vLLM with Tiergate's plug-in, driven over HTTP: by its own account of its steps, orders are obeyed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import orjson
import pytest

from adapters import registry
from adapters.contract import OutgoingRequest, Support
from adapters.vllm import VllmAdapter
from deploy.vllm_cpu import server as engines
from tests.real_engine.conftest import RealEngine
from tiergate_engine.control import Mode, Orders, Promise, SchedulerKind, StepFact
from tiergate_engine.drive import Rules
from tiergate_engine.steptime import RooflineStepTime

# About what this engine takes on a core of its own; nothing here depends on its being right.
PROFILE = RooflineStepTime(
    c0_s=6e-3, per_token_s=45e-6, per_seq_s=80e-6, per_kv_s=4e-7, per_attention_s=8e-8, host_step_s=1e-3
)
DRIVEN = Orders(Mode.DRIVEN, PROFILE, Rules())
_NUMBERS = itertools.count(1)


@pytest.fixture
async def driven(adapter: VllmAdapter) -> AsyncIterator[VllmAdapter]:
    """The adapter to the engine, which forgets its orders behind the test."""
    await adapter.probe()
    yield adapter
    await adapter.give_orders(Orders())


async def _wait(adapter: VllmAdapter, running: int, waiting: int = 0) -> None:
    async with asyncio.timeout(60):
        while True:
            state = await adapter.read_state()
            if (state.running, state.waiting) == (running, waiting):
                return
            await asyncio.sleep(0.02)


async def _generate(
    adapter: VllmAdapter, prompt_tokens: int, tokens: int, promise: Promise | None = None, **fields: object
) -> list[int]:
    """Stream an answer; the token ids."""
    number = next(_NUMBERS)
    body: dict[str, object] = {
        "model": engines.MODEL_NAME,
        "prompt": [(number * 31 + index * 7) % 400 + 50 for index in range(prompt_tokens)],
        "max_tokens": tokens,
        "ignore_eos": True,  # the random model draws it now and then
        "stream": True,
        "return_token_ids": True,
        **fields,
    }
    headers = {"content-type": "application/json"}
    request = OutgoingRequest("/v1/completions", headers, orjson.dumps(body), f"d-{number}", True, promise=promise)
    answer = await adapter.upstream.open(adapter.prepare(request))
    assert answer.status == 200
    text = b""
    while part := await answer.read():
        text += part
    answer.release()
    events = [event.removeprefix(b"data: ") for event in text.split(b"\n\n") if event]
    assert events[-1] == b"[DONE]"
    return [token for event in events[:-1] for token in orjson.loads(event)["choices"][0]["token_ids"]]


async def _since(adapter: VllmAdapter, step: int) -> Sequence[StepFact]:
    return (await adapter.read_steps(step)).facts


def _chunks(facts: Sequence[StepFact]) -> list[int]:
    return [fact.step.prefill_tokens for fact in facts if fact.step.prefill_tokens]


async def test_the_plugin_is_found_and_stock_until_somebody_orders(adapter: VllmAdapter) -> None:
    found = await adapter.probe()
    assert (found.chunk_budget, found.running_cap, found.driven) == (Support.YES,) * 3
    assert (found.max_batched_tokens, found.max_running_seqs) == (4096, 64)
    state = await adapter.read_state()
    assert (state.engine, state.engine_version, state.tested) == ("vllm", "0.32.0", True)
    assert (state.scheduler, state.mode, state.failures) == (SchedulerKind.SYNC, Mode.STOCK, 0)
    await adapter.read_steps(0)
    first = (await adapter.read_state()).steps
    await _generate(adapter, 600, 3)
    assert _chunks(await _since(adapter, first)) == [600]


async def test_the_budget_set_over_http_is_the_budget_obeyed(driven: VllmAdapter) -> None:
    """Before, while a prompt is on its way, and after; the streams beside it get all their tokens."""
    await driven.read_steps(0)
    async with asyncio.TaskGroup() as tasks:
        beside = [tasks.create_task(_generate(driven, 5, 500)) for _ in range(3)]
        await _wait(driven, 3)
        first = (await driven.read_state()).steps
        await driven.set_chunk_budget(64)
        await _generate(driven, 600, 2)
        facts = [fact for fact in await _since(driven, first) if fact.step.prefill_tokens]
        assert [fact.step.prefill_tokens for fact in facts] == [64] * 9 + [24]
        assert all(fact.step.decode_seqs == 3 and fact.budget_tokens == 67 for fact in facts)

        first = (await driven.read_state()).steps
        changing = tasks.create_task(_generate(driven, 3000, 2))
        async with asyncio.timeout(30):
            while sum(_chunks(await _since(driven, first))) < 640:  # noqa: ASYNC110 (another process's state)
                await asyncio.sleep(0.01)
        await driven.set_chunk_budget(512)
        await changing
        chunks = _chunks(await _since(driven, first))
        assert sum(chunks) == 3000
        assert set(chunks[:-1]) == {64, 512}
        assert chunks[:-1] == sorted(chunks[:-1])

        first = (await driven.read_state()).steps
        await driven.set_chunk_budget(None)
        await _generate(driven, 600, 2)
        assert _chunks(await _since(driven, first)) == [600]
    assert [len(task.result()) for task in beside] == [500] * 3


async def test_the_text_is_the_same_under_any_budget(driven: VllmAdapter) -> None:
    prompt = [index * 11 % 400 + 50 for index in range(500)]
    answers: list[list[int]] = []
    for orders in (Orders(), Orders(chunk_tokens=37), DRIVEN):
        await driven.give_orders(orders)
        salt = f"under orders {len(answers)}"  # or the first one's prompt is found in the cache
        fields = {"prompt": prompt, "temperature": 0, "cache_salt": salt}
        answers.append(await _generate(driven, 1, 20, Promise(0.4, 0.05), **fields))
    assert answers[0] == answers[1] == answers[2]


async def test_a_running_cap_admits_no_more(driven: VllmAdapter) -> None:
    await driven.set_running_cap(2)
    first = (await driven.read_state()).steps
    await driven.read_steps(0)
    await asyncio.gather(*(_generate(driven, 20, 30) for _ in range(6)))
    facts = await _since(driven, first)
    assert max(fact.step.decode_seqs + fact.step.prefill_seqs for fact in facts) == 2


async def test_the_queue_is_served_by_deadline_and_what_is_given_up_last(driven: VllmAdapter) -> None:
    await driven.give_orders(replace(DRIVEN, running_cap=1))
    ended: list[str] = []

    async def ask(name: str, promise: Promise | None, tokens: int = 4) -> None:
        await _generate(driven, 30, tokens, promise)
        ended.append(name)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ask("running", Promise(30.0, 1.0), 300))
        await _wait(driven, 1)
        tasks.create_task(ask("free", None))
        tasks.create_task(ask("lost", Promise(5.0, 1.0, relegated=True)))
        for name, ttft_s in (("b", 80.0), ("c", 70.0), ("d", 30.0), ("e", 50.0)):
            tasks.create_task(ask(name, Promise(ttft_s, 1.0)))
        await _wait(driven, 1, 6)
    assert ended == ["running", "d", "e", "c", "b", "free", "lost"]


async def test_a_driven_engine_keeps_steps_within_the_slack_on_board(driven: VllmAdapter) -> None:
    """By its profile; a stock engine takes the whole prompt in one step."""
    await driven.give_orders(DRIVEN)
    first = (await driven.read_state()).steps
    async with asyncio.TaskGroup() as tasks:
        tight = [tasks.create_task(_generate(driven, 10, 150, Promise(0.1, 0.015))) for _ in range(3)]
        await _wait(driven, 3)
        loose = tasks.create_task(_generate(driven, 3000, 2, Promise(60.0, 1.0)))
    assert [len(task.result()) for task in (*tight, loose)] == [150, 150, 150, 2]
    mixed = [
        fact for fact in await _since(driven, first) if fact.step.prefill_tokens and fact.step.decode_seqs == 3
    ]
    chunks = [fact.step.prefill_tokens for fact in mixed]
    assert sum(chunks) > 2500
    assert max(chunks) < 2000
    assert len(set(chunks)) > 3  # not a static budget
    state = await driven.read_state()
    assert (state.mode, state.failures) == (Mode.DRIVEN, 0)
    assert state.plan_us is not None


async def test_a_tool_is_called_under_orders(driven: VllmAdapter) -> None:
    """Structured output waits for its grammar in the queue, which is another one under orders."""
    await driven.give_orders(DRIVEN)
    answer = await _generate(
        driven, 10, 60, Promise(1.0, 0.1), structured_outputs={"choice": ["bada koru", "meni zuna"]}
    )
    assert answer


async def test_without_its_gateway_the_engine_goes_on_alone(vllm: RealEngine, driven: VllmAdapter) -> None:
    """Orders lapse when nobody renews them. Long answers go on meanwhile, and new orders are obeyed."""
    orders = Orders(chunk_tokens=32, running_cap=1, lapse_s=2.0)
    await driven.give_orders(orders)
    async with asyncio.TaskGroup() as tasks:
        before = [tasks.create_task(_generate(driven, 10, 1200)) for _ in range(2)]
        await _wait(driven, 1, 1)
        await _wait(driven, 2)  # nobody speaks; to ask how it is renews nothing
        state = await driven.read_state()
        assert state.mode is Mode.STOCK
        assert state.orders_digest == orders.digest
        assert state.note is not None
        first = state.steps
        await _generate(driven, 200, 2)
        assert _chunks(await _since(driven, first)) == [200]
        anew = await registry.detect(vllm.url)  # a gateway that starts
        assert isinstance(anew, VllmAdapter)
        await anew.probe()
        await anew.set_chunk_budget(64)
        first = (await anew.read_state()).steps
        await _generate(anew, 200, 2)
        assert _chunks(await _since(anew, first)) == [64, 64, 64, 8]
        await anew.close()
    assert [len(task.result()) for task in before] == [1200, 1200]


async def test_a_promise_that_cannot_be_read_makes_a_request_best_effort(
    vllm: RealEngine, driven: VllmAdapter
) -> None:
    await driven.give_orders(DRIVEN)
    direct = await registry.detect(vllm.url)  # not probed, so it sends what the client says
    assert isinstance(direct, VllmAdapter)
    assert len(await _generate(direct, 10, 3, vllm_xargs={"tiergate_ttft_ms": "soon"})) == 3
    await direct.close()
    assert (await driven.read_state()).failures == 0
