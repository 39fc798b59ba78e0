"""A small HTTP/1.1 client for streams: bytes are handed on in the callback that receives them.

A load generator shares its machine with what it measures, so a token must cost little: no task wakes up for it and
no queue lies between socket and clock. One request at a time on a connection, idle connections are reused, their
number has no limit. Transfer by chunks, by length or until the connection closes.
"""

from __future__ import annotations

import asyncio
import ssl as tls
import time
from collections.abc import Mapping
from typing import Protocol, cast
from urllib.parse import urlsplit

_IDLE_S = 4.0  # below the 5 s after which uvicorn, hence vLLM, closes an idle connection
_HEAD_LIMIT_BYTES = 64 * 1024
_BODILESS = frozenset({204, 304})


class HttpError(Exception):
    """The connection failed, or the server does not speak HTTP."""


class Stale(HttpError):
    """A reused connection turned out closed before any byte of an answer: worth one try on a new one."""


class Sink(Protocol):
    """Takes one answer. An exception of `errors` raised in a callback ends the exchange and is passed on."""

    @property
    def errors(self) -> tuple[type[Exception], ...]: ...

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        """The status and the headers, names in lower case."""
        ...

    def on_body(self, data: bytes) -> None:
        """The next bytes of the body, cut anywhere."""
        ...


