"""From an address to redis-py: one typed `Connection`, whatever stands there."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self, TypeAlias

from redis.asyncio import RedisCluster
from redis.asyncio.client import PubSub
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import ConnectionError as RedisConnectionError

from state.redis.address import Address
from state.redis.clients import Client, ClusterClient, Pool, end_tasks, make_client, read_outcome
from state.redis.clients import ConnectOptions as ConnectOptions
from state.redis.errors import ERRORS as ERRORS
from state.redis.errors import cancellable
from state.redis.errors import closed_is_an_error as closed_is_an_error
from state.redis.messages import Message as Message
from state.redis.messages import Subscription as Subscription

Answer: TypeAlias = "bytes | int | list[Answer] | None"
"""What a script answers. Error answers are raised."""
Word: TypeAlias = str | bytes | int | float
"""A part of a command."""


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
        with closed_is_an_error(), cancellable():
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
        task.add_done_callback(read_outcome)
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
        await end_tasks(opening)
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
        await end_tasks(*self._opening)
        for made in tuple(self._sockets):
            with contextlib.suppress(*ERRORS):
                await made.disconnect(nowait=True)
        opener = self.client if isinstance(self.client, RedisCluster) else self.client.connection_pool
        with contextlib.suppress(*ERRORS):
            if isinstance(opener, ClusterClient | Pool):
                await opener.end()
            await self.client.aclose()
        if self._sentinel is not None:
            with contextlib.suppress(*ERRORS):
                await self._sentinel.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def connect(address: Address, options: ConnectOptions | None = None) -> Connection:
    """A `Connection`; nothing is opened yet. Call it inside the event loop that will use it."""
    chosen = options or ConnectOptions()
    client, sentinel = make_client(address, chosen)
    return Connection(address, chosen, client, sentinel)
