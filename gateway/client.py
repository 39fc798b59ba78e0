"""Answers to a client over aiohttp: a stream that is begun late, and whole answers."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web
from multidict import CIMultiDict

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "content-length",
        "date",
        "keep-alive",
        "proxy-authenticate",
        "server",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-request-id",
    }
)
_KEYS = frozenset({"authorization", "x-api-key"})


class ClientStream:
    """A stream to one client. Nothing is sent before `begin`; `write` waits while the client is slow."""

    __slots__ = ("_request", "response")

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request
        self.response: web.StreamResponse | None = None

    @property
    def begun(self) -> bool:
        return self.response is not None

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Send the head."""
        response = web.StreamResponse(headers=CIMultiDict(headers))
        self.response = response
        await response.prepare(self._request)

    async def write(self, data: bytes) -> None:
        assert self.response is not None
        await self.response.write(data)

    async def end(self) -> web.StreamResponse:
        assert self.response is not None
        await self.response.write_eof()
        return self.response

    def abort(self) -> None:
        """Close the client's connection now."""
        transport = self._request.transport
        if transport is not None:
            transport.abort()


def forwarded(engine: Mapping[str, str]) -> dict[str, str]:
    """The engine's headers that go on to the client."""
    return {name: value for name, value in engine.items() if name not in _HOP_BY_HOP}


def whole(status: int, headers: Mapping[str, str], body: bytes) -> web.Response:
    """An answer in one piece."""
    return web.Response(status=status, headers=CIMultiDict(headers), body=body)


def bearer(request: web.BaseRequest) -> str | None:
    """The client's key: `Authorization: Bearer`, or Anthropic's `x-api-key`."""
    headers = request.headers
    given = headers.get("authorization")
    if given is not None:
        scheme, _, token = given.partition(" ")
        return token.strip() if scheme.lower() == "bearer" and token else None
    return headers.get("x-api-key")


def without_keys(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers without the client's key, which is for the gateway only."""
    return {name: value for name, value in headers.items() if name.lower() not in _KEYS}
