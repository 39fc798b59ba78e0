"""The fleet's policy on real servers: pushed, kept over a restart, and put back where it was lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.config import KeySettings
from gateway.policy import FleetPolicy
from gateway.shared import PolicyConflict, PolicySource
from state.contract import StoreUnavailable
from state.documents import Documents
from state.redis.address import parse_url
from state.redis.connect import connect
from state.redis.documents import RedisDocuments
from state.redis.keys import Keys
from state.redis.rights import acl_rule
from tests.gateway.policies import file_of, only_tier, replica
from tests.gateway.rig import client, engine, gateway, settings_for, until, until_told
from tests.server_groups import Watched
from tests.servers import DataServer, Kind, Options


def with_a_key(policy: FleetPolicy) -> FleetPolicy:
    """The same policy with a client's key."""
    return policy.model_copy(update={"keys": (KeySettings(sha256="0" * 64, tenant="t"),)})


async def is_version(documents: Documents, version: int) -> bool:
    """Whether this version stands; not while the store cannot tell."""
    try:
        found = await documents.read()
    except StoreUnavailable:
        return False
    return found is not None and found.version == version


@contextlib.asynccontextmanager
async def documents_of(url: str, fleet: str = "main") -> AsyncIterator[Documents]:
    """A handle over a connection of its own."""
    async with connect(parse_url(url)) as connection:
        made = RedisDocuments(connection, fleet)
        yield made
        await made.close()


@pytest.mark.parametrize("kind", list(Kind))
async def test_with_persistence_the_policy_outlives_all_that_run(kind: Kind, tmp_path: Path) -> None:
    async with DataServer(kind, tmp_path, Options(appendonly=True)) as server:
        async with documents_of(server.url) as documents, replica(documents) as one:
            changed = await one.shared.change(only_tier, "test")
        server.kill()
        await server.start()
        async with documents_of(server.url) as documents, replica(documents) as two:
            assert two.shared.document == changed
            assert two.tiers == ["only"]
            assert [found.version for found in await documents.history()] == [2, 1]


async def test_without_persistence_the_policy_in_force_is_put_back(tmp_path: Path) -> None:
    async with (
        DataServer(Kind.REDIS, tmp_path) as server,
        documents_of(server.url) as first,
        documents_of(server.url) as second,
        replica(first) as one,
        replica(second) as two,
    ):
        changed = await one.shared.change(only_tier, "test")
        await until(lambda: two.version == 2)
        server.kill()
        with pytest.raises(StoreUnavailable):
            await one.shared.change(with_a_key, "in vain")
        await server.start()
        # A replica that starts now has another file; what the others serve by stands.
        async with documents_of(server.url) as third, replica(third, file_of(default_tier="batch")) as late:
            await until(lambda: late.version == 2)
            assert late.shared.policy == one.shared.policy == two.shared.policy
            assert late.tiers == ["only"]
            assert await third.read() == changed
        # And changes are pushed as before.
        await two.shared.change(with_a_key, "again")
        await until(lambda: one.version == 3)


async def test_with_nobody_left_the_file_seeds_an_emptied_store(tmp_path: Path) -> None:
    async with DataServer(Kind.REDIS, tmp_path) as server:
        async with documents_of(server.url) as documents, replica(documents) as one:
            await one.shared.change(only_tier, "test")
        await server.restart()
        async with documents_of(server.url) as documents, replica(documents) as two:
            assert (two.version, two.tiers[0]) == (1, "fast")


async def test_a_replica_that_starts_without_its_store_finds_the_policy_later(tmp_path: Path) -> None:
    async with DataServer(Kind.REDIS, tmp_path, Options(appendonly=True)) as server:
        async with documents_of(server.url) as documents, replica(documents) as one:
            await one.shared.change(only_tier, "test")
        await server.stop()
        async with documents_of(server.url) as documents, replica(documents) as two:
            assert (two.version, two.tiers[0]) == (0, "fast")
            await server.start()
            await until(lambda: two.version == 2)
            assert two.tiers == ["only"]


async def test_fleets_on_one_server_do_not_meet(tmp_path: Path) -> None:
    async with (
        DataServer(Kind.REDIS, tmp_path) as server,
        documents_of(server.url, "one") as first,
        documents_of(server.url, "two") as second,
        replica(first) as one,
        replica(second, file_of(default_tier="batch")) as two,
    ):
        await one.shared.change(only_tier, "test")
        await first.contribute("a", "x")
        assert (two.version, two.shared.policy.default_tier) == (1, "batch")
        assert await second.contributions() == {}


