"""The bytes of a stream, as vLLM writes them: `data: {json}` and an empty line for each token.

Everything in an event but the token's text is the same for a whole stream, so it is made once; chunk framing
(RFC 9112 section 7.1) is done here too, because one write per token then needs neither a task nor a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import orjson

from adapters.emulated.settings import FINGERPRINT

DONE = b"data: [DONE]\n\n"


class Route(Enum):
    """The streaming APIs; the values are what OpenAI's say of their events."""

    CHAT = "chat.completion.chunk"
    COMPLETION = "text_completion"
    MESSAGES = "message"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request, or of one choice so far."""

    prompt_tokens: int
    completion_tokens: int

    def json(self) -> bytes:
        total = self.prompt_tokens + self.completion_tokens
        return b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}' % (
            self.prompt_tokens,
            total,
            self.completion_tokens,
        )


def chunk(payload: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class EventWriter(Protocol):
    """Writes the events of one choice of one stream. Texts must need no JSON escapes."""

    @property
    def fast_heads(self) -> dict[int, bytes]:
        """By a plain token's text size: what precedes it on the wire, chunk size included."""
        ...

    @property
    def fast_tail(self) -> bytes:
        """What follows a plain token's text on the wire."""
        ...

    def fast_head(self, text_bytes: int) -> bytes:
        """Make the entry of `fast_heads` for this size."""
        ...

    def opening(self, prompt_tokens: int, *, running_usage: bool) -> bytes:
        """The events before the first text."""
        ...

    def text(self, text: bytes, finish_reason: str | None, usage: Usage | None, *, fingerprint: bool) -> bytes:
        """An event with text, of the size that came at once. The last one may say why it ended."""
        ...

    def closing(self, usage: Usage, finish_reason: str, *, usage_asked: bool) -> bytes:
        """The events after the last text of all choices."""
        ...


class FastFrame:
    """The framing of plain tokens: everything around their text is made once."""

    __slots__ = ("_before", "fast_heads", "fast_tail")

    def __init__(self, before: bytes, after: bytes) -> None:
        self._before = before
        self.fast_tail = after + b"\r\n"
        self.fast_heads: dict[int, bytes] = {}

    def fast_head(self, text_bytes: int) -> bytes:
        size = len(self._before) + text_bytes + len(self.fast_tail) - 2
        head = self.fast_heads[text_bytes] = b"%x\r\n%b" % (size, self._before)
        return head


class OpenAIWriter(FastFrame):
    """Chats and completions."""

    __slots__ = ("_head", "_middle", "_opening", "_route")

    def __init__(self, route: Route, response_id: str, created_s: int, model: str, choice: int) -> None:
        self._route = route
        opening = orjson.dumps({"id": response_id, "object": route.value, "created": created_s, "model": model})
        self._opening = b"data: " + opening[:-1] + b',"choices":['
        chat = route is Route.CHAT
        self._head = self._opening + b'{"index":%d,%b' % (choice, b'"delta":{"content":"' if chat else b'"text":"')
        self._middle = b'"},"logprobs":null,"finish_reason":' if chat else b'","logprobs":null,"finish_reason":'
        tail = (
            b'null,"token_ids":null}]}'
            if chat
            else b'null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}'
        )
        super().__init__(self._head, self._middle + tail + b"\n\n")

    def opening(self, prompt_tokens: int, *, running_usage: bool) -> bytes:
        """A chat begins with the role and no text."""
        if self._route is not Route.CHAT:
            return b""
        index = self._head[len(self._opening) : self._head.index(b'"delta"')]
        return (
            b'%b%b"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b,%b}\n\n'
            % (
                self._opening,
                index,
                b',"usage":' + Usage(prompt_tokens, 0).json() if running_usage else b"",
                b'"prompt_token_ids":null,"prompt_text":null',
            )
        )

    def text(self, text: bytes, finish_reason: str | None, usage: Usage | None, *, fingerprint: bool) -> bytes:
        """One event. The last one of a choice says why it ended."""
        reason = b"null" if finish_reason is None else b'"%b"' % finish_reason.encode()
        if self._route is Route.COMPLETION:
            rest = b',"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]'
        elif finish_reason is None:
            rest = b',"token_ids":null}]'
        else:
            rest = b',"stop_reason":null,"token_ids":null}]'
        running = b"" if usage is None else b',"usage":' + usage.json()
        marked = b',"system_fingerprint":"%b"' % FINGERPRINT.encode() if fingerprint else b""
        return b"%b%b%b%b%b%b%b}\n\n" % (self._head, text, self._middle, reason, rest, running, marked)

    def closing(self, usage: Usage, finish_reason: str, *, usage_asked: bool) -> bytes:
        """The whole request's usage in an event without choices, if asked for, and [DONE]."""
        if not usage_asked:
            return DONE
        return b'%b],"usage":%b,"system_fingerprint":"%b"}\n\n%b' % (
            self._opening,
            usage.json(),
            FINGERPRINT.encode(),
            DONE,
        )
