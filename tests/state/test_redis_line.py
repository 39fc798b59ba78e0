"""The line that all commands of a replica share: every caller gets its own answer, whoever else gives up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.exceptions import ResponseError

from state.redis.address import parse_url
from state.redis.connect import ERRORS, ConnectOptions, connect
from state.redis.line import Line
from tests.servers import DataServer, Kind

from .conftest import SERVERS

LONG_S = 20.0


@pytest.fixture(params=list(Kind), ids=lambda kind: kind.value)
async def line(request: pytest.FixtureRequest) -> AsyncIterator[Line]:
    """On the server that all tests share."""
    connection = connect(parse_url(SERVERS.url(request.param)), ConnectOptions(timeout_s=5.0))
    made = Line(connection)
    yield made
    await made.close()
    await connection.close()


async def echo(line: Line, number: int, timeout_s: float = LONG_S) -> None:
    """Ask for one's own number back."""
    assert await line.ask("key", timeout_s, "ECHO", number) == str(number).encode()


async def test_many_at_once_each_get_their_own_answer(line: Line) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in range(500):
            tasks.create_task(echo(line, number))


async def test_who_gives_up_disturbs_nobody(line: Line) -> None:
    """Those that read for all are among them."""
    chance = random.Random(4)
    await echo(line, -1)
    for round_number in range(30):
        asked = [asyncio.get_running_loop().create_task(echo(line, 100 * round_number + i)) for i in range(40)]
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        given_up = [task for task in asked if chance.random() < 0.5]
        for task in given_up:
            task.cancel()
        done = await asyncio.gather(*asked, return_exceptions=True)
        for task, outcome in zip(asked, done, strict=True):
            assert outcome is None or (task in given_up and isinstance(outcome, asyncio.CancelledError))
    await echo(line, -2)


async def test_an_error_answer_is_its_askers_alone(line: Line) -> None:
    async def wrong() -> None:
        with pytest.raises(ResponseError):
            await line.ask("key", LONG_S, "EVAL", "return redis.error_reply('ERR on purpose')", 0)

    async with asyncio.TaskGroup() as tasks:
        for number in range(60):
            tasks.create_task(wrong() if number % 3 == 0 else echo(line, number))


async def test_commands_are_done_in_the_order_in_which_they_are_asked(line: Line) -> None:
    await line.ask("key", LONG_S, "DEL", "order")
    async with asyncio.TaskGroup() as tasks:
        for number in range(100):
            tasks.create_task(line.ask("key", LONG_S, "RPUSH", "order", number))
    stood = await line.ask("key", LONG_S, "LRANGE", "order", 0, -1)
    assert stood == [str(number).encode() for number in range(100)]


async def test_after_a_silence_no_answer_goes_to_another(tmp_path: Path) -> None:
    async with DataServer(Kind.REDIS, tmp_path / "server") as server:
        connection = connect(parse_url(server.url), ConnectOptions(timeout_s=5.0))
        line = Line(connection)
        await echo(line, -1)
        server.pause()
        asked = [echo(line, number, timeout_s=0.1 if number == 3 else LONG_S) for number in range(8)]
        # One's time is up: all are told, since nobody was answered.
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, ERRORS)
        server.resume()
        for number in range(100, 150):
            await echo(line, number)
        server.kill()
        with pytest.raises(ERRORS):
            await echo(line, 1)
        await server.start()
        async with asyncio.timeout(LONG_S):
            while True:
                try:
                    await echo(line, 2)
                    break
                except ERRORS:
                    await asyncio.sleep(0.02)
        await line.close()
        await connection.close()


async def test_after_a_restart_nobody_notices(tmp_path: Path) -> None:
    """The connection broke while nobody asked, or while many did."""
    async with DataServer(Kind.REDIS, tmp_path / "server") as server:
        connection = connect(parse_url(server.url), ConnectOptions(timeout_s=5.0))
        line = Line(connection)
        await echo(line, -1)
        for _ in range(3):
            server.kill()
            await server.start()
            async with asyncio.TaskGroup() as tasks:
                for number in range(50):
                    tasks.create_task(echo(line, number))
        server.kill()
        with pytest.raises(ERRORS):
            await echo(line, 1)
        await line.close()
        await connection.close()


async def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    async with DataServer(Kind.REDIS, tmp_path / "server") as server:
        connection = connect(parse_url(server.url), ConnectOptions(timeout_s=5.0))
        line = Line(connection)
        await echo(line, -1)
        server.pause()
        asked = [asyncio.get_running_loop().create_task(echo(line, number)) for number in range(3)]
        await asyncio.sleep(0.05)
        await line.close()
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, ERRORS)
        server.resume()
        await connection.close()
