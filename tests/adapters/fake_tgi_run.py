"""One request to the fake TGI (`fake_tgi`) while it is served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from adapters.emulated.tokens import answer_key, draw_output_tokens, first_word
from tests.adapters.fake_parts import Json, Plan
from tiergate_engine.lockstep import State
from tiergate_engine.model import SequenceSpec

if TYPE_CHECKING:
    from tests.adapters.fake_tgi import FakeTgi

_FINGERPRINT = "3.3.7-fake"
_END_TOKEN = "</s>"


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


class Api(Enum):
    """Whose words a request and its answer are in."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    OWN = "own"


class Lease:
    """One sequence for as long as it runs on: after so many tokens it ends, and queues again with what it said.

    `needs`: KV for its prompt and all that it may say until then, `held` what it has of that.
    """

    def __init__(
        self, fake: FakeTgi, plan: Plan, most: int, choice: int, into: asyncio.Queue[tuple[int, int]]
    ) -> None:
        self.needs = self.held = 0
        self._fake = fake
        self._plan = plan
        self._most = most
        self._choice = choice
        self._into = into
        self._made = 0
        self._name = ""
        self._abandoned = False
        self._queue()

    def token(self, index: int, *, finished: bool) -> None:
        if self._abandoned:
            self._fake.driver.abort(self._name)
            self._fake.give_back(self)
            return
        self._into.put_nowait((self._choice, self._made))
        self._made += 1
        if finished:
            self._fake.give_back(self)
        if finished and self._made < self._plan.output_tokens:
            self._fake.requeued += 1
            self._queue()

    def leave(self) -> None:
        """Its client is gone. What waits or speaks is dropped; a prompt that is computed goes on to its end."""
        known = self._fake.driver.model._known.get(self._name)
        if known is not None and known.state is State.PREFILL:
            self._abandoned = True
        else:
            self._fake.driver.abort(self._name)
            self._fake.give_back(self)

    def _queue(self) -> None:
        lease = min(self._most - self._made, self._fake.limits.lease_tokens)
        self.needs = self._plan.prompt_tokens + self._made + lease - 1
        self._name = f"{self._plan.sequence_id}+{self._made}"
        self._fake.reserve(self)

    def begin(self) -> None:
        """There is KV for it."""
        plan, made = self._plan, self._made
        tokens = min(plan.output_tokens - made, self._fake.limits.lease_tokens)
        spec = SequenceSpec(self._name, plan.prompt_tokens + made, tokens)
        self._fake.driver.submit(spec, self, by_length=plan.by_length)


class Run:
    """One request while it is served."""

    def __init__(
        self, fake: FakeTgi, body: Json, prompts: Sequence[Sequence[str]], api: Api, *, usage: bool
    ) -> None:
        self._fake = fake
        self._body = body
        self._prompts = prompts
        self._api = api
        self._chat = api is Api.CHAT
        self._usage = usage
        self._plans: list[Plan] = []
        self._leases: list[Lease] = []
        self._permits = 0
        self._name = f"tgi-{fake.generations}"
        self._tokens: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self._head: Json = {"id": "", "created": int(time.time())}
        asked = body.get("model")
        # A chat names the model it was asked for, which TGI takes for the name of a LoRA adapter.
        self._model = fake.model if asked in (None, "tgi") or not self._chat else str(asked)

    def close(self) -> None:
        """Give back what it holds."""
        self._fake.permits -= self._permits
        self._permits = 0
        for lease in self._leases:
            lease.leave()

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
        if self._api is Api.OWN:
            return web.json_response(self._own_answer(self._plans[0], "".join(texts[0])))
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
            await send(error.event(flat=habits.flat_errors or self._api is Api.OWN))
        if habits.done and self._api is not Api.OWN:
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
        for choice, (plan, most) in enumerate(plans):
            self._plans.append(plan)
            self._leases.append(Lease(fake, plan, most, choice, self._tokens))

    def _plan(self, words: Sequence[str], choice: int) -> tuple[Plan, int]:
        """What it will say, and the most it may. Raises TgiError."""
        top_p = self._body.get("top_p")
        if isinstance(top_p, int | float) and not 0.0 < top_p < 1.0:
            raise _invalid("`top_p` must be > 0.0 and < 1.0")
        if not words:
            raise _invalid("`inputs` cannot be empty")
        most = self._fake.limits.max_total_tokens
        asked = self._body.get("max_tokens", self._body.get("max_completion_tokens"))
        room = most - len(words)
        longest = self._fake.limits.longest_prompt
        if len(words) > longest:
            raise _invalid(f"`inputs` must have less than {longest} tokens. Given: {len(words)}")
        limit = asked if isinstance(asked, int) else room
        if limit > room:
            raise _invalid(
                f"`inputs` tokens + `max_new_tokens` must be <= {most}. "
                f"Given: {len(words)} `inputs` tokens and {limit} `max_new_tokens`"
            )
        name = f"{self._name}-{choice}"
        key = answer_key(self._body.get("seed", name), choice)
        natural = draw_output_tokens(key)
        plan = Plan(name, len(words), min(natural, limit), first_word(key), natural > limit, _END_TOKEN)
        return plan, limit

    def _check(self, index: int) -> None:
        fails_after = self._fake.habits.fails_after
        if fails_after is not None and index >= fails_after:
            raise _failed()

    def _events(self, choice: int, index: int) -> list[Json]:
        plan = self._plans[choice]
        last = plan.ends(index)
        text = plan.text(index)
        if self._api is Api.OWN:
            return [self._own_event(plan, index)]
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

    def _own_event(self, plan: Plan, index: int) -> Json:
        token: Json = {"id": index, "text": plan.text(index), "logprob": -0.1, "special": False}
        if not plan.ends(index):
            return {"index": index + 1, "token": token, "generated_text": None, "details": None}
        said = "".join(map(plan.text, range(plan.output_tokens - (not plan.by_length))))
        token["special"] = not plan.by_length
        return {"index": index + 1, "token": token, **self._own_answer(plan, said)}

    def _own_answer(self, plan: Plan, text: str) -> Json:
        details: Json = {
            "finish_reason": "length" if plan.by_length else "eos_token",
            "generated_tokens": plan.output_tokens,
            "seed": None,
            "input_length": plan.prompt_tokens,
        }
        return {"generated_text": text, "details": details if self._body.get("details") else None}

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
