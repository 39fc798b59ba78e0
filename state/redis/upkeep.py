"""What a handle does by itself for as long as it runs: beat, tell its changes, and listen.

Nothing here ends because the store is away; each loop waits a moment and tries again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from state.contract import StoreUnavailable
from state.redis.connect import ERRORS, Connection

_AGAIN_S = 0.25  # after a failure; short against the 2 s in which a store that is back is whole again
_SOONEST_S = 0.05  # between two beats, however urgent
_LISTEN_S = 1.0  # a call that waits for a message ends by then, so that silence is noticed
_BEATS_PER_LEASE = 3.0
_TROUBLE: tuple[type[Exception], ...] = (StoreUnavailable, *ERRORS)


class Doing(Protocol):
    """What there is to do; all may raise StoreUnavailable."""

    @property
    def healing(self) -> bool: ...

    async def beat(self) -> None: ...

    async def announce(self, backends: Iterable[str]) -> None: ...

    async def resync(self) -> None: ...

    def hear(self, payload: bytes) -> bool: ...


class Upkeep:
    """Three loops over one handle."""

    def __init__(
        self, doing: Doing, connection: Connection, channel: str, lease_s: float, announce_s: float
    ) -> None:
        self._doing = doing
        self._connection = connection
        self._channel = channel
        self._beat_s = lease_s / _BEATS_PER_LEASE
        self._announce_s = announce_s
        self._dirty: dict[str, None] = {}
        self._changed = asyncio.Event()
        self._urgent = asyncio.Event()
        self.listening = asyncio.Event()

    def changed(self, backend: str) -> None:
        """This replica's load there is another; the others are to be told."""
        self._dirty[backend] = None
        self._changed.set()

    def hurry(self) -> None:
        """The store may have forgotten something: beat soon."""
        self._urgent.set()

    async def run(self) -> None:
        """All three, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            tasks.create_task(self._announce())
            tasks.create_task(self._listen())

    async def _beat(self) -> None:
        while _wanted():
            self._urgent.clear()
            try:
                await self._doing.beat()
                pause_s = _AGAIN_S if self._doing.healing else self._beat_s
            except StoreUnavailable:
                self._urgent.clear()
                pause_s = _AGAIN_S
            await asyncio.sleep(_SOONEST_S)
            try:
                async with asyncio.timeout(min(pause_s, self._beat_s)):
                    await self._urgent.wait()
            except TimeoutError:
                continue

    async def _announce(self) -> None:
        while _wanted():
            await self._changed.wait()
            await asyncio.sleep(self._announce_s)
            self._changed.clear()
            dirty, self._dirty = self._dirty, {}
            try:
                await self._doing.announce(dirty)
            except StoreUnavailable:
                self._dirty |= dirty
                self._changed.set()
                await asyncio.sleep(_AGAIN_S)

    async def _listen(self) -> None:
        while _wanted():
            try:
                await self._listen_once()
            except _TROUBLE:
                await asyncio.sleep(_AGAIN_S)

    async def _listen_once(self) -> None:
        """Until something goes wrong, which it raises."""
        subscription = await self._connection.subscribe(self._channel)
        try:
            await self._doing.resync()
            # What was lost meanwhile is found by comparing sequences.
            self._urgent.set()
            self.listening.set()
            while _wanted():
                message = await subscription.next(_LISTEN_S)
                if message is not None and not self._doing.hear(message.payload):
                    await self._doing.resync()
        finally:
            self.listening.clear()
            await subscription.close()


def _wanted() -> bool:
    """True; raises CancelledError where a cancellation got lost on the way, as `asyncio.wait_for` of Python 3.11,
    which redis-py uses, may do."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
    return True
