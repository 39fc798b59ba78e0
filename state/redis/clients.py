"""redis-py's clients for whatever stands at an address.

Nothing is retried here: a command that failed may have been done, and only the store knows what to ask again. What
outlives a caller is the opening of a connection: where that takes longer than callers wait, none would ever be
opened otherwise. The protocol is RESP2: what our scripts answer (integers, strings, lists) both versions carry
alike, and messages come over a connection of their own, so RESP3 would bring nothing but a longer handshake, more
rights to grant, and trouble with proxies that speak RESP2 alone.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import Connection as TcpConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError
from redis.typing import EncodableT

from state.redis.address import Address, Credentials, Deployment, Tls
from state.redis.errors import ERRORS

Client: TypeAlias = Redis | RedisCluster
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}  # s, s, count: a dead peer shows in 11 s
_NAME = re.compile(r"[^!-~]+")  # what CLIENT SETNAME refuses


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """How a connection behaves.

    Attributes:
        timeout_s: to send a command and read its answer.
        connect_timeout_s: to open a connection, TLS and login included.
        max_connections: at most so many at once; who finds all taken waits, `timeout_s` at most.
        client_name: how it shows in CLIENT LIST.
    """

    timeout_s: float = 1.0
    connect_timeout_s: float = 1.0
    max_connections: int = 32
    client_name: str = "tiergate"


def make_client(address: Address, options: ConnectOptions) -> tuple[Client, Sentinel | None]:
    """The client, and the Sentinels that it asks. Nothing is opened yet."""
    common = _common(address.login, options)
    match address.deployment:
        case Deployment.SENTINEL:
            return _sentinel_client(address, options, common)
        case Deployment.CLUSTER:
            return _cluster_client(address, options, common), None
        case Deployment.SOCKET:
            common |= {"connection_class": UnixDomainSocketConnection, "path": str(address.path)}
        case Deployment.SERVER:
            kind = TcpConnection if address.tls is None else SSLConnection
            common |= {"connection_class": kind, "host": address.hosts[0].name, "port": address.hosts[0].port}
            common |= _tcp() | _tls(address.tls)
    pool = Pool(max_connections=options.max_connections, timeout=options.timeout_s, db=address.database, **common)
    return Redis.from_pool(pool), None


# redis-py's pools and clients hand keyword arguments on to its connections untyped.
_Arguments: TypeAlias = dict[str, Any]


def _common(login: Credentials, options: ConnectOptions) -> _Arguments:
    """What every connection is told."""
    arguments: _Arguments = {
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": options.timeout_s,
        "socket_connect_timeout": options.connect_timeout_s,
        "client_name": _NAME.sub("_", options.client_name),
        "driver_info": None,  # CLIENT SETINFO would be two more commands and a right to grant
    }
    return arguments | _login(login)


def _login(login: Credentials) -> _Arguments:
    if login.password_file is not None:
        return {"credential_provider": _FileLogin(login.username, login.password_file)}
    return {"username": login.username, "password": login.password}


def _tcp() -> _Arguments:
    options = {getattr(socket, name): value for name, value in KEEPALIVE.items() if hasattr(socket, name)}
    return {"socket_keepalive": True, "socket_keepalive_options": options}


def _tls(tls: Tls | None) -> _Arguments:
    if tls is None:
        return {}
    files = {"ssl_ca_certs": tls.authority, "ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
    checks = {"ssl_cert_reqs": "none" if tls.insecure else "required", "ssl_check_hostname": not tls.insecure}
    return {name: None if path is None else str(path) for name, path in files.items()} | checks


class Pool(BlockingConnectionPool):
    """Connections for whoever comes; who finds all taken waits. One that is being opened belongs to the pool."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._opening: dict[AbstractConnection, asyncio.Task[None]] = {}

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        """See that the connection is open and good. Raises `ERRORS`."""
        task = self._opening.get(connection)
        if task is None:
            if connection.is_connected:
                await super().ensure_connection(connection)
                return
            task = asyncio.get_running_loop().create_task(super().ensure_connection(connection))
            self._opening[connection] = task
            task.add_done_callback(partial(self._opened, connection))
        await asyncio.shield(task)

    def _opened(self, connection: AbstractConnection, task: asyncio.Task[None]) -> None:
        del self._opening[connection]
        read_outcome(task)

    async def end(self) -> None:
        """Give up what is being opened."""
        await end_tasks(*self._opening.values())


