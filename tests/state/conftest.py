"""The stores under contract test, and short ways to say a candidate.

Redis and Valkey are real servers on loopback, one of each for a whole run; every test has a fleet of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from scheduling.load import Cost, Limits, ReserveCandidate
from state.contract import Store
from state.memory import MemoryState
from state.outage import Shelter
from state.redis.address import parse_url
from state.redis.connect import Connection, ConnectOptions, connect
from state.redis.store import RedisStore, StoreOptions
from state.sheltered import Sheltered
from tests.servers import DataServer, Kind

ONE_CHAT = Cost(1, 100, 50, "chat", 50.0)
NO_LIMITS = Limits(10**6, 10**9, 10**9)


class Cluster(Protocol):
    """Several replicas' handles on one shared state."""

    async def replica(self, name: str) -> Store: ...

    async def close(self) -> None: ...


class MemoryCluster:
    """Replicas of one `MemoryState`."""

    def __init__(self) -> None:
        self._state = MemoryState()
        self._stores: list[Store] = []

    async def replica(self, name: str) -> Store:
        store = self._state.replica(name)
        self._stores.append(store)
        return store

    async def close(self) -> None:
        for store in self._stores:
            await store.close()


class Servers:
    """One server of each kind, started when it is first wanted."""

    def __init__(self) -> None:
        self._running: dict[Kind, DataServer] = {}
        self._ending = ExitStack()
        self._fleets = itertools.count()

    def url(self, kind: Kind) -> str:
        if kind not in self._running:
            folder = self._ending.enter_context(tempfile.TemporaryDirectory(prefix="tg"))
            self._running[kind] = self._ending.enter_context(DataServer(kind, Path(folder)))
        return self._running[kind].url

    def fleet(self) -> str:
        """A name that no other test has."""
        return f"fleet{next(self._fleets)}"

    def close(self) -> None:
        self._ending.close()


SERVERS = Servers()


@pytest.fixture(scope="session", autouse=True)
def _servers() -> Iterator[None]:
    """Ends the servers with the run."""
    yield
    SERVERS.close()


class ServedCluster:
    """Replicas of one fleet on a server, each with a connection and an upkeep of its own."""

    def __init__(self, url: str, fleet: str, options: StoreOptions) -> None:
        self.url = url
        self.fleet = fleet
        self.options = options
        self._ending = AsyncExitStack()

    def connection(self) -> Connection:
        connection = connect(parse_url(self.url), ConnectOptions(timeout_s=5.0))
        self._ending.push_async_callback(connection.close)
        return connection

    async def replica(self, name: str) -> RedisStore:
        store = RedisStore(self.connection(), self.fleet, name, self.options)
        running = asyncio.get_running_loop().create_task(store.run())
        self._ending.push_async_callback(_end, store, running)
        await store.listening()
        return store

    async def close(self) -> None:
        await self._ending.aclose()


async def _end(store: Store, running: asyncio.Task[None]) -> None:
    await store.close()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


# A busy test machine must not look like an outage, and a slow example not like a dead replica.
PATIENT = StoreOptions(lease_s=60.0, timeout_s=5.0)


def served(kind: Kind, options: StoreOptions = PATIENT) -> Callable[[], ServedCluster]:
    """Makes clusters on the one server of this kind."""
    return lambda: ServedCluster(SERVERS.url(kind), SERVERS.fleet(), options)


class ShelteredCluster(MemoryCluster):
    """Replicas of one `MemoryState`, each in a shelter that nothing disturbs."""

    def __init__(self) -> None:
        super().__init__()
        self._ending = AsyncExitStack()

    async def replica(self, name: str) -> Store:
        store = Sheltered(await super().replica(name), time.monotonic, Shelter(deadline_s=5.0))
        running = asyncio.get_running_loop().create_task(store.run())
        self._ending.push_async_callback(_end, store, running)
        await asyncio.sleep(0)  # it listens
        return store

    async def close(self) -> None:
        await self._ending.aclose()


CLUSTERS: dict[str, Callable[[], Cluster]] = {
    "memory": MemoryCluster,
    "sheltered": ShelteredCluster,
    "redis": served(Kind.REDIS),
    "valkey": served(Kind.VALKEY),
}
"""Every implementation of the contract by name; all of `test_contract.py` runs on each."""


@pytest.fixture(params=sorted(CLUSTERS))
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    made = CLUSTERS[request.param]()
    yield made
    await made.close()


@pytest.fixture
async def store(cluster: Cluster) -> Store:
    return await cluster.replica("a")


@pytest.fixture
async def other(cluster: Cluster) -> Store:
    return await cluster.replica("b")


class Asking(Protocol):
    def __call__(
        self,
        backend: str,
        epoch: int,
        *,
        cost: Cost = ...,
        limits: Limits = ...,
        tightest_resident_ms: float = ...,
    ) -> ReserveCandidate: ...


@pytest.fixture(scope="session")
def asking() -> Asking:
    """A candidate of one sequence, 100 KV tokens and 50 prompt tokens, with limits that never bind."""

    def ask(
        backend: str,
        epoch: int,
        *,
        cost: Cost = ONE_CHAT,
        limits: Limits = NO_LIMITS,
        tightest_resident_ms: float = 0.0,
    ) -> ReserveCandidate:
        return ReserveCandidate(backend, cost, limits, tightest_resident_ms, epoch)

    return ask


def run_machine(machine: type[RuleBasedStateMachine], max_examples: int) -> None:
    """Draw sequences of calls, and check them."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=30,
            deadline=None,
            # Shrinking would take minutes, and a failure here is readable unshrunk.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
