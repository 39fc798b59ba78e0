"""The vLLM adapter and a fake of Tiergate's plug-in: its routes, and what may be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from adapters.contract import Failure, OutgoingRequest, Support, Unsupported, UpstreamError
from adapters.promises import with_promise
from adapters.vllm import VllmAdapter
from tiergate_engine.control import (
    EngineState,
    Mode,
    Orders,
    Promise,
    SchedulerKind,
    StepFact,
    StepFacts,
)
from tiergate_engine.step import Step

from .conftest import Connect, ServeApp

STATE = EngineState(
    run_id="a1",
    engine="vllm",
    engine_version="0.32.0",
    tested=True,
    scheduler=SchedulerKind.SYNC,
    mode=Mode.STOCK,
    orders_digest=None,
    orders_age_s=None,
    steps=0,
    running=0,
    waiting=0,
    kv_usage=0.0,
    budget_tokens=2048,
    max_batched_tokens=2048,
    max_running_seqs=99,
)
FACT = StepFact(Step(64, 1, 128, 1e4, 3, 500), 0.012, 67)


@dataclass
class FakePlugin:
    """A vLLM with the plug-in's routes: a fake, which remembers orders and obeys none."""

    state: EngineState = STATE
    status: int = 200
    answer: str | None = None
    told: list[Orders] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/tiergate/state", self._state)
        app.router.add_put("/v1/tiergate/orders", self._orders)
        app.router.add_get("/v1/tiergate/steps", self._steps)
        return app

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny", "owned_by": "vllm"}]})

    def _say(self, text: str) -> web.Response:
        return web.Response(status=self.status, text=text if self.answer is None else self.answer)

    async def _state(self, _: web.Request) -> web.Response:
        return self._say(self.state.to_json())

    async def _orders(self, request: web.Request) -> web.Response:
        orders = Orders.from_json(await request.read())
        self.told.append(orders)
        return self._say(replace(self.state, orders_digest=orders.digest).to_json())

    async def _steps(self, request: web.Request) -> web.Response:
        return self._say(StepFacts("a1", int(request.query["since"]), (FACT,)).to_json())


async def probed(plugin: FakePlugin, serve_app: ServeApp, connect: Connect) -> VllmAdapter:
    adapter = VllmAdapter(connect(await serve_app(plugin.app())), priority=Support.NO)
    await adapter.probe()
    return adapter


async def test_an_engine_with_the_plugin_is_driven(serve_app: ServeApp, connect: Connect) -> None:
    adapter = VllmAdapter(connect(await serve_app(FakePlugin().app())), priority=Support.NO)
    found = await adapter.probe()
    assert (found.chunk_budget, found.running_cap, found.driven) == (Support.YES,) * 3
    assert (found.max_batched_tokens, found.max_running_seqs) == (2048, 99)


@pytest.mark.parametrize(
    "plugin",
    [
        FakePlugin(status=404),
        FakePlugin(status=501),
        FakePlugin(answer="no JSON"),
        FakePlugin(answer='{"version":99}'),
        FakePlugin(replace(STATE, tested=False)),
    ],
    ids=["no route", "another scheduler", "no JSON", "a version of the future", "an untested vLLM"],
)
async def test_an_engine_that_cannot_be_driven(plugin: FakePlugin, serve_app: ServeApp, connect: Connect) -> None:
    adapter = VllmAdapter(connect(await serve_app(plugin.app())), priority=Support.NO)
    found = await adapter.probe()
    assert (found.chunk_budget, found.running_cap, found.driven) == (Support.NO,) * 3
    for call in (adapter.set_chunk_budget(64), adapter.set_running_cap(3), adapter.give_orders(Orders())):
        with pytest.raises(Unsupported):
            await call
    with pytest.raises(Unsupported):
        await adapter.read_state()
    with pytest.raises(Unsupported):
        await adapter.read_steps(0)
    assert not plugin.told
    request = OutgoingRequest("/v1/completions", {}, b"{}", "r-1", True, promise=Promise(0.5, 0.05))
    assert adapter.prepare(request).body == b"{}"


async def test_one_knob_leaves_the_others_as_ordered(serve_app: ServeApp, connect: Connect) -> None:
    plugin = FakePlugin()
    adapter = await probed(plugin, serve_app, connect)
    await adapter.give_orders(Orders(lapse_s=5.0))
    await adapter.set_chunk_budget(128)
    await adapter.set_running_cap(7)
    await adapter.set_chunk_budget(None)
    assert plugin.told == [
        Orders(lapse_s=5.0),
        Orders(lapse_s=5.0, chunk_tokens=128),
        Orders(lapse_s=5.0, chunk_tokens=128, running_cap=7),
        Orders(lapse_s=5.0, running_cap=7),
    ]


