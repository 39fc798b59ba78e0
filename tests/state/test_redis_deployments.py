"""The whole store over every way to deploy Redis: rights, TLS, sockets, Clusters, Sentinels, failovers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from scheduling.load import Limits, LoadVector
from state.contract import (
    Changed,
    Denied,
    Granted,
    Held,
    HeldEvent,
    Mode,
    Publication,
    StoreEvent,
    StoreUnavailable,
)
from state.documents import Document, Draft
from state.redis.codec import Picture
from state.redis.directory import Directory
from state.redis.documents import RedisDocuments
from state.redis.inventory import InventoryReader
from state.redis.keys import Keys
from state.redis.rights import AUDIT_COMMANDS, SENTINEL_RULE, acl_rule
from state.redis.store import RedisStore, StoreOptions
from tests.server_groups import DataCluster, Watched
from tests.servers import DataServer, Kind, Options, make_certificates
from tests.state.conftest import PATIENT, Asking, ServedCluster

FLEET = "eu"
BRISK = StoreOptions(lease_s=1.0, timeout_s=1.0)
PATIENCE_S = 30.0
AGAIN_S = 0.05
ONE_AT_MOST = Limits(1, 10**9, 10**9)


@contextlib.asynccontextmanager
async def _fleet(url: str, options: StoreOptions = BRISK) -> AsyncIterator[ServedCluster]:
    fleet = ServedCluster(url, FLEET, options)
    try:
        yield fleet
    finally:
        await fleet.close()


async def _replica(fleet: ServedCluster, name: str) -> RedisStore:
    """One that hears the others. A right that is missing shows here first."""
    async with asyncio.timeout(PATIENCE_S):
        return await fleet.replica(name)


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it holds; a store that does not answer is asked again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(StoreUnavailable):
                if await holds():
                    return
            await asyncio.sleep(AGAIN_S)


async def _tour(fleet: ServedCluster, asking: Asking) -> None:
    """Every script and every message once, a replica that dies included."""
    one, two = await _replica(fleet, "one"), await _replica(fleet, "two")
    events = two.watch()
    await one.add_backend("y", "chat")
    await one.remove_backend("y")
    claimed = await one.claim("x", "chat", (await one.add_backend("x", None)).epoch)
    assert isinstance(claimed, Changed)
    epoch = claimed.membership.epoch
    assert await one.reserve("first", [asking("x", epoch)]) == Granted("first", "x")
    assert isinstance(await two.reserve("second", [asking("x", epoch, limits=ONE_AT_MOST)]), Denied)
    measured = Publication("x", LoadVector(decodes=1), one.sequence_of("x") + 1)
    held = Held("m", "chat", 1.0, 1, 100)
    assert await one.publish([measured], [held]) == {"x"}
    await _heard_of(events, held)

    dead = RedisStore(fleet.connection(), FLEET, "dead", BRISK)  # it never beats
    assert await dead.reserve("third", [asking("x", epoch)]) == Granted("third", "x")

    async def given_up() -> bool:
        return "dead" in (await one.picture()).orphans

    async def taken_out() -> bool:
        await one.note_engine("x", 1)
        return (await one.picture()).totals["x"].load.decodes == 1

    await _until(given_up)
    await _until(taken_out)
    await _audit(fleet)
    await one.release("first")
    assert isinstance(await one.hand_back("x", epoch), Changed)
    await _documents(fleet)


async def _audit(fleet: ServedCluster) -> None:
    connection = fleet.connection()
    keeping = asyncio.get_running_loop().create_task(
        Directory(connection, FLEET, "one", BRISK.lease_s).keep(lambda: "http://one")
    )
    reader = InventoryReader(connection, FLEET)

    async def whole() -> bool:
        inventory = await reader.read()
        assert set(inventory.leases) == {("one", "first")}
        return dict(inventory.addresses) == {"one": "http://one"}

    try:
        await _until(whole)
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])


async def _heard_of(events: AsyncIterator[StoreEvent | HeldEvent], held: Held) -> None:
    """Another replica's load and what it holds arrive, in whichever order."""
    missing = {"load", "held"}
    async with asyncio.timeout(PATIENCE_S):
        async for event in events:
            if isinstance(event, HeldEvent):
                if [(one.model, one.decodes) for one in event.held] == [(held.model, held.decodes)]:
                    missing.discard("held")
            elif event.load.foreign.decodes == 1:
                missing.discard("load")
            if not missing:
                return


async def _documents(fleet: ServedCluster) -> None:
    documents = RedisDocuments(fleet.connection(), FLEET)
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        running = group.create_task(documents.run())
        watch = documents.watch()
        made = await documents.put(Draft("change", 1, "{}", "somebody", "because"), 0)
        assert isinstance(made, Document)
        async for told in watch:
            if told == made:
                break
        assert await documents.history() == (made,)
        await documents.contribute("one", "{}")
        assert set(await documents.contributions()) == {"one"}
        await documents.close()
        running.cancel()


@pytest.mark.parametrize("kind", list(Kind))
async def test_the_documented_rights_are_enough_for_all_the_store_does(
    kind: Kind, tmp_path: Path, asking: Asking
) -> None:
    users = [f"tiergate on >secret {acl_rule(FLEET)} {AUDIT_COMMANDS}"]
    async with (
        DataServer(kind, tmp_path, Options(password="admin", users=users)) as server,
        _fleet(server.url_as("tiergate", "secret")) as fleet,
    ):
        await _tour(fleet, asking)
        assert _denied(server) == []


def test_the_documentation_gives_these_rights() -> None:
    told = (Path(__file__).parents[2] / "docs" / "state.md").read_text()
    assert f" {acl_rule()}\n" in told
    assert f"`{SENTINEL_RULE}`" in told


