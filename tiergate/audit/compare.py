"""Comparing what was read. Pure: readings in, differences out.

The store is read in one step, so what it says of itself must add up at any moment. Replicas and engines are read a
moment later, and in between requests come and go. So all is read several times, and only what is there every time
counts: a lease by its name, an engine's sequences by bounds that any request on its way satisfies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from state.inventory import Damage, Inventory, contradictions
from tiergate.audit.causes import CAUSES, Cause, Kind
from tiergate.audit.readings import Carried, Reading, Readings, plain_lease

# Leases that one side alone has: what a replica measures and what its leases come to differ by them.
_EXPLAIN_DRIFT = frozenset({Kind.LEAKED_LEASE, Kind.UNCOUNTED_LEASE})


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference, and where."""

    kind: Kind | Damage
    detail: str
    backend: str | None = None
    replica: str | None = None
    lease: str | None = None

    @property
    def cause(self) -> Cause:
        return CAUSES[self.kind]

    @property
    def key(self) -> tuple[Kind | Damage, str | None, str | None, str | None]:
        """What it is called at every reading; the detail may change."""
        return self.kind, self.backend, self.replica, self.lease


@dataclass(frozen=True, slots=True)
class Verdict:
    """What stands at every reading, and how many differences were only on their way."""

    differences: tuple[Difference, ...]
    passing: int


def compare(read: Readings) -> Verdict:
    """All differences. Needs two readings at least to tell what is on its way."""
    rounds = [_of_one(reading, read.lease_s) for reading in read.readings]
    lasting = set.intersection(*({one.key for one in found} for found in rounds)) if rounds else set()
    every = {one.key for found in rounds for one in found}
    last = [one for one in rounds[-1] if one.key in lasting] if rounds else []
    explained = {(one.replica, one.backend) for one in last if one.kind in _EXPLAIN_DRIFT}
    drifts = [one for one in _drift(read.readings) if (one.replica, one.backend) not in explained]
    engines = [*_engines_with_more(read.readings), *_engines_with_less(read.readings)]
    return Verdict((*_unique(last), *drifts, *engines), len(every - lasting))


def _unique(found: Iterable[Difference]) -> Iterator[Difference]:
    seen = set()
    for one in found:
        if one.key not in seen:
            seen.add(one.key)
            yield one


def _of_one(reading: Reading, lease_s: float) -> list[Difference]:
    """Differences within one reading."""
    found = [
        Difference(one.damage, one.detail, one.backend, one.replica, one.lease)
        for one in contradictions(reading.after, lease_s)
    ]
    found += _dead(reading.after, lease_s)
    found += _nobodys(reading)
    for told in reading.told.values():
        found += _replica(reading, told)
    return found


def _dead(store: Inventory, lease_s: float) -> Iterator[Difference]:
    for replica, silent_s in store.orphans.items():
        loads = {backend: part.load for (name, backend), part in store.parts.items() if name == replica}
        what = "; ".join(f"{load} on {backend}" for backend, load in sorted(loads.items()) if not load.idle)
        left_s = max(2 * lease_s - silent_s, 0.0)
        detail = f"silent for {silent_s:.1f} s, taken out in {left_s:.1f} s at the latest; still counted: "
        yield Difference(Kind.DEAD_REPLICA, detail + (what or "nothing"), None, replica)


def _nobodys(reading: Reading) -> Iterator[Difference]:
    """Backends that no replica serves, when all replicas were asked."""
    if not reading.told or not set(reading.after.live) <= set(reading.told):
        return
    served = {one.name for told in reading.told.values() for one in told.backends}
    for backend in sorted(set(reading.before.standings) & set(reading.after.standings) - served):
        yield Difference(Kind.NOBODYS_BACKEND, "no replica has it in its configuration", backend)


def _replica(reading: Reading, told: Carried) -> Iterator[Difference]:
    before, after, name = reading.before, reading.after, told.replica
    if told.mode != "shared":
        yield Difference(Kind.ALONE, f"it says that it stands {told.mode!r} to the store", None, name)
    if name not in before.live and name not in after.live:
        count = len(told.leases)
        yield Difference(
            Kind.UNREGISTERED_REPLICA,
            f"the store does not count it as alive; it carries {count} leases",
            None,
            name,
        )
    else:
        yield from _leases(reading, told)
    for backend in told.backends:
        if backend.epoch is None:
            continue
        stands = (before.standings.get(backend.name), after.standings.get(backend.name))
        if stands == (None, None):
            yield Difference(
                Kind.BACKEND_NOT_IN_STORE, "the replica serves it, the store does not know it", backend.name, name
            )
        elif all(one is not None and (one.epoch, one.tier) != (backend.epoch, backend.tier) for one in stands):
            stored = after.standings[backend.name]
            detail = (
                f"the replica has it in {backend.tier or 'the pool'} at epoch {backend.epoch}, "
                f"the store in {stored.tier or 'the pool'} at epoch {stored.epoch}"
            )
            yield Difference(Kind.MEMBERSHIP, detail, backend.name, name)