async def test_state_and_steps_are_read(serve_app: ServeApp, connect: Connect) -> None:
    adapter = await probed(FakePlugin(), serve_app, connect)
    assert await adapter.read_state() == STATE
    assert await adapter.read_steps(17) == StepFacts("a1", 17, (FACT,))


@pytest.mark.parametrize(
    ("status", "failure"), [(400, Failure.REJECTED), (401, Failure.REJECTED), (503, Failure.BROKEN)]
)
async def test_orders_that_fail_are_not_remembered(
    serve_app: ServeApp, connect: Connect, status: int, failure: Failure
) -> None:
    plugin = FakePlugin()
    adapter = await probed(plugin, serve_app, connect)
    plugin.status = status
    with pytest.raises(UpstreamError) as caught:
        await adapter.set_chunk_budget(64)
    assert caught.value.failure is failure
    plugin.status = 200
    await adapter.set_running_cap(5)
    assert plugin.told[-1] == Orders(running_cap=5)


async def test_an_engine_that_came_back_without_the_plugin(serve_app: ServeApp, connect: Connect) -> None:
    plugin = FakePlugin()
    adapter = await probed(plugin, serve_app, connect)
    plugin.status = 404
    with pytest.raises(Unsupported):
        await adapter.read_state()
    request = OutgoingRequest("/v1/completions", {}, b"{}", "r-1", True, promise=Promise(0.5, 0.05))
    assert adapter.prepare(request).body == b"{}"


async def test_orders_that_the_engine_does_not_keep_are_refused(serve_app: ServeApp, connect: Connect) -> None:
    plugin = FakePlugin()
    adapter = await probed(plugin, serve_app, connect)
    plugin.answer = replace(STATE, note="undriven").to_json()
    with pytest.raises(Unsupported, match="undriven"):
        await adapter.set_chunk_budget(64)


async def test_answers_that_cannot_be_read(serve_app: ServeApp, connect: Connect) -> None:
    plugin = FakePlugin()
    adapter = await probed(plugin, serve_app, connect)
    plugin.answer = "{}"
    for call in (adapter.read_state(), adapter.read_steps(0), adapter.give_orders(Orders())):
        with pytest.raises(UpstreamError) as caught:
            await call
        assert caught.value.failure is Failure.BROKEN


async def test_a_promise_goes_along_and_a_clients_own_does_not(serve_app: ServeApp, connect: Connect) -> None:
    adapter = await probed(FakePlugin(), serve_app, connect)

    def sent(body: bytes, promise: Promise | None, path: str = "/v1/completions") -> object:
        request = OutgoingRequest(path, {}, body, "r-1", True, promise=promise)
        return orjson.loads(adapter.prepare(request).body)

    assert sent(b'{"model":"tiny"}', Promise(0.5, 0.05, relegated=True)) == {
        "vllm_xargs": {"tiergate_ttft_ms": 500.0, "tiergate_tpot_ms": 50.0, "tiergate_relegated": 1},
        "model": "tiny",
    }
    own = b'{"vllm_xargs":{"tiergate_ttft_ms":1,"other":"x"},"n":1}'
    assert sent(own, Promise(0.5)) == {"vllm_xargs": {"tiergate_ttft_ms": 500.0, "other": "x"}, "n": 1}
    assert sent(own, None) == {"vllm_xargs": {"other": "x"}, "n": 1}
    assert sent(b'{"input":"a"}', Promise(0.5), "/v1/embeddings") == {"input": "a"}


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"nonsense", b'{"vllm_xargs":3}', b'{"vllm_xargs":', b'{"vllm_xargs":{"a":1}}', b'{"a":1}'],
)
def test_a_body_that_nothing_has_to_be_said_in_stays_as_it_is(body: bytes) -> None:
    assert with_promise(body, None) == body
    assert with_promise(body, Promise()) == body


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    fields=st.dictionaries(st.text(max_size=8).filter(lambda name: name != "vllm_xargs"), _JSON, max_size=4),
    xargs=st.none()
    | st.dictionaries(st.sampled_from(["a", "b", "tiergate_tpot_ms", "tiergate_x"]), st.integers()),
    there=st.booleans(),
    ttft_s=st.none() | st.floats(-10, 1000),
)
def test_nothing_else_of_a_body_changes(
    fields: Mapping[str, object], xargs: Mapping[str, int] | None, there: bool, ttft_s: float | None
) -> None:
    body = {**fields, **({"vllm_xargs": xargs} if there else {})}
    promise = Promise(ttft_s, 0.05)
    written = json.loads(with_promise(json.dumps(body).encode(), promise))
    kept = (
        {name: value for name, value in (xargs or {}).items() if not name.startswith("tiergate_")} if there else {}
    )
    assert written == {**fields, "vllm_xargs": {**kept, **promise.to_xargs()}}
