"""Anthropic's Messages API as vLLM serves it: bodies, answers, errors, and the events of streams."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from aiohttp import web

from adapters.emulated.errors import ApiError
from adapters.emulated.protocol import Body, GenerationBody, JsonValue, Message, TextPart
from adapters.emulated.sse import FastFrame, Usage

_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}
_VALIDATION = "Bad Request"


class MessagesBody(Body):
    """`POST /v1/messages`: a chat whose system prompt stands apart."""

    model: str
    messages: list[Message]
    system: str | list[TextPart] | None = None
    max_tokens: int
    stream: bool | None = False
    temperature: float | None = None
    vllm_xargs: dict[str, JsonValue] | None = None

    def chat(self) -> list[Message]:
        """The messages with the system prompt as the first."""
        if not self.system:
            return self.messages
        parts: list[TextPart | str] | str = self.system if isinstance(self.system, str) else [*self.system]
        return [Message(role="system", content=parts), *self.messages]

    def generation(self) -> GenerationBody:
        """What is asked for, in the words of the other routes."""
        return GenerationBody(
            model=self.model,
            stream=self.stream,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            vllm_xargs=self.vllm_xargs,
        )


class CountTokensBody(Body):
    """`POST /v1/messages/count_tokens`."""

    model: str
    messages: list[Message]
    system: str | list[TextPart] | None = None


class MessageWriter(FastFrame):
    """The events of a streamed message: one text block, opened with the message and closed with it."""

    __slots__ = ("_after", "_id", "_model", "_start")

    def __init__(self, response_id: str, model: str) -> None:
        self._id = response_id
        self._model = model
        self._start = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta",'
            b'"delta":{"type":"text_delta","text":"'
        )
        self._after = b'"},"index":0}\n\n'
        super().__init__(self._start, self._after)

    def opening(self, prompt_tokens: int, *, running_usage: bool) -> bytes:
        message = message_answer(self._id, self._model, None, None, Usage(prompt_tokens, 0))
        return _event({"type": "message_start", "message": message}) + _event(
            {"type": "content_block_start", "content_block": {"type": "text", "text": ""}, "index": 0}
        )

    def text(self, text: bytes, finish_reason: str | None, usage: Usage | None, *, fingerprint: bool) -> bytes:
        return self._start + text + self._after

    def closing(self, usage: Usage, finish_reason: str, *, usage_asked: bool) -> bytes:
        stop = {"stop_reason": _STOP_REASONS[finish_reason], "stop_sequence": None}
        return (
            _event({"type": "content_block_stop", "index": 0})
            + _event({"type": "message_delta", "delta": stop, "usage": _usage(usage)})
            + _event({"type": "message_stop"})
        )


def message_answer(
    response_id: str, model: str, text: str | None, finish_reason: str | None, usage: Usage
) -> dict[str, object]:
    """A message: whole, or (without text) as a stream begins it."""
    content: Sequence[object] = [] if text is None else [{"type": "text", "text": text}]
    return {
        "id": response_id,
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": model,
        "stop_reason": None if finish_reason is None else _STOP_REASONS[finish_reason],
        "stop_sequence": None,
        "usage": _usage(usage),
    }


def message_error(error: ApiError) -> web.Response:
    """An error in Anthropic's shape; what fails a body's validation keeps OpenAI's, as in vLLM."""
    body = error.body()
    if error.kind != _VALIDATION:
        body = orjson.dumps({"type": "error", "error": {"type": error.kind, "message": str(error)}})
    return web.Response(status=error.status, body=body, headers={"content-type": "application/json"})


def _usage(usage: Usage) -> dict[str, int]:
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}


def _event(value: dict[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (str(value["type"]).encode(), orjson.dumps(value))
