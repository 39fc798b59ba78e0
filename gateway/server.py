"""HTTP server pieces of aiohttp, bent where its defaults do not speak OpenAI."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from gateway.config import Settings
from gateway.errors import ApiError, InvalidRequest

_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class _Broken(ApiError):
    """Something inside the gateway went wrong."""

    status = 500
    kind = "internal_error"


class _Connection(RequestHandler):
    """Errors that aiohttp itself finds (unreadable HTTP, floods of headers) are told as JSON."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if 400 <= status < 500:
            error: ApiError = InvalidRequest(message or "the HTTP request cannot be read", code="bad_http")
        elif isinstance(exc, ConnectionError):
            # The client went away while it was written to, which is no error of anybody's; nobody reads this.
            error = _Broken("the client is gone", code="client_gone")
        else:
            self.log_exception("Error while handling a request", exc_info=exc)
            error = _Broken("the gateway failed on this request", code="internal_error")
        answer = web.Response(status=status, headers={"content-type": "application/json"}, body=error.body())
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:  # aiohttp's own signature
        """aiohttp reads the rest of a body after its answer; one that cannot be read was told to the client."""
        if not isinstance(kw.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kw)


class GatewayServer(web.Server):
    """A server without routing and middlewares; a handler is cancelled when its client goes away.

    Attributes:
        last_requests: every answer from now on tells its client to close the connection.
        open_connections: how many there are.
        on_connections: told that number whenever it changes.
    """

    def __init__(self, handler: _Handler, settings: Settings) -> None:
        super().__init__(handler, handler_cancellation=True, request_factory=self._read_request)
        self.last_requests = False
        self.open_connections = 0
        self.on_connections: Callable[[int], None] | None = None
        self._changed = asyncio.Event()
        # The gateway writes its own line a request.
        self._silent = logging.getLogger("tiergate.access")
        self._silent.disabled = True
        self._limits = settings.limits
        self._timeouts = settings.timeouts

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._count(1)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._count(-1)

    async def wait_empty(self) -> None:
        """Wait until there is no connection."""
        while self.open_connections:
            self._changed.clear()
            await self._changed.wait()

    def _count(self, more: int) -> None:
        self.open_connections += more
        self._changed.set()
        if self.on_connections is not None:
            self.on_connections(self.open_connections)

    def _read_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        if self.last_requests:
            message = message._replace(should_close=True)
        return web.BaseRequest(message, payload, protocol, writer, task, self._loop)

    def __call__(self) -> RequestHandler:
        limits = self._limits
        return _Connection(
            self,
            loop=self._loop,
            access_log=self._silent,
            keepalive_timeout=self._timeouts.keep_alive_s,
            max_line_size=limits.header_line_bytes,
            max_field_size=limits.header_line_bytes,
            max_headers=limits.header_fields,
            lingering_time=2.0,
        )
