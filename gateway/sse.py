"""Counting what a stream of server-sent events carries, on its bytes, without decoding them.

The scanner sees every byte once and returns what goes to the client: the same bytes, but for the usage event that
only the gateway asked for. Which events carry tokens is told by one pattern per API; JSON is decoded only for the
one event that carries the usage.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from enum import Enum

import orjson


class Api(Enum):
    """Which API's events a stream carries."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"
    GENERATE = "generate"  # TGI's own


# A quote inside a JSON string is escaped, so `"name":` can only be a key of the event itself.
_CONTENT = {
    Api.CHAT: re.compile(
        rb'"(?:content|reasoning_content|reasoning|refusal|arguments)"\s*:\s*"(?!")|"tool_calls"\s*:\s*\[\s*\{'
    ),
    Api.COMPLETIONS: re.compile(rb'"text"\s*:\s*"(?!")'),
    Api.RESPONSES: re.compile(rb'"type"\s*:\s*"response\.[a-z_.]+\.delta"'),
    Api.MESSAGES: re.compile(rb'"(?:text|thinking|partial_json|signature)"\s*:\s*"(?!")|"type"\s*:\s*"tool_use"'),
    Api.EMBEDDINGS: re.compile(rb"(?!)"),
    Api.GENERATE: re.compile(rb'"token"\s*:\s*\{\s*"id"\s*:\s*\d+\s*,\s*"text"\s*:\s*"'),
}
# TGI's completions give an empty reason while they go on.
_REASON = rb'"finish_reason"\s*:\s*"(?!")'
_FINISH = {
    Api.CHAT: re.compile(_REASON + rb"|data:\s*\[DONE\]"),
    Api.COMPLETIONS: re.compile(_REASON + rb"|data:\s*\[DONE\]"),
    Api.RESPONSES: re.compile(rb'"type"\s*:\s*"response\.(?:completed|incomplete|failed)"|data:\s*\[DONE\]'),
    Api.MESSAGES: re.compile(rb'"type"\s*:\s*"message_stop"'),
    Api.EMBEDDINGS: re.compile(rb"(?!)"),
    Api.GENERATE: re.compile(rb'"generated_text"\s*:\s*"'),
}
_ERROR = re.compile(
    rb'(?:^|\n)event:\s*error\b|(?:^|\n)data:\s*\{\s*"(?:error"\s*:\s*(?:\{|"(?!"))|object"\s*:\s*"error")'
)
_EMPTY_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_DATA = re.compile(rb"(?:^|\n)data:")
_TEXT = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*')
_QUOTE, _BACKSLASH = b'"\\'
_EVENTS_KEPT = 4  # the end may be told before a usage event and [DONE]


@dataclass(frozen=True, slots=True)
class Usage:
    """What the engine says a request took. None where it did not say."""

    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None = None

    def updated(self, later: Usage) -> Usage:
        """What a later event says, and of the rest what an earlier one said."""
        return Usage(
            self.prompt_tokens if later.prompt_tokens is None else later.prompt_tokens,
            self.output_tokens if later.output_tokens is None else later.output_tokens,
            self.cached_tokens if later.cached_tokens is None else later.cached_tokens,
        )

    def plus(self, other: Usage) -> Usage:
        """What two choices took together; None where either did not say."""
        return Usage(
            _sum(self.prompt_tokens, other.prompt_tokens),
            _sum(self.output_tokens, other.output_tokens),
            _sum(self.cached_tokens, other.cached_tokens),
        )


class StreamTooWide(Exception):
    """One event is larger than the limit: not a stream of events."""


