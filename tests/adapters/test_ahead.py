"""Beginnings of prompts that are computed ahead: what is asked of vLLM, and what is left alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import orjson
import pytest
from aiohttp import web

from adapters.ahead import prompt_question
from adapters.contract import Failure, OutgoingRequest, PromptIds, Support, Unsupported, UpstreamError
from adapters.vllm import VllmAdapter

from .conftest import Connect, ServeApp, until

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_USER = {"role": "user", "content": "hello there"}
_METRICS = (
    'vllm:cache_config_info{block_size="128",enable_prefix_caching="%s",engine="%d",num_gpu_blocks="1000"} 1.0\n'
)


def _asked(path: str, fields: object) -> object:
    return prompt_question(path, orjson.dumps(fields), ("model", "messages", "tools", "chat_template_kwargs"))


class TestQuestion:
    def test_a_text_is_asked_with_what_decides_its_ids(self) -> None:
        fields = {
            "model": "tiny",
            "prompt": "a b",
            "add_special_tokens": False,
            "max_tokens": 9,
            "cache_salt": "s",
        }
        question = {"prompt": "a b", "model": "tiny", "add_special_tokens": False}
        assert _asked(_COMPLETIONS, fields) == (question, {"model": "tiny", "cache_salt": "s"})

    def test_a_chat_is_asked_with_its_tools_and_its_template(self) -> None:
        kept = {"model": "lora", "messages": [_USER], "tools": [{}], "chat_template_kwargs": {"thinking": True}}
        fields = {**kept, "temperature": 0.3, "tool_choice": "auto"}
        assert _asked(_CHAT, fields) == (kept, {"model": "lora"})

    @pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
    def test_token_ids_need_no_question(self, prompt: object) -> None:
        assert _asked(_COMPLETIONS, {"prompt": prompt}) == ((5, 6, 7), {})

    def test_parts_that_are_text_are_text(self) -> None:
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant"}]
        assert _asked(_CHAT, {"messages": messages}) == ({"messages": messages}, {})

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            ("/v1/responses", {"input": "a"}),
            ("/v1/messages", {"messages": [_USER]}),
            (_CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            (_CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}, {"type": "input_audio"}]}]}),
            (_CHAT, {"messages": "hello"}),
            (_CHAT, {"prompt": "a"}),
            (_CHAT, {"messages": [_USER], "documents": [{"text": "a"}]}),
            (_CHAT, {"messages": [_USER], "reasoning_effort": "high"}),
            (_CHAT, {"messages": [_USER], "tools": [{}], "tool_choice": "none"}),
            (_COMPLETIONS, {"prompt": ["a", "b"]}),
            (_COMPLETIONS, {"prompt": [[1], [2]]}),
            (_COMPLETIONS, {"prompt": [[1], [2, "x"]]}),
            (_COMPLETIONS, {"prompt": []}),
            (_COMPLETIONS, {"prompt": [True]}),
            (_COMPLETIONS, {"prompt": "a", "truncate_prompt_tokens": 10}),
            (_COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1}),
            (_COMPLETIONS, {"prompt": "a", "echo": True}),
            (_COMPLETIONS, {"messages": [_USER]}),
            (_COMPLETIONS, [1, 2]),
        ],
    )
    def test_what_tokenize_cannot_say_goes_as_it_is(self, path: str, fields: object) -> None:
        with pytest.raises(Unsupported):
            _asked(path, fields)

    def test_what_is_no_json_goes_as_it_is(self) -> None:
        with pytest.raises(Unsupported):
            prompt_question(_CHAT, b"{", ())


@dataclass
class _Engine:
    """A fake with the routes that are needed, set up by a test."""

    tokens: object = field(default_factory=lambda: [7, 8, 9])
    status: int = 200
    hold: bool = False
    metrics: str = ""
    posted: list[tuple[str, dict[str, object], dict[str, str]]] = field(default_factory=list)
    left: int = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/tokenize", self._post)
        app.router.add_post(_COMPLETIONS, self._post)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.metrics)

    async def _post(self, request: web.Request) -> web.Response:
        self.posted.append((request.path, await request.json(), dict(request.headers)))
        if request.path == "/tokenize":
            return web.json_response({"tokens": self.tokens, "count": 3, "max_model_len": 100})
        if self.hold:
            try:
                await asyncio.Event().wait()
            finally:
                self.left += 1
        return web.json_response({"error": {"message": "busy", "code": self.status}}, status=self.status)


_LIKE = OutgoingRequest(
    _CHAT,
    {"authorization": "Bearer mine", "x-data-parallel-rank": "3", "x-request-id": "theirs"},
    b'{"stream":true}',
    "r-1",
    streamed=True,
    left_ms=5,
    due_ms=70,
    want_usage=True,
)
_PROMPT = PromptIds((5, 6, 7, 8), {"model": "lora", "cache_salt": "s"})


async def test_ids_are_the_engines(serve_app: ServeApp, connect: Connect) -> None:
    engine = _Engine()
    adapter = VllmAdapter(connect(await serve_app(engine.app())))
    body = orjson.dumps({"model": "lora", "prompt": "a b c", "cache_salt": "s"})
    assert await adapter.prompt_ids(_COMPLETIONS, body) == PromptIds(
        (7, 8, 9), {"model": "lora", "cache_salt": "s"}
    )
    ids = orjson.dumps({"prompt": [1, 2]})
    assert await adapter.prompt_ids(_COMPLETIONS, ids) == PromptIds((1, 2), {})
    assert [path for path, *_ in engine.posted] == ["/tokenize"]


@pytest.mark.parametrize("tokens", [None, ["a"], [1] * 100])
async def test_an_answer_without_usable_ids_is_none(serve_app: ServeApp, connect: Connect, tokens: object) -> None:
    adapter = VllmAdapter(connect(await serve_app(_Engine(tokens=tokens).app())))
    with pytest.raises(Unsupported):
        await adapter.prompt_ids(_COMPLETIONS, b'{"prompt":"a"}')


async def test_a_prefix_has_the_rights_and_the_urgency_of_its_request(
    serve_app: ServeApp, connect: Connect
) -> None:
    engine = _Engine()
    adapter = VllmAdapter(connect(await serve_app(engine.app())), priority=Support.YES)
    await adapter.compute_ahead(_PROMPT, 3, _LIKE)
    ((path, body, headers),) = engine.posted
    assert path == _COMPLETIONS
    assert body == {"model": "lora", "cache_salt": "s", "prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0}
    told = {name.lower(): value for name, value in headers.items()}
    assert told["authorization"] == "Bearer mine"
    assert told["x-data-parallel-rank"] == "3"
    assert told["x-request-id"] == "r-1-ahead-3"
    assert told["x-vllm-priority"] == "70"


async def test_a_prefix_that_is_refused_says_why(serve_app: ServeApp, connect: Connect) -> None:
    adapter = VllmAdapter(connect(await serve_app(_Engine(status=503).app())))
    with pytest.raises(UpstreamError, match="busy") as raised:
        await adapter.compute_ahead(_PROMPT, 3, _LIKE)
    assert raised.value.failure is Failure.OVERLOADED


async def test_a_prefix_that_is_given_up_is_gone_from_the_engine(serve_app: ServeApp, connect: Connect) -> None:
    engine = _Engine(hold=True)
    adapter = VllmAdapter(connect(await serve_app(engine.app())))
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(adapter.compute_ahead(_PROMPT, 3, _LIKE))
        await until(lambda: len(engine.posted) == 1)
        sending.cancel()
    assert sending.cancelled()
    await until(lambda: engine.left == 1)


@pytest.mark.parametrize(
    ("metrics", "caching", "engines"),
    [
        (_METRICS % ("True", 0), Support.YES, 1),
        (_METRICS % ("False", 0), Support.NO, 1),
        (_METRICS % ("True", 0) + _METRICS % ("True", 1), Support.YES, 2),
        ("", Support.UNKNOWN, None),
    ],
)
async def test_the_probe_tells_whether_prefixes_are_cached(
    serve_app: ServeApp, connect: Connect, metrics: str, caching: Support, engines: int | None
) -> None:
    found = await VllmAdapter(connect(await serve_app(_Engine(metrics=metrics).app()))).probe()
    assert (found.prefix_caching, found.engines) == (caching, engines)
