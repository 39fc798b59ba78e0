"""One worker: a gateway that accepts from its supervisor's sockets and does what the supervisor says.

`python -m tiergate.workers.worker` is what a supervisor starts; by hand it says what to run instead.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import orjson
import uvloop

from gateway.acceptor import Acceptor
from gateway.app import Gateway, Wiring, running
from gateway.config import ConfigError, Settings
from gateway.learning import Learned
from gateway.requestlog import LogFile
from tiergate.cli import DONE, FAILED, USAGE
from tiergate.commands import CommandFailed, UsageError
from tiergate.commands.serve import settings_of
from tiergate.root import Incarnation, assemble
from tiergate.upkeep import (
    calm_collector,
    open_request_log,
    reload_on,
    request_log_sink,
    save,
    save_often,
    start_log,
)
from tiergate.workers.board import Board, Share
from tiergate.workers.channel import Channel, Kind, Message, Topic
from tiergate.workers.spec import WorkerSpec

log = logging.getLogger("tiergate")

_SETTLE_S = 5.0  # at most so long a worker waits for its engines' first answers before it accepts
_LOOK_S = 0.02
_ASK_S = 3.0  # beyond what the supervisor gives the siblings


class Line:
    """This worker's connection to its supervisor, and through it to its siblings (`gateway.siblings.Siblings`)."""

    def __init__(self, channel: Channel, reload: asyncio.Event) -> None:
        self._channel = channel
        self._reload = reload
        self._orders: asyncio.Queue[Kind] = asyncio.Queue()
        self.gateway: Gateway | None = None

    async def metrics(self, own: bytes) -> bytes:
        """Of all workers, or its own where the supervisor is gone."""
        told = await self._channel.ask(Topic.METRICS, own.decode(), within_s=_ASK_S)
        return own if told is None else told.encode()

    async def carried(self, own: bytes) -> list[bytes]:
        told = await self._channel.ask(Topic.CARRIED, within_s=_ASK_S)
        return [own] if told is None else [own, *(orjson.dumps(one) for one in orjson.loads(told))]

    async def decision(self, request_id: str) -> bytes | None:
        told = await self._channel.ask(Topic.DECISION, request_id, within_s=_ASK_S)
        return None if told is None else told.encode()

    def tell(self, kind: Kind, text: str | None = None) -> None:
        self._channel.send(Message(kind, text=text))

    async def order(self) -> Kind:
        """The next of RETIRE, DRAIN and STOP."""
        return await self._orders.get()

    async def listen(self) -> None:
        """Hear the supervisor until it is gone, which is an order to retire."""
        while True:
            message = await self._channel.receive()
            if message is None:
                log.error("the supervisor is gone: this worker serves those who are connected, and ends")
                self._orders.put_nowait(Kind.RETIRE)
                return
            if message.kind is Kind.QUESTION:
                self._channel.answer(message, self._reply(message))
            elif message.kind is Kind.RELOAD:
                self._reload.set()
            else:
                self._orders.put_nowait(message.kind)

    def _reply(self, question: Message) -> str | None:
        if self.gateway is None:
            return None
        if question.topic is Topic.METRICS:
            return self.gateway.exposition.text().decode()
        if question.topic is Topic.CARRIED:
            return orjson.dumps(self.gateway.carried.state()).decode()
        found = self.gateway.decisions.get(question.text or "")
        return None if found is None else found.decode()


