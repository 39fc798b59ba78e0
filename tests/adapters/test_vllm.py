"""The vLLM adapter against a server with vLLM's routes, and telling engines apart."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from aiohttp import web

from adapters.contract import EngineLoad, Failure, OutgoingRequest, Support, Unsupported, UpstreamError
from adapters.exposition import Scanner
from adapters.openai import OpenAIAdapter
from adapters.registry import AdapterOptions, detect, make
from adapters.vllm import VllmAdapter

from .conftest import Connect, ServeApp

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 4.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0
vllm:num_requests_waiting{engine="1",model_name="tiny"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.75
vllm:num_preemptions_total{engine="0",model_name="tiny"} 1.0e+01
vllm:num_preemptions_created{engine="0",model_name="tiny"} 1.7e+09
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000",odd="a}\\"b"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="1000",odd="a}\\"b"} 1.0
"""


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@dataclass
class Engine:
    """A server with vLLM's routes, set up by a test."""

    owner: str = "vllm"
    metrics: str | None = METRICS
    scheduler: dict[str, object] | None = None
    post_routes: tuple[str, ...] = ("/tokenize",)
    priority_answer: tuple[int, dict[str, object]] = field(default_factory=lambda: (200, {}))
    headers: dict[str, str] = field(default_factory=dict)
    health: int = 200
    abort_status: int = 200
    posted: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application()
        listed = {"data": [{"id": "tiny", "owned_by": self.owner, "max_model_len": 8192}]}
        self._get(app, "/v1/models", listed)
        self._get(app, "/version", {"version": "0.32.0"})
        self._get(app, "/load", {"server_load": 5})
        app.router.add_get("/health", self._health)
        if self.metrics is not None:
            app.router.add_get("/metrics", self._metrics)
        if self.scheduler is not None:
            self._get(app, "/server_info", {"vllm_config": {"scheduler_config": self.scheduler}})
        for path in ("/v1/completions", *self.post_routes):
            app.router.add_post(path, self._post)
        return app

    def _get(self, app: web.Application, path: str, answer: object) -> None:
        async def handle(_: web.Request) -> web.Response:
            return web.json_response(answer, headers=self.headers)

        app.router.add_get(path, handle)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.metrics)

    async def _post(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.posted.append((request.path, body))
        if request.path == "/v1/completions":
            status, answer = self.priority_answer
            return web.json_response(answer, status=status)
        if request.path == "/tokenize":
            return web.json_response({"count": len(body.get("prompt") or body["messages"]), "max_model_len": 9})
        return web.Response(status=self.abort_status)


def outgoing(due_ms: int | None, headers: dict[str, str] | None = None) -> OutgoingRequest:
    left_ms = None if due_ms is None else 40
    return OutgoingRequest("/v1/completions", headers or {}, b'{"model":"tiny"}', "r-1", True, left_ms, due_ms)


async def priority_sent(adapter: VllmAdapter) -> str | None:
    call = adapter.prepare(outgoing(1_790_000_000_123))
    assert call.body == b'{"model":"tiny"}'
    return call.headers.get("x-vllm-priority")


class TestProbe:
    async def test_everything_a_development_server_tells(self, serve_app: ServeApp, connect: Connect) -> None:
        engine = Engine(
            scheduler={"policy": "priority", "max_num_seqs": 64, "max_num_batched_tokens": 4096},
            post_routes=("/tokenize", "/abort_requests"),
        )
        adapter = VllmAdapter(connect(await serve_app(engine.app())))
        found = await adapter.probe()
        assert (found.engine, found.version, found.models) == ("vllm", "0.32.0", ("tiny",))
        assert (found.max_model_tokens, found.block_tokens, found.kv_tokens) == (8192, 16, 16000)
        assert (found.max_running_seqs, found.max_batched_tokens) == (64, 4096)
        assert (found.priority, found.tokenize, found.abort_by_id) == (Support.YES,) * 3
        assert (found.load, found.tokens_per_event, found.emulated) == (Support.YES, 1, False)
        assert await priority_sent(adapter) == "1790000000123"
        assert "/v1/completions" not in {path for path, _ in engine.posted}

    async def test_a_plain_server(self, serve_app: ServeApp, connect: Connect) -> None:
        engine = Engine()
        adapter = VllmAdapter(connect(await serve_app(engine.app())))
        found = await adapter.probe()
        assert (found.max_running_seqs, found.max_batched_tokens) == (None, None)
        assert (found.priority, found.abort_by_id) == (Support.UNKNOWN, Support.NO)
        assert [path for path, _ in engine.posted] == ["/v1/completions"]
        assert engine.posted[0][1]["max_tokens"] == 1
        assert await priority_sent(adapter) == "1790000000123"

    @pytest.mark.parametrize(
        ("status", "answer", "support"),
        [
            (400, {"error": {"message": "Got priority 1 but Priority scheduling is not enabled."}}, Support.NO),
            (400, {"error": {"message": "something else"}}, Support.UNKNOWN),
            (503, {"error": {"message": "busy"}}, Support.UNKNOWN),
        ],
    )
    async def test_an_engine_that_refuses_a_priority_gets_none(
        self, serve_app: ServeApp, connect: Connect, status: int, answer: dict[str, object], support: Support
    ) -> None:
        engine = Engine(priority_answer=(status, answer))
        adapter = VllmAdapter(connect(await serve_app(engine.app())))
        assert (await adapter.probe()).priority is support
        assert await priority_sent(adapter) is None

    async def test_a_first_come_scheduler_gets_none(self, serve_app: ServeApp, connect: Connect) -> None:
        adapter = VllmAdapter(connect(await serve_app(Engine(scheduler={"policy": "fcfs"}).app())))
        assert (await adapter.probe()).priority is Support.NO
        assert await priority_sent(adapter) is None

    @pytest.mark.parametrize(("support", "sent"), [(Support.YES, "1790000000123"), (Support.NO, None)])
    async def test_configuration_costs_no_generation(
        self, serve_app: ServeApp, connect: Connect, support: Support, sent: str | None
    ) -> None:
        engine = Engine()
        adapter = VllmAdapter(connect(await serve_app(engine.app())), priority=support)
        assert (await adapter.probe()).priority is support
        assert await priority_sent(adapter) == sent
        assert engine.posted == []

    async def test_an_emulated_engine_says_so(self, serve_app: ServeApp, connect: Connect) -> None:
        engine = Engine(owner="tiergate-emulated", headers={"X-Tiergate-Emulated": "1"})
        assert (await VllmAdapter(connect(await serve_app(engine.app()))).probe()).emulated

    async def test_metrics_that_are_missing_or_strange(self, serve_app: ServeApp, connect: Connect) -> None:
        for metrics in (None, "", "garbage {{{\n", 'vllm:cache_config_info{block_size="x"} 1\n'):
            found = await VllmAdapter(connect(await serve_app(Engine(metrics=metrics).app()))).probe()
            assert (found.kv_tokens, found.block_tokens, found.load) == (None, None, Support.NO)

    @pytest.mark.parametrize("more", [{"stream_interval": 4}, None])
    async def test_events_that_may_carry_more_than_one_token(
        self, serve_app: ServeApp, connect: Connect, more: dict[str, object] | None
    ) -> None:
        speculating = METRICS + 'vllm:spec_decode_num_drafts_total{engine="0"} 0.0\n'
        engine = Engine(metrics=METRICS if more else speculating, scheduler=more)
        assert (await VllmAdapter(connect(await serve_app(engine.app()))).probe()).tokens_per_event is None

    async def test_nobody_there(self, connect: Connect) -> None:
        with pytest.raises(UpstreamError):
            await VllmAdapter(connect("http://127.0.0.1:1")).probe()


class TestVerbs:
    async def test_load_is_summed_over_engines(self, serve_app: ServeApp, connect: Connect) -> None:
        adapter = VllmAdapter(connect(await serve_app(Engine().app())))
        assert await adapter.read_load() == EngineLoad(7, 2, 0.5, 10)
        assert await adapter.read_server_load() == 5

    async def test_load_under_older_names_and_without(self, serve_app: ServeApp, connect: Connect) -> None:
        old = "vllm:gpu_cache_usage_perc 0.5\nvllm:num_requests_running nan\n"
        adapter = VllmAdapter(connect(await serve_app(Engine(metrics=old).app())))
        assert await adapter.read_load() == EngineLoad(None, None, 0.5, None)

    async def test_load_without_metrics_is_an_error(self, serve_app: ServeApp, connect: Connect) -> None:
        adapter = VllmAdapter(connect(await serve_app(Engine(metrics=None).app())))
        with pytest.raises(UpstreamError):
            await adapter.read_load()

    @pytest.mark.parametrize(("status", "well"), [(200, True), (503, False), (500, False)])
    async def test_health(self, serve_app: ServeApp, connect: Connect, status: int, well: bool) -> None:
        adapter = VllmAdapter(connect(await serve_app(Engine(health=status).app())))
        assert await adapter.healthy() is well

    @pytest.mark.parametrize("path", ["/inference/v1/abort_requests", "/abort_requests"])
    async def test_abort_names_the_request_as_the_engine_does(
        self, serve_app: ServeApp, connect: Connect, path: str
    ) -> None:
        """An empty list would abort everything, so probing must never post one."""
        engine = Engine(post_routes=(path,))
        adapter = VllmAdapter(connect(await serve_app(engine.app())), priority=Support.NO)
        assert (await adapter.probe()).abort_by_id is Support.YES
        assert all(body["request_ids"] for _, body in engine.posted)
        engine.posted.clear()
        await adapter.abort("r-1")
        assert engine.posted == [(path, {"request_ids": ["cmpl-r-1-0", "chatcmpl-r-1"]})]

    async def test_an_abort_route_that_refuses_everything_is_none(
        self, serve_app: ServeApp, connect: Connect
    ) -> None:
        engine = Engine(post_routes=("/abort_requests",), abort_status=500)
        adapter = VllmAdapter(connect(await serve_app(engine.app())), priority=Support.NO)
        assert (await adapter.probe()).abort_by_id is Support.NO

    async def test_abort_without_a_route(self, serve_app: ServeApp, connect: Connect) -> None:
        adapter = VllmAdapter(connect(await serve_app(Engine().app())))
        await adapter.probe()
        with pytest.raises(Unsupported):
            await adapter.abort("r-1")

    @pytest.mark.parametrize(
        ("body", "count", "asked"),
        [
            ({"model": "tiny", "prompt": "abc", "max_tokens": 5}, 3, {"model": "tiny", "prompt": "abc"}),
            ({"prompt": ["abcd"]}, 4, {"prompt": "abcd"}),
            ({"prompt": [1, 2, 3]}, 3, None),
            ({"prompt": [[1, 2], [3]]}, 3, None),
            ({"input": "ab"}, 2, {"prompt": "ab"}),
            (
                {"messages": [{"role": "user", "content": "x"}], "tools": [{}], "temperature": 0},
                1,
                {"messages": [{"role": "user", "content": "x"}], "tools": [{}]},
            ),
        ],
    )
    async def test_counting_tokens(
        self,
        serve_app: ServeApp,
        connect: Connect,
        body: dict[str, object],
        count: int,
        asked: dict[str, object] | None,
    ) -> None:
        engine = Engine()
        adapter = VllmAdapter(connect(await serve_app(engine.app())))
        assert await adapter.count_tokens(body) == count
        assert engine.posted == ([] if asked is None else [("/tokenize", asked)])

    @pytest.mark.parametrize(
        "body", [{}, {"prompt": 7}, {"prompt": []}, {"prompt": ["a", "b"]}, {"messages": nested(400)}]
    )
    async def test_what_cannot_be_counted(
        self, serve_app: ServeApp, connect: Connect, body: dict[str, object]
    ) -> None:
        adapter = VllmAdapter(connect(await serve_app(Engine().app())))
        with pytest.raises(Unsupported):
            await adapter.count_tokens(body)

    async def test_counting_where_there_is_no_route(self, serve_app: ServeApp, connect: Connect) -> None:
        adapter = VllmAdapter(connect(await serve_app(Engine(post_routes=()).app())))
        with pytest.raises(UpstreamError):
            await adapter.count_tokens({"prompt": "a"})
        await adapter.probe()
        with pytest.raises(Unsupported):
            await adapter.count_tokens({"prompt": "a"})

    async def test_a_clients_own_priority_header_is_dropped(self, serve_app: ServeApp, connect: Connect) -> None:
        adapter = VllmAdapter(connect(await serve_app(Engine().app())), priority=Support.YES)
        headers = {"X-VLLM-Priority": "-999"}
        for due_ms in (None, 2**70):  # without one it would count as 0: before every deadline
            sent = adapter.prepare(outgoing(due_ms, headers)).headers
            assert [value for name, value in sent.items() if name.lower() == "x-vllm-priority"] == [str(2**63 - 1)]
        mute = VllmAdapter(connect(await serve_app(Engine().app())), priority=Support.NO)
        assert "x-vllm-priority" not in {name.lower() for name in mute.prepare(outgoing(None, headers)).headers}


class TestExposition:
    def test_only_whole_names_and_valid_lines(self) -> None:
        text = (
            'a{x="1"} 1\nab 2\na 3 1700000000\n# a 4\n xa 5\n'
            'a{y="q\\n\\\\\\"}"} 6\r\na nonsense\na{broken 7\na +Inf\n'
        )
        found = [(one.name, dict(one.labels), one.value) for one in Scanner(["a"]).samples(text)]
        assert found == [
            ("a", {"x": "1"}, 1.0),
            ("a", {}, 3.0),
            ("a", {"y": 'q\n\\"}'}, 6.0),
            ("a", {}, float("inf")),
        ]


class TestRegistry:
    @pytest.mark.parametrize(
        ("engine", "kind"),
        [
            (Engine(), VllmAdapter),
            (Engine(owner="tiergate-emulated", metrics=None), VllmAdapter),
            (Engine(owner="somebody"), VllmAdapter),
            (Engine(owner="somebody", metrics="other:metric 1\n# vllm:no\n"), OpenAIAdapter),
            (Engine(owner="somebody", metrics=None), OpenAIAdapter),
        ],
    )
    async def test_detect(self, serve_app: ServeApp, engine: Engine, kind: type) -> None:
        adapter = await detect(await serve_app(engine.app()))
        assert type(adapter) is kind
        await adapter.close()

    async def test_detect_where_nobody_answers(self) -> None:
        with pytest.raises(UpstreamError) as caught:
            await detect("http://127.0.0.1:1")
        assert caught.value.failure is Failure.UNREACHABLE

    async def test_make(self) -> None:
        options = AdapterOptions(api_key="k", priority=Support.YES)
        adapter = make("vllm", "http://127.0.0.1:1/base/", options)
        assert dict(adapter.prepare(outgoing(1)).headers) == {
            "x-request-id": "r-1",
            "authorization": "Bearer k",
            "x-vllm-priority": "1",
        }
        assert type(make("openai", "http://h")) is OpenAIAdapter
        with pytest.raises(ValueError, match=r"'sglang2' is not one of vllm, sglang, tgi, openai"):
            make("sglang2", "http://h")
