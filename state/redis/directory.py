"""Where each replica can be asked, kept in the store for as long as the replica says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from state.redis.connect import ERRORS, Connection
from state.redis.keys import Keys
from state.redis.scripts import unavailable

log = logging.getLogger("tiergate.directory")

ADDRESS = "at:"
"""What the names of these keys begin with, behind the fleet's prefix."""
_LEAST_S = 1.0
_URL = "url"


def address_key(keys: Keys, replica: str) -> str:
    """The key of one replica's address."""
    return keys.other(f"{ADDRESS}{replica}")


class Directory:
    """One replica's entry."""

    def __init__(self, connection: Connection, fleet: str, replica: str, lease_s: float) -> None:
        """The connection stays the caller's."""
        self._connection = connection
        self._key = address_key(Keys.of(fleet), replica)
        self._every_s = max(lease_s, _LEAST_S)

    async def keep(self, url: Callable[[], str | None]) -> None:
        """Say where this replica is, again and again, so that an emptied store knows it too and a dead replica's
        entry ends by itself. None is not told. Runs until it is cancelled."""
        silent = False
        while True:
            where = url()
            if where is not None:
                try:
                    async with asyncio.timeout(self._every_s):
                        await self.tell(where)
                    silent = False
                except ERRORS as error:
                    if not silent:
                        log.debug("the store was not told where this replica is: %s", error)
                    silent = True
            await asyncio.sleep(self._every_s if where is not None and not silent else _LEAST_S / 4)

    async def tell(self, url: str) -> None:
        """Say once where this replica is. Raises `ERRORS`."""
        await self._connection.run("HSET", self._key, _URL, url)
        await self._connection.run("PEXPIRE", self._key, round(3e3 * self._every_s))


async def read_addresses(connection: Connection, keys: Keys, replicas: Iterable[str]) -> dict[str, str]:
    """The addresses of those that have one. Raises StoreUnavailable."""
    found: dict[str, str] = {}
    try:
        for replica in replicas:
            answer = await connection.run("HGET", address_key(keys, replica), _URL)
            if isinstance(answer, bytes):
                found[replica] = answer.decode(errors="replace")
    except ERRORS as error:
        raise unavailable("addresses", error) from error
    return found
