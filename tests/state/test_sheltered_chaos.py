"""Random faults of a real server and of the lines to it, under load: in the end the store knows exactly what is
carried."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests.servers import Kind, Options

from .test_sheltered_redis import MOST, QUICK, REPLICAS, Stand, stand

FAULTS = 8


class Trouble:
    """Makes one fault after another."""

    def __init__(self, made: Stand, random: Random) -> None:
        self._made = made
        self._random = random
        self._kinds: list[Callable[[], Awaitable[None]]] = [
            self._killed,
            self._paused,
            self._held,
            self._delayed,
            self._reset,
            self._emptied,
            self._scripts_flushed,
            self._read_only,
            self._no_memory,
        ]

    async def run(self) -> None:
        random = self._random
        kinds = random.sample(self._kinds, FAULTS)
        for kind in kinds:
            await kind()
            await asyncio.sleep(random.choice((0.05, 0.2, 0.8)))

    async def _last(self) -> None:
        await asyncio.sleep(self._random.choice((0.1, 0.5)))

    async def _killed(self) -> None:
        self._made.server.kill()
        await self._last()
        await self._made.server.start()

    async def _paused(self) -> None:
        self._made.server.pause()
        await self._last()
        self._made.server.resume()

    async def _held(self) -> None:
        line = self._random.choice(self._made.replicas).line
        line.hold()
        await self._last()
        line.flow()

    async def _delayed(self) -> None:
        line = self._random.choice(self._made.replicas).line
        line.delay(0.2)
        await self._last()
        line.flow()

    async def _reset(self) -> None:
        self._random.choice(self._made.replicas).line.cut()

    async def _emptied(self) -> None:
        self._made.server.ask("FLUSHALL")

    async def _scripts_flushed(self) -> None:
        self._made.server.ask("SCRIPT", "FLUSH")

    async def _read_only(self) -> None:
        self._made.server.ask("REPLICAOF", "127.0.0.1", "1")
        await self._last()
        self._made.server.ask("REPLICAOF", "NO", "ONE")

    async def _no_memory(self) -> None:
        self._made.server.ask("CONFIG", "SET", "maxmemory", "1")
        await self._last()
        self._made.server.ask("CONFIG", "SET", "maxmemory", "0")


@pytest.mark.parametrize(("seed", "lease_s"), [(1, 2.0), (2, 60.0)])
async def test_after_any_faults_the_store_knows_exactly_what_is_carried(
    tmp_path: Path, seed: int, lease_s: float
) -> None:
    random = Random(seed)
    shelter = replace(QUICK, lease_s=lease_s)
    async with stand(Kind.REDIS, tmp_path, Options(appendonly=seed % 2 == 0), shelter) as made:
        over = asyncio.Event()

        async def load(index: int) -> None:
            while not over.is_set():
                await made.reserve(index)
                if random.random() < 0.6:
                    await made.release(index)
                if random.random() < 0.1:
                    await made.publish(index)
                await asyncio.sleep(0.02 * random.random())

        async with asyncio.TaskGroup() as tasks:
            for index in range(REPLICAS):
                tasks.create_task(load(index))
            await Trouble(made, random).run()
            over.set()
        await made.healed()
        # at most one share for each replica but one that was cut off while the others were not
        assert made.worst <= MOST + (REPLICAS - 1) * (MOST // REPLICAS)
        assert all(replica.granted > MOST for replica in made.replicas)
        await made.whole()
