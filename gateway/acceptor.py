"""Taking connections from listening sockets that several processes share, so that each gets its part.

The kernel wakes every process that waits on a shared socket, and whichever runs first could take a whole burst of
connections. So before it accepts, a process compares how many connections it has with what its siblings have, and
lets them go first for a moment when it has more. No connection waits longer than that moment, whatever they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from gateway.server import GatewayServer

log = logging.getLogger("tiergate.gateway")

_YIELD_S = 0.002  # long enough for a sibling that is idle to wake up, short beside any time to a first token
_EXHAUSTED_S = 0.1
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Turns(Protocol):
    """Whose turn it is to accept, among the processes that share the sockets."""

    def mine(self, open_connections: int) -> bool:
        """Whether this process, with so many connections, should take the next one."""
        ...

    def tell(self, open_connections: int | None) -> None:
        """How many connections this process has; None: it accepts no more."""
        ...


class Acceptor:
    """Accepts on non-blocking listening sockets from `start` until `stop`. Sockets are left open."""

    def __init__(
        self, server: GatewayServer, listeners: Sequence[socket.socket], turns: Turns, tasks: asyncio.TaskGroup
    ) -> None:
        self._server = server
        self._listeners = listeners
        self._turns = turns
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._arriving = 0
        self.accepting = False

    def start(self) -> None:
        """Begin, or begin again after `stop`."""
        if self.accepting:
            return
        self.accepting = True
        self._server.on_connections = self._turns.tell
        self._turns.tell(self._server.open_connections)
        self._listen()

    def stop(self) -> None:
        """Take nobody new. What was accepted is served. Idempotent."""
        if not self.accepting:
            return
        self.accepting = False
        self._server.on_connections = None
        self._turns.tell(None)
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
            return
        for listener in self._listeners:
            self._loop.remove_reader(listener)

    def _listen(self) -> None:
        self._pause = None
        for listener in self._listeners:
            self._loop.add_reader(listener, self._ready, listener)

    def _pause_for(self, seconds: float, then: Callable[[], None]) -> None:
        """Look away for so long: a socket that is not accepted from would wake the loop again and again."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        self._pause = self._loop.call_later(seconds, then)

    def _insist(self) -> None:
        """The siblings had their chance: take who waits still."""
        self._listen()
        for listener in self._listeners:
            if self._pause is None:
                self._take(listener)

    def _ready(self, listener: socket.socket) -> None:
        """Somebody connects: take one connection, or let a sibling take it."""
        if self._pause is not None or not self.accepting:
            return
        if self._turns.mine(self._server.open_connections + self._arriving):
            self._take(listener)
        else:
            self._pause_for(_YIELD_S, self._insist)

    def _take(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # a sibling was faster, or the client has gone
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            log.error("cannot accept a connection: %s", error)
            self._pause_for(_EXHAUSTED_S, self._listen)
            return
        connection.setblocking(False)
        self._arriving += 1
        self._tasks.create_task(self._attach(connection), name="accept")

    async def _attach(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError):  # the client has gone in between
                await self._loop.connect_accepted_socket(self._server, connection)
                return
            connection.close()
        finally:
            self._arriving -= 1
