"""The bad line does what it says, else what is tested with it would say nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from .faults import Line, Way


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A server that sends back what it gets; its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while some := await reader.read(100):
            writer.write(some)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def read(reader: asyncio.StreamReader, within_s: float = 10.0) -> bytes | None:
    """The next bytes; None when none come in time."""
    try:
        async with asyncio.timeout(within_s):
            return await reader.read(100)
    except TimeoutError:
        return None


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the connection is closed or reset."""
    try:
        return await read(reader) == b""
    except ConnectionResetError:
        return True


async def test_bytes_pass_and_either_end_may_close() -> None:
    async with echo() as port, Line(port) as line:
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        writer.write(b"hello")
        assert await read(reader) == b"hello"
        writer.close()
        await writer.wait_closed()
        assert line.accepted == 1


async def test_delay_keeps_order_and_hits_one_way() -> None:
    async with echo() as port, Line(port) as line:
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        line.delay(0.2, Way.TO_CLIENT)
        began_s = asyncio.get_running_loop().time()
        writer.write(b"a")
        await asyncio.sleep(0.05)
        writer.write(b"b")
        assert await reader.readexactly(2) == b"ab"
        assert asyncio.get_running_loop().time() - began_s >= 0.2
        writer.close()


@pytest.mark.parametrize("way", list(Way))
async def test_held_bytes_arrive_when_it_flows_again(way: Way) -> None:
    async with echo() as port, Line(port) as line:
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        line.hold(way)
        writer.write(b"late")
        assert await read(reader, 0.1) is None
        line.flow()
        assert await read(reader) == b"late"
        writer.close()


async def test_a_cut_resets_and_a_refusal_stays() -> None:
    async with echo() as port, Line(port) as line:
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        writer.write(b"x")
        await read(reader)
        line.cut()
        assert await ended(reader)
        writer.close()
        again, writer = await asyncio.open_connection("127.0.0.1", line.port)
        writer.write(b"y")
        assert await read(again) == b"y"
        await line.refuse()
        with pytest.raises(OSError):  # noqa: PT011  (refused or reset, as the system likes)
            await asyncio.open_connection("127.0.0.1", line.port)
        writer.close()
        await line.welcome()
        again, writer = await asyncio.open_connection("127.0.0.1", line.port)
        writer.write(b"z")
        assert await read(again) == b"z"
        writer.close()


async def test_a_server_that_is_not_there_resets() -> None:
    async with echo() as port:
        pass
    async with Line(port) as line:
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        assert await ended(reader)
        writer.close()
