"""The stores under contract test, and short ways to say a candidate."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

import pytest

from scheduling.load import Cost, Limits, ReserveCandidate
from state.contract import Store
from state.memory import MemoryState

ONE_CHAT = Cost(1, 100, 50, "chat", 50.0)
NO_LIMITS = Limits(10**6, 10**9, 10**9)


class Cluster(Protocol):
    """Several replicas' handles on one shared state."""

    async def replica(self, name: str) -> Store: ...


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


CLUSTERS: dict[str, Callable[[], MemoryCluster]] = {"memory": MemoryCluster}
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