class SseScanner:
    """Follows one stream. `feed` takes bytes as they come and returns the bytes for the client.

    Attributes:
        tokens: content events so far (or the engine's own running count, when `counts_from_usage` and it tells).
        text_bytes: bytes of text in these events, as they stand in the JSON.
        plain: whether every one of them had text that could be measured.
        usage: the engine's final usage, once it came.
        error: the first error event, once it came.
        opened: whether anything came that ends the wait for the first token.
        error_first: whether that was an error.
    """

    __slots__ = (
        "_api",
        "_carry",
        "_content",
        "_counts_from_usage",
        "_ended",
        "_finish",
        "_held",
        "_limit",
        "_recent",
        "_separator",
        "_strip_usage",
        "error",
        "error_first",
        "opened",
        "plain",
        "text_bytes",
        "tokens",
        "usage",
    )

    def __init__(
        self,
        api: Api,
        *,
        strip_usage: bool = False,
        counts_from_usage: bool = False,
        limit_bytes: int = 4 << 20,
    ) -> None:
        self._api = api
        self._content = _CONTENT[api]
        self._finish = _FINISH[api]
        self._strip_usage = strip_usage
        self._counts_from_usage = counts_from_usage
        self._limit = limit_bytes
        self._carry = b""
        self._separator = b""
        self._held = False
        self._recent: deque[bytes] = deque(maxlen=_EVENTS_KEPT)
        self.tokens = 0
        self.text_bytes = 0
        self.plain = True
        self._ended: Usage | None = None  # the sum over choices that ended, each telling its own
        self.usage: Usage | None = None
        self.error: bytes | None = None
        self.opened = False
        self.error_first = False

    @property
    def between_events(self) -> bool:
        """Whether the last byte that went to the client ended an event."""
        return self._held or not self._carry

    @property
    def complete(self) -> bool:
        """Whether the stream said that it is complete."""
        rest = self._carry if _is_whole(self._carry) else b""
        return self._finish.search(b"".join((*self._recent, rest))) is not None

    def feed(self, chunk: bytes) -> bytes:
        """Count `chunk`; returns what goes to the client. Raises StreamTooWide."""
        if not self._carry and self._separator == b"\n\n" and chunk.find(b"\n\n") == len(chunk) - 2:
            return chunk if self._event(chunk) else b""
        return self._feed_pieces(chunk)

    def _feed_pieces(self, chunk: bytes) -> bytes:
        carry = self._carry
        data = carry + chunk if carry else chunk
        separator = self._separator or self._find_separator(data)
        if not separator:
            pieces, rest = [], data
        else:
            *pieces, rest = data.split(separator)
        if len(rest) > self._limit:
            raise StreamTooWide
        self._carry = rest
        dropped = False
        kept: list[bytes] = []
        for piece in pieces:
            event = piece + separator
            if self._event(event):
                kept.append(event)
            else:
                dropped = True
        if not self._strip_usage:
            return chunk
        # With an event to be taken out, only whole events go on: half of it may not slip through.
        self._held = True
        return b"".join(kept) if dropped or carry or rest else data

    def _find_separator(self, data: bytes) -> bytes:
        plain, windows = data.find(b"\n\n"), data.find(b"\r\n\r\n")
        if windows >= 0 and (plain < 0 or windows < plain):
            self._separator = b"\r\n\r\n"
        elif plain >= 0:
            self._separator = b"\n\n"
        return self._separator

    def flush(self) -> bytes:
        """The stream has ended: bytes of an unfinished event that were held back."""
        rest, self._carry = self._carry, b""
        return rest if self._held else b""

    def _event(self, event: bytes) -> bool:
        """Count one whole event; False when it must not reach the client."""
        self._recent.append(event)
        content = self._content.search(event)
        has_content = content is not None
        if content is not None:
            self.opened = True
            self.tokens += 1
            self._measure(event, content.end())
            if not self._counts_from_usage and (b'"usage"' not in event or self._finish.search(event) is None):
                return True
        if b'"usage"' in event:
            usage = read_usage(event)
            if usage is not None:
                self._note_usage(usage, event)
                if self._counts_from_usage and has_content and usage.output_tokens is not None:
                    self.tokens = max(self.tokens, usage.output_tokens)
                if self._strip_usage and _EMPTY_CHOICES.search(event) is not None:
                    return False
        if not self.opened and not has_content:
            if _ERROR.search(event) is not None:
                self.opened = self.error_first = True
                self.error = event
            elif self._finish.search(event) is not None:
                self.opened = True
        elif self.error is None and not has_content and b"error" in event and _ERROR.search(event) is not None:
            self.error = event
        return True

    def _note_usage(self, usage: Usage, event: bytes) -> None:
        """Beside the end of a choice stands what that choice took; in other places it is all, so far."""
        if _EMPTY_CHOICES.search(event) is None and self._finish.search(event) is not None:
            self._ended = usage if self._ended is None else self._ended.plus(usage)
            usage = self._ended
        self.usage = usage if self.usage is None else self.usage.updated(usage)

    def _measure(self, event: bytes, start: int) -> None:
        """Add the text that begins at `start`, up to its closing quote."""
        end = event.find(b'"', start)
        if event[end - 1] == _BACKSLASH:
            whole = _TEXT.match(event, start)
            end = start if whole is None else whole.end()
        if end > start and event[start - 1] == _QUOTE:
            self.text_bytes += end - start
        else:
            self.plain = False


def has_data(event: bytes) -> bool:
    """Whether an event carries data, and is not a comment only."""
    return _DATA.search(event) is not None


def data_of(event: bytes) -> bytes:
    """What an event of one data line carries."""
    start = event.find(b"data:")
    return event[start + 5 :].split(b"\n", 1)[0].strip() if start >= 0 else b""


def _is_whole(rest: bytes) -> bool:
    """Whether the last event of a stream lacks nothing but its blank line, which some engines leave out."""
    data = rest[rest.find(b"data:") + 5 :].strip()
    if data == b"[DONE]":
        return True
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


def read_usage(event: bytes) -> Usage | None:
    """The usage in one event, whichever API it is of; None when there is none that can be read."""
    start = event.find(b"data:")
    if start < 0:
        return None
    try:
        data = orjson.loads(event[start + 5 :].strip())
    except orjson.JSONDecodeError:
        return None
    return usage_of(data)


def usage_of(answer: object) -> Usage | None:
    """The usage of a decoded answer or event. Responses and Messages nest it or name its fields otherwise."""
    if not isinstance(answer, dict):
        return None
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        for outer in ("response", "message"):
            inner = answer.get(outer)
            if isinstance(inner, dict) and isinstance(inner.get("usage"), dict):
                usage = inner["usage"]
                break
        else:
            return None
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    found = Usage(
        _count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        _count(usage.get("completion_tokens", usage.get("output_tokens"))),
        _count(cached if cached is not None else usage.get("cache_read_input_tokens")),
    )
    return None if found.prompt_tokens is None and found.output_tokens is None else found


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
