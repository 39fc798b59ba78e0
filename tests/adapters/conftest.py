"""Loopback servers that do exactly what a test tells them, well or badly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import pytest
from aiohttp import web

from adapters.http import HttpOptions, HttpUpstream

PATIENCE_S = 10.0


@dataclass(slots=True)
class Wire:
    """One connection as the server sees it. `number` counts connections from 1."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    heads: list[bytes]

    async def request(self) -> bytes:
        """Read one request; its body. Raises IncompleteReadError when the client is gone."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return await self.reader.readexactly(length)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes, head: bytes = b"") -> None:
        await self.send(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))

    async def gone(self) -> None:
        """Wait until the client closed the connection."""
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


@dataclass(slots=True)
class RawServer:
    """What a raw server has seen so far."""

    url: str
    heads: list[bytes] = field(default_factory=list)
    connections: int = 0
    errors: list[Exception] = field(default_factory=list)


class Serve(Protocol):
    async def __call__(self, script: Callable[[Wire], Awaitable[None]]) -> RawServer: ...


async def _raw_server(stack: AsyncExitStack, script: Callable[[Wire], Awaitable[None]]) -> RawServer:
    seen = RawServer("")

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.connections += 1
        try:
            await script(Wire(seen.connections, reader, writer, seen.heads))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, which the test arranged
        except AssertionError as error:
            seen.errors.append(error)
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    seen.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def stop() -> None:
        server.close()
        await server.wait_closed()
        assert not seen.errors

    stack.push_async_callback(stop)
    return seen


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start a server that runs the script on every connection and closes it after that."""
    async with AsyncExitStack() as stack:

        async def start(script: Callable[[Wire], Awaitable[None]]) -> RawServer:
            return await _raw_server(stack, script)

        yield start


class ServeApp(Protocol):
    async def __call__(self, app: web.Application) -> str: ...


@pytest.fixture
async def serve_app() -> AsyncIterator[ServeApp]:
    """Start an aiohttp application; its URL."""
    async with AsyncExitStack() as stack:

        async def start(app: web.Application) -> str:
            runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return f"http://127.0.0.1:{runner.addresses[0][1]}"

        yield start


class Connect(Protocol):
    def __call__(self, url: str, options: HttpOptions | None = None) -> HttpUpstream: ...


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Make upstreams; after the test each is closed, and must have nothing open."""
    made: list[HttpUpstream] = []

    def make(url: str, options: HttpOptions | None = None) -> HttpUpstream:
        made.append(HttpUpstream(url, options))
        return made[-1]

    yield make
    for upstream in made:
        assert upstream.open_exchanges == 0
        await upstream.close()
        await until(partial(_all_closed, upstream))


def _all_closed(upstream: HttpUpstream) -> bool:
    return upstream.open_connections == 0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other tasks bring about; fails by timeout when it never comes."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.002)
