"""What the served store does when the server, or a replica, goes away and comes back. The servers are real."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from scheduling.load import Cost, Limits, LoadVector
from state.contract import Denied, Granted, Held, HeldEvent, Mode, Publication, StoreEvent, StoreUnavailable
from state.redis.keys import Keys
from state.redis.store import RedisStore, StoreOptions
from tests.servers import DataServer, Kind, Options

from .conftest import SERVERS, Asking, ServedCluster

KINDS = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.value)
PATIENCE_S = 20.0
STEADY = StoreOptions(lease_s=30.0, timeout_s=1.0)
TIGHT = Cost(1, 10, 5, "code", 20.0)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something the replicas do by themselves."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with suppress(StoreUnavailable):
                if await holds():
                    return
            await asyncio.sleep(0.02)


async def totals_are_sums(store: RedisStore) -> None:
    """The invariant of the store's own books: what reserve looks at is the sum of all parts."""
    picture = await store.picture()
    for backend, total in picture.totals.items():
        parts = [stored for stored in picture.parts if stored.part.backend == backend]
        summed = sum((stored.part.load for stored in parts), LoadVector())
        assert (summed.decodes, summed.peak_kv_tokens, summed.queued_prefill_tokens) == (
            total.load.decodes,
            total.load.peak_kv_tokens,
            total.load.queued_prefill_tokens,
        )
        assert dict(summed.residents) == dict(total.load.residents)
        assert sum(stored.leases for stored in parts) == total.leases


async def decodes(store: RedisStore, backend: str = "x") -> tuple[int, int]:
    """Own and foreign."""
    load = (await store.view())[backend]
    return load.own.decodes, load.foreign.decodes


@pytest.fixture
async def fleet(request: pytest.FixtureRequest) -> AsyncIterator[ServedCluster]:
    """Replicas on the shared server; parametrized by kind and options."""
    kind, options = request.param
    made = ServedCluster(SERVERS.url(kind), SERVERS.fleet(), options)
    yield made
    await made.close()


def on(options: StoreOptions) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "fleet", [(kind, options) for kind in Kind], ids=[kind.value for kind in Kind], indirect=True
    )


@on(STEADY)
async def test_scripts_that_the_server_forgot_are_loaded_again(fleet: ServedCluster, asking: Asking) -> None:
    store = await fleet.replica("a")
    epoch = (await store.add_backend("x", None)).epoch
    for number in range(5):
        await fleet.connection().run("SCRIPT", "FLUSH")
        assert isinstance(await store.reserve(f"{number}", [asking("x", epoch)]), Granted)
        await fleet.connection().run("SCRIPT", "FLUSH")
        await store.release(f"{number}")
    assert await decodes(store) == (0, 0)


async def forget_all(fleet: ServedCluster) -> None:
    """Empty this fleet's part of the store, as a server that lost everything, at one moment."""
    script = "for _, key in ipairs(redis.call('KEYS', ARGV[1])) do redis.call('DEL', key) end"
    pattern = Keys.of(fleet.fleet).prefix.replace("{", "[{]").replace("}", "[}]") + "*"
    await fleet.connection().run("EVAL", script, 0, pattern)


@on(STEADY)
async def test_an_emptied_store_is_filled_by_those_who_live(fleet: ServedCluster, asking: Asking) -> None:
    one, two = await fleet.replica("a"), await fleet.replica("b")
    before = await one.add_backend("x", "chat")
    await one.add_backend("idle", None)
    for lease in ("1", "2", "3"):
        await one.reserve(lease, [asking("x", before.epoch)])
    await two.reserve("4", [asking("x", before.epoch, cost=TIGHT)])
    assert await one.publish([Publication("x", LoadVector(3, 250, 40, {"chat": 3}), one.sequence_of("x") + 1)])
    await one.reserve("5", [asking("x", before.epoch)])
    await one.release("1")
    expected = (await one.view())["x"]
    await until(lambda: _knows(two, "x", 3))
    events = two.watch()

    await forget_all(fleet)

    async def whole() -> bool:
        view = (await one.view()).get("x")
        return view is not None and (view.own.decodes, view.foreign.decodes) == (3, 1)

    await until(whole)
    after = await one.view()
    assert after["x"].membership.tier == "chat"
    assert after["x"].membership.epoch > before.epoch
    assert after["idle"].membership.tier is None
    assert after["x"].own == expected.own
    assert replace(after["x"].foreign, age_s=0.0) == replace(expected.foreign, age_s=0.0)
    await until(lambda: _is(lambda: one.mode is Mode.SHARED and two.mode is Mode.SHARED))
    async with asyncio.timeout(PATIENCE_S):
        async for event in events:
            if isinstance(event, StoreEvent) and event.load.membership == after["x"].membership:
                break
    epoch = after["x"].membership.epoch
    assert isinstance(await two.reserve("6", [asking("x", epoch, tightest_resident_ms=50.0)]), Denied)
    for store, leases in ((one, "235"), (two, "4")):
        for lease in leases:
            await store.release(lease)
    await totals_are_sums(one)
    assert await decodes(one) == (0, 0)
    assert isinstance(await two.reserve("6", [asking("x", epoch, tightest_resident_ms=50.0)]), Granted)


