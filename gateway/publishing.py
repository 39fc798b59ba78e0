"""What this replica measures and holds, told to the store: one publish at a time, begun by the ticker.

A publish counts only if nothing of ours was written since it was measured (`state.contract.Store.publish`). So one
is begun only where the store has answered for every lease, and the sequence is read and the load measured in one
turn of the event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from scheduling.load import LoadVector
from scheduling.rivals import Waiting
from state.contract import Held, Publication, Store, StoreUnavailable

TELL_ANEW_S = 1.0
"""How often everything is told again, news or not: a store that was away may have forgotten it, and what others
hold is believed for so long only."""


class Core(Protocol):
    """What is published of a dispatcher."""

    @property
    def backends(self) -> Iterable[str]: ...

    def begin_publish(self, backend: str, now_s: float) -> LoadVector | None: ...

    def settle_publish(self, backend: str, taken: bool | None) -> None: ...

    def doubt_published(self) -> None: ...

    def first_held(self) -> tuple[Waiting, ...]: ...


@dataclass(frozen=True, slots=True)
class _Letter:
    publications: Sequence[Publication]
    held: tuple[Held, ...]


class Publisher:
    """Its `run` is a task of the shell's owner; all methods run on one event loop."""

    def __init__(self, core: Core, store: Store, clock: Callable[[], float]) -> None:
        self._core = core
        self._store = store
        self._clock = clock
        self._ending: Counter[str] = Counter()  # leases that the store may still count, by backend
        self._held: tuple[Waiting, ...] | None = ()  # as it was told last; None: not known
        self._letter: _Letter | None = None
        self._written = asyncio.Event()
        self._anew_s = -math.inf

    def ending(self, backend: str) -> None:
        """The store is to end a lease there."""
        self._ending[backend] += 1

    def ended(self, backend: str) -> None:
        """The store has ended it."""
        self._ending[backend] -= 1
        if not self._ending[backend]:
            del self._ending[backend]

    def begin(self) -> None:
        """Publish what is news, unless a publish is on its way."""
        if self._letter is not None:
            return
        core, store, now_s = self._core, self._store, self._clock()
        if now_s >= self._anew_s:
            self._anew_s = now_s + TELL_ANEW_S
            self._held = None
            core.doubt_published()
        publications: list[Publication] = []
        for backend in core.backends:
            if backend in self._ending:
                continue
            sequence = store.sequence_of(backend)
            own = core.begin_publish(backend, now_s)
            if own is not None:
                publications.append(Publication(backend, own, sequence + 1))
        first = core.first_held()
        if publications or first != self._held:
            self._held = first
            self._letter = _Letter(publications, tuple(_held(one, now_s) for one in first))
            self._written.set()

    async def run(self) -> None:
        """Send what was begun. Runs until it is cancelled."""
        while True:
            await self._written.wait()
            self._written.clear()
            letter = self._letter
            if letter is not None:
                await self._send(letter)

    async def _send(self, letter: _Letter) -> None:
        taken: frozenset[str] | None = None
        try:
            taken = await self._store.publish(letter.publications, letter.held)
        except StoreUnavailable:
            self._held = None
        finally:
            self._letter = None
            for one in letter.publications:
                self._core.settle_publish(one.backend, None if taken is None else one.backend in taken)


def _held(one: Waiting, now_s: float) -> Held:
    return Held(one.model, one.tier, one.due_s - now_s, one.decodes, one.kv_tokens)


def waiting_of(held: Iterable[Held], now_s: float) -> tuple[Waiting, ...]:
    """What another replica told, by this one's clock."""
    return tuple(Waiting(one.model, one.tier, now_s + one.due_in_s, one.decodes, one.kv_tokens) for one in held)
