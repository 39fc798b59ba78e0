"""Replicas on a real Redis or Valkey that fails in every way, or the line to it does: requests go on, oversell
stays within what docs/state.md ("Outages") derives, and the store is whole again afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from scheduling.load import Cost, Limits, LoadVector, ReserveCandidate
from state.contract import Granted, Mode, Publication
from state.outage import Shelter
from state.redis.address import parse_url
from state.redis.connect import ConnectOptions, connect
from state.redis.store import RedisStore, StoreOptions
from state.sheltered import Sheltered
from tests.servers import DataServer, Kind, Options

from .faults import Line

KINDS = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.value)
PATIENCE_S = 30.0
MOST = 12
REPLICAS = 3
LIMITS = Limits(MOST, 10**6, 10**6)
ONE = Cost(1, 10, 5, "chat", 50.0)
TIMEOUT_S = 0.25  # patient, because the test machine may be busy; the default is 0.1
LONG = 60.0  # a lease time that no test outlives
QUICK = Shelter(deadline_s=TIMEOUT_S * 1.2, probe_s=0.05, pulse_s=0.3, settle_s=0.3, lease_s=LONG)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110  (replicas do it by themselves)
            await asyncio.sleep(0.02)


@dataclass
class Replica:
    """One gateway's side: its line, its store, and what it carries by its own account."""

    line: Line
    inner: RedisStore
    store: Sheltered
    modes: list[Mode]
    carried: dict[str, None] = field(default_factory=dict)
    granted: int = 0


