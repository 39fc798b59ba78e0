"""A connection that the event loop closed before anybody noticed is trouble with the store, nothing worse."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from state.redis.address import parse_url
from state.redis.connect import ERRORS, Connection, ConnectOptions, connect
from state.redis.line import Line
from tests.servers import DataServer, Kind

Ask = Callable[[], Awaitable[object]]


async def _broken_off(server: DataServer, ask: Ask) -> None:
    """Have the server die over a question that nobody waits for any more: the loop closes the connection then."""
    await ask()
    server.pause()
    forgotten = asyncio.ensure_future(ask())  # noqa: TID251 -- it is ended three lines below
    await asyncio.sleep(0.05)
    forgotten.cancel()
    await asyncio.wait({forgotten})
    await asyncio.to_thread(server.kill)
    await asyncio.sleep(0.1)


@pytest.mark.parametrize("way", ["line", "pool"])
async def test_a_write_to_a_closed_connection_is_trouble_with_the_store(tmp_path: Path, way: str) -> None:
    async with DataServer(Kind.REDIS, tmp_path) as server:
        options = ConnectOptions(timeout_s=5.0, max_connections=1)
        async with connect(parse_url(server.url), options) as connection:
            line = Line(connection)
            ask = _by_line(line) if way == "line" else _by_pool(connection)
            await _broken_off(server, ask)
            with pytest.raises(ERRORS):
                await ask()
            await server.start()
            await ask()
            await line.close()


def _by_line(line: Line) -> Ask:
    return lambda: line.ask("key", 5.0, "PING")


def _by_pool(connection: Connection) -> Ask:
    return lambda: connection.run("PING")
