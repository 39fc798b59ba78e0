"""A fake TGI server: the routes, streams, errors and metrics of version 3.3.7, with no model inside.

It is a fake. The shapes were written after the source of the router (`router/src/server.rs`, `lib.rs`, `chat.rs`,
`infer/mod.rs`); nothing here was compared with a live server. Times are those of the emulated engine
(`adapters.emulated.driver`), words those of the emulated model, so they say nothing of TGI.

Not reproduced: tools, grammars, log probabilities, `best_of`, that a generation is queued again every 1024 tokens,
and that a sequence in prefill is not cancelled when its client leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from adapters.emulated.driver import EngineDriver
from adapters.emulated.tokens import answer_key, draw_output_tokens, encode, first_word
from tests.adapters.fake_parts import Json, Plan, Sink, chat_words, served
from tiergate_engine.model import EngineConfig, EngineModel, SequenceSpec
from tiergate_engine.steptime import RooflineStepTime

VERSION = "3.3.7"
_FINGERPRINT = f"{VERSION}-fake"
_END_TOKEN = "</s>"


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
    """What a launcher's flags set."""

    max_concurrent_requests: int = 128
    max_total_tokens: int = 4096
    max_batch_prefill_tokens: int = 2048
    max_batch_total_tokens: int = 65_536
    max_client_batch_size: int = 4


