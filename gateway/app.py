"""The running gateway: its tasks, its socket, and how it goes down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from gateway.acceptor import Acceptor, Turns
from gateway.admin import Admin, Watched
from gateway.api import Api, Gate
from gateway.carried import CarriedView, Place
from gateway.config import ConfigError, Settings
from gateway.dispatch import Shell, Timing
from gateway.driving import Driving
from gateway.fleet import GatewayFleet
from gateway.generate import Generator, Parts
from gateway.live import Live
from gateway.merged import TextRates
from gateway.recent import Decisions
from gateway.relay import Limits, Relay
from gateway.request import RequestParser
from gateway.requestlog import RequestLog
from gateway.server import GatewayServer
from gateway.shared import Begun, PolicyConflict, PolicySource, SharedPolicy, alone, begin
from gateway.sharing import Sharing
from gateway.siblings import Siblings
from gateway.teachers import Teachers
from gateway.telemetry import Exposition, Telemetry
from gateway.tokens import TokenCounter
from gateway.view import FleetView
from scheduling.dispatcher import Dispatcher
from scheduling.events import TiersChanged
from state.contract import Store, StoreUnavailable

log = logging.getLogger("tiergate.gateway")
_LINGER_S = 2.0  # how long idle connections stay open at a retirement
_CUT_S = 0.05  # how long open streams may still go on when the socket is shut; to aiohttp 0 means for ever


KeepAddress = Callable[[Callable[[], int]], Coroutine[object, object, None]]
"""Tells the other replicas the port this one listens on (0 while it does not), until it is cancelled."""


async def nothing_to_close() -> None:
    """For a gateway that holds nothing beyond its parts."""


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
    policy: PolicySource = field(default_factory=alone)
    begun: Begun | None = None  # what `gateway.shared.begin` gave, where the root had to ask it first
    sharing: Sharing | None = None  # of what is learned; None: with nobody
    siblings: Siblings | None = None  # other processes on the same port
    place: Place = field(default_factory=Place)
    keep_address: KeepAddress | None = None
    close: Callable[[], Awaitable[None]] = nothing_to_close  # what the parts used together; called last


class Gateway:
    """One running gateway. Made by `running`."""

    def __init__(self, begun: Begun, wiring: Wiring) -> None:
        clock = wiring.clock
        settings = begun.settings
        self.live = Live(settings, 0 if begun.document is None else begun.document.version)
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
        self.policy = SharedPolicy(wiring.policy, begun, self._put_in_force, self.telemetry)
        self.log = RequestLog(wiring.write_log, self.telemetry.log_lost)
        self.decisions = decisions = Decisions()
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
        self.driving = Driving(self.fleet, wiring.dispatcher, self.shell, self.live, self.telemetry, clock)
        self.view = FleetView(
            wiring.dispatcher, self.fleet, self.shell, self.telemetry, self.driving, wiring.version
        )
        self.exposition = Exposition(self.telemetry, self.shell, self.view, wiring.version)
        self.carried = CarriedView(wiring.dispatcher, self.fleet, self.shell, wiring.store, wiring.place)
        watched = Watched(
            self.live,
            self.view,
            self.fleet,
            self.gate,
            self.exposition,
            decisions,
            self.policy,
            clock,
            self.carried,
            wiring.siblings,
        )
        Admin(watched).attach(self.api)
        self._server = GatewayServer(self.api.handle, settings)
        self._runner = web.ServerRunner(self._server, handle_signals=False, shutdown_timeout=_CUT_S)
        self.port = 0

    async def open(self, host: str, port: int) -> None:
        """Begin to listen. Raises OSError."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=1024)
        await site.start()
        addresses = self._runner.addresses
        self.port = int(addresses[0][1]) if addresses else port

    async def share(self, listeners: Sequence[socket.socket], turns: Turns, tasks: asyncio.TaskGroup) -> Acceptor:
        """Begin to accept from sockets that other processes accept from as well."""
        await self._runner.setup()
        acceptor = Acceptor(self._server, listeners, turns, tasks)
        acceptor.start()
        self.port = int(listeners[0].getsockname()[1])
        return acceptor

    async def reload(self, settings: Settings) -> None:
        """A configuration file that was read again: its tiers, backends and keys for the whole fleet; no stream is
        touched. Other keys need a restart. Where that cannot be, the log says why, and they stay as they are."""
        try:
            await self.policy.reload(settings)
        except (ConfigError, PolicyConflict) as error:
            log.error("tiers, backends and keys stay as they were: %s", error)
        except StoreUnavailable:
            log.error("the store does not answer: tiers, backends and keys stay; send SIGHUP again when it does")
        else:
            log.info("configuration %d is in use", self.live.now.version)

    async def _put_in_force(self, settings: Settings, version: int) -> None:
        snapshot = self.live.replace(settings, version)
        self.shell.feed(TiersChanged(snapshot.tiers))
        await self.fleet.configure(settings.backends)

    async def drain(self, grace_s: float) -> int:
        """Let nobody in, wait for the streams at most `grace_s`; how many had to be cut."""
        self.gate.open = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self.shell.wait_empty()
        return len(self.shell.tickets())

    async def retire(self, grace_s: float) -> int:
        """After the last connection was accepted: serve those that are open until they end, at most `grace_s`.

        Requests that come on them are answered as ever, and told that the connection closes; one that stays idle
        for a moment is closed, since a client may use it again at any time but seldom does. How many requests had
        to be cut.
        """
        self._server.last_requests = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER_S):
                        await self._server.wait_empty()
                while True:
                    await self.shell.wait_empty()
                    await asyncio.sleep(_CUT_S)  # a busy loop may not have read yet what clients have sent
                    if not self.shell.tickets():
                        break
        return len(self.shell.tickets())

    async def shut(self) -> None:
        """Stop listening and end what is left."""
        await self._runner.cleanup()


@contextlib.asynccontextmanager
async def running(settings: Settings, wiring: Wiring, *, listen: bool = True) -> AsyncIterator[Gateway]:
    """A gateway that listens on `settings.host` and `settings.port` (0: any free one, see `Gateway.port`).

    Without `listen` nobody can connect before `Gateway.share`. On the way out it stops at once; call `drain`
    before for a graceful end.
    """
    gateway = Gateway(wiring.begun or await begin(settings, wiring.policy), wiring)
    async with asyncio.TaskGroup() as tasks:
        own = [tasks.create_task(wiring.store.run(), name="store")]
        own += gateway.shell.start(tasks) + gateway.fleet.start(tasks, gateway.live.now.settings.backends)
        own.append(tasks.create_task(gateway.policy.run(), name="policy"))
        own.append(tasks.create_task(gateway.driving.run(), name="driving"))
        if wiring.sharing is not None:
            own.append(tasks.create_task(wiring.sharing.run(), name="sharing"))
        own.append(tasks.create_task(gateway.log.run(), name="request-log"))
        if wiring.keep_address is not None:
            own.append(tasks.create_task(wiring.keep_address(lambda: gateway.port), name="address"))
        try:
            if listen:
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
            if wiring.sharing is not None:
                await wiring.sharing.leave()
            await wiring.policy.documents.close()
            await wiring.store.close()
            await wiring.close()