@on(STEADY)
async def test_who_meets_an_emptied_store_says_that_it_heals(fleet: ServedCluster, asking: Asking) -> None:
    one = await fleet.replica("a")
    two = RedisStore(fleet.connection(), fleet.fleet, "b", STEADY)  # does not run: it is heard of no more
    epoch = (await one.add_backend("x", None)).epoch
    await two.reserve("1", [asking("x", epoch)])
    await until(lambda: _is(lambda: one.replicas == 2))
    assert one.mode is Mode.SHARED
    await forget_all(fleet)
    await until(lambda: _is(lambda: one.mode is Mode.HEALING))
    await two.beat()
    await until(lambda: _is(lambda: one.mode is Mode.SHARED))
    assert await decodes(one) == (0, 1)
    await two.close()


async def last_heard(fleet: ServedCluster, key: str, leases_ago: float, *names: str) -> None:
    """As if these had been heard last so many lease times ago: silence without waiting for it."""
    before_ms = round((time.time() - leases_ago * fleet.options.lease_s) * 1000.0)
    for name in names:
        await fleet.connection().run("ZADD", key, "XX", before_ms, name)


@on(STEADY)
async def test_a_dead_replicas_load_counts_on_and_then_ends(fleet: ServedCluster, asking: Asking) -> None:
    one = await fleet.replica("a")
    dead = RedisStore(fleet.connection(), fleet.fleet, "dead", fleet.options)
    keys = Keys.of(fleet.fleet)
    epoch = (await one.add_backend("x", None)).epoch
    await dead.reserve("1", [asking("x", epoch, cost=TIGHT)])
    await dead.publish((), (Held("m", "chat", 0.5, 1, 10),))
    await dead.announce(["x"])
    await until(lambda: _knows(one, "x", 1))
    assert one.replicas == 2
    events = one.watch()
    full = Limits(1, 10**9, 10**9)

    await last_heard(fleet, keys.replicas, 0.9, "dead")
    await one.beat()
    assert not (await one.picture()).orphans
    await last_heard(fleet, keys.replicas, 1.5, "dead")
    await one.beat()
    # An orphan: its load counts on, whatever else is forgotten of it.
    assert (await one.picture()).orphans == {"dead"}
    assert isinstance(await one.reserve("2", [asking("x", epoch, limits=full)]), Denied)
    await one.beat()
    assert (await one.picture()).orphans == {"dead"}
    await last_heard(fleet, keys.orphans, 2.5, "dead")
    await one.beat()
    assert await decodes(one) == (0, 0)
    assert isinstance(
        await one.reserve("3", [asking("x", epoch, limits=full, tightest_resident_ms=50.0)]), Granted
    )
    await totals_are_sums(one)
    assert one.replicas == 1
    told_empty = told_nobody = False
    async with asyncio.timeout(PATIENCE_S):
        async for event in events:
            told_nobody |= isinstance(event, HeldEvent) and event == HeldEvent("dead", ())
            told_empty |= isinstance(event, StoreEvent) and event.load.foreign.idle
            if told_empty and told_nobody:
                break
    assert await fleet.connection().run("EXISTS", keys.leases("dead"), keys.ended("dead")) == 0


