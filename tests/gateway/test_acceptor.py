"""Accepting from a socket that several processes share, and retiring from it."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from gateway.acceptor import Acceptor
from gateway.app import Wiring, running
from gateway.config import Settings
from gateway.server import GatewayServer
from tests.gateway.rig import until
from tiergate.root import wire

_ASK = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@dataclass(slots=True)
class Turns:
    """Says the same every time, and remembers what it was told."""

    ours: bool = True
    told: list[int | None] = field(default_factory=list)
    asked: int = 0

    def mine(self, open_connections: int) -> bool:
        self.asked += 1
        return self.ours

    def tell(self, open_connections: int | None) -> None:
        self.told.append(open_connections)


class Exhausted(socket.socket):
    """A listening socket of a process that has no file descriptors left, the first few times."""

    failures = 3

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


@pytest.fixture
def listener() -> socket.socket:
    return _listen(socket.socket())


def _listen(made: socket.socket) -> socket.socket:
    made.bind(("127.0.0.1", 0))
    made.listen(16)
    made.setblocking(False)
    return made


def _server(name: str) -> GatewayServer:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=name.encode())

    return GatewayServer(answer, Settings())


@asynccontextmanager
async def _accepting(server: GatewayServer, listener: socket.socket, turns: Turns) -> AsyncIterator[Acceptor]:
    async with asyncio.TaskGroup() as tasks:
        acceptor = Acceptor(server, [listener], turns, tasks)
        acceptor.start()
        yield acceptor
        acceptor.stop()
    await server.shutdown(0.1)


async def _ask(listener: socket.socket) -> bytes:
    """The answer to one request on a connection of its own."""
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(_ASK)
    head = await reader.readuntil(b"\r\n\r\n")
    body = await reader.read(100)
    writer.close()
    return head + body


async def test_connections_are_served_and_counted(listener: socket.socket) -> None:
    server, turns = _server("one"), Turns()
    async with _accepting(server, listener, turns):
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(_ask(listener)) for _ in range(5)]
        assert all(one.result().endswith(b"one") for one in asking)
        await until(lambda: server.open_connections == 0)
        assert turns.told[0] == 0
        assert max(count for count in turns.told if count is not None) >= 1
        assert turns.told[-1:] == [0]
    assert turns.told[-1:] == [None]
    listener.close()


async def test_one_that_gives_way_for_ever_still_serves(listener: socket.socket) -> None:
    turns = Turns(ours=False)
    async with _accepting(_server("one"), listener, turns):
        assert (await _ask(listener)).endswith(b"one")
        assert (await _ask(listener)).endswith(b"one")
    assert turns.asked >= 2
    listener.close()


async def test_whom_one_gives_way_to_serves(listener: socket.socket) -> None:
    polite, quick = Turns(ours=False), Turns()
    same = listener.dup()  # an event loop watches a descriptor once only
    async with _accepting(_server("polite"), listener, polite), _accepting(_server("quick"), same, quick):
        for _ in range(20):
            assert (await _ask(listener)).endswith(b"quick")
            await asyncio.sleep(0.005)  # whoever gave way listens again
    assert polite.asked > 1
    for one in (listener, same):
        one.close()


async def test_who_connects_after_one_has_stopped_is_served_by_the_other(listener: socket.socket) -> None:
    first, second = _server("first"), _server("second")
    async with _accepting(first, listener, Turns()) as acceptor:
        assert (await _ask(listener)).endswith(b"first")
        acceptor.stop()
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(_ask(listener))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            async with _accepting(second, listener, Turns()):
                assert (await waiting).endswith(b"second")
        acceptor.start()
        assert (await _ask(listener)).endswith(b"first")
    listener.close()


async def test_a_process_without_descriptors_serves_when_it_has_some() -> None:
    listener = _listen(Exhausted())
    async with _accepting(_server("one"), listener, Turns()):
        assert (await _ask(listener)).endswith(b"one")
    listener.close()


@pytest.fixture
def wiring() -> Wiring:
    return wire(Settings())


async def test_a_gateway_that_retires_answers_and_says_that_it_closes(
    listener: socket.socket, wiring: Wiring
) -> None:
    async with running(Settings(), wiring, listen=False) as gateway, asyncio.TaskGroup() as tasks:
        acceptor = await gateway.share([listener], Turns(), tasks)
        used, idle = [await asyncio.open_connection(*listener.getsockname()) for _ in range(2)]
        for reader, writer in (used, idle):
            writer.write(_ASK)
            assert b"connection: close" not in (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(len(b'{"status":"ok"}'))
        acceptor.stop()
        retiring = tasks.create_task(gateway.retire(30.0))
        await asyncio.sleep(0)
        reader, writer = used
        writer.write(_ASK)
        assert b"connection: close" in (await reader.readuntil(b"\r\n\r\n")).lower()
        assert await reader.read() == b'{"status":"ok"}'
        assert await retiring == 0  # the idle connection does not hold it up for its grace
    assert await idle[0].read() == b""
    for _, writer in (used, idle):
        writer.close()
    listener.close()
