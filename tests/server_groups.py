"""Several real servers that belong together: a Cluster, and a primary with replicas that Sentinels watch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers import HOST, Certificates, DataServer, Kind, Options, ServerFailed

SLOTS = 16384
SETTLE_TIMEOUT_S = 40.0
POLL_S = 0.05
SERVICE = "tiergate"
"""The name by which the Sentinels know the primary."""


async def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for something the servers do by themselves. Raises ServerFailed."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not await asyncio.to_thread(holds):
        if time.monotonic() > deadline:
            raise ServerFailed(f"not within {SETTLE_TIMEOUT_S} s: {what}")
        await asyncio.sleep(POLL_S)


def facts(server: DataServer, *words: str) -> dict[str, str]:
    """The ``name:value`` lines of an answer such as that of ``INFO replication``, blocking."""
    with server.admin() as client:
        client.response_callbacks.clear()
        text = str(client.execute_command(*words))
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))


class Group:
    """Servers that start and end together."""

    def __init__(self) -> None:
        self.servers: list[DataServer] = []

    async def start(self) -> None:
        """Start them, and wait until they know each other. Raises ServerFailed."""
        await asyncio.gather(*(server.start() for server in self.servers))

    def kill(self) -> None:
        """SIGKILL all that runs. Idempotent."""
        for server in self.servers:
            server.kill()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.kill()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class DataCluster(Group):
    """A Cluster of `size` primaries that share the slots evenly, each with `copies` replicas."""

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        *,
        size: int = 3,
        copies: int = 0,
        users: Sequence[str] = (),
        tls: Certificates | None = None,
    ) -> None:
        """`users` and `tls` as in `Options`; the default user has all rights and no password."""
        super().__init__()
        options = Options(cluster=True, users=users, tls=tls, settings={"cluster-announce-ip": HOST})
        self._scheme = "redis" if tls is None else "rediss"
        self.servers = [DataServer(kind, folder / f"{place}", options) for place in range(size * (1 + copies))]
        self.primaries = self.servers[:size]

    @property
    def url(self) -> str:
        """How a client reaches it, all its nodes named."""
        return f"{self._scheme}+cluster://{','.join(f'{HOST}:{server.port}' for server in self.servers)}"

    def url_as(self, user: str, password: str) -> str:
        """The same as one of the users."""
        return self.url.replace("://", f"://{user}:{password}@")

    async def start(self) -> None:
        await super().start()
        await asyncio.to_thread(self._introduce)
        size = len(self.servers)

        def agreed() -> bool:
            told = [facts(server, "CLUSTER", "INFO") for server in self.servers]
            return all(each["cluster_known_nodes"] == str(size) and each["cluster_state"] == "ok" for each in told)

        await until(agreed, "the Cluster's nodes know each other")
        copies = self.servers[len(self.primaries) :]
        if copies:
            await asyncio.to_thread(self._replicate, copies)
            linked = "the Cluster's replicas follow"
            await until(lambda: all(_follows(server) for server in copies), linked)

    def _introduce(self) -> None:
        count = len(self.primaries)
        for place, server in enumerate(self.servers):
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
            if place < count:
                first, last = place * SLOTS // count, (place + 1) * SLOTS // count - 1
                server.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
        first_server = self.servers[0]
        for server in self.servers[1:]:
            bus = facts_of_setting(server, "cluster-port")
            first_server.ask("CLUSTER", "MEET", HOST, server.port, bus)

    def _replicate(self, copies: Sequence[DataServer]) -> None:
        for place, server in enumerate(copies):
            primary = self.primaries[place % len(self.primaries)]
            server.ask("CLUSTER", "REPLICATE", str(primary.ask("CLUSTER", "MYID")))

    def owner(self, key: str) -> DataServer:
        """The primary that a key belongs to by the slots given at the start (not after a failover)."""
        slot = self.servers[0].ask("CLUSTER", "KEYSLOT", key)
        assert isinstance(slot, int)
        return self.primaries[slot * len(self.primaries) // SLOTS]

    def copy_of(self, primary: DataServer) -> DataServer:
        """The first replica of a primary."""
        return self.servers[len(self.primaries) + self.primaries.index(primary)]


def facts_of_setting(server: DataServer, name: str) -> str:
    """One value of a server's configuration, blocking."""
    answer = server.ask("CONFIG", "GET", name)
    assert isinstance(answer, dict)
    return str(answer[name])


def _follows(server: DataServer) -> bool:
    return facts(server, "INFO", "replication").get("master_link_status") == "up"


class Watched(Group):
    """A primary and a replica, and Sentinels that promote the replica when most of them miss the primary."""

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        *,
        sentinels: int = 3,
        password: str | None = None,
        tls: Certificates | None = None,
    ) -> None:
        super().__init__()
        data = Options(password=password, tls=tls)
        self.primary = DataServer(kind, folder / "primary", data)
        self.replica = DataServer(kind, folder / "replica", replace(data, replica_of=self.primary.port))
        watch = {
            f"sentinel monitor {SERVICE}": f"{HOST} {self.primary.port} {sentinels // 2 + 1}",
            f"sentinel down-after-milliseconds {SERVICE}": "500",
            f"sentinel failover-timeout {SERVICE}": "3000",
        }
        if password is not None:
            watch[f"sentinel auth-pass {SERVICE}"] = password
        options = Options(sentinel=True, tls=tls, settings=watch)
        self.sentinels = [DataServer(kind, folder / f"sentinel-{place}", options) for place in range(sentinels)]
        self.servers = [self.primary, self.replica, *self.sentinels]
        self._scheme = "redis" if tls is None else "rediss"
        self._password = password

    @property
    def url(self) -> str:
        """How a client reaches it."""
        secret = "" if self._password is None else f":{self._password}@"
        hosts = ",".join(f"{HOST}:{server.port}" for server in self.sentinels)
        return f"{self._scheme}+sentinel://{secret}{hosts}/{SERVICE}/0"

    async def start(self) -> None:
        await asyncio.gather(self.primary.start(), self.replica.start())
        await until(lambda: _follows(self.replica), "the replica follows")
        await asyncio.gather(*(sentinel.start() for sentinel in self.sentinels))
        await until(lambda: all(self._knows(sentinel) for sentinel in self.sentinels), "the Sentinels know all")

    def _knows(self, sentinel: DataServer) -> bool:
        told = facts(sentinel, "INFO", "sentinel").get("master0", "")
        return f"slaves=1,sentinels={len(self.sentinels)}" in told and "status=ok" in told

    async def cut_replication(self) -> None:
        """From now on the replica misses what is written; it can still be promoted."""
        await asyncio.to_thread(self._cut)
        await until(lambda: not _follows(self.replica), "the replica lost its primary")

    def _cut(self) -> None:
        self.replica.ask("CONFIG", "SET", "masterauth", "wrong")
        self.replica.ask("CLIENT", "KILL", "TYPE", "master")

    async def promoted(self) -> None:
        """Wait until the replica is the primary. Raises ServerFailed."""
        await until(lambda: facts(self.replica, "INFO", "replication")["role"] == "master", "the replica leads")
