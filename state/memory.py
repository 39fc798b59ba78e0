"""The store in memory: one process, one or several replica handles on one state.

Nothing here awaits between looking and writing, so every method is atomic within its event loop.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from scheduling.load import Cost, LoadVector, ReserveCandidate
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
from state.parts import Part
from state.watch import Watch

_NOWHERE = Membership(None, 0)
_REMEMBERED_ENDINGS = 16_384


@dataclass(slots=True)
class _Home:
    """One backend."""

    membership: Membership
    parts: dict[str, Part] = field(default_factory=dict)
    paces: dict[float, int] = field(default_factory=dict)  # tpot_ms of every lease: how many

    def part(self, replica: str) -> Part:
        found = self.parts.get(replica)
        if found is None:
            found = self.parts[replica] = Part()
        return found

    def fits(self, candidate: ReserveCandidate) -> bool:
        if self.membership.epoch != candidate.epoch:
            return False
        if self.paces and min(self.paces) < candidate.tightest_resident_ms:
            return False
        decodes, kv_tokens, prefill_tokens = (
            candidate.cost.decodes,
            candidate.cost.peak_kv_tokens,
            candidate.cost.prefill_tokens,
        )
        for part in self.parts.values():
            for sums in (part.measured, part.reserved):
                decodes += sums.decodes
                kv_tokens += sums.peak_kv_tokens
                prefill_tokens += sums.queued_prefill_tokens
        limits = candidate.limits
        return (
            decodes <= limits.decodes
            and kv_tokens <= limits.peak_kv_tokens
            and prefill_tokens <= limits.queued_prefill_tokens
        )


@dataclass(slots=True)
class _Lease:
    home: _Home
    backend: str
    cost: Cost
    sequence: int  # of the write that granted it


class MemoryState:
    """What several replica handles share. Lives in one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds; vectors are aged by it."""
        self._clock = clock
        self._homes: dict[str, _Home] = {}
        self._replicas: dict[str, MemoryStore] = {}
        self._last_epoch = 0

    def replica(self, name: str) -> MemoryStore:
        """A handle of its own. Raises ValueError while another open handle has the name."""
        if name in self._replicas:
            raise ValueError(f"replica {name!r} is there already")
        store = MemoryStore(self, name)
        self._replicas[name] = store
        return store

    def _next_epoch(self) -> int:
        """One count for all backends, so that an epoch is never met again after a backend was removed."""
        self._last_epoch += 1
        return self._last_epoch

    def _tell_others(self, replica: str, backend: str) -> None:
        if len(self._replicas) < 2:
            return
        for name, store in self._replicas.items():
            if name != replica:
                store._notice(backend)

    def _tell_held(self, replica: str, held: tuple[Held, ...]) -> None:
        for name, store in self._replicas.items():
            if name != replica:
                store._notice_held(HeldEvent(replica, held))


class MemoryStore:
    """One replica's handle (`state.contract.Store`). `MemoryStore()` is a store with one replica."""

    def __init__(self, state: MemoryState | None = None, name: str = "only") -> None:
        self._state = state or MemoryState()
        self._name = name
        self._leases: dict[str, _Lease] = {}
        self._ended: set[str] = set()
        self._ended_order: deque[str] = deque()
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._held: tuple[Held, ...] = ()
        self._closed = False

    async def add_backend(self, backend: str, tier: str | None) -> Membership:
        """See the contract. Raises StoreUnavailable after `close`, as all that follow."""
        self._check_open()
        home = self._state._homes.get(backend)
        if home is None:
            home = self._state._homes[backend] = _Home(Membership(tier, self._state._next_epoch()))
            self._state._tell_others(self._name, backend)
        return home.membership

    async def remove_backend(self, backend: str) -> None:
        self._check_open()
        self._state._homes.pop(backend, None)

    async def reserve(self, lease_id: str, candidates: Sequence[ReserveCandidate]) -> Granted | Denied:
        """See the contract. A lease that has ended is denied, so that a late second request cannot revive it."""
        self._check_open()
        standing = self._leases.get(lease_id)
        if standing is not None:
            return Granted(lease_id, standing.backend)
        homes = self._state._homes
        if lease_id not in self._ended:
            for candidate in candidates:
                home = homes.get(candidate.backend)
                if home is not None and home.fits(candidate):
                    self._grant(lease_id, candidate, home)
                    return Granted(lease_id, candidate.backend)
        known = {one.backend: homes[one.backend] for one in candidates if one.backend in homes}
        return Denied(
            lease_id,
            {name: self._foreign(home) for name, home in known.items()},
            {name: home.membership for name, home in known.items()},
        )

    async def release(self, lease_id: str) -> None:
        """See the contract. After `close` there is nothing left to end."""
        if self._closed:
            return
        if lease_id not in self._ended:
            self._remember_ending(lease_id)
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            self._end(lease)

    async def publish(self, publications: Sequence[Publication], held: Sequence[Held] = ()) -> frozenset[str]:
        self._check_open()
        taken = frozenset([one.backend for one in publications if self._publish(one)])
        if tuple(held) != self._held:
            self._held = tuple(held)
            self._state._tell_held(self._name, self._held)
        return taken

    def _publish(self, one: Publication) -> bool:
        home = self._state._homes.get(one.backend)
        if home is None:
            return False
        part = home.part(self._name)
        if one.sequence <= part.sequence:
            return False
        part.publish(one.own, one.sequence)
        part.wrote(self._state._clock(), one.own.age_s)
        self._state._tell_others(self._name, one.backend)
        return True

    def sequence_of(self, backend: str) -> int:
        home = self._state._homes.get(backend)
        part = None if home is None else home.parts.get(self._name)
        return 0 if part is None else part.sequence

    async def claim(self, backend: str, tier: str, expected_epoch: int) -> Changed | Conflict:
        """See the contract. An unknown backend conflicts at epoch 0, which no backend ever has."""
        self._check_open()
        return self._move(backend, tier, expected_epoch)

    async def hand_back(self, backend: str, expected_epoch: int) -> Changed | Conflict:
        """See the contract. A lease counts even when its cost is zero."""
        self._check_open()
        home = self._state._homes.get(backend)
        if home is not None and not all(part.idle for part in home.parts.values()):
            return Conflict(home.membership)
        return self._move(backend, None, expected_epoch)

    async def view(self) -> Mapping[str, BackendLoad]:
        self._check_open()
        return {name: self._load(home) for name, home in self._state._homes.items()}

    def watch(self) -> AsyncIterator[StoreEvent | HeldEvent]:
        """See the contract. Listens from this call on; changes of one backend that were not fetched yet become one
        event, so a slow reader holds at most one per backend. A removed backend is not told of.
        """
        watch = Watch(self._event)
        if self._closed:
            watch.end()
        else:
            self._watches.add(watch)
        return watch

    async def note_engine(self, backend: str, sequences: int) -> None:
        """See the contract. In one process no replica goes without taking its load along."""

    @property
    def mode(self) -> Mode:
        return Mode.SHARED

    @property
    def replicas(self) -> int:
        return len(self._state._replicas) or 1

    async def run(self) -> None:
        """See the contract. Memory needs no upkeep."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """See the contract. Idempotent."""
        if self._closed:
            return
        self._closed = True
        state = self._state
        for lease in self._leases.values():
            self._end(lease)
        self._leases.clear()
        state._replicas.pop(self._name, None)
        if self._held:
            state._tell_held(self._name, ())
        for backend, home in state._homes.items():
            if home.parts.pop(self._name, None) is not None:
                state._tell_others(self._name, backend)
        for watch in tuple(self._watches):
            watch.end()

    def _grant(self, lease_id: str, candidate: ReserveCandidate, home: _Home) -> None:
        part = home.part(self._name)
        cost = candidate.cost
        self._leases[lease_id] = _Lease(home, candidate.backend, cost, part.begin(cost))
        part.wrote(self._state._clock())
        home.paces[cost.tpot_ms] = home.paces.get(cost.tpot_ms, 0) + 1
        self._state._tell_others(self._name, candidate.backend)

    def _end(self, lease: _Lease) -> None:
        home = lease.home
        if self._state._homes.get(lease.backend) is not home:
            return
        part = home.part(self._name)
        part.end(lease.cost, lease.sequence)
        part.wrote(self._state._clock())
        pace = lease.cost.tpot_ms
        left = home.paces[pace] - 1
        if left:
            home.paces[pace] = left
        else:
            del home.paces[pace]
        self._state._tell_others(self._name, lease.backend)

    def _move(self, backend: str, tier: str | None, expected_epoch: int) -> Changed | Conflict:
        home = self._state._homes.get(backend)
        if home is None:
            return Conflict(_NOWHERE)
        if home.membership.epoch != expected_epoch:
            return Conflict(home.membership)
        home.membership = Membership(tier, self._state._next_epoch())
        self._state._tell_others(self._name, backend)
        return Changed(home.membership)

    def _remember_ending(self, lease_id: str) -> None:
        self._ended.add(lease_id)
        self._ended_order.append(lease_id)
        if len(self._ended_order) > _REMEMBERED_ENDINGS:
            self._ended.discard(self._ended_order.popleft())

    def _foreign(self, home: _Home) -> LoadVector:
        now_s = self._state._clock()
        total = LoadVector()
        for name, part in home.parts.items():
            if name != self._name and not part.idle:
                total += part.vector(max(now_s - part.written_s, 0.0) + part.age_s)
        return total

    def _load(self, home: _Home) -> BackendLoad:
        own = home.parts.get(self._name)
        return BackendLoad(home.membership, LoadVector() if own is None else own.vector(0.0), self._foreign(home))

    def _event(self, backend: str) -> StoreEvent | None:
        home = self._state._homes.get(backend)
        return None if home is None else StoreEvent(backend, self._load(home))

    def _notice(self, backend: str) -> None:
        for watch in self._watches:
            watch.notice(backend)

    def _notice_held(self, event: HeldEvent) -> None:
        for watch in self._watches:
            watch.notice_held(event)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable(f"the store handle of replica {self._name!r} is closed")
