"""One connection that everybody shares: commands go out as they come, and answers are matched in their order.

So a command costs neither a connection of its own nor a wait for a free one, and what one replica asks is done in
the order in which it asked. No task reads: whoever waits for an answer does, and gives each to its owner.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable
from contextlib import suppress
from typing import Protocol, cast

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from state.deadline import within
from state.redis.connect import ERRORS, Answer, Connection, Word, closed_is_an_error

_ELSEWHERE = (AskError, ClusterDownError, MasterDownError, MovedError, ReadOnlyError)
"""Answers after which another connection is needed: this one leads to the wrong server."""


class _Closed(RedisConnectionError):
    """Closed on this side: nobody is to open it again for what was under way."""


def _broke(error: Exception) -> bool:
    """Whether the connection is gone, and not only slow."""
    return isinstance(error, RedisConnectionError | OSError) and not isinstance(error, _Closed | TimeoutError)


class _Socket(Protocol):
    """What is needed of redis-py's connections, which are typed in part only."""

    def disconnect(self, nowait: bool = ...) -> Awaitable[None]: ...

    async def send_packed_command(self, command: tuple[bytes, ...], check_health: bool = ...) -> None: ...

    async def read_response(self, *, disconnect_on_error: bool = ...) -> Answer: ...


class _Turn:
    """One command that was sent, and where its answer goes."""

    __slots__ = ("answer", "done", "error", "link", "waking")

    def __init__(self) -> None:
        self.answer: Answer = None
        self.error: Exception | None = None
        self.done = False
        self.waking: asyncio.Future[None] | None = None
        self.link: _Link | None = None

    def renew(self) -> None:
        """It is to be sent again."""
        self.answer, self.error, self.done = None, None, False

    def settle(self, answer: Answer, error: Exception | None) -> None:
        self.answer, self.error, self.done = answer, error, True
        self.wake()

    def wake(self) -> bool:
        """Whether somebody waits here."""
        waking, self.waking = self.waking, None
        if waking is None or waking.done():
            return False
        waking.set_result(None)
        return True


class _Link:
    """One connection's life."""

    __slots__ = ("reading", "socket", "turns")

    def __init__(self, socket: _Socket) -> None:
        self.socket = socket
        self.turns: deque[_Turn] = deque()
        self.reading = False

    async def answer_to(self, turn: _Turn) -> None:
        """Wait until a turn is settled, reading for all while nobody else does. Raises `ERRORS`."""
        while not turn.done:
            if self.reading:
                turn.waking = asyncio.get_running_loop().create_future()
                try:
                    await turn.waking
                except asyncio.CancelledError:
                    # It may have been woken to read, and now it will not.
                    self._hand_over()
                    raise
                continue
            self.reading = True
            try:
                await self._read_until(turn)
            finally:
                self.reading = False
                self._hand_over()

    def _hand_over(self) -> None:
        """Wake somebody to read, when nobody does."""
        if not self.reading:
            for turn in self.turns:
                if turn.wake():
                    break

    async def _read_until(self, turn: _Turn) -> None:
        while not turn.done:
            answer: Answer = None
            refused: Exception | None = None
            try:
                answer = await self.socket.read_response(disconnect_on_error=False)
            except ResponseError as error:
                refused = error
            # Empty when the link was given up meanwhile.
            if self.turns:
                self.turns.popleft().settle(answer, refused)

    def give_up(self, error: Exception) -> None:
        """Whoever waits here waits in vain."""
        while self.turns:
            self.turns.popleft().settle(None, error)


class Line:
    """Opens its connection when it is first asked, and again after it broke. A command that was under way then is
    sent a second time, so commands must bear to be done twice."""

    def __init__(self, connection: Connection) -> None:
        """The connection says where to; the line has a socket of its own."""
        self._connection = connection
        self._link: _Link | None = None
        self._opening: asyncio.Task[AbstractConnection] | None = None

    async def ask(self, key: str, timeout_s: float, *words: Word) -> Answer:
        """One command; `key` says in a Cluster which node is asked. Raises `ERRORS`; when the time is up, all who
        wait on this line are told, because behind one silence comes another."""
        packed = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub takes one word alone
        turn = _Turn()
        try:
            await within(timeout_s, self._take(turn, key, packed))
        except ERRORS as error:
            await self._drop(turn.link, error)
            raise
        if turn.error is not None:
            if isinstance(turn.error, _ELSEWHERE) or not isinstance(turn.error, ResponseError):
                await self._drop(turn.link, turn.error)
            raise turn.error
        return turn.answer

    async def _take(self, turn: _Turn, key: str, packed: bytes) -> None:
        """Send a command and wait until its turn is settled. Raises `ERRORS` when no connection can be opened.

        Once more on a new connection when the standing one broke: what broke it may be long over, as where this
        process was stopped while the server restarted. The first may have been done all the same.
        """
        link = self._link
        if link is not None:
            await self._exchange(link, turn, packed)
            if turn.error is None or not _broke(turn.error):
                return
            await self._drop(link, turn.error)
            turn.renew()
        await self._exchange(await self._open(key), turn, packed)

    async def _exchange(self, link: _Link, turn: _Turn, packed: bytes) -> None:
        turn.link = link
        link.turns.append(turn)
        try:
            with closed_is_an_error():
                await link.socket.send_packed_command((packed,), check_health=False)
            await link.answer_to(turn)
        except ERRORS as error:
            if not turn.done:  # else whoever gave the link up has said why
                turn.settle(None, error)

    async def close(self) -> None:
        """Close the connection. Idempotent; the line opens it again when it is asked."""
        opening, self._opening = self._opening, None
        if opening is not None:
            await self._connection.close_socket(opening)
        await self._drop(self._link, _Closed("the line was closed"))

    async def _open(self, key: str) -> _Link:
        """The link. It is opened once for all who wait, and goes on opening when they give up. Raises `ERRORS`."""
        while self._link is None:
            if self._opening is None:
                self._opening = self._connection.open_socket(key)
            opening = self._opening
            try:
                opened = await asyncio.shield(opening)
            finally:
                mine = opening.done() and self._opening is opening
                if mine:
                    self._opening = None
            if mine:
                # Each call has its own deadline. redis-py's would cost a task a command, and asyncio's `wait_for`
                # of Python 3.11 can swallow a cancellation.
                opened.socket_timeout = None
                self._link = _Link(cast("_Socket", opened))
        return self._link

    async def _drop(self, link: _Link | None, error: Exception) -> None:
        if link is None:
            return
        if self._link is link:
            self._link = None
        link.give_up(error)
        with suppress(*ERRORS):
            await link.socket.disconnect(nowait=True)
