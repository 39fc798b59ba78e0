"""A fake TGI server: the routes, streams, errors and metrics of version 3.3.7, with no model inside.

It is a fake. The shapes were written after the source of the router (`router/src/server.rs`, `lib.rs`, `chat.rs`,
`infer/mod.rs`); nothing here was compared with a live server. Times are those of the emulated engine
(`adapters.emulated.driver`), words those of the emulated model, so they say nothing of TGI.

KV for the prompt and up to `lease_tokens` of the answer is taken when a request is let in, one after the other;
when those are made, it queues again. Not reproduced: tools, grammars, log probabilities, and `best_of`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from adapters.emulated.driver import EngineDriver
from adapters.emulated.tokens import encode
from tests.adapters.fake_parts import Json, chat_words, served
from tests.adapters.fake_tgi_run import Api, Lease, Run, TgiError
from tiergate_engine.model import EngineConfig, EngineModel
from tiergate_engine.step import StepTime
from tiergate_engine.steptime import RooflineStepTime

VERSION = "3.3.7"


@dataclass(frozen=True, slots=True)
class Habits:
    """How it writes its streams, and what it does wrong.

    Attributes:
        spaced: `data: {` as later versions write it, else `data:{`.
        flat_errors: errors in a stream as versions before 2.4.1 wrote them, with their `error_type`.
        comments: an empty comment before every event, as TGI sends one every 15 s.
        overloaded: no request gets a permit.
        fails_after: every generation fails after this many tokens.
        cut_after: the connection is closed after this many tokens.
        ends_after: the body ends tidily after this many tokens, without a reason or `[DONE]`.
        done: whether a stream ends with `[DONE]`.
        healthy: what /health says.
    """

    spaced: bool = True
    flat_errors: bool = False
    comments: bool = False
    overloaded: bool = False
    fails_after: int | None = None
    cut_after: int | None = None
    ends_after: int | None = None
    done: bool = True
    healthy: bool = True


@dataclass(frozen=True, slots=True)
class Limits:
    """What a launcher's flags set. `lease_tokens`: of an answer, before its request is queued again."""

    max_concurrent_requests: int = 128
    max_total_tokens: int = 4096
    max_input_tokens: int | None = None  # one less than the above
    max_batch_prefill_tokens: int = 2048
    max_batch_total_tokens: int = 65_536
    max_client_batch_size: int = 4
    lease_tokens: int = 1024  # a constant of the router

    @property
    def longest_prompt(self) -> int:
        return self.max_total_tokens - 1 if self.max_input_tokens is None else self.max_input_tokens