def read_outcome(task: asyncio.Task[Any]) -> None:
    """Callers that gave up do not ask how it ended, and asyncio complains about errors nobody asked for."""
    if not task.cancelled():
        task.exception()


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _FileLogin(CredentialProvider):
    """A password that is read from its file at every login."""

    def __init__(self, username: str | None, file: Path) -> None:
        self._username = username
        self._file = file

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        try:
            password = (await asyncio.to_thread(self._file.read_text)).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise AuthenticationError(f"the store's password file cannot be read: {error}") from error
        return (password,) if self._username is None else (self._username, password)


# ------------------------------------------------------------------------------------------------------ Sentinel


class _SentinelPool(SentinelConnectionPool, Pool):
    """Connections to the primary of the moment."""


class _Sentinels(Sentinel):
    """Sentinels that are asked all at once: one that is dead without a word costs no time."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """The primary's address, by the first Sentinel that knows a living one. Raises MasterNotFoundError."""
        found: list[tuple[str, int]] = []
        errors: list[str] = []
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[None]] = []

            async def ask(sentinel: Redis) -> None:
                try:
                    states = cast("Mapping[str, Mapping[str, Any]]", await sentinel.sentinel_masters())
                except ERRORS as error:
                    errors.append(str(error))
                    return
                state = states.get(service_name)
                if state and not found and self.check_master_state(dict(state), service_name):
                    found.append((state["ip"], state["port"]))
                    for task in tasks:
                        if task is not asyncio.current_task():
                            task.cancel()

            tasks += [group.create_task(ask(sentinel)) for sentinel in self.sentinels]
        if not found:
            told = f": {'; '.join(errors)}" if errors else ""
            raise MasterNotFoundError(f"no Sentinel knows a living primary for {service_name!r}{told}")
        return found[0]


def _sentinel_client(address: Address, options: ConnectOptions, common: _Arguments) -> tuple[Redis, Sentinel]:
    secured = {} if address.tls is None else {"ssl": True, **_tls(address.tls)}
    sentinel = _Sentinels(  # type: ignore[no-untyped-call]  # as redis-py left it
        [(host.name, host.port) for host in address.hosts],
        sentinel_kwargs={**common, "username": None, "password": None, "credential_provider": None}
        | _login(address.sentinel_login)
        | _tcp()
        | secured,
    )
    pool = _SentinelPool(  # type: ignore[no-untyped-call]  # as redis-py left it
        address.service,
        sentinel,
        max_connections=options.max_connections,
        timeout=options.timeout_s,
        db=address.database,
        **common,
        **_tcp(),
        **secured,
    )
    return Redis.from_pool(pool), sentinel


# ------------------------------------------------------------------------------------------------------- Cluster


class ClusterClient(RedisCluster):
    """A Cluster client that waits for a free connection, and whose look at the topology outlives its caller."""

    def __init__(self, commands: int, nodes: list[ClusterNode], arguments: _Arguments) -> None:
        super().__init__(startup_nodes=nodes, **arguments)
        self._gate = asyncio.Semaphore(commands)
        self._looking: asyncio.Task[None] | None = None

    async def initialize(
        self,
        additional_startup_nodes_info: list[tuple[str, int]] | None = None,
        last_failed_node_name: str | None = None,
    ) -> RedisCluster:
        """Learn which node holds which slots, if that is not known. Raises `ERRORS`."""
        if not self._initialize:
            return self
        if self._looking is None or self._looking.done():
            look = self._look(additional_startup_nodes_info, last_failed_node_name)
            self._looking = asyncio.get_running_loop().create_task(look)
            self._looking.add_done_callback(read_outcome)
        await asyncio.shield(self._looking)
        return self

    async def _look(self, more: list[tuple[str, int]] | None, failed: str | None) -> None:
        _ = await super().initialize(more, failed)

    async def execute_command(self, *args: EncodableT, **kwargs: Any) -> Any:
        """One command at the node that is due. Raises `ERRORS`."""
        async with self._gate:
            return await super().execute_command(*args, **kwargs)

    async def end(self) -> None:
        """End a look that is under way."""
        if self._looking is not None:
            await end_tasks(self._looking)


def _cluster_client(address: Address, options: ConnectOptions, common: _Arguments) -> RedisCluster:
    secured = {} if address.tls is None else {"ssl": True, **_tls(address.tls)}
    nodes = [ClusterNode(host.name, host.port) for host in address.hosts]
    arguments = {
        **common,
        **_tcp(),
        **secured,
        "max_connections": options.max_connections + 2,  # subscriptions take theirs from the same pool
        "require_full_coverage": False,  # a fleet needs its own slot alone
        "dynamic_startup_nodes": False,  # the names given stay good when every address behind them has changed
    }
    return ClusterClient(options.max_connections, nodes, arguments)
