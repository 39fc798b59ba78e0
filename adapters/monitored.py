"""What engines with /health, /metrics and a tokenizer route have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from adapters.contract import Support, Unsupported, UpstreamError
from adapters.exchange import NO_ANSWER, Answer
from adapters.exposition import Sample, Scanner
from adapters.openai import OpenAIAdapter


class MonitoredAdapter(OpenAIAdapter):
    """An OpenAI-compatible engine that also tells how it is doing. The base of the families that do."""

    async def healthy(self) -> bool:
        """Whether /health answers 200."""
        try:
            answer = await self._ask("GET", "/health")
        except UpstreamError:
            return False
        return answer.status == 200

    async def _samples(self, scanner: Scanner) -> tuple[Sample, ...]:
        """What /metrics says. Raises UpstreamError."""
        answer = await self._ask("GET", "/metrics")
        if answer.status != 200:
            raise self.response_failure(answer.status, answer.body)
        return _scanned(scanner, answer)

    async def _try_samples(self, scanner: Scanner) -> tuple[Sample, ...]:
        """What /metrics says; nothing when it says nothing."""
        answer = await self._try_get("/metrics")
        return _scanned(scanner, answer) if answer.status == 200 else ()

    async def _has_post_route(self, path: str) -> Support:
        """A GET on a route that only takes POST is answered 405; so nothing is done by asking."""
        status = (await self._try_get(path)).status
        return Support.YES if status == 405 else Support.NO if status == 404 else Support.UNKNOWN

    async def _try_get(self, path: str) -> Answer:
        """One route's silence must not fail the whole probe."""
        try:
            return await self._ask("GET", path)
        except UpstreamError:
            return NO_ANSWER

    async def _ask_tokenizer(self, path: str, question: Mapping[str, object], there: Support) -> Answer:
        """The tokenizer's answer. `there`: whether the probe found the route.

        Raises Unsupported without the route or for too deep nesting, UpstreamError when the prompt is refused.
        """
        if there is Support.NO:
            raise Unsupported("count tokens: the server has no /tokenize")
        try:
            asked = orjson.dumps(question)
        except orjson.JSONEncodeError as error:  # orjson reads deeper nesting than it writes
            raise Unsupported("count tokens: the body is nested too deeply") from error
        answer = await self._ask("POST", path, asked)
        if answer.status != 200:
            raise self.response_failure(answer.status, answer.body)
        return answer


def positive_int(value: object) -> int | None:
    """A whole number above zero, also as text (a metric's label is one); else None."""
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def tokenize_question(body: Mapping[str, object], chat_fields: Sequence[str]) -> dict[str, object] | int:
    """What to ask vLLM's or SGLang's /tokenize of a request's body; a prompt of token ids is counted at once.

    `chat_fields`: the fields that decide how many tokens a chat prompt has, and are known to the route. Raises
    Unsupported for a list of several texts.
    """
    if "messages" in body:
        return {name: body[name] for name in chat_fields if body.get(name) is not None}
    prompt = body.get("prompt", body.get("input"))
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        question: dict[str, object] = {"prompt": prompt}
        question |= {name: body[name] for name in ("model", "add_special_tokens") if body.get(name) is not None}
        return question
    if isinstance(prompt, list) and prompt:
        if all(isinstance(token, int) for token in prompt):
            return len(prompt)
        if all(isinstance(part, list) for part in prompt):
            return sum(len(part) for part in prompt)
    raise Unsupported("count tokens: the body has neither messages nor one prompt")


def _scanned(scanner: Scanner, answer: Answer) -> tuple[Sample, ...]:
    return tuple(scanner.samples(answer.body.decode("utf-8", "replace")))
