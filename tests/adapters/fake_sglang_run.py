"""One request to the fake SGLang (`fake_sglang`) while it is served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import orjson
from aiohttp import web

from adapters.emulated.tokens import answer_key, draw_output_tokens, first_word
from tests.adapters.fake_parts import Json, Plan, Sink
from tiergate_engine.model import SequenceSpec

if TYPE_CHECKING:
    from tests.adapters.fake_sglang import FakeSglang


class Refused(Exception):
    """A generation that ends with an error: the status it has outside of streams."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind

    def body(self, kind: str | None = None) -> Json:
        told = {"object": "error", "message": str(self), "type": kind or str(self.status), "param": None}
        return {**told, "code": self.status}

    def event(self) -> bytes:
        return orjson.dumps({"error": self.body(self.kind)})


Send: TypeAlias = Callable[[bytes], Awaitable[None]]


class Run:
    """One request while it is served."""

    def __init__(self, fake: FakeSglang, body: Json, prompts: Sequence[Sequence[str]], *, chat: bool) -> None:
        self._fake = fake
        self._body = body
        self._prompts = prompts
        self._chat = chat
        self.rid = str(body.get("rid") or f"made-{len(fake.seen)}")
        self._plans: list[Plan] = []
        self._begun: set[int] = set()
        self._tokens: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        options = body.get("stream_options")
        self._usage = isinstance(options, dict) and options.get("include_usage") is True
        self._running_usage = isinstance(options, dict) and options.get("continuous_usage_stats") is True
        self._created = int(time.time())
        self._refusal: Refused | None = None

    def waiting(self) -> list[Plan]:
        """Its sequences without a token yet."""
        return [plan for choice, plan in enumerate(self._plans) if choice not in self._begun]

    def close(self) -> None:
        self._fake.driver.abort_all(plan.sequence_id for plan in self._plans)

    def end_by_abort(self) -> None:
        """Its request ends with the reason `abort`, and without an error."""
        self.close()
        self._tokens.put_nowait((-1, -1))

    async def whole(self) -> web.Response:
        """The answer in one piece. Raises Refused."""
        self._begin()
        if self._refusal is not None:
            raise self._refusal
        left = len(self._plans)
        texts: list[str] = ["" for _ in self._plans]
        reasons = ["length" if plan.by_length else "stop" for plan in self._plans]
        while left:
            choice, index = await self._next()
            if choice < 0:
                reasons = ["abort"] * len(reasons)
                break
            texts[choice] += self._plans[choice].text(index)
            left -= self._plans[choice].ends(index)
        choices: list[Json] = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            said: Json = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        kind = "chat.completion" if self._chat else "text_completion"
        return web.json_response(self._event(kind, choices) | {"usage": self._usage_of(self._plans)})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The head comes with the first chunk. What fails then is told in the stream, behind a status of 200."""
        self._begin()
        first: tuple[int, int] | Refused
        try:
            first = await self._next()
        except Refused as error:
            first = error
        answer = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        written = bytearray()
        self._fake.written.append(written)
        await answer.prepare(request)

        async def send(data: bytes) -> None:
            event = b"data: %b\n\n" % data
            written.extend(event)
            await answer.write(event)

        try:
            await self._events(first, send)
        except Refused as error:
            await send(error.event())
        await send(b"[DONE]")
        return answer

    async def _events(self, first: tuple[int, int] | Refused, send: Send) -> None:
        if isinstance(first, Refused):
            raise first
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        made = [0] * len(self._plans)
        left = len(self._plans)
        got = first
        if self._chat:
            await send(orjson.dumps(self._event(kind, [_delta({"role": "assistant", "content": ""}, None)])))
        while True:
            choice, index = got
            if choice < 0:
                said = _delta({}, "abort") if self._chat else {"index": 0, "text": "", "finish_reason": "abort"}
                await send(orjson.dumps(self._event(kind, [said])))
                return
            plan = self._plans[choice]
            text = plan.text(index)
            # What has come meanwhile goes into the same event.
            for _ in range(self._fake.habits.merged - 1):
                if plan.ends(index):
                    break
                _, index = await self._next()
                text += plan.text(index)
            made[choice] = index + 1
            reason = None
            if plan.ends(index):
                left -= 1
                reason = "length" if plan.by_length else "stop"
            said = (
                _delta({"content": text}, reason)
                if self._chat
                else {"index": choice, "text": text, "logprobs": None, "finish_reason": reason}
            )
            event = self._event(kind, [said])
            if self._running_usage:
                event["usage"] = {"prompt_tokens": plan.prompt_tokens, "completion_tokens": made[choice]}
            await send(orjson.dumps(event))
            if not left:
                break
            got = await self._next()
        if self._usage:
            await send(orjson.dumps(self._event(kind, []) | {"usage": self._usage_of(self._plans)}))

    async def _next(self) -> tuple[int, int]:
        if self._refusal is not None:
            raise self._refusal
        choice, index = await self._tokens.get()
        fails_after = self._fake.habits.fails_after
        if fails_after is not None and index >= fails_after:
            raise Refused(500, "INTERNAL_SERVER_ERROR", "fake failure")
        self._begun.add(choice)
        return choice, index

    def _begin(self) -> None:
        """Check and submit. Raises Refused for a wrong prompt; the scheduler's refusal comes later."""
        fake, body = self._fake, self._body
        full = fake.limits.max_queued_requests
        if body.get("priority") is not None and fake.habits.aborts_priority and not fake.habits.priority:
            self._refusal = Refused(503, "SERVICE_UNAVAILABLE", "Using priority is disabled for this server.")
        elif fake.habits.overloaded or (full is not None and fake.engine.waiting >= full):
            self._refusal = Refused(503, "SERVICE_UNAVAILABLE", "The request queue is full.")
        if self._refusal is not None:
            return
        for choice, words in enumerate(self._prompts):
            plan = self._plan(words, choice)
            spec = SequenceSpec(plan.sequence_id, plan.prompt_tokens, plan.output_tokens)
            fake.driver.submit(spec, Sink(choice, self._tokens), by_length=plan.by_length)
            self._plans.append(plan)

    def _plan(self, words: Sequence[str], choice: int) -> Plan:
        most = self._fake.limits.context_tokens
        asked = self._body.get("max_tokens", self._body.get("max_completion_tokens"))
        room = most - len(words)
        if room <= 0:
            message = f"The input ({len(words)} tokens) is longer than the model's context length ({most} tokens)."
            raise Refused(400, "BadRequestError", message)
        limit = min(asked, room) if isinstance(asked, int) else room
        name = f"{self.rid}_{choice}" if len(self._prompts) > 1 else self.rid
        key = answer_key(self._body.get("seed", name), choice)
        natural = draw_output_tokens(key)
        return Plan(name, len(words), min(natural, limit), first_word(key), natural > limit, "")

    def _event(self, kind: str, choices: list[Json]) -> Json:
        head: Json = {"id": self.rid, "object": kind, "created": self._created, "model": self._fake.model}
        return {**head, "choices": choices}

    def _usage_of(self, plans: Sequence[Plan]) -> Json:
        usages = [plan.usage() for plan in plans]
        return {name: sum(int(str(one[name])) for one in usages) for name in usages[0]}


def _delta(delta: Json, reason: str | None) -> Json:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, "matched_stop": None}