def _denied(server: DataServer) -> list[str]:
    """What the server refused its users, by its own log."""
    with server.admin() as client:
        entries = client.acl_log()
    assert isinstance(entries, list)
    return [str(entry) for entry in entries]


async def test_over_tls(tmp_path: Path, asking: Asking) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    ours = f"tls_certificate={certificates.client_certificate}&tls_key={certificates.client_key}"
    options = Options(password="secret", tls=certificates, client_certificates=True)
    async with (
        DataServer(Kind.REDIS, tmp_path / "server", options) as server,
        _fleet(f"{server.url}?tls_ca={certificates.authority}&{ours}") as fleet,
    ):
        await _tour(fleet, asking)


async def test_over_a_socket(tmp_path: Path, asking: Asking) -> None:
    async with (
        DataServer(Kind.VALKEY, tmp_path, Options(unix_socket=True)) as server,
        _fleet(server.unix_url) as fleet,
    ):
        await _tour(fleet, asking)


async def test_in_a_cluster_with_all_of_a_fleet_on_one_node(tmp_path: Path, asking: Asking) -> None:
    users = [f"tiergate on >secret {acl_rule(FLEET)}"]
    async with (
        DataCluster(Kind.VALKEY, tmp_path, users=users) as cluster,
        _fleet(cluster.url_as("tiergate", "secret")) as fleet,
    ):
        await _tour(fleet, asking)
        owner = cluster.owner(f"{{tg1:{FLEET}}}:load")
        assert [server.ask("DBSIZE") != 0 for server in cluster.servers] == [
            server is owner for server in cluster.servers
        ]


@dataclass(frozen=True, slots=True)
class _Two:
    """Two replicas on one backend, and the epoch of its membership."""

    one: RedisStore
    two: RedisStore
    epoch: int

    async def shows(self, leases: int) -> bool:
        """Whether the store counts so many leases, each of one sequence, and both replicas trust it."""
        picture = await self.one.picture()
        if "x" not in picture.totals:
            return False  # a copy that took over may have lost all, until it is told anew
        return _count(picture) == (leases, leases) and self.one.mode is self.two.mode is Mode.SHARED


def _count(picture: Picture) -> tuple[int, int]:
    """Leases and sequences on x, where the total is the sum of the parts."""
    total = picture.totals["x"]
    parts = [part for part in picture.parts if part.part.backend == "x"]
    assert total.leases == sum(part.leases for part in parts)
    assert total.load.decodes == sum(part.part.load.decodes for part in parts)
    return total.leases, total.load.decodes


async def _two(fleet: ServedCluster) -> _Two:
    one, two = await _replica(fleet, "one"), await _replica(fleet, "two")
    return _Two(one, two, (await one.add_backend("x", "chat")).epoch)


async def test_a_promoted_replica_that_lost_the_last_writes_is_told_what_is_missing(
    tmp_path: Path, asking: Asking
) -> None:
    """A grant, a release and a claim are lost; afterwards the store knows all three."""
    async with Watched(Kind.VALKEY, tmp_path) as watched, _fleet(watched.url) as fleet:
        both = await _two(fleet)
        pool = await both.one.add_backend("y", None)
        await both.one.reserve("kept", [asking("x", both.epoch)])
        await both.two.reserve("ended", [asking("x", both.epoch)])
        await asyncio.to_thread(watched.primary.ask, "WAIT", 1, 10_000)
        await watched.cut_replication()
        await both.one.reserve("lost", [asking("x", both.epoch)])
        await both.two.release("ended")
        claimed = await both.two.claim("y", "chat", pool.epoch)
        assert isinstance(claimed, Changed)
        watched.primary.kill()
        await watched.promoted()

        async def healed() -> bool:
            member = (await both.one.view())["y"].membership
            return member.tier == "chat" and await both.shows(2)

        await _until(healed)
        # An epoch that was given out once never comes back with another meaning.
        assert (await both.two.view())["y"].membership.epoch >= claimed.membership.epoch
        await both.one.release("kept")
        await both.one.release("lost")
        assert await both.shows(0)


async def test_a_lost_membership_is_told_before_the_store_is_read(redis_server: DataServer) -> None:
    """Whoever reads first would otherwise believe the store, and nobody would know of the change any more."""
    async with _fleet(redis_server.url, PATIENT) as fleet:
        both = await _two(fleet)
        keys = Keys.of(FLEET)
        pool = await both.one.add_backend("y", None)
        with redis.Redis(port=redis_server.port) as raw:
            before = {key: raw.dump(key) for key in (keys.load, keys.meta)}
            claimed = await both.two.claim("y", "chat", pool.epoch)
            for key, value in before.items():
                raw.restore(key, 0, value, replace=True)
        assert isinstance(claimed, Changed)
        await both.two.resync()
        member = (await both.one.view())["y"].membership
        assert member.tier == "chat"
        assert member.epoch >= claimed.membership.epoch


async def test_a_clusters_failover_loses_no_lease(tmp_path: Path, asking: Asking) -> None:
    async with DataCluster(Kind.REDIS, tmp_path, copies=1) as cluster, _fleet(cluster.url) as fleet:
        both = await _two(fleet)
        await both.one.reserve("first", [asking("x", both.epoch)])
        await both.two.reserve("second", [asking("x", both.epoch)])
        cluster.owner(f"{{tg1:{FLEET}}}:load").kill()
        await _until(lambda: both.shows(2))
        epoch = (await both.one.view())["x"].membership.epoch
        assert await both.one.reserve("third", [asking("x", epoch)]) == Granted("third", "x")
        for store, lease in ((both.one, "first"), (both.two, "second"), (both.one, "third")):
            await store.release(lease)
        await _until(lambda: both.shows(0))
