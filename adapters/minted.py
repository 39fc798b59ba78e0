"""Give an answer the id that its engine left empty.

OpenAI's clients put the events of a stream together by `id`, and TGI leaves it empty in every one. It is filled in
on the bytes, in the one place where TGI writes it, so that nothing else of an answer changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from adapters.contract import Upstream, UpstreamCall, UpstreamResponse

# How TGI begins each event and answer of its OpenAI routes: `object` is its tag, `id` the first member behind it.
# In a text these bytes cannot stand, because a quote in a JSON text is escaped.
_EMPTY = b'"id":""'
_HEADS = tuple(
    (b'{"object":"%b",%b' % (kind, _EMPTY), prefix)
    for kind, prefix in (
        (b"chat.completion.chunk", b"chatcmpl-"),
        (b"chat.completion", b"chatcmpl-"),
        (b"text_completion", b"cmpl-"),
    )
)
_LONGEST = max(len(head) for head, _ in _HEADS)
_ID_HEADER = "x-request-id"


class MintedIds:
    """An upstream whose answers carry an id made of that of their request (`adapters.contract.Upstream`)."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    @property
    def inner(self) -> Upstream:
        """What the bytes come from."""
        return self._upstream

    async def open(self, call: UpstreamCall) -> UpstreamResponse:
        response = await self._upstream.open(call)
        name = call.headers.get(_ID_HEADER)
        return response if name is None else _Minted(response, name)

    async def close(self) -> None:
        await self._upstream.close()


class _Minted:
    """An answer that is filled in as it is read. An event cut inside its head waits for the rest of it."""

    __slots__ = ("_filled", "_held", "_response")

    def __init__(self, response: UpstreamResponse, name: str) -> None:
        self._response = response
        text = json.dumps(name)[1:-1].encode()
        self._filled = tuple(
            (head, head.replace(_EMPTY, b'"id":"%b%b"' % (prefix, text))) for head, prefix in _HEADS
        )
        self._held = b""

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Without the length, which is no longer true."""
        return {name: value for name, value in self._response.headers.items() if name != "content-length"}

    async def read(self) -> bytes:
        while True:
            data = await self._response.read()
            if not data:
                rest, self._held = self._held, b""
                return rest
            data = self._fill(self._held + data if self._held else data)
            start = _unfinished(data)
            self._held = data[start:]
            if start:
                return data[:start]

    async def read_all(self, limit_bytes: int) -> bytes:
        held, self._held = self._held, b""
        return self._fill(held + await self._response.read_all(limit_bytes))

    def abort(self) -> None:
        self._response.abort()

    def release(self) -> None:
        self._response.release()

    def _fill(self, data: bytes) -> bytes:
        if _EMPTY in data:
            for head, filled in self._filled:
                data = data.replace(head, filled)
        return data


def _unfinished(data: bytes) -> int:
    """Where a head begins that the end of `data` cuts; the end where none is cut."""
    start = data.rfind(b"{", max(len(data) - _LONGEST, 0))
    if start >= 0 and any(head.startswith(data[start:]) for head, _ in _HEADS):
        return start
    return len(data)