class TgiError(Exception):
    """One of TGI's errors: its status outside of streams and its `error_type`."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind

    def body(self) -> bytes:
        return orjson.dumps({"error": str(self), "error_type": self.kind})

    def event(self, *, flat: bool) -> bytes:
        """What stands in an event: since version 2.4.1 always with 422 and without the type."""
        return self.body() if flat else orjson.dumps({"error": {"message": str(self), "http_status_code": 422}})


def _invalid(message: str) -> TgiError:
    return TgiError(422, "validation", f"Input validation error: {message}")


def _overloaded() -> TgiError:
    return TgiError(429, "overloaded", "Model is overloaded")


def _failed() -> TgiError:
    return TgiError(424, "generation", "Request failed during generation: Server error: fake failure")


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
                "max_input_tokens": limits.max_total_tokens - 1,
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
                ("tgi_queue_size", model.waiting),
                ("tgi_batch_current_size", model.running),
                ("tgi_batch_current_max_tokens", model.kv_used_tokens),
            ):
                lines += [f"# TYPE {name} gauge", f"{name} {value}"]
        return web.Response(text="\n".join(lines) + "\n")

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await self._body(request, "inputs")
        return web.json_response(_tokens(str(body["inputs"]).split()))

    async def chat_tokenize(self, request: web.Request) -> web.Response:
        words = chat_words(await self._body(request, "messages"))
        return web.json_response({"tokenize_response": _tokens(words), "templated_text": " ".join(words)})

    # --- generations ---------------------------------------------------------------------------------------

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, "messages")
        options = body.get("stream_options")
        usage = isinstance(options, dict) and options.get("include_usage") is True
        return await self._generate(request, body, [chat_words(body)], chat=True, usage=usage)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, "prompt")
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise web.HTTPUnprocessableEntity(text="Failed to deserialize the JSON body into the target type")
        if len(prompts) > self.limits.max_client_batch_size:
            message = f"Number of prompts exceeds the maximum allowed batch size of {len(prompts)}"
            raise TgiError(422, "batch size exceeded", message)
        words = [str(prompt).split() for prompt in prompts]
        return await self._generate(request, body, words, chat=False, usage=False)

    async def _body(self, request: web.Request, needed: str) -> Json:
        raw = await request.read()
        body = orjson.loads(raw)
        if not isinstance(body, dict) or needed not in body or isinstance(body.get("stop"), str):
            raise web.HTTPUnprocessableEntity(text="Failed to deserialize the JSON body into the target type")
        self.bodies.append(raw)
        self.seen.append(body)
        return body

    async def _generate(
        self, request: web.Request, body: Json, prompts: Sequence[Sequence[str]], *, chat: bool, usage: bool
    ) -> web.StreamResponse:
        self.generations += 1
        run = _Run(self, body, prompts, chat=chat, usage=usage)
        try:
            return await (run.stream(request) if body.get("stream") is True else run.whole())
        except (asyncio.CancelledError, ConnectionError):
            self.disconnects += 1
            raise
        finally:
            run.close()


class _Run:
    """One request while it is served."""

    def __init__(
        self, fake: FakeTgi, body: Json, prompts: Sequence[Sequence[str]], *, chat: bool, usage: bool
    ) -> None:
        self._fake = fake
        self._body = body
        self._prompts = prompts
        self._chat = chat
        self._usage = usage
        self._plans: list[Plan] = []
        self._permits = 0
        self._name = f"tgi-{fake.generations}"
        self._tokens: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self._head: Json = {"id": "", "created": int(time.time())}
        asked = body.get("model")
        # A chat names the model it was asked for, which TGI takes for the name of a LoRA adapter.
        self._model = fake.model if asked in (None, "tgi") or not chat else str(asked)

    def close(self) -> None:
        """Give back what it holds."""
        self._fake.permits -= self._permits
        self._permits = 0
        self._fake.driver.abort_all(plan.sequence_id for plan in self._plans)

    async def whole(self) -> web.Response:
        """The answer in one piece. Raises TgiError."""
        self._begin()
        left = len(self._plans)
        texts: list[list[str]] = [[] for _ in self._plans]
        while left:
            choice, index = await self._tokens.get()
            self._check(index)
            plan = self._plans[choice]
            left -= plan.ends(index)
            if plan.by_length or not plan.ends(index):
                texts[choice].append(plan.text(index))
        choices: list[Json] = []
        for index, (plan, text) in enumerate(zip(self._plans, texts, strict=True)):
            message = {"role": "assistant", "content": "".join(text)}
            said: Json = {"message": message} if self._chat else {"text": "".join(text)}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": _reason(plan, chat=True)})
        usages = [plan.usage() for plan in self._plans]
        usage = {name: sum(int(str(one[name])) for one in usages) for name in usages[0]}
        answer = {
            "object": "chat.completion" if self._chat else "text_completion",
            **self._head,
            "model": self._model,
            "system_fingerprint": _FINGERPRINT,
            "choices": choices,
            "usage": usage,
        }
        return web.Response(body=orjson.dumps(answer), content_type="application/json")

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """200 first, whatever comes: the permit is taken inside of the stream."""
        habits = self._fake.habits
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
        answer = web.StreamResponse(headers=headers)
        written = bytearray()
        self._fake.written.append(written)
        await answer.prepare(request)

        async def send(data: bytes) -> None:
            event = b"%bdata:%b%b\n\n" % (b":\n\n" * habits.comments, b" " * habits.spaced, data)
            written.extend(event)
            await answer.write(event)

        try:
            self._begin()
            left = len(self._plans)
            while left:
                choice, index = await self._tokens.get()
                if habits.cut_after is not None and index >= habits.cut_after:
                    assert request.transport is not None
                    request.transport.close()
                    return answer
                if habits.ends_after is not None and index >= habits.ends_after:
                    return answer
                self._check(index)
                left -= self._plans[choice].ends(index)
                for event in self._events(choice, index):
                    await send(orjson.dumps(event))
        except TgiError as error:
            await send(error.event(flat=habits.flat_errors))
        if habits.done:
            await send(b"[DONE]")
        return answer

    def _begin(self) -> None:
        """Take permits, check and submit. Raises TgiError."""
        fake, prompts = self._fake, self._prompts
        if fake.habits.overloaded or fake.permits + len(prompts) > fake.limits.max_concurrent_requests:
            fake.refused += 1
            raise _overloaded()
        self._permits = len(prompts)
        fake.permits += self._permits
        plans = [self._plan(words, choice) for choice, words in enumerate(prompts)]
        for choice, plan in enumerate(plans):
            spec = SequenceSpec(plan.sequence_id, plan.prompt_tokens, plan.output_tokens)
            fake.driver.submit(spec, Sink(choice, self._tokens), by_length=plan.by_length)
            self._plans.append(plan)

    def _plan(self, words: Sequence[str], choice: int) -> Plan:
        top_p = self._body.get("top_p")
        if isinstance(top_p, int | float) and not 0.0 < top_p < 1.0:
            raise _invalid("`top_p` must be > 0.0 and < 1.0")
        if not words:
            raise _invalid("`inputs` cannot be empty")
        most = self._fake.limits.max_total_tokens
        asked = self._body.get("max_tokens", self._body.get("max_completion_tokens"))
        room = most - len(words)
        if len(words) >= most:
            raise _invalid(f"`inputs` must have less than {most} tokens. Given: {len(words)}")
        limit = asked if isinstance(asked, int) else room
        if limit > room:
            raise _invalid(
                f"`inputs` tokens + `max_new_tokens` must be <= {most}. "
                f"Given: {len(words)} `inputs` tokens and {limit} `max_new_tokens`"
            )
        name = f"{self._name}-{choice}"
        key = answer_key(self._body.get("seed", name), choice)
        natural = draw_output_tokens(key)
        return Plan(name, len(words), min(natural, limit), first_word(key), natural > limit, _END_TOKEN)

    def _check(self, index: int) -> None:
        fails_after = self._fake.habits.fails_after
        if fails_after is not None and index >= fails_after:
            raise _failed()

    def _events(self, choice: int, index: int) -> list[Json]:
        plan = self._plans[choice]
        last = plan.ends(index)
        text = plan.text(index)
        if not self._chat:
            said: Json = {"index": choice, "text": text, "logprobs": None}
            if not last:
                return [self._event(choices=[{**said, "finish_reason": ""}])]
            return [
                self._event(choices=[{**said, "finish_reason": _reason(plan, chat=False)}], usage=plan.usage())
            ]
        delta = {"role": "assistant", "content": "" if text == _END_TOKEN else text}
        reason = _reason(plan, chat=True) if last else None
        events = [
            self._event(
                choices=[{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}], usage=None
            )
        ]
        if last and self._usage:
            events.append(self._event(choices=[], usage=plan.usage()))
        return events

    def _event(self, *, choices: list[Json], **more: object) -> Json:
        """Members in the order of TGI's structs; that of a completion's inner events differs from its last."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        named = {"model": self._model, "system_fingerprint": _FINGERPRINT}
        if not self._chat and "usage" not in more:
            return {"object": kind, **self._head, "choices": choices, **named}
        return {"object": kind, **self._head, **named, "choices": choices, **more}


def _reason(plan: Plan, *, chat: bool) -> str:
    """Streamed completions call the end of a sequence by its own name."""
    return "length" if plan.by_length else "stop" if chat else "eos_token"


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
) -> AsyncIterator[FakeTgi]:
    """A fake TGI on a free port; every step takes about `step_s`."""
    config = EngineConfig(
        kv_tokens=limits.max_batch_total_tokens,
        max_model_tokens=limits.max_total_tokens,
        max_batched_tokens=limits.max_batch_prefill_tokens,
    )
    driver = EngineDriver(EngineModel(config, RooflineStepTime(c0_s=step_s)))
    fake = FakeTgi(model, limits, habits, driver)
    async with served(fake.application(), driver) as fake.url:
        yield fake