@on(STEADY)
async def test_the_engines_own_count_ends_an_orphans_load(fleet: ServedCluster, asking: Asking) -> None:
    one = await fleet.replica("a")
    dead, dead_too = (RedisStore(fleet.connection(), fleet.fleet, name, fleet.options) for name in ("dead", "too"))
    epoch = (await one.add_backend("x", None)).epoch
    for lease in range(3):
        await dead.reserve(f"{lease}", [asking("x", epoch)])
    await dead_too.reserve("4", [asking("x", epoch)])
    await one.reserve("live", [asking("x", epoch)])
    await one.note_engine("x", 0)  # nobody is dead: an engine that has not met them yet proves nothing
    assert await decodes(one) == (1, 4)
    await last_heard(fleet, Keys.of(fleet.fleet).replicas, 1.5, "dead", "too")
    await one.beat()
    await until(lambda: _is(lambda: one._mirror.orphans == {"dead", "too"}))
    await one.note_engine("x", 9)
    assert await decodes(one) == (1, 4)
    await one.note_engine("x", 2)
    assert await decodes(one) == (1, 2)
    await totals_are_sums(one)
    await one.note_engine("x", 0)
    assert await decodes(one) == (1, 0)
    await one.release("live")
    assert (await one.view())["x"].foreign.idle


@on(STEADY)
async def test_a_replica_that_was_given_up_comes_back_whole(fleet: ServedCluster, asking: Asking) -> None:
    one = await fleet.replica("a")
    back = RedisStore(fleet.connection(), fleet.fleet, "back", fleet.options)
    epoch = (await one.add_backend("x", "chat")).epoch
    await one.add_backend("gone", "chat")
    gone = (await one.view())["gone"].membership.epoch
    for lease in ("1", "2"):
        await back.reserve(lease, [asking("x", epoch)])
    await back.reserve("on gone", [asking("gone", gone)])
    await last_heard(fleet, Keys.of(fleet.fleet).replicas, 2.5, "back")
    await one.beat()
    assert await decodes(one) == (0, 0)
    await one.remove_backend("gone")
    answer = await back.reserve("3", [asking("x", epoch)])
    assert isinstance(answer, Granted)
    assert await decodes(back) == (3, 0)
    assert set(await back.view()) == {"x"}  # what others removed meanwhile stays removed
    await back.release("1")
    await back.release("on gone")
    assert await back.publish([Publication("x", LoadVector(2, 80, 3, {"chat": 2}), back.sequence_of("x") + 1)])
    await back.release("2")
    await back.release("3")
    assert await decodes(back) == (0, 0)
    await totals_are_sums(one)
    await back.close()


@KINDS
async def test_writes_that_a_failover_lost_are_made_good(kind: Kind, asking: Asking) -> None:
    """The server is put back to an earlier moment, as a replica that took over without the last writes."""
    fleet = ServedCluster(SERVERS.url(kind), SERVERS.fleet(), STEADY)
    try:
        one, two = await fleet.replica("a"), await fleet.replica("b")
        epoch = (await one.add_backend("x", "chat")).epoch
        await one.reserve("old", [asking("x", epoch)])
        await two.reserve("theirs", [asking("x", epoch)])
        admin = fleet.connection()
        pattern = Keys.of(fleet.fleet).prefix.replace("{", "[{]").replace("}", "[}]") + "*"
        found = await admin.run("KEYS", pattern)
        assert isinstance(found, list)
        saved = [(key, await admin.run("DUMP", key)) for key in found if isinstance(key, bytes)]

        await one.release("old")
        for number in range(3):
            await one.reserve(f"{number}", [asking("x", epoch)])
        claimed = await two.claim("x", "code", epoch)
        await one.add_backend("new", "chat")
        await until(lambda: _is(lambda: one._mirror.memberships["x"] == claimed.membership))
        words = [word for pair in saved for word in pair]
        script = "for i = 1, #ARGV, 2 do redis.call('RESTORE', ARGV[i], 0, ARGV[i + 1], 'REPLACE') end"
        await admin.run("EVAL", script, 0, *(word for word in words if isinstance(word, bytes)))
        await admin.run("CLIENT", "KILL", "TYPE", "pubsub")

        await until(lambda: _has(one, "x", (3, 1)))

        async def moved_again() -> bool:
            stands = (await one.view())["x"].membership
            return stands.tier == "code" and stands.epoch > claimed.membership.epoch

        await until(moved_again)
        assert (await two.view())["new"].membership.tier == "chat"
        for number in range(3):
            await one.release(f"{number}")
        await two.release("theirs")
        assert await decodes(one) == (0, 0)
        await totals_are_sums(one)
    finally:
        await fleet.close()