class Worker:
    """A worker's life, from its first look at the engines to its end."""

    def __init__(
        self, spec: WorkerSpec, settings: Settings, read: Callable[[], Settings], log_file: LogFile | None
    ) -> None:
        self._spec = spec
        self._settings = settings
        self._read = read
        self._log_file = log_file
        self._listeners = [socket.socket(fileno=fd) for fd in spec.listeners]
        self._board = Board(spec.board, spec.slots)

    async def run(self) -> None:
        """Serve until the supervisor says otherwise, or is gone. Raises ConfigError."""
        reload = asyncio.Event()
        channel = await Channel.over(socket.socket(fileno=self._spec.control))
        line = Line(channel, reload)
        self._heed_signals(line, reload)
        wiring = await self._assemble(line)
        learned = wiring.teachers if isinstance(wiring.teachers, Learned) else None
        saves = learned is not None and self._settings.learned_state is not None and self._spec.number == 0
        try:
            async with (
                running(self._settings, wiring, listen=False) as gateway,
                asyncio.TaskGroup() as tasks,
            ):
                line.gateway = gateway
                side = [
                    tasks.create_task(line.listen(), name="supervisor"),
                    tasks.create_task(reload_on(reload, gateway, self._read, self._log_file), name="reload"),
                ]
                if learned is not None and saves:
                    side.append(tasks.create_task(save_often(learned), name="save"))
                await _settled(gateway)
                acceptor = await gateway.share(self._listeners, Share(self._board, self._spec.slot), tasks)
                line.tell(Kind.READY, str(self._settings.drain_grace_s))
                await self._obey(gateway, line, acceptor)
                line.tell(Kind.LAST, gateway.exposition.text().decode())
                for task in side:
                    task.cancel()
        finally:
            if learned is not None and saves:
                await save(learned)
            await channel.close()

    async def _assemble(self, line: Line) -> Wiring:
        """Raises ConfigError."""
        which = Incarnation.of(self._spec.number, adopt_file=self._spec.adopt_file)
        made = await assemble(self._settings, which)
        calm_collector()
        return replace(made, write_log=request_log_sink(self._settings, self._log_file), siblings=line)

    def _heed_signals(self, line: Line, reload: asyncio.Event) -> None:
        """A signal from a terminal or a service manager goes to every process; what to do about it is the
        supervisor's. SIGTERM to this worker alone asks for its replacement."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, line.tell, Kind.LEAVING)
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        for signum in (signal.SIGINT, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_IGN)

    async def _obey(self, gateway: Gateway, line: Line, acceptor: Acceptor) -> None:
        """Wait for the order to end, and carry it out; STOP ends it at once, at any time."""
        grace_s = self._settings.drain_grace_s
        order = await line.order()
        if order is Kind.RETIRE:
            self._let_go(acceptor)
            ending = gateway.retire(grace_s)
        elif order is Kind.DRAIN:
            ending = gateway.drain(grace_s)
        else:
            return
        async with asyncio.TaskGroup() as tasks:
            ends = tasks.create_task(ending)
            stops = tasks.create_task(self._stopped(line, acceptor))
            await asyncio.wait({ends, stops}, return_when=asyncio.FIRST_COMPLETED)
            ends.cancel()
            stops.cancel()
        acceptor.stop()

    async def _stopped(self, line: Line, acceptor: Acceptor) -> None:
        while (order := await line.order()) is not Kind.STOP:
            if order is Kind.RETIRE:
                self._let_go(acceptor)

    def _let_go(self, acceptor: Acceptor) -> None:
        """Accept no more. Where no supervisor is left, a new one can have the address. Idempotent."""
        acceptor.stop()
        for listener in self._listeners:
            listener.close()


async def _settled(gateway: Gateway) -> None:
    """Wait until every engine has been asked once, so that nobody is refused because none is known yet."""
    for _ in range(int(_SETTLE_S / _LOOK_S)):
        if gateway.fleet.asked:
            return
        await asyncio.sleep(_LOOK_S)


def main() -> int:
    """Run one worker; its exit code."""
    try:
        spec = WorkerSpec.take(os.environ)
    except KeyError:
        print("tiergate: run `tiergate serve --workers N`, which starts this", file=sys.stderr)
        return USAGE
    args = spec.namespace()
    start_log(spec.number)
    try:
        settings = settings_of(args)
        # Workers that draw the same numbers would all choose the same backend at the same time.
        settings = settings.model_copy(update={"seed": settings.seed + spec.number})
        log_file = open_request_log(settings)
        try:
            uvloop.run(Worker(spec, settings, partial(settings_of, args), log_file).run())
        finally:
            if log_file is not None:
                log_file.close()
    except (UsageError, ConfigError) as error:
        print(f"tiergate: {error}", file=sys.stderr)
        return USAGE
    except CommandFailed as error:
        print(f"tiergate: {error}", file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
