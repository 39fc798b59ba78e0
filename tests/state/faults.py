"""A TCP line that can be made bad: between one client and one server on loopback.

Give every client a line of its own, and a fault hits that client only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from types import TracebackType
from typing import Self

_CHUNK = 1 << 16


class Way(Enum):
    """In which direction bytes go."""

    TO_SERVER = "to server"
    TO_CLIENT = "to client"


BOTH = (Way.TO_SERVER, Way.TO_CLIENT)


class _Flow:
    """What is wrong in one direction, over all connections."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.open = asyncio.Event()
        self.open.set()


class Line:
    """`async with Line(port) as line`: whoever connects to `line.port` reaches the server on `port`."""

    def __init__(self, server_port: int) -> None:
        self.port = 0
        self.accepted = 0
        self._server_port = server_port
        self._flows = {way: _Flow() for way in Way}
        self._listener: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    # --- faults ----------------------------------------------------------------------------------------------

    def delay(self, delay_s: float, *ways: Way) -> None:
        """From now on every byte takes so much longer (both ways when none is named). Order is kept."""
        for way in ways or BOTH:
            self._flows[way].delay_s = delay_s

    def hold(self, *ways: Way) -> None:
        """Bytes go nowhere, as when packets are dropped: connections stay open. `flow` sends what was held."""
        for way in ways or BOTH:
            self._flows[way].open.clear()

    def flow(self) -> None:
        """No delay and no hold any more."""
        for flow in self._flows.values():
            flow.delay_s = 0.0
            flow.open.set()

    def lead_to(self, server_port: int) -> None:
        """From now on whoever connects reaches another server; open connections are reset."""
        self._server_port = server_port
        self.cut()

    def cut(self) -> None:
        """Every open connection is reset; new ones are welcome."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def refuse(self) -> None:
        """Every open connection is reset, and nobody listens."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.cut()

    async def welcome(self) -> None:
        """Listen again, on the same port."""
        if self._listener is None:
            self._listener = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    # --- life ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.welcome()
        assert self._listener is not None
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.refuse()
        self.flow()
        async with asyncio.timeout(10):
            while self._writers:  # noqa: ASYNC110  (each connection's own task takes its writers out)
                await asyncio.sleep(0.001)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(server_writer)

        def reset() -> None:
            writer.transport.abort()
            server_writer.transport.abort()

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_carry(reader, server_writer, self._flows[Way.TO_SERVER], reset))
                tasks.create_task(_carry(server_reader, writer, self._flows[Way.TO_CLIENT], reset))
        finally:
            reset()
            self._writers -= {writer, server_writer}


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flow: _Flow, reset: Callable[[], None]
) -> None:
    """Bytes from one end to the other, each after the delay of when it came. Ends with either end."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def send() -> None:
        while True:
            due_s, some = await waiting.get()
            await asyncio.sleep(max(due_s - loop.time(), 0.0))
            await flow.open.wait()
            if not some or writer.transport.is_closing():
                break
            writer.write(some)
            await writer.drain()
        reset()

    async def receive() -> None:
        some = b"more"
        while some:
            try:
                some = await reader.read(_CHUNK)
            except OSError:
                some = b""
            waiting.put_nowait((loop.time() + flow.delay_s, some))

    with suppress(OSError):
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(receive())
                tasks.create_task(send())
        except* OSError:
            reset()
