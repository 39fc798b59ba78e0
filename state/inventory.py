"""Everything a shared store keeps of a fleet at one moment, and where it contradicts itself.

A store changes all of this in one step at a time, so within one picture every sum has to be right: a contradiction
is damage, never a matter of timing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

_PACE_MS = 1e-6  # paces are equal when they differ by less: they travel as text


@dataclass(frozen=True, slots=True)
class Counted:
    """Load as it is counted."""

    decodes: float = 0
    kv_tokens: float = 0
    prefill_tokens: float = 0
    leases: float = 0
    residents: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Counted) -> Counted:
        residents = dict(self.residents)
        for tier, count in other.residents.items():
            residents[tier] = residents.get(tier, 0) + count
        return Counted(
            self.decodes + other.decodes,
            self.kv_tokens + other.kv_tokens,
            self.prefill_tokens + other.prefill_tokens,
            self.leases + other.leases,
            residents,
        )

    @property
    def idle(self) -> bool:
        return not (
            self.decodes or self.kv_tokens or self.prefill_tokens or self.leases or any(self.residents.values())
        )

    @property
    def negative(self) -> bool:
        numbers = (self.decodes, self.kv_tokens, self.prefill_tokens, self.leases, *self.residents.values())
        return any(number < 0 for number in numbers)

    def __str__(self) -> str:
        tiers = ", ".join(f"{tier} {count:g}" for tier, count in sorted(self.residents.items()) if count)
        return (
            f"{self.decodes:g} sequences, {self.kv_tokens:g} KV tokens, {self.prefill_tokens:g} prompt tokens, "
            f"{self.leases:g} leases" + (f" ({tiers})" if tiers else "")
        )


@dataclass(frozen=True, slots=True)
class Standing:
    """How a backend stands: membership, and the totals that reservations are checked against."""

    tier: str | None
    epoch: int
    birth: int
    tightest_ms: float
    total: Counted


@dataclass(frozen=True, slots=True)
class CarriedPart:
    """What one replica carries on one backend. `age_s`: since it was measured."""

    load: Counted
    measured_leases: float
    age_s: float


@dataclass(frozen=True, slots=True)
class StoredLease:
    """One lease. `ended`: it is also among those that ended."""

    backend: str
    birth: int
    decodes: int
    tier: str
    pace_ms: float
    ended: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    """The whole of it.

    Attributes:
        born_ms, last_epoch, beaten_ms: when the state began, the last epoch given, when a replica last beat; None
            when the store does not say.
        parts: by replica and backend. leases: by replica and lease.
        live, orphans: replicas, and for how long each has been silent.
        held: replicas that told what they hold.
        unreadable: names of fields that are not as this version writes them.
        addresses: where replicas say that they can be asked.
        strays: keys of this fleet that belong to nobody known, or to another version; None when not looked for.
    """

    taken_ms: int
    born_ms: int | None = None
    last_epoch: int | None = None
    beaten_ms: int | None = None
    standings: Mapping[str, Standing] = field(default_factory=dict)
    parts: Mapping[tuple[str, str], CarriedPart] = field(default_factory=dict)
    paces: Mapping[str, Mapping[float, int]] = field(default_factory=dict)
    leases: Mapping[tuple[str, str], StoredLease] = field(default_factory=dict)
    live: Mapping[str, float] = field(default_factory=dict)
    orphans: Mapping[str, float] = field(default_factory=dict)
    held: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    addresses: Mapping[str, str] = field(default_factory=dict)
    strays: tuple[str, ...] | None = None


class Damage(Enum):
    """How a store contradicts itself."""

    TOTALS = "totals"
    NEGATIVE = "negative"
    LEASE_COUNT = "lease count"
    LOAD_WITHOUT_LEASE = "load without lease"
    PACES = "paces"
    TIGHTEST = "tightest pace"
    UNKNOWN_BACKEND = "unknown backend"
    UNKNOWN_REPLICA = "unknown replica"
    ENDED_LEASE = "ended lease"
    EPOCH = "epoch"
    UNREADABLE = "unreadable"
    STRAY_KEY = "stray key"
    OVERDUE = "overdue"


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One of them, and where."""

    damage: Damage
    detail: str
    backend: str | None = None
    replica: str | None = None
    lease: str | None = None


def contradictions(seen: Inventory, lease_s: float) -> Iterator[Contradiction]:
    """All that is wrong within one picture. `lease_s` is the store's lease time."""
    yield from _totals(seen)
    yield from _parts(seen)
    yield from _paces(seen)
    yield from _leases(seen)
    yield from _replicas(seen, lease_s)
    yield from _epochs(seen)
    for name in seen.unreadable:
        yield Contradiction(Damage.UNREADABLE, f"{name!r} is not as this version of Tiergate writes it")
    for name in seen.strays or ():
        yield Contradiction(Damage.STRAY_KEY, f"the key {name!r} belongs to nobody who is known")


def _totals(seen: Inventory) -> Iterator[Contradiction]:
    sums: dict[str, Counted] = {}
    for (_, backend), part in seen.parts.items():
        sums[backend] = sums.get(backend, Counted()) + part.load
    for backend, standing in seen.standings.items():
        total, summed = standing.total, sums.get(backend, Counted())
        if total.negative:
            yield Contradiction(Damage.NEGATIVE, f"the total is {total}", backend)
        if not _equal(total, summed):
            yield Contradiction(
                Damage.TOTALS, f"the total is {total}; the replicas' parts come to {summed}", backend
            )