class Stand:
    """Three replicas that place requests on one backend with room for 12."""

    def __init__(self, server: DataServer, replicas: list[Replica]) -> None:
        self.server = server
        self.replicas = replicas
        self.epochs = [0] * len(replicas)
        self.worst = 0
        self._count = 0

    @property
    def total(self) -> int:
        return sum(len(replica.carried) for replica in self.replicas)

    async def reserve(self, index: int) -> bool:
        replica = self.replicas[index]
        self._count += 1
        lease = f"{index}-{self._count}"
        candidate = ReserveCandidate("x", ONE, LIMITS, 0.0, self.epochs[index])
        answer = await replica.store.reserve(lease, (candidate,))
        if isinstance(answer, Granted):
            replica.carried[lease] = None
            replica.granted += 1
            self.worst = max(self.worst, self.total)
            return True
        self.epochs[index] = answer.memberships["x"].epoch
        return False

    async def release(self, index: int) -> None:
        replica = self.replicas[index]
        if replica.carried:
            lease = next(iter(replica.carried))
            del replica.carried[lease]  # it left the engine before the store is told
            await replica.store.release(lease)

    async def publish(self, index: int) -> None:
        store, own = self.replicas[index].store, len(self.replicas[index].carried)
        sequence = store.sequence_of("x") + 1
        await store.publish([Publication("x", LoadVector(own, 10 * own, 0, {"chat": own}), sequence)])

    async def traffic(self, rounds: int) -> None:
        """All replicas side by side take what they get, and give some back."""

        async def one(index: int) -> None:
            for turn in range(rounds):
                await self.reserve(index)
                if turn % 3 == 2:
                    await self.release(index)
                if turn % 7 == 6:
                    await self.publish(index)
                await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as tasks:
            for index in range(len(self.replicas)):
                tasks.create_task(one(index))

    async def calm(self) -> None:
        """Nothing is under way, and everybody knows how everything stands."""
        for replica in self.replicas:
            await replica.store.view()

    def modes(self) -> set[Mode]:
        return {replica.store.mode for replica in self.replicas}

    async def noticed(self, indices: Sequence[int] = range(REPLICAS)) -> None:
        await until(lambda: all(self.replicas[index].store.mode is Mode.ALONE for index in indices))

    async def healed(self) -> float:
        """Wait until the store counts for all; how long that took."""
        began_s = time.monotonic()
        await until(lambda: self.modes() == {Mode.SHARED})
        return time.monotonic() - began_s

    async def whole(self) -> None:
        """The store knows exactly what each replica carries; and when all is over, nothing is left there."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                loads = [(await replica.inner.view())["x"] for replica in self.replicas]
                counted = [load.own.decodes for load in loads]
                carried = [len(replica.carried) for replica in self.replicas]
                if counted == carried and loads[0].foreign.decodes == sum(carried[1:]):
                    break
                await asyncio.sleep(0.05)
        for index, replica in enumerate(self.replicas):
            while replica.carried:
                await self.release(index)
        picture = await self.replicas[0].inner.picture()
        assert picture.totals["x"].load.idle
        assert picture.totals["x"].leases == 0
        assert all(stored.leases == 0 and stored.part.load.idle for stored in picture.parts)
        assert await self.reserve(0)
        await self.release(0)


@asynccontextmanager
async def stand(
    kind: Kind, folder: Path, options: Options | None = None, shelter: Shelter = QUICK
) -> AsyncIterator[Stand]:
    async with AsyncExitStack() as ending:
        server = await ending.enter_async_context(DataServer(kind, folder, options))
        tasks = asyncio.TaskGroup()
        running: list[asyncio.Task[None]] = []
        replicas = []
        for index in range(REPLICAS):
            line = await ending.enter_async_context(Line(server.port))
            url = server.url.replace(f":{server.port}", f":{line.port}")
            connection = connect(parse_url(url), ConnectOptions(timeout_s=TIMEOUT_S, connect_timeout_s=TIMEOUT_S))
            ending.push_async_callback(connection.close)
            told = StoreOptions(lease_s=shelter.lease_s, timeout_s=TIMEOUT_S)
            inner = RedisStore(connection, "outage", f"r{index}", told)
            modes: list[Mode] = []
            store = Sheltered(
                inner,
                time.monotonic,
                shelter,
                on_mode=lambda mode, why, modes=modes: modes.append(mode),  # type: ignore[misc]
            )
            replicas.append(Replica(line, inner, store, modes))
        async with tasks:
            made = Stand(server, replicas)
            try:
                for index, replica in enumerate(replicas):
                    running.append(tasks.create_task(replica.store.run()))
                    await replica.inner.listening()
                    made.epochs[index] = (await replica.store.add_backend("x", "chat")).epoch
                await until(lambda: all(one.inner.replicas == REPLICAS for one in replicas))
                await asyncio.sleep(2 * shelter.probe_s)  # that each has counted the replicas
                assert made.modes() == {Mode.SHARED}
                yield made
            finally:
                for task in running:
                    task.cancel()
                for replica in replicas:
                    with suppress(TimeoutError):
                        await replica.store.close()


async def through_an_outage(made: Stand, begin: Callable[[], object], end: Callable[[], object]) -> float:
    """Traffic before, during and after; nothing is oversold, since all replicas knew the same. How long it took to
    heal."""
    await made.traffic(12)
    await made.calm()
    begun = begin()
    if asyncio.iscoroutine(begun):
        await begun
    before = [replica.granted for replica in made.replicas]
    await made.traffic(12)
    await made.noticed()
    for index, replica in enumerate(made.replicas):
        if replica.granted == before[index]:
            await made.release(index)
            assert await made.reserve(index)
    assert made.worst <= MOST
    ended = end()
    if asyncio.iscoroutine(ended):
        await ended
    took_s = await made.healed()
    assert [replica.modes[0] for replica in made.replicas] == [Mode.ALONE] * REPLICAS
    await made.traffic(12)
    assert made.worst <= MOST
    await made.whole()
    return took_s


@KINDS
async def test_a_server_that_dies_and_comes_back_empty(
    kind: Kind, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with stand(kind, tmp_path) as made:
        record_property("healed_s", await through_an_outage(made, made.server.kill, made.server.start))


@KINDS
async def test_a_server_that_dies_and_comes_back_with_all_it_had(
    kind: Kind, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with stand(kind, tmp_path, Options(appendonly=True)) as made:
        record_property("healed_s", await through_an_outage(made, made.server.kill, made.server.start))


@KINDS
async def test_a_server_that_hangs(
    kind: Kind, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with stand(kind, tmp_path) as made:
        record_property("healed_s", await through_an_outage(made, made.server.pause, made.server.resume))


async def test_a_server_that_answers_after_a_second(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with stand(Kind.REDIS, tmp_path) as made:

        def slow() -> None:
            for replica in made.replicas:
                replica.line.delay(0.5)

        def quick() -> None:
            for replica in made.replicas:
                replica.line.flow()

        record_property("healed_s", await through_an_outage(made, slow, quick))


async def test_a_server_that_takes_no_writes(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with stand(Kind.REDIS, tmp_path) as made:
        ask = made.server.ask

        def read_only() -> None:
            ask("CONFIG", "SET", "replica-read-only", "yes")
            ask("REPLICAOF", "127.0.0.1", "1")

        record_property(
            "healed_s", await through_an_outage(made, read_only, lambda: ask("REPLICAOF", "NO", "ONE"))
        )


async def test_a_server_without_memory(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    async with stand(Kind.REDIS, tmp_path) as made:
        ask = made.server.ask
        record_property(
            "healed_s",
            await through_an_outage(
                made,
                lambda: ask("CONFIG", "SET", "maxmemory", "1"),
                lambda: ask("CONFIG", "SET", "maxmemory", "0"),
            ),
        )


async def test_a_server_that_forgets_the_scripts_is_no_outage(tmp_path: Path) -> None:
    async with stand(Kind.REDIS, tmp_path) as made:
        await made.traffic(6)
        made.server.ask("SCRIPT", "FLUSH")
        await made.traffic(12)
        assert made.worst <= MOST
        assert all(replica.modes == [] for replica in made.replicas)
        await made.whole()


async def test_a_restart_that_nobody_saw_is_no_outage_for_who_looks_again(tmp_path: Path) -> None:
    """As for a gateway that was stopped meanwhile: its connections are dead, and the server has all it had."""
    async with stand(Kind.REDIS, tmp_path, Options(appendonly=True)) as made:
        await made.traffic(6)
        await made.calm()
        for replica in made.replicas:
            replica.line.cut()
        for index, replica in enumerate(made.replicas):
            granted = replica.granted
            await made.release(index)
            assert await made.reserve(index)
            assert replica.granted == granted + 1
        assert made.worst <= MOST
        assert all(replica.modes == [] for replica in made.replicas)
        await made.whole()


async def test_who_starts_while_the_store_is_slow_waits_to_learn_of_the_others(tmp_path: Path) -> None:
    async with stand(Kind.REDIS, tmp_path) as made, Line(made.server.port) as line:
        line.delay(0.75 * TIMEOUT_S)
        url = made.server.url.replace(f":{made.server.port}", f":{line.port}")
        async with connect(parse_url(url)) as connection:
            inner = RedisStore(connection, "outage", "late", StoreOptions(lease_s=LONG, timeout_s=TIMEOUT_S))
            late = Sheltered(inner, time.monotonic, replace(QUICK, first_s=PATIENCE_S))
            await late.add_backend("x", "chat")
            mode, replicas = late.mode, late.replicas
            line.flow()
            await late.close()
        assert mode is Mode.ALONE  # all else than the first look takes too long
        assert replicas >= REPLICAS


@KINDS
async def test_a_server_that_is_emptied_while_it_runs(
    kind: Kind, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with stand(kind, tmp_path) as made:
        await made.traffic(12)
        await made.calm()
        made.server.ask("FLUSHALL")
        await made.traffic(12)
        assert made.worst <= MOST
        # Who finds out late may find all the others back already.
        await until(lambda: any(Mode.HEALING in replica.modes for replica in made.replicas))
        record_property("healed_s", await made.healed())
        await made.traffic(12)
        assert made.worst <= MOST
        await made.whole()


async def test_one_replica_is_cut_off_from_the_server(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The others may use all that is free while it uses its share: at most its share is oversold."""
    async with stand(Kind.REDIS, tmp_path) as made:
        for index in (0, 0, 1, 2):
            assert await made.reserve(index)
        await made.calm()
        made.replicas[0].line.hold()
        await made.noticed([0])
        share = (MOST - made.total) // REPLICAS
        before = made.replicas[0].granted
        await made.traffic(15)
        assert made.replicas[0].granted > before
        assert made.worst <= MOST + share
        assert [replica.modes for replica in made.replicas[1:]] == [[], []]
        made.replicas[0].line.flow()
        record_property("healed_s", await made.healed())
        for index in range(REPLICAS):
            while made.total > MOST // 2 and made.replicas[index].carried:
                await made.release(index)
        made.worst = made.total
        await made.traffic(12)
        assert made.worst <= MOST
        await made.whole()


