"""What a fleet's replicas agree on besides load: one versioned document, and what each of them has learned.

The **document** is the fleet's policy, a text that this package does not read. Its version rises by one with every
change, by compare-and-set, so of two racing changes one is told that it lost. The last versions are kept.

A store can lose writes (a restart without persistence, a failover), and then replicas put back what they have in
force. Who wins is one order, `outranks`: the higher version, and of two with the same number the one that was
written first. So a replica that starts beside an emptied store and seeds it from its file never replaces what the
others serve by.

**Contributions** are what each replica learned by itself, never what it heard from others, so that summing them
counts nothing twice. They have an age, by the store's clock, and end after a day, or when `CONTRIBUTIONS` younger
ones have come.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

HISTORY = 16
"""Versions that are kept, the one in force included."""

CONTRIBUTION_S = 86_400.0
"""How long a contribution is kept after it was last written."""

CONTRIBUTIONS = 64
"""Contributions that are kept: the last written. Every process that ran since yesterday may have left one."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What shall become the next version.

    Attributes:
        change_id: of this change alone; a put that is asked again by the same id is done once.
        schema: of the body; a reader that does not know it leaves the body alone.
        body: the policy; engines' keys may stand in it, so it is not shown.
        author: the replica that wrote it.
        reason: why, for people.
    """

    change_id: str
    schema: int
    body: str = field(repr=False)
    author: str
    reason: str


@dataclass(frozen=True, slots=True)
class Document:
    """One version. `written_unix_s` is by the store's clock, for people and for `outranks`."""

    version: int
    written_unix_s: float
    draft: Draft

    @property
    def change_id(self) -> str:
        return self.draft.change_id

    def outranks(self, other: Document | None) -> bool:
        """Whether this one stands where both claim to be the fleet's. A total order over different documents."""
        if other is None:
            return True
        return self._rank() > other._rank()

    def _rank(self) -> tuple[int, float, str]:
        return self.version, -self.written_unix_s, self.change_id


@dataclass(frozen=True, slots=True)
class Stale:
    """The change was made to a version that is not the one the store has: this is, None when it has none."""

    document: Document | None


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one source learned. `age_s` is since it was last written."""

    body: str
    age_s: float


class Documents(Protocol):
    """One replica's handle. All methods but `watch` may raise `state.contract.StoreUnavailable`."""

    async def read(self) -> Document | None:
        """The version that stands; None when the store has none."""
        ...

    async def put(self, draft: Draft, expected: int) -> Document | Stale:
        """Make a draft the version after `expected` (0: the store has none). Idempotent by `change_id`."""
        ...

    async def put_back(self, document: Document) -> Document:
        """Put back a version that was in force before the store lost it, where it outranks what the store has.
        Returns what stands then."""
        ...

    async def history(self) -> tuple[Document, ...]:
        """The last versions, newest first; at most `HISTORY`."""
        ...

    def watch(self) -> AsyncGenerator[Document | None, None]:
        """What stands, first as it is, then whenever it changed or a change may have been missed; None when the
        store has none. A slow reader gets the newest alone. Ends when the handle is closed."""
        ...

    async def contribute(self, source: str, body: str) -> None:
        """Replace what a source has learned."""
        ...

    async def contributions(self) -> Mapping[str, Contribution]:
        """What every source learned, by source; at most `CONTRIBUTIONS`."""
        ...

    async def run(self) -> None:
        """Listen for changes. Runs until it is cancelled; its owner starts it once."""
        ...

    async def close(self) -> None:
        """End every watch."""
        ...


class Watching:
    """Readers that want the newest alone: woken by `notice`, they look for themselves."""

    __slots__ = ("__weakref__", "_ended", "_noticed")

    def __init__(self) -> None:
        self._noticed = asyncio.Event()
        self._noticed.set()  # the first look is at once
        self._ended = False

    def notice(self) -> None:
        self._noticed.set()

    def end(self) -> None:
        self._ended = True
        self._noticed.set()

    async def next(self) -> bool:
        """Wait for the next reason to look; False when it is over."""
        await self._noticed.wait()
        self._noticed.clear()
        return not self._ended


class MemoryDocumentState:
    """What several handles share. Lives in one event loop."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives Unix seconds."""
        self.clock = clock
        self.current: Document | None = None
        self.past: dict[int, Document] = {}  # by version
        self.learned: dict[str, tuple[float, str]] = {}
        self._watching: weakref.WeakSet[Watching] = weakref.WeakSet()

    def watching(self) -> Watching:
        made = Watching()
        self._watching.add(made)
        return made

    def set(self, document: Document) -> Document:
        """Let this one stand and tell everybody."""
        self.current = document
        self.past[document.version] = document
        for version in sorted(self.past)[:-HISTORY]:
            del self.past[version]
        for watching in list(self._watching):
            watching.notice()
        return document


class MemoryDocuments:
    """One handle (`Documents`). `MemoryDocuments()` is a store with one replica."""

    def __init__(self, state: MemoryDocumentState | None = None) -> None:
        self._state = state or MemoryDocumentState()
        self._mine: weakref.WeakSet[Watching] = weakref.WeakSet()

    async def read(self) -> Document | None:
        return self._state.current

    async def put(self, draft: Draft, expected: int) -> Document | Stale:
        current = self._state.current
        if current is not None and current.change_id == draft.change_id:
            return current
        if (0 if current is None else current.version) != expected:
            return Stale(current)
        return self._state.set(Document(expected + 1, self._state.clock(), draft))

    async def put_back(self, document: Document) -> Document:
        current = self._state.current
        if current is not None and not document.outranks(current):
            return current
        return self._state.set(document)

    async def history(self) -> tuple[Document, ...]:
        return tuple(document for _, document in sorted(self._state.past.items(), reverse=True))

    async def watch(self) -> AsyncGenerator[Document | None, None]:
        watching = self._state.watching()
        self._mine.add(watching)
        while await watching.next():
            yield self._state.current

    async def contribute(self, source: str, body: str) -> None:
        now_s = self._state.clock()
        learned = self._state.learned
        learned.pop(source, None)
        learned[source] = (now_s, body)  # the dict is in the order in which they were written
        while len(learned) > CONTRIBUTIONS or now_s - next(iter(learned.values()))[0] > CONTRIBUTION_S:
            del learned[next(iter(learned))]

    async def contributions(self) -> Mapping[str, Contribution]:
        now_s = self._state.clock()
        return {
            source: Contribution(body, max(now_s - at_s, 0.0))
            for source, (at_s, body) in self._state.learned.items()
            if now_s - at_s <= CONTRIBUTION_S
        }

    async def run(self) -> None:
        # Whoever changes something tells the watchers itself.
        await asyncio.Event().wait()

    async def close(self) -> None:
        for watching in list(self._mine):
            watching.end()
