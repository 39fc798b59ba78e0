"""The running gateway: its tasks, its socket, and how it goes down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from aiohttp import web

from gateway.admin import Admin, Watched
from gateway.api import Api, Gate
from gateway.config import Settings
from gateway.dispatch import Shell, Timing
from gateway.fleet import GatewayFleet, Teachers
from gateway.generate import Generator, Parts
from gateway.live import Live
from gateway.merged import TextRates
from gateway.recent import Decisions
from gateway.relay import Limits, Relay
from gateway.request import RequestParser
from gateway.requestlog import RequestLog
from gateway.server import GatewayServer
from gateway.telemetry import Exposition, Telemetry
from gateway.tokens import TokenCounter
from gateway.view import FleetView
from scheduling.dispatcher import Dispatcher
from scheduling.events import TiersChanged
from state.contract import Store

log = logging.getLogger("tiergate.gateway")

_CUT_S = 0.05  # how long open streams may still go on when the socket is shut; to aiohttp 0 means for ever


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the composition root gives the gateway."""

    dispatcher: Dispatcher
    store: Store
    teachers: Teachers
    counter: TokenCounter
    version: str
    write_log: Callable[[bytes], None] | None = None  # takes the request log's lines; may block
    clock: Callable[[], float] = time.monotonic  # the one clock, in seconds; the event loop keeps the same time


class Gateway:
    """One running gateway. Made by `running`."""

    def __init__(self, settings: Settings, wiring: Wiring) -> None:
        clock = wiring.clock
        self.live = Live(settings)
        self.counter = wiring.counter
        self.gate = Gate()
        self.shell = Shell(
            wiring.dispatcher,
            wiring.store,
            clock,
            Timing(settings.tick_ms / 1e3, settings.timeouts.stall_s, settings.timeouts.client_stall_s),
        )
        self.fleet = GatewayFleet(wiring.teachers, wiring.store, self.shell, settings.health)
        self.shell.pace.learner = self.fleet
        self.telemetry = Telemetry()
        self.log = RequestLog(wiring.write_log, self.telemetry.log_lost)
        decisions = Decisions()
        parts = Parts(
            self.live,
            self.shell,
            self.fleet,
            RequestParser(wiring.counter, self.fleet),
            wiring.counter,
            TextRates(),
            Relay(
                Limits(settings.limits.answer_bytes, settings.limits.event_bytes, settings.timeouts.head_s), clock
            ),
            self.telemetry,
            decisions,
            self.log,
            clock,
        )
        self.api = Api(parts, self.fleet, Generator(parts, secrets.token_hex(6)), self.gate)
        self.view = FleetView(wiring.dispatcher, self.fleet, self.shell, self.telemetry, wiring.version)
        watched = Watched(
            self.live,
            self.view,
            self.fleet,
            self.gate,
            Exposition(self.telemetry, self.shell, self.view, wiring.version),
            decisions,
            lambda tiers: self.shell.feed(TiersChanged(tiers)),
            clock,
        )
        Admin(watched).attach(self.api)
        self._server = GatewayServer(self.api.handle, settings)
        self._runner: web.ServerRunner | None = None
        self._site: web.TCPSite | None = None
        self.port = 0

    async def open(self, host: str, port: int) -> None:
        """Begin to listen. Raises OSError."""
        self._runner = web.ServerRunner(self._server, handle_signals=False, shutdown_timeout=_CUT_S)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, host, port, backlog=1024)
        await self._site.start()
        addresses = self._runner.addresses
        self.port = int(addresses[0][1]) if addresses else port

    async def reload(self, settings: Settings) -> None:
        """Take other tiers, backends and keys; no stream is touched. Other keys need a restart."""
        snapshot = self.live.replace(settings)
        self.shell.feed(TiersChanged(snapshot.tiers))
        await self.fleet.configure(settings.backends)
        log.info("configuration %d is in use", snapshot.version)

    async def drain(self, grace_s: float) -> int:
        """Let nobody in, wait for the streams at most `grace_s`; how many had to be cut."""
        self.gate.open = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self.shell.wait_empty()
        return len(self.shell.tickets())

    async def shut(self) -> None:
        """Stop listening and end what is left."""
        if self._runner is not None:
            await self._runner.cleanup()


@contextlib.asynccontextmanager
async def running(settings: Settings, wiring: Wiring) -> AsyncIterator[Gateway]:
    """A gateway that listens on `settings.host` and `settings.port` (0: any free one, see `Gateway.port`).

    On the way out it stops at once; call `drain` before for a graceful end.
    """
    gateway = Gateway(settings, wiring)
    async with asyncio.TaskGroup() as tasks:
        own = gateway.shell.start(tasks) + gateway.fleet.start(tasks, settings.backends)
        own.append(tasks.create_task(gateway.log.run(), name="request-log"))
        try:
            await gateway.open(settings.host, settings.port)
            yield gateway
        finally:
            gateway.gate.open = False
            await gateway.shut()
            await gateway.shell.settle()
            gateway.shell.stop_timer()
            gateway.fleet.stop()
            for task in own:
                task.cancel()
            await asyncio.to_thread(gateway.log.flush)
            await gateway.fleet.close()
            await wiring.store.close()