def _equal(one: Counted, other: Counted) -> bool:
    same = all(
        one.residents.get(tier, 0) == other.residents.get(tier, 0) for tier in {*one.residents, *other.residents}
    )
    return same and (one.decodes, one.kv_tokens, one.prefill_tokens, one.leases) == (
        other.decodes,
        other.kv_tokens,
        other.prefill_tokens,
        other.leases,
    )


def _parts(seen: Inventory) -> Iterator[Contradiction]:
    standing_leases = Counter(
        (replica, lease.backend)
        for (replica, _), lease in seen.leases.items()
        if lease.backend in seen.standings and seen.standings[lease.backend].birth == lease.birth
    )
    for replica, backend in seen.parts.keys() | standing_leases.keys():
        part = seen.parts.get((replica, backend))
        load = Counted() if part is None else part.load
        leases = standing_leases[replica, backend]
        if backend not in seen.standings:
            yield Contradiction(
                Damage.UNKNOWN_BACKEND, f"it carries {load} on a backend that is not known", backend, replica
            )
            continue
        if load.negative:
            yield Contradiction(Damage.NEGATIVE, f"the part is {load}", backend, replica)
        if replica in seen.orphans:
            continue  # the engine's own count may have taken from it what its leases still name
        if load.leases != leases:
            yield Contradiction(
                Damage.LEASE_COUNT, f"the part counts {load.leases:g} leases, and {leases} stand", backend, replica
            )
        elif not leases and not load.idle:
            yield Contradiction(
                Damage.LOAD_WITHOUT_LEASE, f"the part is {load}, and no lease stands", backend, replica
            )


def _paces(seen: Inventory) -> Iterator[Contradiction]:
    wanted: dict[str, Counter[float]] = {}
    for lease in seen.leases.values():
        standing = seen.standings.get(lease.backend)
        if standing is not None and standing.birth == lease.birth and lease.pace_ms != float("inf"):
            wanted.setdefault(lease.backend, Counter())[round(lease.pace_ms, 6)] += 1
    for backend in seen.paces.keys() | wanted.keys():
        counted = {round(pace, 6): count for pace, count in seen.paces.get(backend, {}).items() if count}
        leased = dict(wanted.get(backend, {}))
        if counted != leased:
            detail = f"counted by pace (ms): {_listed(counted)}; the leases have {_listed(leased)}"
            yield Contradiction(Damage.PACES, detail, backend)
    for backend, standing in seen.standings.items():
        tightest_ms = min(seen.paces.get(backend, {}), default=float("inf"))
        if tightest_ms != standing.tightest_ms and abs(tightest_ms - standing.tightest_ms) > _PACE_MS:
            detail = (
                f"the tightest pace is {standing.tightest_ms:g} ms; the paces counted make it {tightest_ms:g} ms"
            )
            yield Contradiction(Damage.TIGHTEST, detail, backend)


def _listed(paces: Mapping[float, int]) -> str:
    return ", ".join(f"{count} at {pace:g}" for pace, count in sorted(paces.items())) or "none"


def _leases(seen: Inventory) -> Iterator[Contradiction]:
    for (replica, name), lease in seen.leases.items():
        if lease.ended:
            detail = f"lease {name} stands and has ended"
            yield Contradiction(Damage.ENDED_LEASE, detail, lease.backend, replica, name)


def _replicas(seen: Inventory, lease_s: float) -> Iterator[Contradiction]:
    known = {*seen.live, *seen.orphans}
    carried: dict[str, Counted] = {}
    for (replica, _), part in seen.parts.items():
        carried[replica] = carried.get(replica, Counted()) + part.load
    leases = Counter(replica for replica, _ in seen.leases)
    for replica in sorted({*carried, *leases, *seen.held} - known):
        load = carried.get(replica, Counted())
        detail = f"it is neither alive nor given up, and has {load} and {leases[replica]} leases"
        yield Contradiction(Damage.UNKNOWN_REPLICA, detail, None, replica)
    for replica, silent_s in sorted(seen.live.items()):
        if silent_s > 2 * lease_s:
            detail = (
                f"it has been silent for {silent_s:.1f} s and still counts as alive (lease time {lease_s:g} s)"
            )
            yield Contradiction(Damage.OVERDUE, detail, None, replica)
    for replica, silent_s in sorted(seen.orphans.items()):
        if silent_s > 3 * lease_s:
            detail = f"it was given up, has been silent for {silent_s:.1f} s, and its load still counts"
            yield Contradiction(Damage.OVERDUE, detail, None, replica)


def _epochs(seen: Inventory) -> Iterator[Contradiction]:
    if seen.standings and seen.born_ms is None:
        yield Contradiction(Damage.EPOCH, "there are backends, and the state has no beginning")
    for backend, standing in seen.standings.items():
        last = seen.last_epoch
        if last is None or standing.epoch > last:
            detail = f"its epoch {standing.epoch} is beyond the last one given ({last})"
            yield Contradiction(Damage.EPOCH, detail, backend)
        elif standing.birth > standing.epoch:
            yield Contradiction(
                Damage.EPOCH, f"its epoch {standing.epoch} is before its birth {standing.birth}", backend
            )
