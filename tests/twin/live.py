"""The trace through the live shell: gateway, adapters and emulated engines, over loopback sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler

from adapters.contract import Adapter, Capabilities, UpstreamCall
from adapters.emulated.server import EmulatedEngine
from adapters.emulated.settings import EmulatedSettings
from gateway.app import running
from gateway.config import BackendSettings, PolicySettings, Settings, TierSettings
from gateway.pace import PrefillSample, StepSample
from gateway.teachers import StepLearner, Teachers, Timing
from scheduling.lengths import LengthModel
from scheduling.policies import make
from tests.twin.stepped import run_stepped
from tests.twin.witness import Log, Witness
from tests.twin.world import (
    ENGINE,
    HOMES,
    LIMITS,
    MARGIN,
    MODEL,
    OPTIONS,
    PROFILE,
    SEED,
    START_S,
    TIERS,
    Asked,
    Outage,
)
from tiergate.root import wire
from tiergate_engine.step import Step

CONNECTIONS = 64  # to each engine: more than it ever has requests


class _Fixed:
    """Step times that stay what the profile says, whatever is seen."""

    limits = LIMITS

    def observe(self, sample: StepSample) -> None:
        pass

    def observe_prefill(self, sample: PrefillSample) -> None:
        pass

    def observe_told(self, steps: Sequence[tuple[Step, float]], of: int) -> None:
        pass

    def timing(self) -> Timing:
        return Timing(PROFILE.step_time, MARGIN, calibrated=True, version=1)


class _NoLengths:
    """Answer lengths of which nothing is learned."""

    def observe(self, model: str, tier: str, output_tokens: int, *, complete: bool) -> None:
        pass

    def changed(self, running: Mapping[tuple[str, str], Sequence[int]]) -> list[tuple[str, str, LengthModel]]:
        return []


class _Frozen:
    """`gateway.fleet.Teachers` that connect as always, and teach nothing."""

    lengths = _NoLengths()

    def __init__(self, real: Teachers) -> None:
        self._real = real

    async def connect(self, settings: BackendSettings) -> Adapter:
        return await self._real.connect(settings)

    async def steps(self, settings: BackendSettings, capabilities: Capabilities) -> StepLearner:
        return _Fixed()


class _Machine:
    """One emulated engine behind a port that stays its own. It can be switched off, which loses everything, and on
    again."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.port = 0
        self._tasks = tasks
        self._answering: dict[asyncio.Transport, None] = {}  # in the order in which requests came

    async def on(self) -> None:
        engine = EmulatedEngine(EmulatedSettings(MODEL, ENGINE), PROFILE.step_time)
        app = engine.application()
        app.middlewares.append(self._note)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1, keepalive_timeout=3600.0
        )
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await self._site.start()
        self.port = int(self._runner.addresses[0][1])
        self._driving = self._tasks.create_task(engine.driver.run())

    async def off(self) -> None:
        await self._site.stop()
        for transport in list(self._answering):
            transport.abort()
        server = self._runner.server
        assert server is not None
        for connection in server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        self._driving.cancel()
        await self._runner.cleanup()

    @web.middleware
    async def _note(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        self._answering[transport] = None
        try:
            return await handler(request)
        finally:
            del self._answering[transport]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _settings(policy: str, machines: Sequence[_Machine]) -> Settings:
    return Settings(
        port=0,
        backends=tuple(
            BackendSettings(url=f"http://127.0.0.1:{machine.port}", name=name, tier=tier)
            for (name, tier), machine in zip(HOMES.items(), machines, strict=True)
        ),
        tiers=tuple(
            TierSettings(name=t.name, ttft_ms=_ms(t.slo.ttft_s), tpot_ms=_ms(t.slo.tpot_s), on_miss=t.on_miss)
            for t in TIERS.tiers
        ),
        default_tier=TIERS.default,
        policy=PolicySettings(name=policy),
        driving=False,
        log_requests=False,
        seed=SEED,
    )


async def _ask(session: aiohttp.ClientSession, port: int, asked: Asked) -> None:
    await _until(asked.at_s)
    body: dict[str, object] = {
        "model": MODEL,
        "prompt": [1] * asked.prompt_tokens,
        "stream": asked.streamed,
        "max_tokens": asked.max_output_tokens,
        "vllm_xargs": {"emulated_output_tokens": asked.output_tokens},
    }
    url = f"http://127.0.0.1:{port}/v1/completions"
    async with session.post(url, json=body, headers={"x-slo-tier": asked.tier}) as answer:
        await answer.read()


async def _until(at_s: float) -> None:
    """Wait for exactly this time."""
    loop = asyncio.get_running_loop()
    due = loop.create_future()
    loop.call_at(at_s, due.set_result, None)
    await due


async def _warm(adapter: Adapter) -> None:
    """Have as many connections ready as will be used, so that no request waits for one to be made."""

    async def ask() -> None:
        answer = await adapter.upstream.open(UpstreamCall("GET", "/health", {}, b"", 10.0))
        await answer.read_all(1)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CONNECTIONS):
            tasks.create_task(ask())


async def _fail(machine: _Machine, adapter: Adapter, outage: Outage) -> None:
    await _until(outage.from_s)
    await machine.off()
    await _until(outage.until_s)
    await machine.on()
    await _warm(adapter)


async def _run(policy: str, trace: Sequence[Asked], outage: Outage | None) -> Log:
    async with asyncio.TaskGroup() as driving:
        machines = {name: _Machine(driving) for name in HOMES}
        for machine in machines.values():
            await machine.on()
        settings = _settings(policy, list(machines.values()))
        wiring = await asyncio.to_thread(wire, settings, asyncio.get_running_loop().time)
        witness = Witness(TIERS, make(policy, Random(SEED)), OPTIONS)
        wiring = replace(wiring, dispatcher=witness, teachers=_Frozen(wiring.teachers))
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        async with running(settings, wiring) as gateway, session, asyncio.TaskGroup() as tasks:
            await _until(START_S / 2)
            for name in HOMES:
                await _warm(gateway.fleet.adapter(name))
            for asked in trace:
                tasks.create_task(_ask(session, gateway.port, asked))
            if outage is not None:
                tasks.create_task(_fail(machines[outage.backend], gateway.fleet.adapter(outage.backend), outage))
        for machine in machines.values():
            await machine.off()
    return witness.log


def live(policy: str, trace: Sequence[Asked], outage: Outage | None = None) -> Log:
    """What the gateway decides."""
    return run_stepped(_run(policy, trace, outage))
