"""Replicas reserve and release while their server is emptied, stopped, killed and cut off: nothing leaks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from scheduling.load import Cost, Limits, LoadVector, ReserveCandidate
from state.contract import Held, Publication, StoreUnavailable
from state.redis.store import RedisStore, StoreOptions
from tests.servers import DataServer, Kind, Options

from .conftest import ServedCluster

T = TypeVar("T")

TROUBLES = 12
CLIENTS = 6
BOX = Limits(40, 10**9, 10**9)
AGAIN_S = 0.05
PATIENCE_S = 60.0


async def until_answered(ask: Callable[[], Awaitable[T]]) -> T:
    """As a caller does: ask the same again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await ask()
            except StoreUnavailable:
                await asyncio.sleep(AGAIN_S)


async def one_client(store: RedisStore, name: str, chance: random.Random, over: asyncio.Event) -> None:
    """Requests that come, stay a moment and go; some vanish while they are asked for, and are released as well."""
    number = 0
    while not over.is_set():
        number += 1
        lease = f"{name}-{number}"
        cost = Cost(
            1, chance.randrange(100), chance.randrange(50), "chat", chance.choice((20.0, 50.0, float("inf")))
        )
        view = store._mirror.memberships
        asked = [ReserveCandidate(one, cost, BOX, 0.0, view[one].epoch) for one in sorted(view)]
        chance.shuffle(asked)
        try:
            async with asyncio.timeout(0.002 if chance.random() < 0.1 else None):
                await until_answered(partial(store.reserve, lease, asked))
        except TimeoutError:
            await asyncio.sleep(0)
        await asyncio.sleep(chance.random() * 0.05)
        await until_answered(partial(store.release, lease))


def carried(store: RedisStore) -> list[Publication]:
    """What an engine would show: the leases that stand, by the replica's own book."""
    publications = []
    for backend in sorted(store._mirror.memberships):
        costs = [lease.cost for lease in store._own._leases.values() if lease.backend == backend]
        kv_tokens, prefill_tokens = sum(c.peak_kv_tokens for c in costs), sum(c.prefill_tokens for c in costs)
        load = LoadVector(len(costs), kv_tokens, prefill_tokens, {"chat": len(costs)})
        publications.append(Publication(backend, load, store.sequence_of(backend) + 1))
    return publications


async def publishing(store: RedisStore, chance: random.Random, over: asyncio.Event) -> None:
    """Measurements that are right, as often as the store answers."""
    while not over.is_set():
        await asyncio.sleep(0.05)
        measured = carried(store)
        held = [Held("m", "chat", chance.random(), 1, 5)] if chance.random() < 0.5 else []
        try:
            await store.publish(measured, held)
        except StoreUnavailable:
            continue


async def trouble(server: DataServer, chance: random.Random) -> None:
    for kind in chance.sample(range(TROUBLES), TROUBLES):
        await asyncio.sleep(chance.random() * 0.5)
        match kind % 4:
            case 0:
                await asyncio.to_thread(server.ask, "FLUSHALL")
            case 1:
                server.pause()
                await asyncio.sleep(chance.random() * 1.5)
                server.resume()
            case 2:
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(chance.random() * 0.5)
                await server.start()
            case _:
                await asyncio.to_thread(server.ask, "SCRIPT", "FLUSH")
                await asyncio.to_thread(server.ask, "CLIENT", "KILL", "TYPE", "normal")


@pytest.mark.parametrize(
    ("kind", "appendonly"), [(Kind.REDIS, True), (Kind.VALKEY, False)], ids=["redis that persists", "valkey"]
)
async def test_nothing_leaks_through_any_trouble(kind: Kind, appendonly: bool, tmp_path: Path) -> None:
    chance = random.Random(7)
    async with DataServer(kind, tmp_path / "server", Options(appendonly=appendonly)) as server:
        fleet = ServedCluster(server.url, "soak", StoreOptions(lease_s=1.0, timeout_s=0.25))
        try:
            await _soak(fleet, server, chance)
        finally:
            await fleet.close()


async def _soak(fleet: ServedCluster, server: DataServer, chance: random.Random) -> None:
    stores = [await fleet.replica(name) for name in "abc"]
    for backend in "xyz":
        await stores[0].add_backend(backend, "chat")
    over = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for store in stores:
            for number in range(CLIENTS):
                tasks.create_task(one_client(store, f"{number}", chance, over))
            tasks.create_task(publishing(store, chance, over))
        await trouble(server, chance)
        over.set()

    async def cleaned() -> None:
        for store in stores:  # as gateways go on measuring
            await store.publish(carried(store))
        picture = await stores[0].picture()
        nobody = all(not stored.leases and stored.part.load.idle for stored in picture.parts)
        sums = picture.totals.values()
        empty = all(one.leases == 0 and one.load.idle and one.tightest_ms is None for one in sums)
        if not (nobody and empty and set(picture.totals) == {"x", "y", "z"}):
            raise StoreUnavailable(f"something is left: {picture}")

    await until_answered(cleaned)
