"""What every adapter keeps of its contract: in front of an emulated vLLM, a fake SGLang and a fake TGI."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import orjson
import pytest

from adapters.contract import Adapter, EngineLoad, OutgoingRequest, Support, Unsupported, UpstreamError
from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from adapters.registry import KINDS, AdapterOptions, detect, make
from tests.adapters.fake_sglang import FakeSglang, fake_sglang
from tests.adapters.fake_tgi import FakeTgi, fake_tgi
from tiergate_engine.model import EngineConfig
from tiergate_engine.steptime import RooflineStepTime

MODEL = "m"
_FAKES: dict[str, Callable[[str], AbstractAsyncContextManager[FakeTgi | FakeSglang]]] = {
    "tgi": fake_tgi,
    "sglang": fake_sglang,
}
KEY = AdapterOptions(api_key="ours", probe_timeout_s=5.0)


@contextlib.asynccontextmanager
async def connected(kind: str) -> AsyncIterator[Adapter]:
    """The adapter of this kind in front of something that it can talk to."""
    if kind in _FAKES:
        async with _FAKES[kind](MODEL) as fake:
            adapter = make(kind, fake.url, KEY)
            yield adapter
            await adapter.close()
        return
    config = EngineConfig(kv_tokens=6400, max_model_tokens=4096)
    engine = EmulatedEngine(EmulatedSettings(MODEL, config), RooflineStepTime(c0_s=0.001))
    async with serving([engine]) as (served,):
        adapter = make(kind, served.url, KEY)
        yield adapter
        await adapter.close()


async def done(verb: Awaitable[object]) -> bool:
    """Whether a verb was carried out; anything but success and Unsupported goes through."""
    try:
        await verb
    except Unsupported:
        return False
    return True


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_the_probe_tells_what_the_verbs_do(kind: str) -> None:
    async with connected(kind) as adapter:
        found = await adapter.probe()
        assert (found.engine, found.models, found.emulated) == (kind, (MODEL,), True)
        assert await adapter.healthy()
        for support, verb in (
            (found.tokenize, adapter.count_tokens({"model": MODEL, "prompt": "a b c"})),
            (
                found.tokenize,
                adapter.count_tokens({"model": MODEL, "messages": [{"role": "user", "content": "a"}]}),
            ),
            (found.abort_by_id, adapter.abort("nobody")),
            (found.chunk_budget, adapter.set_chunk_budget(512)),
            (found.running_cap, adapter.set_running_cap(8)),
        ):
            assert support is not Support.UNKNOWN
            assert await done(verb) is (support is Support.YES)
        load = await adapter.read_load()
        assert found.load is not Support.NO or load == EngineLoad()
        assert load.running in (None, 0)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_request_goes_as_it_came_and_is_answered(kind: str, path: str, streamed: bool) -> None:
    prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    body = orjson.dumps({"model": MODEL, "max_tokens": 3, "stream": streamed} | prompt)
    headers = {"Authorization": "Bearer theirs", "content-type": "application/json"}
    async with connected(kind) as adapter:
        call = adapter.prepare(OutgoingRequest(path, headers, body, "r-1", streamed, 5, 1_000_005))
        assert (call.method, call.path, call.body) == ("POST", path, body)
        assert call.headers["authorization"] == "Bearer ours"
        response = await adapter.upstream.open(call)
        answer = await response.read_all(1 << 20)
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream" if streamed else "application/json")
        assert not streamed or adapter.stream_failure(answer[: answer.index(b"\n\n") + 2]) is None


async def test_it_is_detected(kind: str) -> None:
    """A generic server is what is left, so the emulated vLLM behind that adapter is told as vLLM."""
    async with connected(kind) as adapter:
        url = str(getattr(getattr(adapter.upstream, "inner", adapter.upstream), "base_url", ""))
        found = await detect(url)
        assert type(found) is type(make("vllm" if kind == "openai" else kind, url))
        await found.close()


async def test_nobody_there(kind: str) -> None:
    adapter = make(kind, "http://127.0.0.1:1", KEY)
    with pytest.raises(UpstreamError):
        await adapter.probe()
    assert not await adapter.healthy()
    await adapter.close()


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 502, 503, 504])
async def test_an_error_status_is_an_error_whatever_comes_with_it(kind: str, status: int) -> None:
    adapter = make(kind, "http://h")
    for body in (b"", b"<html>", b'{"error":{"message":"x"}}', b"[]", b'{"error_type":[]}'):
        error = adapter.response_failure(status, body)
        assert error.status == status
        assert str(error)
        assert error.retryable is (status == 429 or status >= 500)
