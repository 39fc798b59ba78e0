"""HTTP to one engine over aiohttp's client: raw bytes, back-pressure, an abort that closes at once.

What a foreign library may raise is mapped here, once, into `UpstreamError`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl as tls
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

import aiohttp
from aiohttp import ClientResponse, hdrs
from yarl import URL

from adapters.contract import Failure, UpstreamCall, UpstreamError

log = logging.getLogger("tiergate.adapters")

_SHOWN_CHARS = 100
_SKIPPED_AUTO_HEADERS = (hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE)

# Tells `open` whether its exchange made a connection or took one that was kept alive. The list is shared with the
# tasks that connect on its behalf, and belongs to one exchange only.
_made_here: ContextVar[list[bool] | None] = ContextVar("tiergate_connection_made_here", default=None)


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How connections to an engine are kept.

    Attributes:
        connect_timeout_s: time for the TCP (and TLS) handshake.
        keepalive_s: how long an idle connection is kept. Below the 5 s after which uvicorn (vLLM) closes one.
        max_connections: most connections at once, 0 for no limit: the scheduler is what limits load.
        buffer_bytes: how much of an answer may lie unread before reading from the socket pauses; about twice
            this much is held at most, besides what one socket read brings.
        max_head_bytes: longest status or header line of an answer, and longest header value.
        ssl: None verifies as usual; a context replaces it.
    """

    connect_timeout_s: float = 5.0
    keepalive_s: float = 4.0
    max_connections: int = 0
    buffer_bytes: int = 64 * 1024
    max_head_bytes: int = 16 * 1024
    ssl: tls.SSLContext | None = None


class HttpResponse:
    """An open answer (`adapters.contract.UpstreamResponse`)."""

    __slots__ = ("_done", "_headers", "_origin", "_response")

    def __init__(self, response: ClientResponse, origin: HttpUpstream) -> None:
        self._response = response
        self._origin = origin
        self._headers: Mapping[str, str] | None = None
        self._done = False

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Lower-case names; a repeated header's values joined by a comma."""
        if self._headers is None:
            joined: dict[str, str] = {}
            for name, value in self._response.headers.items():
                key = name.lower()
                joined[key] = f"{joined[key]}, {value}" if key in joined else value
            self._headers = MappingProxyType(joined)
        return self._headers

    async def read(self) -> bytes:
        """The body bytes that have arrived; b"" at the end, and after `abort` or `release`.

        Raises UpstreamError(BROKEN) when the engine broke off. Bytes that arrived before the break but were not
        read yet may be lost with it.
        """
        if self._done:
            return b""
        try:
            data = await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            self.abort()
            log.debug("%s broke off its answer: %r", self._origin.base_url, error)
            raise UpstreamError(Failure.BROKEN, f"the engine broke off its answer: {_plain(error)}") from error
        if not data:
            self.release()
        return data

    async def read_all(self, limit_bytes: int) -> bytes:
        """The whole body. Raises UpstreamError(BROKEN) beyond the limit, and then closes the connection."""
        announced = self._response.content_length
        parts: list[bytes] = []
        size = 0
        while announced is None or announced <= limit_bytes:
            data = await self.read()
            if not data:
                return b"".join(parts)
            size += len(data)
            if size > limit_bytes:
                break
            parts.append(data)
        self.abort()
        raise UpstreamError(Failure.BROKEN, f"the engine's answer is longer than {limit_bytes} bytes")

    def abort(self) -> None:
        """Close the connection now, dropping what was not sent or read. Idempotent."""
        if self._done:
            return
        connection = self._response.connection
        if connection is not None and connection.transport is not None:
            connection.transport.abort()
        self._response.close()
        self._finish()

    def release(self) -> None:
        """Keep the connection if the body was read to its end, else close it. Idempotent."""
        if self._done:
            return
        self._response.release()
        self._finish()

    def _finish(self) -> None:
        self._done = True
        self._origin._ended()


def endpoint(base_url: str) -> URL:
    """The URL of an engine: scheme, host, port and an optional path prefix.

    Raises ValueError with what it must be; the URL itself is not in the message.
    """
    try:
        url = URL(base_url)
    except ValueError as error:
        raise ValueError(f"must look like http://host:port: {error}") from None
    if url.scheme not in ("http", "https") or not url.host or not url.port:
        raise ValueError("must look like http://host:port")
    if any(letter.isspace() or not letter.isprintable() for letter in base_url):
        raise ValueError("must look like http://host:port, without spaces and control characters")
    if url.query_string or url.fragment:
        raise ValueError("must not have a query or a fragment")
    return url


