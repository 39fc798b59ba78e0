"""The store contract. Every implementation passes the same tests (tests/state/test_contract.py).

Load is reserved by **lease**: `reserve` adds a request's cost to one backend, `release` takes it away, both
idempotent by `lease_id`, so an answer that was lost is simply asked for again. Each replica writes only its own
part of a backend's load; totals are sums over live replicas. Membership (which tier a backend is in) changes by
compare-and-set on an **epoch** that only rises.

A replica that stops beating leaves **orphan** load, which still counts towards every limit until the engine's own
count shows it gone or twice the lease time has passed. Between machines travel only ages and remaining times.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from scheduling.load import LoadVector, ReserveCandidate


@dataclass(frozen=True, slots=True)
class Membership:
    """Where a backend belongs: a tier's name, or None for the pool. `epoch` rises with every change."""

    tier: str | None
    epoch: int


@dataclass(frozen=True, slots=True)
class Granted:
    """The reservation stands on `backend`."""

    lease_id: str
    backend: str


@dataclass(frozen=True, slots=True)
class Denied:
    """No candidate fits. What the OTHER replicas carry on each candidate (its slack may be left out), and how each
    stands."""

    lease_id: str
    foreign: Mapping[str, LoadVector]
    memberships: Mapping[str, Membership]


@dataclass(frozen=True, slots=True)
class Changed:
    """The membership is as asked (claim and hand_back)."""

    membership: Membership


@dataclass(frozen=True, slots=True)
class Conflict:
    """Somebody was first, or the backend is not empty: this is how it stands."""

    membership: Membership


@dataclass(frozen=True, slots=True)
class BackendLoad:
    """One backend as the store sees it: membership, own load, and the other replicas' load summed."""

    membership: Membership
    own: LoadVector
    foreign: LoadVector


@dataclass(frozen=True, slots=True)
class Publication:
    """What a replica measured of its own load on one backend. `sequence`: see `Store.sequence_of`."""

    backend: str
    own: LoadVector
    sequence: int


@dataclass(frozen=True, slots=True)
class Held:
    """The request of one tier and model that a replica holds and that is due first.

    Attributes:
        due_in_s: until its deadline, from when this was told.
        decodes, kv_tokens: the room it needs on a backend.
    """

    model: str
    tier: str
    due_in_s: float
    decodes: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class StoreEvent:
    """Something another replica did: a backend's membership or foreign load is now this."""

    backend: str
    load: BackendLoad


@dataclass(frozen=True, slots=True)
class HeldEvent:
    """What another replica holds, all of it; nothing when it holds nobody, or is gone."""

    replica: str
    held: tuple[Held, ...]


class Mode(Enum):
    """How a replica stands with the shared state."""

    SHARED = "shared"
    """Every reservation is checked against what all replicas carry."""

    ALONE = "alone"
    """The store does not answer: the replica keeps to its share of what was free when it last knew."""

    HEALING = "healing"
    """The store answers again, but may not know yet what the others carry: the share still holds."""


class StoreUnavailable(Exception):
    """The store did not answer; whether the write happened is unknown (ask again by the same lease)."""


class Store(Protocol):
    """One replica's handle on the shared state. All methods may raise StoreUnavailable."""

    async def add_backend(self, backend: str, tier: str | None) -> Membership:
        """Make a backend known; keeps its membership when it is known already."""
        ...

    async def remove_backend(self, backend: str) -> None:
        """Forget a backend. Leases on it may still be released, to no effect."""
        ...

    async def reserve(self, lease_id: str, candidates: Sequence[ReserveCandidate]) -> Granted | Denied:
        """Take the first candidate that fits (see `ReserveCandidate`). Idempotent by `lease_id`.

        A lease that was released is denied from then on, so a request that was delayed cannot revive it.
        The tightest resident of a backend is the smallest ``tpot_ms`` among all replicas' leases on it.
        """
        ...

    async def release(self, lease_id: str) -> None:
        """End a lease. Idempotent; a lease that was never granted (or whose grant was lost) ends too.

        Its cost leaves the load. Where a publish came since the grant, the prefill it reserved stays counted until
        the next publish (how much of it was still queued is not known here), or until no such lease is left.
        """
        ...

    async def publish(self, publications: Sequence[Publication], held: Sequence[Held] = ()) -> frozenset[str]:
        """Replace what this replica carries on some backends by what it measured itself, and what it holds.

        A publication's sequence rises with every publish of this replica for that backend; an older one, or one
        taken before the last reservation there (see `sequence_of`), is refused. Returns the backends of those that
        were taken. All in one round trip, and also a sign of life.
        """
        ...

    def sequence_of(self, backend: str) -> int:
        """The sequence of this replica's last write for a backend: take it BEFORE measuring, then publish
        with that number plus one."""
        ...

    async def claim(self, backend: str, tier: str, expected_epoch: int) -> Changed | Conflict:
        """Move a backend into a tier if its epoch is still `expected_epoch`; raises the epoch."""
        ...

    async def hand_back(self, backend: str, expected_epoch: int) -> Changed | Conflict:
        """Move a backend into the pool if nobody carries anything on it and the epoch still fits."""
        ...

    async def view(self) -> Mapping[str, BackendLoad]:
        """Every known backend as it stands."""
        ...

    def watch(self) -> AsyncIterator[StoreEvent | HeldEvent]:
        """What other replicas do, as it happens (within tens of milliseconds). Ends when the store is closed."""
        ...

    async def note_engine(self, backend: str, sequences: int) -> None:
        """The engine itself says how many sequences it has, running and waiting. Orphan load that it no longer
        has ends."""
        ...

    @property
    def mode(self) -> Mode:
        """How this replica stands with the shared state."""
        ...

    @property
    def replicas(self) -> int:
        """Live replicas, this one included, as far as is known."""
        ...

    async def run(self) -> None:
        """Beat, listen, and heal what an outage left. Runs until it is cancelled; its owner starts it once, before
        anything else is asked of the store."""
        ...

    async def close(self) -> None:
        """Give up every lease of this replica and stop watching."""
        ...