async def test_a_replica_that_is_cut_off_for_longer_than_its_lease_comes_back(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The others gave it up, and buried what the store knew of it. What it carries counts when it is back."""
    short = Shelter(deadline_s=TIMEOUT_S * 1.2, probe_s=0.05, pulse_s=0.3, settle_s=0.3, lease_s=1.0)
    async with stand(Kind.REDIS, tmp_path, shelter=short) as made:
        for index in (0, 0, 1, 2):
            assert await made.reserve(index)
        await made.calm()
        made.replicas[0].line.hold()
        await made.noticed([0])
        await until(lambda: made.replicas[1].inner.replicas == REPLICAS - 1)
        async with asyncio.timeout(PATIENCE_S):  # both of its leases are buried after twice the lease time
            while (await made.replicas[1].inner.view())["x"].foreign.decodes > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        before = made.replicas[0].granted
        await made.traffic(15)
        assert made.replicas[0].granted > before
        assert made.worst <= MOST + MOST // REPLICAS
        made.replicas[0].line.flow()
        record_property("healed_s", await made.healed())
        await made.whole()


async def test_a_failover_that_loses_the_last_writes(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with (
        stand(Kind.REDIS, tmp_path / "first") as made,
        DataServer(Kind.REDIS, tmp_path / "second", Options(replica_of=made.server.port)) as second,
    ):
        await made.traffic(6)
        await until(lambda: "connected" in str(second.ask("ROLE")))

        async def promote_early() -> None:
            second.ask("REPLICAOF", "NO", "ONE")
            # these writes, and these endings, are only on the server that dies next
            await made.traffic(6)
            await made.calm()
            made.server.kill()

        def lead_there() -> None:
            for replica in made.replicas:
                replica.line.lead_to(second.port)

        record_property("healed_s", await through_an_outage(made, promote_early, lead_there))
