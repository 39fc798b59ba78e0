"""Generations over HTTP: a checked body becomes sequences of the engine model, and their tokens an answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import orjson
from aiohttp import web

from adapters.emulated.answers import ChoicePlan, Stream, WholeAnswer, prompt_tokens
from adapters.emulated.driver import EngineDriver, TokenSink
from adapters.emulated.errors import ApiError, bad_request, engine_busy, prompt_too_long, unknown_model
from adapters.emulated.messages import (
    CountTokensBody,
    MessagesBody,
    MessageWriter,
    message_answer,
    message_error,
)
from adapters.emulated.plugin import EmulatedPlugin, Urgency
from adapters.emulated.prompts import Prompt, Units, chat_units, prompt_units
from adapters.emulated.protocol import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerationBody,
    check_generation,
    parse,
    stated_output_tokens,
)
from adapters.emulated.settings import FINGERPRINT, EmulatedSettings
from adapters.emulated.sse import EventWriter, OpenAIWriter, Route, Usage
from adapters.emulated.tokens import answer_key, draw_output_tokens, first_word
from tiergate_engine.control import ControlError
from tiergate_engine.model import EngineFull, SequenceSpec, SequenceTooLong

EMBEDDING_DIMENSIONS = 8
_SSE_HEADERS = {"content-type": "text/event-stream; charset=utf-8"}


class Generations:
    """The handlers of the routes that cost engine steps."""

    def __init__(self, settings: EmulatedSettings, driver: EngineDriver) -> None:
        self.settings = settings
        self.driver = driver
        self.plugin: EmulatedPlugin | None = None
        self.in_progress = 0
        self._asked = 0
        self._serial = 0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        body = parse(ChatBody, await read_json(request))
        prompts = self._prompts([chat_units(body.messages)])
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        return await self._generate(request, body, prompts, limit, Route.CHAT)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        body = parse(CompletionBody, await read_json(request))
        prompts = self._prompts(prompt_units(body.prompt, "prompt"))
        return await self._generate(request, body, prompts, body.max_tokens, Route.COMPLETION)

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/messages."""
        try:
            body = parse(MessagesBody, await read_json(request))
            prompts = self._prompts([chat_units(body.chat())])
            return await self._generate(request, body.generation(), prompts, body.max_tokens, Route.MESSAGES)
        except ApiError as error:
            return message_error(error)

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/messages/count_tokens."""
        try:
            body = parse(CountTokensBody, await read_json(request))
            self.check_model(body.model)
            chat = MessagesBody(model=body.model, messages=body.messages, system=body.system, max_tokens=1).chat()
            return json_answer({"input_tokens": len(chat_units(chat))})
        except ApiError as error:
            return message_error(error)

    async def _generate(
        self,
        request: web.Request,
        body: GenerationBody,
        prompts: Sequence[Prompt],
        limit: int | None,
        route: Route,
    ) -> web.StreamResponse:
        self.check_model(body.model)
        check_generation(body)
        urgency = self._urgency(request, body)
        prefix = "cmpl-" if route is Route.COMPLETION else "chatcmpl-"
        response_id = prefix + (request.headers.get("X-Request-Id") or body.request_id or uuid.uuid4().hex)
        plans = self._plans(response_id, body, prompts, limit)
        self.in_progress += 1
        try:
            if body.stream:
                return await self._stream(request, body, plans, prompts, urgency, response_id, route)
            return await self._whole(body, plans, prompts, urgency, response_id, route)
        finally:
            self.in_progress -= 1
            self.driver.abort_all(plan.sequence_id for plan in plans)

    def _prompts(self, units: Sequence[Units]) -> list[Prompt]:
        engine = self.settings.engine
        block_tokens = engine.block_tokens if engine.prefix_caching else None
        return [Prompt.of(one, block_tokens) for one in units]

    def _plans(
        self, response_id: str, body: GenerationBody, prompts: Sequence[Prompt], limit: int | None
    ) -> list[ChoicePlan]:
        stated = stated_output_tokens(body)
        plans: list[ChoicePlan] = []
        for index, prompt in enumerate(prompts):
            room = self._room(prompt)
            most = room if limit is None else min(limit, room)
            for choice in range(body.choices):
                name = body.seed if body.seed is not None else response_id
                key = answer_key(self.settings.seed, name, index, choice)
                natural = draw_output_tokens(key) if stated is None else stated
                if body.ignore_eos and stated is None:
                    natural = most
                tokens = min(max(natural, body.min_tokens), most)
                self._serial += 1
                plans.append(
                    ChoicePlan(
                        sequence_id=f"{response_id}-{index}-{choice}-{self._serial:08x}",
                        prompt_index=index,
                        prompt_tokens=prompt.tokens,
                        output_tokens=tokens,
                        first_word=first_word(key),
                        by_length=body.ignore_eos or tokens < natural or tokens == most,
                    )
                )
        return plans

    def _room(self, prompt: Prompt) -> int:
        """Most tokens that may follow a prompt. Raises ApiError when there is no room for one."""
        engine = self.settings.engine
        if prompt.tokens > engine.max_model_tokens:
            exact = str(prompt.tokens) if prompt.counted else f"at least {engine.max_model_tokens + 1}"
            raise prompt_too_long(engine.max_model_tokens, exact)
        room = min(engine.max_model_tokens, self.driver.model.kv_capacity_tokens) - prompt.tokens
        if room < 1:
            raise bad_request("max_tokens must be at least 1, got 0.", "max_tokens")
        return room

    def _submit(
        self,
        plans: Sequence[ChoicePlan],
        prompts: Sequence[Prompt],
        urgency: Urgency,
        sinks: Sequence[WholeAnswer] | Stream,
    ) -> None:
        """Queue all sequences of a request, or none. Raises ApiError."""
        faults = self.settings.faults
        self._asked += 1
        if faults.refuse_every is not None and self._asked % faults.refuse_every == 0:
            self.driver.stats.rejected += 1
            raise engine_busy()
        targets: Sequence[TokenSink] = sinks.choices if isinstance(sinks, Stream) else sinks
        for position, (plan, sink) in enumerate(zip(plans, targets, strict=True)):
            blocks = prompts[plan.prompt_index].blocks
            spec = SequenceSpec(
                plan.sequence_id,
                plan.prompt_tokens,
                plan.output_tokens,
                urgency.priority,
                blocks,
                first_due_s=urgency.first_due_s,
                pace_s=urgency.pace_s,
                relegated=urgency.relegated,
            )
            try:
                self.driver.submit(spec, sink, by_length=plan.by_length)
            except (EngineFull, SequenceTooLong) as error:
                self.driver.abort_all(earlier.sequence_id for earlier in plans[:position])
                if isinstance(error, SequenceTooLong):
                    raise bad_request(str(error), "max_tokens") from error
                self.driver.stats.rejected += 1
                raise engine_busy() from error

    async def _whole(
        self,
        body: GenerationBody,
        plans: Sequence[ChoicePlan],
        prompts: Sequence[Prompt],
        urgency: Urgency,
        response_id: str,
        route: Route,
    ) -> web.StreamResponse:
        answer = WholeAnswer(len(plans))
        self._submit(plans, prompts, urgency, [answer] * len(plans))
        await answer.wait()
        asked = prompt_tokens(plans)
        produced = sum(plan.output_tokens for plan in plans)
        model = body.model or self.settings.model
        if route is Route.MESSAGES:
            (plan,) = plans
            usage = Usage(asked, produced)
            return json_answer(message_answer(response_id, model, plan.text(), plan.finish_reason, usage))
        choices: list[dict[str, object]] = []
        for index, plan in enumerate(plans):
            said: dict[str, object]
            if route is Route.CHAT:
                message = {"role": "assistant", "content": plan.text(), "refusal": None, "annotations": None}
                message |= {"audio": None, "function_call": None, "reasoning": None}
                said = {"message": message}
            else:
                said = {"text": plan.text()}
            said |= {"logprobs": None, "finish_reason": plan.finish_reason, "stop_reason": None}
            choices.append({"index": index, **said, "token_ids": None})
        return json_answer(
            {
                "id": response_id,
                "object": "chat.completion" if route is Route.CHAT else "text_completion",
                "created": int(time.time()),
                "model": model,
                "choices": choices,
                "service_tier": None,
                "system_fingerprint": FINGERPRINT,
                "usage": {
                    "prompt_tokens": asked,
                    "total_tokens": asked + produced,
                    "completion_tokens": produced,
                    "prompt_tokens_details": None,
                },
                "kv_transfer_params": None,
            }
        )

    async def _stream(
        self,
        request: web.Request,
        body: GenerationBody,
        plans: Sequence[ChoicePlan],
        prompts: Sequence[Prompt],
        urgency: Urgency,
        response_id: str,
        route: Route,
    ) -> web.StreamResponse:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client left before its request was read")
        created_s = int(time.time())
        model = body.model or self.settings.model
        writers: list[EventWriter]
        if route is Route.MESSAGES:
            writers = [MessageWriter(response_id, model)]
        else:
            writers = [OpenAIWriter(route, response_id, created_s, model, index) for index in range(len(plans))]
        stream = Stream(
            request.protocol,
            transport,
            writers,
            plans,
            usage=body.wants_usage,
            running_usage=body.wants_running_usage,
            faults=self.settings.faults,
        )
        late_refusal: ApiError | None = None
        response = web.StreamResponse(headers=_SSE_HEADERS)
        response.enable_chunked_encoding()
        try:
            self._submit(plans, prompts, urgency, stream)
        except ApiError as error:
            if error.status != 503 or not self.settings.faults.refuse_in_stream:
                raise
            late_refusal = error
        # No step can end before the head is written: nothing here waits for anything but the buffer's copy.
        await response.prepare(request)
        if late_refusal is not None:
            await response.write_eof(late_refusal.event())
            return response
        await response.write_eof(await stream.wait())
        return response

    def _urgency(self, request: web.Request, body: GenerationBody) -> Urgency:
        priority = self._priority(request, body)
        if self.plugin is None:
            return Urgency(priority)
        try:
            return self.plugin.urgency(priority, body.vllm_xargs)
        except ControlError as error:
            raise bad_request(str(error), "vllm_xargs") from error

    def _priority(self, request: web.Request, body: GenerationBody) -> int:
        priority = body.priority
        header = request.headers.get("X-Vllm-Priority")
        if header is not None:
            try:
                priority = int(header)
            except ValueError:
                priority = body.priority  # vLLM ignores a header that is no number
        if priority and not self.settings.engine.priority_scheduling:
            raise bad_request(f"Got priority {priority} but Priority scheduling is not enabled.", "priority")
        return priority

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not served."""
        if name and name != self.settings.model:
            raise unknown_model(name, self.settings.model)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/embeddings: each input costs a prefill; the numbers come from a checksum and mean nothing."""
        body = parse(EmbeddingBody, await read_json(request))
        self.check_model(body.model)
        if body.encoding_format != "float":
            raise bad_request("Only encoding_format `float` is emulated.", "encoding_format")
        units = prompt_units(body.input, "input")
        prompts = self._prompts(units)
        for prompt in prompts:
            self._room(prompt)
        response_id = "embd-" + (request.headers.get("X-Request-Id") or uuid.uuid4().hex)
        plans: list[ChoicePlan] = []
        for index, prompt in enumerate(prompts):
            self._serial += 1
            plans.append(
                ChoicePlan(
                    f"{response_id}-{index}-{self._serial:08x}", index, prompt.tokens, 1, 0, by_length=False
                )
            )
        answer = WholeAnswer(len(plans))
        self.in_progress += 1
        try:
            self._submit(plans, prompts, Urgency(), [answer] * len(plans))
            await answer.wait()
        finally:
            self.in_progress -= 1
            self.driver.abort_all(plan.sequence_id for plan in plans)
        size = body.dimensions or EMBEDDING_DIMENSIONS
        asked = prompt_tokens(plans)
        return json_answer(
            {
                "id": response_id,
                "object": "list",
                "created": int(time.time()),
                "model": body.model or self.settings.model,
                "data": [
                    {"index": index, "object": "embedding", "embedding": _direction(one, size)}
                    for index, one in enumerate(units)
                ],
                "usage": {
                    "prompt_tokens": asked,
                    "total_tokens": asked,
                    "completion_tokens": 0,
                    "prompt_tokens_details": None,
                },
            }
        )


async def read_json(request: web.Request) -> bytes:
    """The body of a request that says it is JSON. Raises ApiError 400."""
    if request.content_type != "application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise ApiError(400, message)
    return await request.read()


def json_answer(value: object) -> web.Response:
    """A 200 with this value."""
    return web.Response(body=orjson.dumps(value), headers={"content-type": "application/json"})


def _direction(units: Units, size: int) -> list[float]:
    """A unit vector that depends on the prompt only."""
    key = answer_key(*units)
    raw = [((key * (2 * i + 1) >> 3) & 0xFFFF) / 32768.0 - 1.0 for i in range(size)]
    length = sum(value * value for value in raw) ** 0.5 or 1.0
    return [value / length for value in raw]
