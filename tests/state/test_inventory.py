"""An inventory of the store: clean after anything the store does itself, and every kind of damage named.

The damage is planted in a real server, behind the store's back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from scheduling.load import Cost, LoadVector
from state.contract import Held, Publication
from state.inventory import Damage, Inventory, contradictions
from state.redis.address import parse_url
from state.redis.connect import ConnectOptions, connect
from state.redis.directory import Directory
from state.redis.inventory import InventoryReader
from state.redis.keys import Keys
from state.redis.rights import acl_rule
from state.redis.store import RedisStore, StoreOptions
from tests.servers import DataServer, Kind, Options

from .conftest import Asking, ServedCluster, served

LEASE_S = 60.0
QUICK = Cost(1, 100, 50, "quick", 20.0)
LOOSE = Cost(2, 300, 80, "batch", float("inf"))


@dataclass(frozen=True, slots=True)
class Scene:
    """Two replicas with leases on two backends: `a` has two on x, `b` one on x and none on y."""

    cluster: ServedCluster
    keys: Keys
    a: RedisStore
    b: RedisStore
    reader: InventoryReader

    async def plant(self, script: str, *arguments: str) -> None:
        """Change the fleet's keys behind the store's back. `load`, `meta` and so on are keys in the script."""
        names = ("load", "replicas", "orphans", "held", "meta")
        heads = [f"local {name} = ARGV[{place}]" for place, name in enumerate(names, 1)]
        heads.append(
            "local function edit(field, change) local v = {cmsgpack.unpack(redis.call('HGET', load, field))}"
            " change(v) redis.call('HSET', load, field, cmsgpack.pack(unpack(v))) end"
        )
        keys = [getattr(self.keys, name) for name in names]
        connection = self.cluster.connection()
        await connection.run("EVAL", "\n".join([*heads, script]), 0, *keys, *arguments)

    async def found(self) -> set[tuple[Damage, str | None, str | None]]:
        seen = await self.reader.read()
        return {(one.damage, one.backend, one.replica) for one in contradictions(seen, LEASE_S)}


@pytest.fixture(params=[Kind.REDIS, Kind.VALKEY], ids=lambda kind: kind.value)
async def scene(request: pytest.FixtureRequest, asking: Asking) -> AsyncIterator[Scene]:
    cluster = served(request.param, StoreOptions(lease_s=LEASE_S, timeout_s=5.0))()
    a, b = await cluster.replica("a"), await cluster.replica("b")
    x = await a.add_backend("x", "quick")
    await a.add_backend("y", None)
    for store, lease, cost in ((a, "a1", QUICK), (a, "a2", LOOSE), (b, "b1", replace(QUICK, tpot_ms=50.0))):
        await store.reserve(lease, [asking("x", x.epoch, cost=cost)])
    carried = LoadVector(3, 420, 60, {"quick": 1, "batch": 2})
    held = [Held("m", "quick", 1.0, 1, 100)]
    assert await a.publish([Publication("x", carried, a.sequence_of("x") + 1)], held) == {"x"}
    connection = cluster.connection()
    earlier, now = None, await connection.run("DEBUG", "DIGEST")
    while now != earlier:  # the replicas still tell each other what they did
        await asyncio.sleep(0.04)
        earlier, now = now, await connection.run("DEBUG", "DIGEST")
    reader = InventoryReader(connection, cluster.fleet)
    yield Scene(cluster, Keys.of(cluster.fleet), a, b, reader)
    await cluster.close()


async def test_what_the_store_did_itself_is_without_contradiction(scene: Scene, asking: Asking) -> None:
    assert not await scene.found()
    seen = await scene.reader.read()
    assert set(seen.standings) == {"x", "y"}
    assert (seen.standings["x"].total.decodes, seen.standings["x"].total.leases) == (4, 3)
    assert seen.standings["x"].tightest_ms == 20.0
    assert {place: part.load.leases for place, part in seen.parts.items()} == {("a", "x"): 2, ("b", "x"): 1}
    assert {lease: stored.decodes for lease, stored in seen.leases.items()} == {
        ("a", "a1"): 1,
        ("a", "a2"): 2,
        ("b", "b1"): 1,
    }
    assert (set(seen.live), seen.orphans, seen.held, seen.strays) == ({"a", "b"}, {}, ("a",), ())

    await scene.a.release("a1")
    await scene.a.claim("y", "batch", seen.standings["y"].epoch)
    assert not await scene.found()
    await scene.b.remove_backend("x")  # a2 and b1 stand there still
    assert not await scene.found()
    again = await scene.b.add_backend("x", "quick")
    await scene.b.reserve("b2", [asking("x", again.epoch)])
    assert not await scene.found()
    await scene.a.close()
    assert not await scene.found()
    assert set((await scene.reader.read()).live) == {"b"}


async def test_looking_writes_nothing(scene: Scene) -> None:
    connection = scene.cluster.connection()
    before = await connection.run("DEBUG", "DIGEST")
    await scene.reader.read()
    assert await connection.run("DEBUG", "DIGEST") == before


_STRAY_PART = "cmsgpack.pack(2, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, {}, {}, '')"
_STRAY_LEASE = "cmsgpack.pack('nowhere', 1, 1, 1, 1, 1, 'quick', 20)"
_DELETE_ALL = "for _, key in ipairs(redis.call('KEYS', ARGV[6] .. '*')) do redis.call('DEL', key) end"
_PLANTED: dict[str, tuple[str, set[tuple[Damage, str | None, str | None]]]] = {
    "a total that is too high": (
        "edit('s|x', function(v) v[5] = v[5] + 3 end)",
        {(Damage.TOTALS, "x", None)},
    ),
    "residents that nobody has": (
        "edit('s|x', function(v) v[9]['quick'] = 9 end)",
        {(Damage.TOTALS, "x", None)},
    ),
    "a total below zero": (
        "edit('s|y', function(v) v[6] = -5 end)",
        {(Damage.TOTALS, "y", None), (Damage.NEGATIVE, "y", None)},
    ),
    "a part below zero": (
        "edit('r|b|x', function(v) v[4] = -2 end) edit('s|x', function(v) v[5] = v[5] - 3 end)",
        {(Damage.NEGATIVE, "x", "b")},
    ),
    "a lease too many": (
        "edit('r|a|x', function(v) v[8] = v[8] + 1 end) edit('s|x', function(v) v[8] = v[8] + 1 end)",
        {(Damage.LEASE_COUNT, "x", "a")},
    ),
    "load that no lease explains": (
        f"redis.call('HSET', load, 'r|b|y', {_STRAY_PART}) edit('s|y', function(v) v[5] = 2 end)",
        {(Damage.LOAD_WITHOUT_LEASE, "y", "b")},
    ),
    "a pace that no lease has": (
        "edit('p|x', function(v) v[1][30] = 1 end)",
        {(Damage.PACES, "x", None)},
    ),
    "a tightest pace that nobody has": (
        "edit('s|x', function(v) v[4] = 5 end)",
        {(Damage.TIGHTEST, "x", None)},
    ),
    "load on a backend that is not there": (
        f"redis.call('HSET', load, 'r|a|gone', {_STRAY_PART})",
        {(Damage.UNKNOWN_BACKEND, "gone", "a")},
    ),
    "a replica that nobody would bury": (
        "redis.call('ZREM', replicas, 'b')",
        {(Damage.UNKNOWN_REPLICA, None, "b")},
    ),
    "leases of a replica that was never there": (
        f"redis.call('HSET', ARGV[6] .. 'leases:ghost', 'g1', {_STRAY_LEASE})",
        {(Damage.UNKNOWN_REPLICA, None, "ghost")},
    ),
    "a lease that ended and stands": (
        "redis.call('ZADD', ARGV[6] .. 'ended:a', 1, 'a1')",
        {(Damage.ENDED_LEASE, "x", "a")},
    ),
    "epochs from the future": (
        "redis.call('HSET', meta, 'epoch', '5')",
        {(Damage.EPOCH, "x", None), (Damage.EPOCH, "y", None)},
    ),
    "a state without a beginning": (
        "redis.call('HDEL', meta, 'born')",
        {(Damage.EPOCH, None, None)},
    ),
    "a field that is not ours": (
        "redis.call('HSET', load, 'z|what', 'ever')",
        {(Damage.UNREADABLE, None, None)},
    ),
    "a part that is garbage": (
        "redis.call('HSET', load, 'r|b|y', 'ever')",
        {(Damage.UNREADABLE, None, None)},
    ),
    "keys of another version": (
        "redis.call('SET', (string.gsub(load, 'tg%d+', 'tg0')), '1')",
        {(Damage.STRAY_KEY, None, None)},
    ),
    "a key that is nobody's": (
        "redis.call('SET', ARGV[6] .. 'what', '1')",
        {(Damage.STRAY_KEY, None, None)},
    ),
    "a silent replica that counts as alive": (
        "redis.call('ZADD', replicas, 1, 'b')",
        {(Damage.OVERDUE, None, "b")},
    ),
    "a dead replica that was never taken out": (
        "redis.call('ZREM', replicas, 'b') redis.call('ZADD', orphans, 1, 'b')",
        {(Damage.OVERDUE, None, "b")},
    ),
}


@pytest.mark.parametrize("planted", _PLANTED)
async def test_planted_damage_is_named(scene: Scene, planted: str) -> None:
    script, expected = _PLANTED[planted]
    await scene.plant(script, scene.keys.prefix)
    assert await scene.found() == expected


@pytest.mark.parametrize("planted", ["a total that is too high", "a lease too many", "a part that is garbage"])
async def test_deleting_the_keys_has_the_replicas_tell_all_anew(scene: Scene, planted: str) -> None:
    """The remedy that an audit names."""
    healthy = await scene.reader.read()
    script, expected = _PLANTED[planted]
    await scene.plant(script, scene.keys.prefix)
    assert await scene.found() == expected
    await scene.plant(_DELETE_ALL, scene.keys.prefix)
    for store in (scene.a, scene.b):
        await store.beat()
    seen = await scene.reader.read()
    assert not list(contradictions(seen, LEASE_S))
    assert {name: (one.backend, one.decodes) for name, one in seen.leases.items()} == {
        name: (one.backend, one.decodes) for name, one in healthy.leases.items()
    }
    assert seen.standings["x"].total == healthy.standings["x"].total
    assert seen.standings["x"].epoch > healthy.standings["x"].epoch


def test_every_kind_of_damage_is_planted() -> None:
    assert {one[0] for _, expected in _PLANTED.values() for one in expected} == set(Damage)


async def test_a_dead_replica_whose_load_the_engine_ended_is_no_contradiction(scene: Scene) -> None:
    await scene.plant(
        "redis.call('ZREM', replicas, 'b') redis.call('ZADD', orphans, redis.call('TIME')[1] * 1000, 'b')"
    )
    await scene.a.resync()
    await scene.a.note_engine("x", 0)
    seen = await scene.reader.read()
    assert seen.parts["b", "x"].load.idle
    assert ("b", "b1") in seen.leases
    assert not list(contradictions(seen, LEASE_S))


async def test_where_replicas_can_be_asked_is_told_as_long_as_they_live(scene: Scene) -> None:
    connection = scene.cluster.connection()
    await Directory(connection, scene.cluster.fleet, "a", 1.0).tell("http://10.0.0.1:8080")
    seen = await scene.reader.read()
    assert (seen.addresses, seen.strays) == ({"a": "http://10.0.0.1:8080"}, ())
    left_ms = await connection.run("PTTL", f"{scene.keys.prefix}at:a")
    assert isinstance(left_ms, int)
    assert 0 < left_ms <= 3000


async def test_the_rights_of_a_gateway_are_enough_but_to_look_for_strays(tmp_path: Path) -> None:
    user = f"tiergate on >secret {acl_rule('f')}"
    async with (
        DataServer(Kind.REDIS, tmp_path, Options(users=(user,))) as server,
        connect(parse_url(server.url_as("tiergate", "secret")), ConnectOptions(timeout_s=5.0)) as connection,
    ):
        store = RedisStore(connection, "f", "a", StoreOptions(timeout_s=5.0))
        epoch = (await store.add_backend("x", None)).epoch
        await store.publish([])  # it joins
        await Directory(connection, "f", "a", 1.0).tell("http://10.0.0.1:8080")
        seen = await InventoryReader(connection, "f").read()
        assert (seen.standings["x"].epoch, set(seen.live), seen.strays) == (epoch, {"a"}, None)
        assert seen.addresses == {"a": "http://10.0.0.1:8080"}
        await store.close()


def test_an_empty_store_has_no_contradictions() -> None:
    assert not list(contradictions(Inventory(taken_ms=1), LEASE_S))
