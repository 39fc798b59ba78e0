"""A store in memory that can be made to fail in every way a remote one does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from enum import Enum
from typing import TypeVar

from scheduling.load import ReserveCandidate
from state.contract import (
    BackendLoad,
    Changed,
    Conflict,
    Denied,
    Granted,
    Held,
    HeldEvent,
    Membership,
    Mode,
    Publication,
    StoreEvent,
    StoreUnavailable,
)
from state.memory import MemoryState, MemoryStore

T = TypeVar("T")


class Fault(Enum):
    """What goes wrong with every call."""

    NONE = "none"
    GONE = "gone"
    """Refused at once; nothing is done."""
    SILENT = "silent"
    """No answer ever comes; nothing is done."""
    LOST = "lost"
    """It is done, and the answer is lost."""
    READ_ONLY = "read only"
    """Writes are refused; nothing is done."""
    LATE = "late"
    """It is done at once, and the answer comes when `FaultyStore.answer` is set."""


class FaultyStore:
    """`MemoryStore` behind a fault (`state.contract.Store`). Counts the calls that reached it."""

    def __init__(self, state: MemoryState, name: str) -> None:
        self.fault = Fault.NONE
        self.calls = 0
        self.answer = asyncio.Event()
        self.shown_mode = Mode.SHARED
        self._name = name
        self._store: MemoryStore = state.replica(name)

    def move_to(self, state: MemoryState) -> None:
        """The store came back as another one: empty, or without the last writes."""
        self._store = state.replica(self._name)

    @property
    def inner(self) -> MemoryStore:
        """What stands behind the fault."""
        return self._store

    async def _call(self, call: Callable[[], Awaitable[T]], *, writes: bool = True) -> T:
        self.calls += 1
        match self.fault:
            case Fault.GONE:
                raise StoreUnavailable("gone")
            case Fault.SILENT:
                await asyncio.Event().wait()
            case Fault.LOST:
                await call()
                raise StoreUnavailable("the answer is lost")
            case Fault.READ_ONLY if writes:
                raise StoreUnavailable("read only")
            case Fault.LATE:
                answer = await call()
                await self.answer.wait()
                return answer
        return await call()

    async def add_backend(self, backend: str, tier: str | None) -> Membership:
        return await self._call(lambda: self._store.add_backend(backend, tier))

    async def remove_backend(self, backend: str) -> None:
        await self._call(lambda: self._store.remove_backend(backend))

    async def reserve(self, lease_id: str, candidates: Sequence[ReserveCandidate]) -> Granted | Denied:
        return await self._call(lambda: self._store.reserve(lease_id, candidates))

    async def release(self, lease_id: str) -> None:
        await self._call(lambda: self._store.release(lease_id))

    async def publish(self, publications: Sequence[Publication], held: Sequence[Held] = ()) -> frozenset[str]:
        return await self._call(lambda: self._store.publish(publications, held))

    def sequence_of(self, backend: str) -> int:
        return self._store.sequence_of(backend)

    async def claim(self, backend: str, tier: str, expected_epoch: int) -> Changed | Conflict:
        return await self._call(lambda: self._store.claim(backend, tier, expected_epoch))

    async def hand_back(self, backend: str, expected_epoch: int) -> Changed | Conflict:
        return await self._call(lambda: self._store.hand_back(backend, expected_epoch))

    async def view(self) -> Mapping[str, BackendLoad]:
        return await self._call(self._store.view, writes=False)

    def watch(self) -> AsyncIterator[StoreEvent | HeldEvent]:
        return self._store.watch()

    async def note_engine(self, backend: str, sequences: int) -> None:
        await self._call(lambda: self._store.note_engine(backend, sequences))

    @property
    def mode(self) -> Mode:
        return self.shown_mode

    @property
    def replicas(self) -> int:
        return self._store.replicas

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        await self._store.close()
