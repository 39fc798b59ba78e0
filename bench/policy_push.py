"""How long a change of the fleet's policy takes until every replica serves by it, on a real server.

`python -m bench.policy_push [--changes N] [--replicas 2,4,16] [--kind redis|valkey]`

All replicas live in this process, each with a connection of its own, so the time holds their shares of one core as
well: replicas on machines of their own are faster.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from gateway.config import BackendSettings, KeySettings, Settings, TierSettings
from gateway.shared import PolicySource, SharedPolicy, begin
from gateway.telemetry import Telemetry
from state.redis.address import parse_url
from state.redis.connect import connect
from state.redis.documents import RedisDocuments
from tests.servers import DataServer, Kind
from tiergate.root import check_served
from tiergate.upkeep import calm_collector

_BACKENDS = 8
_KEYS = 200
_PAUSE_S = 0.02
_LIMIT_S = 5.0


@dataclass(slots=True)
class Replica:
    """When each version came into force here."""

    shared: SharedPolicy | None = None
    at_s: dict[int, float] = field(default_factory=dict)
    come: asyncio.Event = field(default_factory=asyncio.Event)

    async def apply(self, settings: Settings, version: int) -> None:
        self.at_s[version] = time.perf_counter()
        self.come.set()

    async def has(self, version: int) -> float:
        """When the version came."""
        while version not in self.at_s:
            self.come.clear()
            await self.come.wait()
        return self.at_s[version]


def file() -> Settings:
    """A policy of a usual size."""
    backends = [
        BackendSettings(url=f"http://gpu{number}:8000", name=f"gpu{number}", profile="h200-llama-3.1-8b-fp8")
        for number in range(_BACKENDS)
    ]
    keys = [KeySettings(sha256=f"{number:064x}", tenant=f"tenant-{number}") for number in range(_KEYS)]
    return Settings(backends=tuple(backends), keys=tuple(keys))


@contextlib.asynccontextmanager
async def replicas_on(url: str, fleet: str, count: int) -> AsyncIterator[list[Replica]]:
    """Replicas that follow one store."""
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        made: list[Replica] = []
        running: list[asyncio.Task[None]] = []
        for number in range(count):
            documents = RedisDocuments(await stack.enter_async_context(connect(parse_url(url))), fleet)
            stack.push_async_callback(documents.close)
            source = PolicySource(documents, check_served, f"replica-{number}")
            replica = Replica()
            replica.shared = SharedPolicy(source, await begin(file(), source), replica.apply, Telemetry())
            running.append(tasks.create_task(replica.shared.run()))
            made.append(replica)
        await asyncio.sleep(0.5)  # until all have subscribed
        yield made
        for task in running:
            task.cancel()


async def measure(url: str, count: int, changes: int) -> list[float]:
    """Seconds from asking for each change until the last replica had it."""
    took: list[float] = []
    async with replicas_on(url, f"push-{count}", count) as replicas:
        writer = replicas[0].shared
        assert writer is not None
        for number in range(changes):
            tier = TierSettings(name=f"tier-{number}", ttft_ms=1000, tpot_ms=50)
            began_s = time.perf_counter()
            document = await writer.change(
                lambda now, tier=tier: now.model_copy(  # type: ignore[misc]
                    update={"tiers": (tier,), "default_tier": tier.name}
                ),
                "bench",
            )
            async with asyncio.timeout(_LIMIT_S):
                last_s = max([await replica.has(document.version) for replica in replicas])
            took.append(last_s - began_s)
            await asyncio.sleep(_PAUSE_S)
    return took


async def main(kind: Kind, counts: list[int], changes: int) -> None:
    calm_collector()  # as `tiergate serve` does
    print(f"a change of the policy on {kind.value}, {changes} changes: ms until all replicas serve by it")
    print(f"{'replicas':>8} {'P50':>8} {'P99':>8} {'most':>8}")
    with tempfile.TemporaryDirectory() as folder:
        async with DataServer(kind, Path(folder)) as server:
            for count in counts:
                took = sorted(await measure(server.url, count, changes))
                p50, p99 = took[len(took) // 2], took[min(int(0.99 * len(took)), len(took) - 1)]
                print(f"{count:>8} {p50 * 1e3:>8.2f} {p99 * 1e3:>8.2f} {took[-1] * 1e3:>8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--replicas", default="2,4,16")
    parser.add_argument("--kind", choices=[kind.value for kind in Kind], default=Kind.REDIS.value)
    given = parser.parse_args()
    uvloop.run(main(Kind(given.kind), [int(part) for part in given.replicas.split(",")], given.changes))
