"""Counts tokens in a server-sent event stream without decoding the JSON of token events.

One event with text, thinking or tool-call content is one token; the answer's `usage`, where it comes, is compared
afterwards. Role-only events and comments are none. Events are told by one search for a non-empty content field: in
JSON a quote inside a string is escaped, so no text can imitate the field. Every other event (role, finish, usage,
error) is decoded; there are a few of them in a stream.
"""

from __future__ import annotations

import re

import orjson

_TOKEN = re.compile(rb'"(?:content|text|reasoning|reasoning_content|arguments)":\s*"(?!")|"tool_calls":\s*\[\s*\{')
_FINISH = re.compile(rb'"finish_reason":\s*"')
_EVENT_LIMIT_BYTES = 16 * 1024 * 1024


class StreamBroken(Exception):
    """The stream is not in the protocol."""


class StreamError(Exception):
    """The server reported an error inside the stream. `status` is its code, if it gave a number."""

    def __init__(self, message: str, kind: str, status: int | None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


def error_of(payload: object, status: int | None = None) -> StreamError | None:
    """The error in an OpenAI-shaped error object (or vLLM's older flat one); None when it is none."""
    if not isinstance(payload, dict):
        return None
    error = payload.get("error", payload if payload.get("object") == "error" else None)
    if error is None:
        return None
    if not isinstance(error, dict):
        return StreamError(str(error), "error", status)
    code = error.get("code")
    number = code if isinstance(code, int) else status
    kind = code if isinstance(code, str) and code else error.get("type")
    return StreamError(str(error.get("message", "")), str(kind or "error"), number)


class SseCounter:
    """Feed it a stream's bytes, cut anywhere; it tells how many tokens each feed completed."""

    __slots__ = ("_last", "_rest", "done", "events", "finish_reason", "tokens", "usage_tokens")

    def __init__(self) -> None:
        self._rest = b""
        self._last = b""
        self.tokens = 0
        self.events = 0
        self.done = False
        self.finish_reason: str | None = None
        self.usage_tokens: int | None = None

    def feed(self, data: bytes) -> int:
        """Take the next bytes and return the tokens whose events they completed.

        Raises StreamError for an error event and StreamBroken for an event without end.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        if data.endswith(b"\n\n") and data.find(b"\n\n") == len(data) - 2 and _TOKEN.search(data):
            self._last = data
            self.events += 1
            self.tokens += 1
            return 1
        return self._feed_many(data)

    def _feed_many(self, data: bytes) -> int:
        *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > _EVENT_LIMIT_BYTES:
            raise StreamBroken(f"an event is longer than {_EVENT_LIMIT_BYTES} bytes")
        before = self.tokens
        for event in events:
            if _TOKEN.search(event):
                self._last = event
                self.events += 1
                self.tokens += 1
            elif event.strip():
                self.events += 1
                self._other(event)
        return self.tokens - before

    def _other(self, event: bytes) -> None:
        payload = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if not payload:
            return
        if payload == b"[DONE]":
            self.done = True
            return
        try:
            value = orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            raise StreamBroken(f"an event is not JSON: {payload[:80]!r}") from error
        failure = error_of(value)
        if failure is not None:
            raise failure
        if isinstance(value, dict):
            self._chunk(value)

    def _chunk(self, value: dict[str, object]) -> None:
        usage = value.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self.usage_tokens = usage["completion_tokens"]
        choices = value.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        choice = choices[0]
        delta = choice.get("delta")
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            self.finish_reason = reason
        elif self.tokens and not (isinstance(delta, dict) and delta.get("role")):
            # An engine that withholds half a character still sends one event a token.
            self.tokens += 1

    @property
    def ended(self) -> bool:
        """Whether the stream said that it is complete ([DONE], or a finish reason where an engine sends none)."""
        return self.done or self.finish_reason is not None or _FINISH.search(self._last) is not None