@dataclass(slots=True)
class FakeTgi:
    """The fake's state and handlers. `written` has the bytes of every stream's body, in order of their begin."""

    model: str
    limits: Limits
    habits: Habits
    driver: EngineDriver
    url: str = ""
    seen: list[Json] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    written: list[bytearray] = field(default_factory=list)
    permits: int = 0
    disconnects: int = 0
    refused: int = 0
    generations: int = 0
    requeued: int = 0
    reserved: int = 0  # KV tokens
    waited: int = 0  # leases that were not had at once
    leases: deque[Lease] = field(default_factory=deque)  # that wait for KV, first come first served

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_errors])
        app.router.add_routes(
            [
                web.get("/health", self.health),
                web.get("/info", self.info),
                web.get("/v1/models", self.models),
                web.get("/metrics", self.metrics),
                web.post("/tokenize", self.tokenize),
                web.post("/chat_tokenize", self.chat_tokenize),
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
                web.post("/generate", self.generate),
                web.post("/generate_stream", self.generate),
            ]
        )
        return app

    def behave(self, **habits: bool | int | None) -> None:
        """Change some habits."""
        self.habits = replace(self.habits, **habits)  # type: ignore[arg-type]  # names and types vary by test

    # --- small questions -----------------------------------------------------------------------------------

    async def health(self, _: web.Request) -> web.Response:
        if self.habits.healthy:
            return web.Response()
        raise TgiError(503, "healthcheck", "unhealthy")

    async def info(self, _: web.Request) -> web.Response:
        limits = self.limits
        return web.json_response(
            {
                "model_id": self.model,
                "model_sha": None,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": limits.max_concurrent_requests,
                "max_best_of": 2,
                "max_stop_sequences": 4,
                "max_input_tokens": limits.longest_prompt,
                "max_total_tokens": limits.max_total_tokens,
                "validation_workers": 2,
                "max_client_batch_size": limits.max_client_batch_size,
                "router": "text-generation-router-v3",
                "version": VERSION,
                "sha": None,
                "docker_label": "fake",
            }
        )

    async def models(self, _: web.Request) -> web.Response:
        card = {"id": self.model, "object": "model", "created": 0, "owned_by": self.model}
        return web.json_response({"object": "list", "data": [card]})

    async def metrics(self, _: web.Request) -> web.Response:
        """A gauge is there once it was set: after the first request."""
        lines = [
            "# TYPE tgi_request_failure counter",
            f'tgi_request_failure{{err="overloaded"}} {self.refused}',
        ]
        model = self.driver.model
        if self.generations:
            for name, value in (
                ("tgi_queue_size", len(self.leases) + model.waiting),
                ("tgi_batch_current_size", model.running),
                ("tgi_batch_current_max_tokens", self.reserved),
            ):
                lines += [f"# TYPE {name} gauge", f"{name} {value}"]
        return web.Response(text="\n".join(lines) + "\n")

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await self._body(request, "inputs")
        return web.json_response(_tokens(str(body["inputs"]).split()))

    async def chat_tokenize(self, request: web.Request) -> web.Response:
        words = chat_words(await self._body(request, "messages"))
        return web.json_response({"tokenize_response": _tokens(words), "templated_text": " ".join(words)})

    # --- KV that is taken ahead ----------------------------------------------------------------------------

    def reserve(self, lease: Lease) -> None:
        """Let it in when there is KV for all that it may need, behind all that wait for theirs."""
        self.leases.append(lease)
        self._let_in()
        self.waited += lease in self.leases

    def give_back(self, lease: Lease) -> None:
        """It has ended, or its client has left the queue."""
        if lease in self.leases:
            self.leases.remove(lease)
        elif lease.held:
            self.reserved -= lease.held
            lease.held = 0
        self._let_in()

    def _let_in(self) -> None:
        while self.leases and self.reserved + self.leases[0].needs <= self.limits.max_batch_total_tokens:
            lease = self.leases.popleft()
            lease.held = lease.needs
            self.reserved += lease.held
            lease.begin()

    # --- generations ---------------------------------------------------------------------------------------

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, "messages")
        options = body.get("stream_options")
        usage = isinstance(options, dict) and options.get("include_usage") is True
        return await self._generate(request, body, [chat_words(body)], Api.CHAT, usage=usage)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, "prompt")
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise web.HTTPUnprocessableEntity(text="Failed to deserialize the JSON body into the target type")
        if len(prompts) > self.limits.max_client_batch_size:
            message = f"Number of prompts exceeds the maximum allowed batch size of {len(prompts)}"
            raise TgiError(422, "batch size exceeded", message)
        words = [str(prompt).split() for prompt in prompts]
        return await self._generate(request, body, words, Api.COMPLETIONS)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Its own routes: another shape of body and answer, no usage, no [DONE], errors always flat."""
        body = await self._body(request, "inputs")
        parameters = body.get("parameters")
        named = dict(parameters) if isinstance(parameters, dict) else {}
        asked = {**named, "max_tokens": named.get("max_new_tokens"), "stream": request.path == "/generate_stream"}
        return await self._generate(request, asked, [str(body["inputs"]).split()], Api.OWN)

    async def _body(self, request: web.Request, needed: str) -> Json:
        raw = await request.read()
        body = orjson.loads(raw)
        if not isinstance(body, dict) or needed not in body or isinstance(body.get("stop"), str):
            raise web.HTTPUnprocessableEntity(text="Failed to deserialize the JSON body into the target type")
        self.bodies.append(raw)
        self.seen.append(body)
        return body

    async def _generate(
        self, request: web.Request, body: Json, prompts: Sequence[Sequence[str]], api: Api, *, usage: bool = False
    ) -> web.StreamResponse:
        self.generations += 1
        run = Run(self, body, prompts, api, usage=usage)
        try:
            return await (run.stream(request) if body.get("stream") is True else run.whole())
        except (asyncio.CancelledError, ConnectionError):
            self.disconnects += 1
            raise
        finally:
            run.close()


def _tokens(words: Sequence[str]) -> list[Json]:
    return [
        {"id": number, "text": word, "start": 0, "stop": len(word)}
        for number, word in zip(encode(words), words, strict=True)
    ]


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except TgiError as error:
        return web.Response(status=error.status, body=error.body(), content_type="application/json")
    except web.HTTPNotFound:
        return web.Response(status=404)  # without a body


@contextlib.asynccontextmanager
async def fake_tgi(
    model: str = "test-model",
    *,
    limits: Limits = Limits(),
    habits: Habits = Habits(),
    step_s: float = 0.002,
    step_time: StepTime | None = None,
) -> AsyncIterator[FakeTgi]:
    """A fake TGI on a free port; every step takes about `step_s`, or what `step_time` says."""
    config = EngineConfig(
        kv_tokens=limits.max_batch_total_tokens + 4_096,  # what is reserved is counted here, in single tokens
        max_model_tokens=limits.max_total_tokens,
        max_batched_tokens=limits.max_batch_prefill_tokens,
    )
    driver = EngineDriver(EngineModel(config, step_time or RooflineStepTime(c0_s=step_s)))
    fake = FakeTgi(model, limits, habits, driver)
    async with served(fake.application(), driver) as fake.url:
        yield fake
