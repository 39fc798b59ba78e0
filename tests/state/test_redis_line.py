"""The line that all commands of a replica share: every caller gets its own answer, whoever else gives up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Own:
    """A server that a test may do anything to, and a line to it."""

    server: DataServer
    line: Line


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[Own]:
    """A Redis, asked once."""
    async with DataServer(Kind.REDIS, tmp_path / "server") as server:
        connection = connect(parse_url(server.url), ConnectOptions(timeout_s=5.0))
        line = Line(connection)
        await echo(line, -1)
        yield Own(server, line)
        await line.close()
        await connection.close()


async def test_after_a_silence_no_answer_goes_to_another(own: Own) -> None:
    own.server.pause()
    asked = [echo(own.line, number, timeout_s=0.1 if number == 3 else LONG_S) for number in range(8)]
    # One's time is up: all are told, since nobody was answered.
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(outcome, ERRORS)
    own.server.resume()
    for number in range(100, 150):
        await echo(own.line, number)


async def test_a_server_that_is_gone_is_an_error_until_it_is_back(own: Own) -> None:
    own.server.kill()
    for number in range(3):
        with pytest.raises(ERRORS):
            await echo(own.line, number)
    await own.server.start()
    await echo(own.line, 3)


async def test_a_restart_between_two_commands_is_not_noticed(own: Own) -> None:
    for _ in range(3):
        own.server.kill()
        await own.server.start()
        async with asyncio.TaskGroup() as tasks:
            for number in range(50):
                tasks.create_task(echo(own.line, number))


async def test_a_connection_that_breaks_under_many_commands_is_opened_again_for_all(own: Own) -> None:
    own.server.pause()
    asked = [asyncio.get_running_loop().create_task(echo(own.line, number)) for number in range(50)]
    await asyncio.sleep(0.05)
    assert own.line._link is not None
    own.line._link.socket._writer.transport.abort()  # type: ignore[attr-defined]  # redis-py's own
    own.server.resume()
    await asyncio.gather(*asked)


async def test_closing_ends_what_is_under_way(own: Own) -> None:
    own.server.pause()
    asked = [asyncio.get_running_loop().create_task(echo(own.line, number)) for number in range(3)]
    await asyncio.sleep(0.05)
    await own.line.close()
    own.server.resume()  # whoever asked again would be answered
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(outcome, ERRORS)