class HttpUpstream:
    """All HTTP to one engine (`adapters.contract.Upstream`). Use it within one event loop."""

    def __init__(self, base_url: str, options: HttpOptions | None = None) -> None:
        """`base_url` is scheme, host, port and an optional path prefix. Raises ValueError when it is not."""
        try:
            url = endpoint(base_url)
        except ValueError as error:
            raise ValueError(f"backend URL {base_url[:_SHOWN_CHARS]!r} {error}") from None
        self._base = str(url).rstrip("/")
        self._options = options or HttpOptions()
        self._session: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None
        self._closed = False
        self._exchanges = 0
        self._sockets: list[socket.socket] = []
        self._look_again_at = 64

    @property
    def base_url(self) -> str:
        return self._base

    @property
    def open_connections(self) -> int:
        """Sockets to this engine that are not closed: in use, idle or connecting."""
        self._sockets = [made for made in self._sockets if made.fileno() != -1]
        return len(self._sockets)

    @property
    def open_exchanges(self) -> int:
        """Answers that were neither read to the end, released nor aborted."""
        return self._exchanges

    async def open(self, call: UpstreamCall) -> HttpResponse:
        """Send the request and wait for the response head. Raises UpstreamError.

        A kept-alive connection that dies before any byte of an answer is retried once on a new one.
        """
        try:
            async with asyncio.timeout(call.timeout_s):
                response = await self._exchange(call)
        except TimeoutError as error:
            raise UpstreamError(
                Failure.TIMEOUT, f"{self._base} sent no answer within {call.timeout_s} s"
            ) from error
        self._exchanges += 1
        return HttpResponse(response, self)

    async def close(self) -> None:
        """Close every connection. Idempotent."""
        self._closed = True
        for session in (self._session, self._fresh):
            if session is not None:
                await session.close()
        self._session = self._fresh = None

    async def _exchange(self, call: UpstreamCall) -> ClientResponse:
        if self._closed:
            raise UpstreamError(Failure.UNREACHABLE, f"the client for {self._base} is closed")
        made: list[bool] = []
        token = _made_here.set(made)
        try:
            if self._session is None:
                self._session = self._new_session(force_close=False)
            return await self._send(self._session, call)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if made or isinstance(error, aiohttp.ClientConnectorError) or not _unanswered(error):
                raise _mapped(error, self._base) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _mapped(error, self._base) from error
        finally:
            _made_here.reset(token)
        return await self._exchange_again(call)

    async def _exchange_again(self, call: UpstreamCall) -> ClientResponse:
        """The same on a connection that is surely new: others in the pool may be just as dead."""
        if self._fresh is None:
            self._fresh = self._new_session(force_close=True)
        try:
            return await self._send(self._fresh, call)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _mapped(error, self._base) from error

    async def _send(self, session: aiohttp.ClientSession, call: UpstreamCall) -> ClientResponse:
        return await session.request(
            call.method,
            URL(self._base + call.path, encoded=True),
            headers=call.headers,
            data=call.body or None,
            allow_redirects=False,
        )

    def _new_session(self, *, force_close: bool) -> aiohttp.ClientSession:
        options = self._options
        connector = aiohttp.TCPConnector(
            limit=options.max_connections,
            force_close=force_close,
            keepalive_timeout=None if force_close else options.keepalive_s,
            ssl=options.ssl if options.ssl is not None else True,
            socket_factory=self._new_socket,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_SKIPPED_AUTO_HEADERS,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=options.connect_timeout_s),
            auto_decompress=False,
            read_bufsize=options.buffer_bytes,
            max_line_size=options.max_head_bytes,
            max_field_size=options.max_head_bytes,
        )

    def _new_socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        # A token must not wait for the acknowledgement of the one before.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets.append(made)
        if len(self._sockets) >= self._look_again_at:
            self._look_again_at = 2 * self.open_connections + 64
        mine = _made_here.get()
        if mine is not None:
            mine.append(True)
        return made

    def _ended(self) -> None:
        self._exchanges -= 1


def _unanswered(error: aiohttp.ClientError) -> bool:
    """Whether the connection died before any byte of an answer (a half-read head travels in `message`)."""
    return not isinstance(error, aiohttp.ServerDisconnectedError) or isinstance(error.message, str)


def _mapped(error: Exception, base: str) -> UpstreamError:
    """A foreign error in our terms; every kind that aiohttp, OpenSSL or the system can raise on an exchange."""
    log.debug("%s: %r", base, error)
    words = _plain(error)
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return UpstreamError(Failure.UNREACHABLE, f"{base} took too long to accept a connection")
    if isinstance(error, aiohttp.ServerTimeoutError):
        return UpstreamError(Failure.TIMEOUT, f"{base} went silent: {words}")
    if isinstance(error, aiohttp.ClientConnectionError | OSError):
        return UpstreamError(Failure.UNREACHABLE, f"{base} cannot be reached: {words}")
    if isinstance(error, ValueError):
        return UpstreamError(Failure.REJECTED, f"the request cannot be put into HTTP: {words}", 400)
    return UpstreamError(Failure.BROKEN, f"{base} did not answer in HTTP: {words}")


def _plain(error: Exception) -> str:
    """What happened, in words that name no library; clients read them."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            told = f"its certificate is not accepted: {error.certificate_error}"
        case aiohttp.ClientConnectorDNSError():
            told = "its name cannot be resolved"
        case aiohttp.ServerDisconnectedError():
            told = "it closed the connection before it had answered"
        case aiohttp.ClientPayloadError():
            told = "the bytes ended early, or were not in the encoding that its headers claim"
        case aiohttp.ClientResponseError():
            told = error.message
        case OSError(errno=int(number)) if number > 0:
            told = os.strerror(number)
        case _:
            told = str(error)
    return " ".join(told.split())[:300]