@KINDS
async def test_every_trouble_is_one_error_and_the_upkeep_goes_on(
    kind: Kind, tmp_path: Path, asking: Asking
) -> None:
    async with DataServer(kind, tmp_path / "server", Options()) as server:
        fleet = ServedCluster(server.url, "outage", StoreOptions(lease_s=30.0, timeout_s=0.3))
        try:
            one, two = await fleet.replica("a"), await fleet.replica("b")
            epoch = (await one.add_backend("x", "chat")).epoch
            await one.reserve("1", [asking("x", epoch)])

            server.pause()
            with pytest.raises(StoreUnavailable):
                await one.reserve("2", [asking("x", epoch)])
            assert one.mode is Mode.ALONE
            server.resume()
            # The answer was lost, not the reservation: asked again, it is the same.
            await until(lambda: _granted(one, "2", asking, epoch))
            await until(lambda: _has(one, "x", (2, 0)))

            server.ask("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(StoreUnavailable):
                await one.release("1")
            server.ask("REPLICAOF", "NO", "ONE")
            await until(lambda: _released(one, "1"))

            server.ask("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(StoreUnavailable, match="OutOfMemory"):
                await one.reserve("3", [asking("x", epoch)])
            server.ask("CONFIG", "SET", "maxmemory", "0")
            await until(lambda: _granted(one, "3", asking, epoch))

            server.kill()
            for call in (one.reserve("4", [asking("x", epoch)]), one.publish(()), one.view(), one.beat()):
                with pytest.raises(StoreUnavailable):
                    await call
            await server.start()
            # Nothing was kept on disk: both tell it all again, without being asked for anything.
            events = two.watch()
            await until(lambda: _has(one, "x", (2, 0)))
            async with asyncio.timeout(PATIENCE_S):
                async for event in events:
                    if isinstance(event, StoreEvent) and event.load.foreign.decodes == 2:
                        break
            for lease in ("2", "3", "4"):
                await one.release(lease)
            assert await decodes(one) == (0, 0)
        finally:
            await fleet.close()


@on(STEADY)
async def test_silence_of_everybody_makes_nobody_dead(fleet: ServedCluster) -> None:
    """The server stood still: all replicas were silent then, because nobody could be heard."""
    one, two = (RedisStore(fleet.connection(), fleet.fleet, name, fleet.options) for name in "ab")
    for store in (one, two, one):
        await store.beat()
    keys = Keys.of(fleet.fleet)
    before_ms = round((time.time() - 4.0 * fleet.options.lease_s) * 1000.0)
    await last_heard(fleet, keys.replicas, 4.0, "a", "b")
    await fleet.connection().run("HSET", keys.meta, "beaten", before_ms)  # of anybody
    await one.beat()
    picture = await one.picture()
    assert set(picture.silent_s) == {"a", "b"}
    assert not picture.orphans
    await last_heard(fleet, keys.replicas, 4.0, "b")
    await one.beat()
    assert set((await one.picture()).silent_s) == {"a"}
    await two.beat()
    assert set((await one.picture()).silent_s) == {"a", "b"}
    for store in (one, two):
        await store.close()


@on(STEADY)
async def test_a_release_that_overtakes_a_joining_is_not_undone(fleet: ServedCluster, asking: Asking) -> None:
    store = RedisStore(fleet.connection(), fleet.fleet, "a", fleet.options)
    epoch = (await store.add_backend("x", "chat")).epoch
    for lease in ("1", "2"):
        await store.reserve(lease, [asking("x", epoch)])
    account = store._own.account(store._era, store._mirror.memberships)
    await store.release("1")
    account_now = store._own.account
    store._own.account = lambda *_: account  # type: ignore[method-assign]  # on its way since before the release
    await store._join(store._join_number)
    assert await decodes(store) == (1, 0)
    await totals_are_sums(store)
    # What was measured before is late: the release may be missing in it.
    before = store.sequence_of("x")
    store._own.account = account_now  # type: ignore[method-assign]
    await store._join(store._join_number)
    assert not await store.publish([Publication("x", LoadVector(2, 200, 100), before + 1)])
    store._own.account = lambda *_: account  # type: ignore[method-assign]
    # The same account once more, later than a reservation that came after it: it is not taken.
    assert isinstance(await store.reserve("3", [asking("x", epoch)]), Granted)
    store._join_number -= 1
    await store._join(store._join_number)
    assert await decodes(store) == (2, 0)
    await store.close()


RACER = """
import asyncio, sys
from scheduling.load import Cost, Limits, ReserveCandidate
from state.contract import Granted
from state.redis.address import parse_url
from state.redis.connect import ConnectOptions, connect
from state.redis.store import RedisStore, StoreOptions

async def main(url, fleet, name, lease_s, attempts, limit):
    connection = connect(parse_url(url), ConnectOptions())
    store = RedisStore(connection, fleet, name, StoreOptions(lease_s=float(lease_s), timeout_s=10.0))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(store.run())
        epochs = {backend: load.membership.epoch for backend, load in (await store.view()).items()}
        candidates = [
            ReserveCandidate(backend, Cost(1, 10, 5, "chat", 50.0), Limits(int(limit), 10**9, 10**9), 0.0, epoch)
            for backend, epoch in sorted(epochs.items())
        ]
        granted = 0
        for base in range(0, int(attempts), 25):
            answers = await asyncio.gather(*(store.reserve(f"{base + i}", candidates) for i in range(25)))
            granted += sum(isinstance(answer, Granted) for answer in answers)
        print(granted, flush=True)
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


async def _race(fleet: ServedCluster, name: str, attempts: int, limit: int) -> asyncio.subprocess.Process:
    """Another process that reserves `attempts` times and then stays and keeps what it got."""
    words = (fleet.url, fleet.fleet, name, str(fleet.options.lease_s), str(attempts), str(limit))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", RACER, *words, stdout=asyncio.subprocess.PIPE
    )


async def _granted_by(racer: asyncio.subprocess.Process) -> int:
    assert racer.stdout is not None
    async with asyncio.timeout(60.0):
        return int(await racer.stdout.readline())


async def _stop(*racers: asyncio.subprocess.Process) -> None:
    for racer in racers:
        if racer.returncode is None:
            racer.kill()
        await racer.wait()


@on(STEADY)
async def test_racing_processes_never_pass_the_limit(fleet: ServedCluster) -> None:
    store = await fleet.replica("watcher")
    for backend in "xyz":
        await store.add_backend(backend, "chat")
    racers = [await _race(fleet, f"racer{i}", 300, 150) for i in range(3)]
    try:
        granted = [await _granted_by(racer) for racer in racers]
        assert sum(granted) == 3 * 150
        for backend in "xyz":
            assert await decodes(store, backend) == (0, 150)
        await totals_are_sums(store)
    finally:
        await _stop(*racers)


@pytest.mark.parametrize("fleet", [(Kind.VALKEY, StoreOptions(lease_s=1.0, timeout_s=1.0))], indirect=True)
async def test_a_stopped_process_is_given_up_and_comes_back_whole(fleet: ServedCluster) -> None:
    store = await fleet.replica("watcher")
    await store.add_backend("x", "chat")
    racer = await _race(fleet, "sleeper", 50, 40)
    try:
        assert await _granted_by(racer) == 40
        os.kill(racer.pid, signal.SIGSTOP)
        await until(lambda: _has(store, "x", (0, 0)))
        os.kill(racer.pid, signal.SIGCONT)
        await until(lambda: _has(store, "x", (0, 40)))
        await totals_are_sums(store)
        await _stop(racer)
        await until(lambda: _has(store, "x", (0, 0)))
    finally:
        await _stop(racer)


async def _has(store: RedisStore, backend: str, expected: tuple[int, int]) -> bool:
    return await decodes(store, backend) == expected


async def _knows(store: RedisStore, backend: str, foreign: int) -> bool:
    return store._mirror.foreign(backend).decodes == foreign


async def _is(holds: Callable[[], bool]) -> bool:
    return holds()


async def _granted(store: RedisStore, lease: str, asking: Asking, epoch: int) -> bool:
    return isinstance(await store.reserve(lease, [asking("x", epoch)]), Granted)


async def _released(store: RedisStore, lease: str) -> bool:
    await store.release(lease)
    return True
