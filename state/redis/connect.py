"""From an address to redis-py: one typed `Connection`, whatever stands there.

Nothing is retried here: a command that failed may have been done, and only the store knows what to ask again.
What outlives a caller is the opening of a connection: where that takes longer than callers wait, none would ever
be opened otherwise.
The protocol is RESP2: what our scripts answer (integers, strings, lists) both versions carry alike, and messages
come over a connection of their own, so RESP3 would bring nothing but a longer handshake, more rights to grant, and
trouble with proxies that speak RESP2 alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias, cast

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import Connection as TcpConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError, RedisClusterException, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.typing import EncodableT

from state.redis.address import Address, Credentials, Deployment, Tls

Answer: TypeAlias = "bytes | int | list[Answer] | None"
"""What a script answers. Error answers are raised."""
Word: TypeAlias = str | bytes | int | float
"""A part of a command."""
Client: TypeAlias = Redis | RedisCluster
ERRORS: tuple[type[Exception], ...] = (RedisError, RedisClusterException, OSError, TimeoutError)
"""All that a command or a subscription may raise: trouble on the way, and error answers (ResponseError)."""

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}  # s, s, count: a dead peer shows in 11 s
SILENCE_S = 2.0
_NAME = re.compile(r"[^!-~]+")  # what CLIENT SETNAME refuses


@contextlib.contextmanager
def closed_is_an_error() -> Iterator[None]:
    """uvloop raises RuntimeError for a write to a connection it has closed, where redis-py expects an OSError.
    Raises redis-py's ConnectionError instead."""
    try:
        yield
    except RuntimeError as error:
        raise RedisConnectionError(f"the connection is closed: {error}") from error


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


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a channel."""

    channel: str
    payload: bytes


class Subscription:
    """The messages of some channels, in order.

    Whatever it raises: close it, subscribe again, and read the state anew, because messages were lost.
    """

    def __init__(self, channels: PubSub) -> None:
        self._channels = channels
        self._early: deque[Message] = deque()
        self._heard_s = 0.0
        self._asked_s: float | None = None

    async def open(self, names: Sequence[str], timeout_s: float) -> None:
        """Subscribe, and wait until the server confirmed: what is sent from now on arrives. Raises `ERRORS`."""
        missing = len(names)
        async with asyncio.timeout(timeout_s):
            with closed_is_an_error(), _cancellable():
                await self._channels.subscribe(*names)
            while missing:
                heard = await self._channels.get_message(timeout=None)
                if heard is None:
                    continue
                if heard["type"] == "subscribe":
                    missing -= 1
                elif heard["type"] == "message":
                    self._early.append(_message(heard))
        self._heard_s = asyncio.get_running_loop().time()

    async def next(self, timeout_s: float) -> Message | None:
        """The next message; None when none came in time. Raises `ERRORS`.

        After `SILENCE_S` without a message the peer is asked for a sign of life, and after as long again without
        one the subscription is dead. This is seen when a call ends, so let calls end every second or so.
        """
        if self._early:
            return self._early.popleft()
        with _cancellable():
            heard = await self._channels.get_message(timeout=timeout_s)
        now_s = asyncio.get_running_loop().time()
        if heard is not None:
            self._heard_s, self._asked_s = now_s, None
            return _message(heard) if heard["type"] == "message" else None
        if self._asked_s is None:
            if now_s - self._heard_s >= SILENCE_S:
                with closed_is_an_error(), _cancellable():
                    await self._channels.ping()
                self._asked_s = now_s
        elif now_s - self._asked_s >= SILENCE_S:
            raise RedisConnectionError("the subscription is silent: no answer to a PING")
        return None

    async def close(self) -> None:
        """End it. Idempotent; raises nothing that matters."""
        with contextlib.suppress(*ERRORS):
            await self._channels.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped


@contextlib.contextmanager
def _cancellable() -> Iterator[None]:
    """Let no cancellation be lost in redis-py. It sends with `asyncio.wait_for`, which in Python 3.11 drops one
    that comes in the moment in which the bytes are sent (bpo-37658), and the task would go on for ever."""
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    finally:  # after an error answer as well: it is an answer
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


def _message(heard: Mapping[str, bytes]) -> Message:
    return Message(heard["channel"].decode(), heard["data"])


class Connection:
    """A way to the store: a bounded pool of connections that opens them when they are needed.

    `client` is redis-py's own, for what `run` does not cover. `close` it in the loop that used it.
    """

    def __init__(
        self, address: Address, options: ConnectOptions, client: Client, sentinel: Sentinel | None
    ) -> None:
        self.address = address
        self.options = options
        self.client = client
        self._sentinel = sentinel
        self._opening: set[asyncio.Task[AbstractConnection]] = set()
        self._sockets: set[AbstractConnection] = set()

    def __repr__(self) -> str:
        return f"Connection({self.address})"

    async def run(self, *words: Word) -> Answer:
        """One command, such as ``run("EVALSHA", digest, 1, key, argument)``. Raises `ERRORS`.

        For scripts, PUBLISH and GET, whose answers redis-py leaves as they are; others it may turn into dicts.
        In a Cluster the first key says which node is asked; PUBLISH goes to any and reaches all. SCRIPT LOAD goes
        to every primary, so after a NOSCRIPT error ask with EVAL: it loads the script where it is needed.
        """
        with closed_is_an_error(), _cancellable():
            answer: Answer = await self.client.execute_command(*words)
        return answer

    def open_socket(self, key: str) -> asyncio.Task[AbstractConnection]:
        """Begin to open a connection outside the pool; in a Cluster to the node that holds `key`.

        The task may raise `ERRORS`. Wait for it through `asyncio.shield`, so that whoever gives up does not break
        it off for the next. Both the task and what it opened end with this `Connection`, or by `close_socket`.
        """
        task = asyncio.get_running_loop().create_task(self._open_socket(key))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        task.add_done_callback(_read_outcome)
        return task

    async def _open_socket(self, key: str) -> AbstractConnection:
        if isinstance(self.client, RedisCluster):
            # The client follows redirections and learns the slots; then it knows the node.
            await self.run("EXISTS", key)
            node = self.client.get_node_from_key(key)
            if node is None:
                raise RedisConnectionError(f"no node of the Cluster serves {key!r}")
            made: AbstractConnection = node.connection_class(**node.connection_kwargs)
        else:
            pool = self.client.connection_pool
            made = pool.make_connection()  # type: ignore[no-untyped-call]  # as redis-py left it
        self._sockets = {socket for socket in self._sockets if socket.is_connected} | {made}
        try:
            await made.connect()  # type: ignore[no-untyped-call]  # as redis-py left it
        except BaseException:
            with contextlib.suppress(*ERRORS):
                await made.disconnect(nowait=True)
            raise
        return made

    async def close_socket(self, opening: asyncio.Task[AbstractConnection]) -> None:
        """Undo `open_socket`, however far it came."""
        await _end(opening)
        if not opening.cancelled() and opening.exception() is None:
            with contextlib.suppress(*ERRORS):
                await opening.result().disconnect(nowait=True)

    def pubsub(self) -> PubSub:
        """redis-py's own subscription; in a Cluster only after a first command. `subscribe` is the typed one."""
        channels: PubSub = self.client.pubsub()
        return channels

    async def subscribe(self, *channels: str) -> Subscription:
        """Listen to channels. In a Cluster at the node that holds the first channel's slot. Raises `ERRORS`."""
        await self.client.initialize()
        made = Subscription(self.pubsub())
        try:
            await made.open(channels, self.options.connect_timeout_s + self.options.timeout_s)
        except BaseException:
            await made.close()
            raise
        return made

    async def close(self) -> None:
        """Close all connections. Idempotent; raises nothing that matters."""
        await _end(*self._opening)
        for made in tuple(self._sockets):
            with contextlib.suppress(*ERRORS):
                await made.disconnect(nowait=True)
        opener = self.client if isinstance(self.client, RedisCluster) else self.client.connection_pool
        with contextlib.suppress(*ERRORS):
            if isinstance(opener, _Cluster | _Pool):
                await opener.end()
            await self.client.aclose()
        if self._sentinel is not None:
            with contextlib.suppress(*ERRORS):
                await self._sentinel.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def connect(address: Address, options: ConnectOptions = ConnectOptions()) -> Connection:
    """A `Connection`; nothing is opened yet. Call it inside the event loop that will use it."""
    common = _common(address.login, options)
    match address.deployment:
        case Deployment.SENTINEL:
            client, sentinel = _sentinel_client(address, options, common)
            return Connection(address, options, client, sentinel)
        case Deployment.CLUSTER:
            return Connection(address, options, _cluster_client(address, options, common), None)
        case Deployment.SOCKET:
            common |= {"connection_class": UnixDomainSocketConnection, "path": str(address.path)}
        case Deployment.SERVER:
            kind = TcpConnection if address.tls is None else SSLConnection
            common |= {"connection_class": kind, "host": address.hosts[0].name, "port": address.hosts[0].port}
            common |= _tcp() | _tls(address.tls)
    pool = _Pool(max_connections=options.max_connections, timeout=options.timeout_s, db=address.database, **common)
    return Connection(address, options, Redis.from_pool(pool), None)


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


class _Pool(BlockingConnectionPool):
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
        _read_outcome(task)

    async def end(self) -> None:
        """Give up what is being opened."""
        await _end(*self._opening.values())


def _read_outcome(task: asyncio.Task[Any]) -> None:
    """Callers that gave up do not ask how it ended, and asyncio complains about errors nobody asked for."""
    if not task.cancelled():
        task.exception()


async def _end(*tasks: asyncio.Task[Any]) -> None:
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


class _SentinelPool(SentinelConnectionPool, _Pool):
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


class _Cluster(RedisCluster):
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
            self._looking.add_done_callback(_read_outcome)
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
            await _end(self._looking)


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
    return _Cluster(options.max_connections, nodes, arguments)
