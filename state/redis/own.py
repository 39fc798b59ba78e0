"""What a replica knows of its own doings, so that it can tell a store that forgot them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from scheduling.load import Cost, LoadVector
from state.contract import Held, Membership
from state.parts import Part
from state.redis.codec import Joined, dump_held, dump_slack


@dataclass(slots=True)
class _Place:
    """One backend, as long as it has one birth (it gets another when it is removed and added again)."""

    birth: int
    part: Part = field(default_factory=Part)


@dataclass(frozen=True, slots=True)
class _Lease:
    backend: str
    birth: int
    sequence: int
    cost: Cost


class Own:
    """Leases and parts by what the store answered. What a lost answer said is missing until asked again."""

    def __init__(self) -> None:
        self.held: tuple[Held, ...] = ()
        self._leases: dict[str, _Lease] = {}
        self._places: dict[str, _Place] = {}
        self._asked: dict[str, int] = {}
        self._released: set[str] = set()
        self._publishing = 0
        self._ended_meanwhile: list[_Lease] = []

    def sequence(self, backend: str) -> int:
        """Of the last write the store told of."""
        place = self._places.get(backend)
        return 0 if place is None else place.part.sequence

    def birth(self, backend: str) -> int | None:
        """The backend's birth as this replica's last write met it."""
        place = self._places.get(backend)
        return None if place is None else place.birth

    def sequences(self) -> dict[str, int]:
        """Of all backends that were written to."""
        return {backend: place.part.sequence for backend, place in self._places.items()}

    def vector(self, backend: str) -> LoadVector:
        place = self._places.get(backend)
        return LoadVector() if place is None else place.part.vector(0.0)

    def asking(self, lease_id: str) -> None:
        """A reservation is under way."""
        self._asked[lease_id] = self._asked.get(lease_id, 0) + 1

    def asked(self, lease_id: str) -> None:
        """It is not under way any more, whatever came of it."""
        left = self._asked[lease_id] - 1
        if left:
            self._asked[lease_id] = left
        else:
            del self._asked[lease_id]
            self._released.discard(lease_id)

    def granted(self, lease_id: str, backend: str, birth: int, sequence: int, cost: Cost) -> None:
        """The store granted a lease."""
        place = self._place(backend, birth)
        if lease_id not in self._leases and lease_id not in self._released:
            newest = max(place.part.sequence, sequence)
            place.part.begin(cost)
            place.part.sequence = newest
            self._leases[lease_id] = _Lease(backend, birth, sequence, cost)
        self.wrote(backend, sequence)

    def releasing(self, lease_id: str) -> None:
        """A release is about to be asked for: from now on nobody is told of this lease again."""
        if lease_id in self._asked:
            self._released.add(lease_id)
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        if self._publishing:
            self._ended_meanwhile.append(lease)
        place = self._places.get(lease.backend)
        if place is not None and place.birth == lease.birth:
            sequence = place.part.sequence
            place.part.end(lease.cost, lease.sequence)
            place.part.sequence = sequence  # the store's answer says it

    def wrote(self, backend: str, sequence: int) -> None:
        """The store told the sequence of a write."""
        place = self._places.get(backend)
        if place is not None:
            place.part.sequence = max(place.part.sequence, sequence)

    def publishing(self) -> int:
        """A publish is under way. Returns what `published` is to be told."""
        self._publishing += 1
        return len(self._ended_meanwhile)

    def publish_over(self) -> None:
        """It is not under way any more, whatever came of it."""
        self._publishing -= 1
        if not self._publishing:
            self._ended_meanwhile.clear()

    def published(self, backend: str, birth: int, own: LoadVector, sequence: int, since: int) -> None:
        """A publication was taken. Leases that ended while it was under way were in it, and ended after it."""
        part = self._place(backend, birth).part
        newest = max(part.sequence, sequence)
        part.publish(own, sequence)
        part.sequence = newest
        for lease in self._ended_meanwhile[since:]:
            if lease.backend == backend and lease.sequence <= sequence:
                part.measured.take(lease.cost, 0)
        if not part.leases and len(self._ended_meanwhile) > since:
            part.publish(LoadVector(), sequence)
            part.sequence = newest

    def met(self, backend: str, birth: int, sequence: int) -> None:
        """A publication was refused; the store's last write there has this sequence."""
        part = self._place(backend, birth).part
        part.sequence = max(part.sequence, sequence)

    def forget(self, backend: str) -> None:
        """The backend was removed."""
        self._places.pop(backend, None)
        for lease_id in [name for name, lease in self._leases.items() if lease.backend == backend]:
            del self._leases[lease_id]

    def account(self, era: int, memberships: Mapping[str, Membership]) -> bytes:
        """All of it, for `join`."""
        parts = [
            (
                backend,
                place.birth,
                place.part.measured.decodes,
                place.part.measured.peak_kv_tokens,
                place.part.measured.queued_prefill_tokens,
                place.part.measured.residents,
                place.part.sequence,
                place.part.published,
                dump_slack(place.part.slack, place.part.queued_slack),
            )
            for backend, place in self._places.items()
        ]
        leases = [
            (
                lease_id,
                lease.backend,
                lease.birth,
                lease.sequence,
                lease.cost.decodes,
                lease.cost.peak_kv_tokens,
                lease.cost.prefill_tokens,
                lease.cost.tier,
                repr(lease.cost.tpot_ms),
            )
            for lease_id, lease in self._leases.items()
        ]
        backends = [(name, member.tier, member.epoch) for name, member in memberships.items()]
        known = {
            "era": era,
            "backends": backends,
            "parts": parts,
            "leases": leases,
            "held": dump_held(self.held).decode(),
        }
        return orjson.dumps(known)

    def rejoined(self, joined: Joined, *, emptied: bool) -> None:
        """The store took the account. What it had no place for is forgotten."""
        for backend in list(self._places):
            place = self._places[backend]
            birth = joined.births.get(backend)
            if birth is None or (birth != place.birth and not emptied and backend not in joined.remade):
                self.forget(backend)
                continue
            place.birth = birth
            place.part.sequence = max(place.part.sequence, joined.sequences[backend])
        for lease_id, lease in list(self._leases.items()):
            self._leases[lease_id] = _Lease(
                lease.backend, joined.births[lease.backend], lease.sequence, lease.cost
            )

    def _place(self, backend: str, birth: int) -> _Place:
        place = self._places.get(backend)
        if place is None or place.birth != birth:
            if place is not None:
                self.forget(backend)
            place = self._places[backend] = _Place(birth)
        return place
