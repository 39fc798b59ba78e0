"""The bytes of a stream, as vLLM writes them: `data: {json}` and an empty line for each token.

Everything in an event but the token's text is the same for a whole stream, so it is made once; chunk framing
(RFC 9112 section 7.1) is done here too, because one write per token then needs neither a task nor a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import orjson

from adapters.emulated.settings import FINGERPRINT

DONE = b"data: [DONE]\n\n"


class Route(Enum):
    """The two streaming APIs."""

    CHAT = "chat.completion.chunk"
    COMPLETION = "text_completion"


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


class EventWriter:
    """Writes the events of one choice of one stream."""

    __slots__ = ("_head", "_middle", "_opening", "_route", "fast_heads", "fast_tail")

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
        self.fast_tail = self._middle + tail + b"\n\n\r\n"
        # By the text's size: chunk size and everything before the text. Filled as sizes come up.
        self.fast_heads: dict[int, bytes] = {}

    def fast_head(self, text_bytes: int) -> bytes:
        """What precedes a plain token's text of this size on the wire; `fast_tail` follows it."""
        size = len(self._head) + text_bytes + len(self.fast_tail) - 2
        head = self.fast_heads[text_bytes] = b"%x\r\n%b" % (size, self._head)
        return head

    def role(self, usage: Usage | None) -> bytes:
        """The chat's opening event: the role, and no text."""
        index = self._head[len(self._opening) : self._head.index(b'"delta"')]
        return (
            b'%b%b"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b,%b}\n\n'
            % (
                self._opening,
                index,
                b"" if usage is None else b',"usage":' + usage.json(),
                b'"prompt_token_ids":null,"prompt_text":null',
            )
        )

    def text(self, text: bytes, finish_reason: str | None, usage: Usage | None, *, fingerprint: bool) -> bytes:
        """An event with text, which must need no JSON escapes. The last one says why it ended."""
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

    def usage(self, usage: Usage) -> bytes:
        """The closing event with no choice and the whole request's usage."""
        return b'%b],"usage":%b,"system_fingerprint":"%b"}\n\n' % (
            self._opening,
            usage.json(),
            FINGERPRINT.encode(),
        )