async def test_the_rights_that_are_documented_are_enough(tmp_path: Path) -> None:
    users = [f"tiergate on >secret {acl_rule('main')}"]
    async with DataServer(Kind.REDIS, tmp_path, Options(users=users)) as server:
        url = server.url_as("tiergate", "secret")
        async with (
            documents_of(url) as first,
            documents_of(url) as second,
            replica(first) as one,
            replica(second) as two,
        ):
            await one.shared.change(only_tier, "test")
            await until(lambda: two.version == 2)
            await first.contribute("a", "x")
            assert set(await second.contributions()) == {"a"}
            assert len(await second.history()) == 2


@pytest.mark.parametrize(
    "payload",
    [
        '{"schema": 9, "author": "a", "reason": "r", "body": "{}", "by": "s"}',
        '{"parts": []}',
        "\x00 not JSON",
    ],
)
async def test_what_a_newer_version_wrote_harms_nobody(payload: str, tmp_path: Path) -> None:
    async with (
        DataServer(Kind.REDIS, tmp_path) as server,
        documents_of(server.url) as documents,
        replica(documents) as one,
    ):
        key = Keys.of("main").other("documents")
        await asyncio.to_thread(server.ask, "HSET", key, "5", f"5\n99\nnew\n{payload}", "now", "5")
        await until(lambda: one.numbers.policy_refused_version == 5)
        with pytest.raises(PolicyConflict):
            await one.shared.change(only_tier, "test")
        assert [found.version for found in await documents.history()] == [5, 1]
        # What is no document at all is no answer, and goes by as an outage does.
        await asyncio.to_thread(server.ask, "HSET", key, "5", "five", "now", "5")
        with pytest.raises(StoreUnavailable):
            await documents.read()
        await asyncio.to_thread(server.ask, "DEL", key)
        await until_told(lambda: is_version(documents, 1))
        assert one.version == 1


async def test_a_full_server_refuses_a_change_and_keeps_the_policy(tmp_path: Path) -> None:
    async with (
        DataServer(Kind.REDIS, tmp_path) as server,
        documents_of(server.url) as documents,
        replica(documents) as one,
    ):
        await asyncio.to_thread(server.ask, "CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(StoreUnavailable):
            await one.shared.change(only_tier, "test")
        assert (one.version, one.applied) == (1, [])
        await asyncio.to_thread(server.ask, "CONFIG", "SET", "maxmemory", "0")
        await one.shared.change(only_tier, "test")
        assert one.version == 2


async def test_a_change_on_one_gateway_is_served_by_the_other(tmp_path: Path) -> None:
    async with (
        DataServer(Kind.VALKEY, tmp_path) as server,
        engine() as one,
        documents_of(server.url) as first,
        documents_of(server.url) as second,
        gateway(settings_for(one), policy=PolicySource(first, replica="one")) as made,
        gateway(settings_for(one), policy=PolicySource(second, replica="two")) as other,
        client(made) as ask,
        client(other) as ask2,
    ):
        body: dict[str, object] = {
            "tiers": [{"name": "only", "ttft_ms": 3000, "tpot_ms": 80}],
            "default_tier": "only",
        }
        headers = {"authorization": "Bearer secret"}
        async with ask.session.put(f"{ask.base}/admin/v1/tiers", json=body, headers=headers) as answer:
            assert answer.status == 200
        await until(lambda: other.live.now.version == 2)
        async with ask2.chat() as answer:
            assert answer.headers["x-tiergate-tier"] == "only"
        await server.stop()
        body["tiers"] = [{"name": "only", "tpot_ms": 90}]
        async with ask.session.put(f"{ask.base}/admin/v1/tiers", json=body, headers=headers) as answer:
            assert answer.status == 503
        async with ask2.chat() as answer:
            assert answer.headers["x-tiergate-tier"] == "only"


async def test_a_change_that_a_failover_lost_is_put_back(tmp_path: Path) -> None:
    async with (
        Watched(Kind.REDIS, tmp_path) as watched,
        documents_of(watched.url) as first,
        documents_of(watched.url) as second,
        replica(first) as one,
        replica(second) as two,
    ):
        await asyncio.to_thread(watched.primary.ask, "WAIT", 1, 10_000)
        await watched.cut_replication()
        changed = await one.shared.change(only_tier, "lost with the primary")
        await until(lambda: two.version == 2)
        watched.primary.kill()
        await watched.promoted()

        async def back() -> bool:
            try:
                return await first.read() == changed
            except StoreUnavailable:
                return False

        await until_told(back)
        assert one.tiers == two.tiers == ["only"]
        made = await two.shared.change(with_a_key, "after it")
        await until(lambda: one.version == made.version == 3)