class _Connection(asyncio.Protocol):
    """One connection; `exchange` sends a request and returns a future that is done with the answer's end."""

    def __init__(self, pool: HttpPool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self._head = b""
        self._in_body = False
        self._left: int | None = None  # body bytes still to come; None: until the connection closes
        self._chunked: _ChunkDecoder | None = None
        self._keep = False
        self._reused = False
        self.closed = False
        self.idle_since_s = 0.0

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio.Transport, so this cannot be checked.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._pool.forget(self)
        if self._done is None:
            return
        if self._in_body and self._left is None and self._chunked is None and exc is None:
            self._finish()
        elif self._reused and not self._in_body and not self._head:
            self._fail(Stale("the kept connection was closed"))
        else:
            self._fail(HttpError(f"the server closed the connection: {exc or 'no reason given'}"))

    def data_received(self, data: bytes) -> None:
        sink = self._sink
        if sink is None:
            self.abort()  # bytes that nobody asked for: the connection cannot be trusted with another request
            return
        try:
            if not self._in_body:
                rest = self._read_head(sink, data)
                if rest is None:
                    return
                data = rest
            self._read_body(sink, data)
        except HttpError as error:
            self._fail(error)
        except sink.errors as error:
            self._fail(error)

    # one exchange

    def exchange(self, request: bytes, sink: Sink) -> asyncio.Future[None]:
        assert self._transport is not None
        self._sink = sink
        self._head = b""
        self._in_body = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def abort(self) -> None:
        """Close now; the server sees a disconnect."""
        self.closed = True
        self._sink = self._done = None
        if self._transport is not None:
            self._transport.abort()

    def _read_head(self, sink: Sink, data: bytes) -> bytes | None:
        """Take the head when it is complete; returns the bytes behind it, or None when more is needed."""
        data = self._head + data
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > _HEAD_LIMIT_BYTES:
                    raise HttpError(f"the answer's head is longer than {_HEAD_LIMIT_BYTES} bytes")
                self._head = data
                return None
            status, version, headers = parse_head(data[:end])
            data = data[end + 4 :]
            if status >= 200:
                break
        self._in_body = True
        self._frame(status, version, headers)
        sink.on_head(status, headers)
        return data

    def _frame(self, status: int, version: bytes, headers: Mapping[str, str]) -> None:
        connection = headers.get("connection", "").lower()
        self._keep = connection != "close" if version == b"HTTP/1.1" else connection == "keep-alive"
        self._chunked = None
        if "chunked" in headers.get("transfer-encoding", "").lower():
            self._chunked = _ChunkDecoder()
        elif status in _BODILESS:
            self._left = 0
        elif "content-length" in headers:
            text = headers["content-length"]
            if not text.isdecimal():
                raise HttpError(f"content-length must be a number, not {text!r}")
            self._left = int(text)
        else:
            self._left, self._keep = None, False

    def _read_body(self, sink: Sink, data: bytes) -> None:
        chunked = self._chunked
        if chunked is not None:
            data = chunked.feed(data)
            if data:
                sink.on_body(data)
            if chunked.ended:
                self._finish()
            return
        if self._left is not None:
            if len(data) > self._left:
                raise HttpError("the answer is longer than its content-length")
            self._left -= len(data)
        if data:
            sink.on_body(data)
        if self._left == 0:
            self._finish()

    def _finish(self) -> None:
        done, self._done, self._sink = self._done, None, None
        if self._keep and not self.closed:
            self._reused = True
            self._pool.give_back(self)
        else:
            self.abort()
        if done is not None and not done.done():
            done.set_result(None)

    def _fail(self, error: Exception) -> None:
        done = self._done
        self.abort()
        if done is not None and not done.done():
            done.set_exception(error)


class _ChunkDecoder:
    """Undoes chunked transfer coding, cut anywhere; bytes of an unfinished chunk are handed on at once."""

    __slots__ = ("_left", "_line", "_trailer", "ended")

    def __init__(self) -> None:
        self._left = 0  # bytes of the current chunk still to come, its line end included
        self._line = b""
        self._trailer = False
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`. Raises HttpError when it is not chunked coding."""
        if self._line:
            data = self._line + data
            self._line = b""
        parts: list[bytes] = []
        at, size = 0, len(data)
        while at < size:
            if self._left:
                take = min(self._left, size - at)
                body_end = at + take - max(0, 2 - (self._left - take))
                if body_end > at:
                    parts.append(data[at:body_end])
                self._left -= take
                at += take
                continue
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                if size - at > _HEAD_LIMIT_BYTES:
                    raise HttpError("a chunk's size line has no end")
                self._line = data[at:]
                break
            if self._trailer:
                if line_end == at:
                    self.ended = True
                    break
            else:
                self._left = self._chunk_bytes(data[at:line_end])
            at = line_end + 2
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk_bytes(self, line: bytes) -> int:
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            size = -1
        if size < 0:
            raise HttpError(f"a chunk's size must be a hexadecimal number, not {line[:20]!r}")
        if size == 0:
            self._trailer = True
            return 0
        return size + 2


def parse_head(head: bytes) -> tuple[int, bytes, dict[str, str]]:
    """Status, version and headers (lower-case names) of an answer. Raises HttpError."""
    status_line, *lines = head.split(b"\r\n")
    version, _, rest = status_line.partition(b" ")
    code = rest[:3]
    if not version.startswith(b"HTTP/1.") or not code.isdigit():
        raise HttpError(f"the server does not speak HTTP/1: {status_line[:60]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise HttpError(f"a header has no colon: {line[:60]!r}")
        headers[name.strip().lower().decode("latin-1")] = value.strip().decode("latin-1")
    return int(code), version, headers


class HttpPool:
    """All connections to one server. Use it inside one event loop, and close it."""

    def __init__(self, url: str, connect_s: float) -> None:
        """Raises ValueError when `url` is not http or https with a host."""
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"the URL must look like http://host:port/v1, not {url!r}")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = tls.create_default_context() if parts.scheme == "https" else None
        self._authority = parts.netloc.rpartition("@")[2]
        self._path = parts.path or "/"
        self._connect_s = connect_s
        self._idle: list[_Connection] = []

    async def post(self, headers: Mapping[str, str], body: bytes, sink: Sink) -> None:
        """Send a POST and feed the answer to `sink`; returns at its end.

        Raises HttpError, OSError and TimeoutError (connecting), and whatever `sink.errors` names.
        """
        lines = [f"POST {self._path} HTTP/1.1", f"Host: {self._authority}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        request = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        connection = self._take_idle()
        if connection is not None:
            try:
                await self._exchange(connection, request, sink)
            except Stale:
                pass
            else:
                return
        await self._exchange(await self._connect(), request, sink)

    async def close(self) -> None:
        """Close the idle connections; open exchanges end with their own tasks."""
        for connection in list(self._idle):
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # transports close in the loop's next round

    def give_back(self, connection: _Connection) -> None:
        """A connection's answer was read to its end."""
        connection.idle_since_s = time.perf_counter()
        self._idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        """A connection was closed."""
        if connection in self._idle:
            self._idle.remove(connection)

    def _take_idle(self) -> _Connection | None:
        oldest_s = time.perf_counter() - _IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and connection.idle_since_s > oldest_s:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._connect_s):
            _, connection = await loop.create_connection(
                lambda: _Connection(self), self._host, self._port, ssl=self._ssl
            )
        return connection

    @staticmethod
    async def _exchange(connection: _Connection, request: bytes, sink: Sink) -> None:
        try:
            await connection.exchange(request, sink)
        except asyncio.CancelledError:
            connection.abort()
            raise
