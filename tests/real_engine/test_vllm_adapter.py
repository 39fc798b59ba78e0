"""The vLLM adapter against a real vLLM, without a gateway."""

from __future__ import annotations

import asyncio
import itertools
import re

import orjson
import pytest

from adapters.contract import Failure, OutgoingRequest, Support, UpstreamError, UpstreamResponse
from adapters.vllm import VllmAdapter
from deploy.vllm_cpu import server as engines
from tests.real_engine.conftest import RealEngine

LIMIT_BYTES = 1 << 20
_NUMBERS = itertools.count(1)


def _request(vllm: RealEngine, **fields: object) -> OutgoingRequest:
    body: dict[str, object] = {"model": vllm.model, "prompt": "Bada koru meni.", "max_tokens": 16, **fields}
    request_id = f"t-{next(_NUMBERS)}"
    headers = {"content-type": "application/json", "x-request-id": request_id}
    return OutgoingRequest(
        "/v1/completions", headers, orjson.dumps(body), request_id, streamed=bool(fields.get("stream"))
    )


async def _open(adapter: VllmAdapter, request: OutgoingRequest) -> UpstreamResponse:
    return await adapter.upstream.open(adapter.prepare(request))


async def _read_to_end(answer: UpstreamResponse) -> bytes:
    parts = []
    while part := await answer.read():
        parts.append(part)
    return b"".join(parts)


async def _wait_idle(adapter: VllmAdapter) -> None:
    async with asyncio.timeout(20):
        while (load := await adapter.read_load()).running or load.waiting:  # noqa: ASYNC110 (another process's state)
            await asyncio.sleep(0.05)


def test_the_busy_wait_is_replaced_in_engine_and_worker(vllm: RealEngine) -> None:
    patched = set(
        re.findall(r"^\((\w+).*tiergate_vllm_cpu: process \d+ waits by sleeping", vllm.log(), re.MULTILINE)
    )
    assert {name.partition("-")[0] for name in patched} >= {"EngineCore", "VllmWorker"}


async def test_the_probe_finds_what_the_engine_was_started_with(adapter: VllmAdapter) -> None:
    found = await adapter.probe()
    assert (found.engine, found.version, found.emulated) == ("vllm", "0.32.0", False)
    assert found.models == (engines.MODEL_NAME,)
    assert found.max_model_tokens == engines.MAX_MODEL_TOKENS
    assert found.max_running_seqs == engines.MAX_RUNNING_SEQS
    assert found.max_batched_tokens == engines.MAX_BATCHED_TOKENS
    assert found.kv_tokens is not None
    assert found.kv_tokens > 100_000
    assert (found.priority, found.tokenize, found.abort_by_id) == (Support.YES, Support.YES, Support.YES)
    assert found.load is Support.YES
    assert await adapter.healthy()


async def test_every_token_of_a_stream_is_text_and_it_ends_with_done(
    vllm: RealEngine, adapter: VllmAdapter
) -> None:
    # a random model may draw a special token, which has no text
    fields = {"return_token_ids": True, "allowed_token_ids": [*range(50, 450)]}
    answer = await _open(adapter, _request(vllm, stream=True, max_tokens=40, **fields))
    assert answer.status == 200
    events = (await _read_to_end(answer)).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    choices = [orjson.loads(event.removeprefix(b"data: "))["choices"][0] for event in events[:-2]]
    assert all(choice["text"] for choice in choices)
    # vLLM merges what its API server could not send in time, so an event may carry several tokens
    assert sum(len(choice["token_ids"]) for choice in choices) == 40


async def test_counted_tokens_are_the_engines(vllm: RealEngine, adapter: VllmAdapter) -> None:
    await adapter.probe()
    answer = await _open(adapter, _request(vllm, prompt="Koru meni bada. " * 20))
    usage = orjson.loads(await answer.read_all(LIMIT_BYTES))["usage"]
    assert (
        await adapter.count_tokens({"model": vllm.model, "prompt": "Koru meni bada. " * 20})
        == usage["prompt_tokens"]
    )


async def test_a_disconnect_frees_the_engine(vllm: RealEngine, adapter: VllmAdapter) -> None:
    answer = await _open(adapter, _request(vllm, stream=True, max_tokens=7000))
    assert await answer.read()
    assert (await adapter.read_load()).running == 1
    answer.abort()
    await _wait_idle(adapter)


async def test_an_abort_by_id_ends_the_stream(vllm: RealEngine, adapter: VllmAdapter) -> None:
    await adapter.probe()
    request = _request(vllm, stream=True, max_tokens=7000)
    answer = await _open(adapter, request)
    assert await answer.read()
    await adapter.abort(request.request_id)
    events = (await _read_to_end(answer)).split(b"\n\n")
    assert b'"finish_reason":"abort"' in events[-3]
    await _wait_idle(adapter)


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"model": "no-such-model"}, 404), ({"max_tokens": 100_000}, 400), ({"temperature": "warm"}, 400)],
)
async def test_wrong_requests_are_rejected_and_not_retried(
    vllm: RealEngine, adapter: VllmAdapter, fields: dict[str, object], status: int
) -> None:
    answer = await _open(adapter, _request(vllm, **fields))
    assert answer.status == status
    failure = adapter.response_failure(answer.status, await answer.read_all(LIMIT_BYTES))
    assert isinstance(failure, UpstreamError)
    assert failure.failure is Failure.REJECTED
    assert not failure.retryable


async def test_an_idle_connection_that_the_engine_closed_is_no_failure(
    vllm: RealEngine, adapter: VllmAdapter
) -> None:
    for _ in range(2):
        answer = await _open(adapter, _request(vllm))
        assert answer.status == 200
        await answer.read_all(LIMIT_BYTES)
        await asyncio.sleep(0.5)
