"""Reading the store, the replicas and the engines, again and again, side by side. Nothing is written anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import aiohttp

from adapters import registry
from adapters.contract import Adapter, UpstreamError
from gateway.config import BackendSettings, EngineKind
from state.redis.inventory import InventoryReader
from tiergate.audit.readings import Carried, Reading, Readings, Unasked, Unreadable, read_carried

T = TypeVar("T")

_HTTP_S = 5.0
CARRIED = "/admin/v1/carried"


@dataclass(frozen=True, slots=True)
class Looks:
    """How often all is read, and how long lies between."""

    times: int = 4
    pause_s: float = 0.4


@dataclass(frozen=True, slots=True)
class Whom:
    """Who is asked besides the store.

    Attributes:
        gateways: base URLs beside those that replicas put into the store.
        admin_token: of the gateways; None cannot ask them.
        backends: as configured, for their keys and kinds; engines that only replicas name are asked as well.
        lease_s: the lease time, unless a replica tells another one.
    """

    gateways: Sequence[str] = ()
    admin_token: str | None = None
    backends: Sequence[BackendSettings] = ()
    lease_s: float = 10.0


@dataclass(slots=True)
class _Heard:
    """What one round of questions brought."""

    told: dict[str, Carried] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


async def look(reader: InventoryReader, whom: Whom, looks: Looks = Looks()) -> Readings:
    """Read everything `looks.times` times. Raises StoreUnavailable."""
    began_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=_HTTP_S)
    # An environment's proxy is for the outside world, not for this fleet.
    async with (
        aiohttp.ClientSession(timeout=timeout, trust_env=False) as http,
        contextlib.AsyncExitStack() as stack,
    ):
        looker = _Looker(reader, whom, http, await stack.enter_async_context(_engines()))
        readings: list[Reading] = []
        for number in range(looks.times):
            if number:
                await asyncio.sleep(looks.pause_s)
            readings.append(await looker.read(first=number == 0))
    return Readings(tuple(readings), time.monotonic() - began_s, whom.lease_s, tuple(looker.unasked(readings)))


@contextlib.asynccontextmanager
async def _engines() -> AsyncIterator[dict[str, Adapter]]:
    """Adapters that are made on the way, by backend; closed at the end."""
    adapters: dict[str, Adapter] = {}
    try:
        yield adapters
    finally:
        for adapter in adapters.values():
            await adapter.close()


class _Looker:
    """Asks everybody once per `read`."""

    def __init__(
        self, reader: InventoryReader, whom: Whom, http: aiohttp.ClientSession, adapters: dict[str, Adapter]
    ) -> None:
        self._reader = reader
        self._whom = whom
        self._http = http
        self._adapters = adapters
        self._heard = _Heard()
        self._engines_failed: dict[str, str] = {}

    async def read(self, *, first: bool) -> Reading:
        """Raises StoreUnavailable."""
        before = await self._reader.read(strays=first)
        urls = {*(url.rstrip("/") for url in self._whom.gateways), *before.addresses.values()}
        if first:  # the engines are known from the replicas
            self._heard = await self._gateways(urls)
        heard, engines = await asyncio.gather(self._gateways(urls), self._all_engines(self._heard.told))
        self._heard = heard
        after = await self._reader.read(strays=False)
        return Reading(before, heard.told, engines, after)

    async def _gateways(self, urls: set[str]) -> _Heard:
        heard = _Heard()
        for url, answer in zip(urls, await asyncio.gather(*map(self._gateway, urls)), strict=True):
            if isinstance(answer, str):
                heard.failed[url] = answer
            else:
                heard.told |= {one.replica: one for one in answer}
        return heard

    async def _gateway(self, url: str) -> tuple[Carried, ...] | str:
        """What a gateway says, or why it does not."""
        token = self._whom.admin_token
        if token is None:
            return "no admin token: give --config FILE, or TIERGATE_ADMIN_TOKEN"
        try:
            async with self._http.get(url + CARRIED, headers={"authorization": f"Bearer {token}"}) as answer:
                body = await answer.read()
                if answer.status != 200:
                    return f"it answered {answer.status}"
                return read_carried(body)
        except (aiohttp.ClientError, TimeoutError) as error:
            return str(error) or "no answer in time"
        except (Unreadable, ValueError) as error:
            return f"its answer cannot be read: {error}"

    async def _all_engines(self, told: Mapping[str, Carried]) -> dict[str, int | None]:
        backends = {one.name: one for one in self._whom.backends}
        for replica in told.values():
            for carried in replica.backends:
                if carried.name not in backends:
                    kind = _kind(carried.engine)
                    backends[carried.name] = BackendSettings(url=carried.url, name=carried.name, engine=kind)
        names = list(backends)
        counts = await asyncio.gather(*(self._engine(backends[name]) for name in names))
        return dict(zip(names, counts, strict=True))

    async def _engine(self, backend: BackendSettings) -> int | None:
        """Running and waiting sequences; None when the engine does not say."""
        name = backend.name
        try:
            adapter = self._adapters.get(name)
            if adapter is None:
                adapter = self._adapters[name] = await _connect(backend)
            load = await _within(adapter.read_load())
        except (UpstreamError, TimeoutError, ValueError) as error:
            self._engines_failed[name] = str(error) or "no answer in time"
            return None
        self._engines_failed.pop(name, None)
        if load.running is None or load.waiting is None:
            return None
        return load.running + load.waiting

    def unasked(self, readings: Sequence[Reading]) -> list[Unasked]:
        """Who is missing from the last reading, and why."""
        last = readings[-1]
        found = [Unasked(f"gateway {url}", why) for url, why in sorted(self._heard.failed.items())]
        for replica, silent_s in sorted(last.after.live.items()):
            if replica not in last.told and last.after.addresses.get(replica) not in self._heard.failed:
                why = f"it told no address (silent for {silent_s:.1f} s): give its URL with --gateway"
                if replica in last.after.addresses:
                    why = f"another process answers at {last.after.addresses[replica]}"
                found.append(Unasked(f"replica {replica}", why))
        found += [Unasked(f"engine {name}", why) for name, why in sorted(self._engines_failed.items())]
        return found


def _kind(engine: str | None) -> EngineKind:
    known = {kind.value: kind for kind in EngineKind}
    return EngineKind.AUTO if engine is None else known.get(engine, EngineKind.AUTO)


async def _connect(backend: BackendSettings) -> Adapter:
    key = None if backend.api_key is None else backend.api_key.get_secret_value()
    options = registry.AdapterOptions(api_key=key)
    if backend.engine is EngineKind.AUTO:
        return await _within(registry.detect(backend.url, options))
    return registry.make(backend.engine.value, backend.url, options)


async def _within(call: Awaitable[T]) -> T:
    async with asyncio.timeout(_HTTP_S):
        return await call