def _leases(reading: Reading, told: Carried) -> Iterator[Difference]:
    """Lease by lease: what stands in the store at both looks, and what the replica has in between."""
    name = told.replica
    before = {lease for replica, lease in reading.before.leases if replica == name}
    after = {lease for replica, lease in reading.after.leases if replica == name}
    carried = {one.lease for one in told.leases}
    for lease in sorted(before & after):
        if plain_lease(lease) not in carried | told.passing and lease not in told.passing:
            stored = reading.after.leases[name, lease]
            detail = f"the store counts lease {lease} ({stored.decodes} sequences), the replica does not have it"
            yield Difference(Kind.LEAKED_LEASE, detail, stored.backend, name, lease)
    counted = {plain_lease(lease) for lease in before | after}
    for one in told.leases:
        if one.lease not in counted:
            detail = f"the replica has lease {one.lease} ({one.sequences} sequences), the store does not count it"
            yield Difference(Kind.UNCOUNTED_LEASE, detail, one.backend, name, one.lease)


def _drift(readings: Sequence[Reading]) -> Iterator[Difference]:
    """Live replicas whose part never agrees with their own leases, and always errs on the same side."""
    pictures = [picture for reading in readings for picture in (reading.before, reading.after)]
    gaps: dict[tuple[str, str], list[float]] = {}
    for picture in pictures:
        leased: dict[tuple[str, str], int] = {}
        for (replica, _), lease in picture.leases.items():
            place = (replica, lease.backend)
            leased[place] = leased.get(place, 0) + lease.decodes
        for place in picture.parts.keys() | leased.keys():
            if place[0] in picture.live and leased.get(place):
                part = picture.parts.get(place)
                counted = 0.0 if part is None else part.load.decodes
                gaps.setdefault(place, []).append(counted - leased.get(place, 0))
    for (replica, backend), found in sorted(gaps.items()):
        if len(found) == len(pictures) and (min(found) > 0 or max(found) < 0):
            least = min(abs(gap) for gap in found)
            side = "more" if found[0] > 0 else "fewer"
            detail = f"its part counts at least {least:g} sequences {side} than its leases have"
            yield Difference(Kind.LOAD_DRIFT, detail, backend, replica)


def _engines_with_more(readings: Sequence[Reading]) -> Iterator[Difference]:
    """Engines with more sequences than anybody counted, now or at the reading before."""
    over: dict[str, list[float]] = {}
    for earlier, now in pairwise(readings):
        for backend, sequences in now.engines.items():
            if sequences is not None:
                most = _counted_at_any_time((earlier, now), backend)
                over.setdefault(backend, []).append(sequences - most)
    for backend, found in sorted(over.items()):
        if len(found) == len(readings) - 1 and min(found) > 0:
            detail = (
                f"the engine has at least {min(found):g} sequences more, running and waiting, than are counted"
            )
            yield Difference(Kind.ENGINE_HAS_MORE, detail, backend)


def _counted_at_any_time(readings: Sequence[Reading], backend: str) -> int:
    """Sequences of all leases that stood at any of these looks, in the store or at a replica."""
    leases: dict[tuple[str, str], int] = {}
    for reading in readings:
        for picture in (reading.before, reading.after):
            for (replica, name), lease in picture.leases.items():
                if lease.backend == backend:
                    leases[replica, plain_lease(name)] = lease.decodes
        for told in reading.told.values():
            for one in told.leases:
                if one.backend == backend:
                    leases[told.replica, one.lease] = one.sequences
    return sum(leases.values())


def _engines_with_less(readings: Sequence[Reading]) -> Iterator[Difference]:
    """Engines with fewer sequences than replicas were served by all the time from one reading to the next."""
    under: dict[str, list[float]] = {}
    for now, later in pairwise(readings):
        for backend, sequences in now.engines.items():
            if sequences is not None:
                least = sum(_served_throughout(now, later, backend).values())
                under.setdefault(backend, []).append(least - sequences)
    for backend, found in sorted(under.items()):
        if len(found) == len(readings) - 1 and min(found) > 0:
            detail = f"the engine has at least {min(found):g} sequences fewer than replicas are being served by it"
            yield Difference(Kind.ENGINE_HAS_LESS, detail, backend)


def _served_throughout(now: Reading, later: Reading, backend: str) -> dict[tuple[str, str], int]:
    """Streams that ran at both readings. The end of one that had ended before the first was told by the second."""
    return dict(_running(now, backend).items() & _running(later, backend).items())


def _running(reading: Reading, backend: str) -> dict[tuple[str, str], int]:
    return {
        (told.replica, one.lease): one.sequences
        for told in reading.told.values()
        for one in told.leases
        if one.backend == backend and one.stage == "running"
    }
