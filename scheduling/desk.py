"""All tickets of a replica: who waits, who has a lease, and how many there are of each.

Every move of a ticket from one phase to the next happens here, so the counts cannot drift from the truth.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush, nsmallest

from scheduling.events import EndKind
from scheduling.tickets import Phase, Ticket
from scheduling.tiers import TierSet

RELEGATED = "(relegated)"
"""Name of the queue of those whose promise was given up."""

Kind = tuple[str, frozenset[str], frozenset[str]]
"""Requests that may use the same backends: their model, and where they failed before. Each kind waits in a queue
of its own, so that a request whom a backend cannot help does not bar the way for the others of its tier."""


@dataclass(slots=True)
class Counts:
    """Conservation: arrived = finished + failed + cancelled + refused + held + reserving + open."""

    arrived: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    held: int = 0
    reserving: int = 0
    open: int = 0

    @property
    def conserved(self) -> bool:
        ended = self.finished + self.failed + self.cancelled + self.refused
        return self.arrived == ended + self.held + self.reserving + self.open


_Entry = tuple[float, int, Ticket]


class Queue:
    """A heap of held tickets. An entry whose wait is over is skipped when it surfaces; `len` counts the live."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def push(self, key: float, number: int, ticket: Ticket) -> None:
        heappush(self._heap, (key, number, ticket))
        self._live += 1

    def left(self) -> None:
        """One of its tickets is held no longer."""
        self._live -= 1

    def front(self) -> _Entry | None:
        """Its first entry: key, number, ticket."""
        heap = self._heap
        while heap:
            if _waits(heap[0]):
                return heap[0]
            heappop(heap)
        return None

    def behind(self, count: int) -> list[_Entry]:
        """The `count` after the first, in order."""
        return nsmallest(count + 1, filter(_waits, self._heap))[1:]

    def live(self) -> list[Ticket]:
        """All of them in order; for looking at, not for deciding."""
        return [entry[2] for entry in sorted(self._heap) if _waits(entry)]


def _waits(entry: _Entry) -> bool:
    _, number, ticket = entry
    return ticket.phase is Phase.HELD and ticket.held_number == number


class Desk:
    """Tickets by request and by lease, queues by tier, and the alarms that end waits."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._requests: dict[str, Ticket] = {}
        self._leases: dict[str, Ticket] = {}
        self._queues: dict[str, dict[Kind, Queue]] = {}
        self._alarms: list[tuple[float, int, Ticket]] = []
        self._yielding: list[tuple[float, int, Ticket]] = []
        self._waits = 0

    # --- finding -------------------------------------------------------------------------------------------

    def of_request(self, request_id: str) -> Ticket | None:
        return self._requests.get(request_id)

    def of_lease(self, lease_id: str) -> Ticket | None:
        return self._leases.get(lease_id)

    def head(self, name: str, but: Collection[Kind] = ()) -> Ticket | None:
        """The first who waits for a tier (or of the RELEGATED), of all kinds but some; None when nobody does."""
        queues = self._queues.get(name)
        if not queues:
            return None
        fronts = [front for kind, queue in queues.items() if kind not in but and (front := queue.front())]
        return min(fronts)[2] if fronts else None

    def behind(self, name: str, count: int) -> list[Ticket]:
        """Those after the first of each kind who wait for a tier, up to `count` of each, in order."""
        queues = self._queues.get(name, {}).values()
        return [entry[2] for entry in sorted(entry for queue in queues for entry in queue.behind(count))]

    def queued(self, name: str) -> int:
        return sum(map(len, self._queues.get(name, {}).values()))

    def waits_before(self, ticket: Ticket, key: float) -> bool:
        """Whether one of its tier and kind waits that goes before it."""
        queue = self._queues.get(_queue_name(ticket), {}).get(kind_of(ticket))
        front = queue.front() if queue is not None else None
        return front is not None and front[0] <= key

    def held(self, tiers: TierSet) -> Mapping[str, int]:
        """How many wait, by tier (and RELEGATED), where anybody ever did."""
        names = [tier.name for tier in tiers.tiers]
        return {name: self.queued(name) for name in [*names, RELEGATED] if name in self._queues}

    def waiting(self) -> list[Ticket]:
        """All who wait, queue by queue; for looking at."""
        return [ticket for queues in self._queues.values() for queue in queues.values() for ticket in queue.live()]

    def all(self) -> list[Ticket]:
        """Every request that has not ended."""
        return list(self._requests.values())

    # --- moving --------------------------------------------------------------------------------------------

    def arrive(self, ticket: Ticket) -> None:
        request_id = ticket.request.request_id
        if request_id in self._requests:
            raise AssertionError(f"request {request_id} arrived twice")
        self._requests[request_id] = ticket
        self.counts.arrived += 1

    def hold(self, ticket: Ticket, key: float) -> None:
        """Into its queue, until `ticket.until_s`."""
        self._move(ticket, Phase.HELD)
        self._waits += 1
        ticket.held_number = self._waits
        queues = self._queues.setdefault(_queue_name(ticket), {})
        queues.setdefault(kind_of(ticket), Queue()).push(key, self._waits, ticket)
        if math.isfinite(ticket.until_s):
            heappush(self._alarms, (ticket.until_s, self._waits, ticket))

    def yields(self, ticket: Ticket) -> None:
        """One that is held is to be looked at again at `yields_until_s`."""
        assert ticket.yields_until_s is not None
        heappush(self._yielding, (ticket.yields_until_s, ticket.held_number, ticket))

    def unhold(self, ticket: Ticket) -> None:
        """Out of its queue, before its promise or tier (and so its queue) changes."""
        self._move(ticket, Phase.NEW)

    def lease(self, ticket: Ticket, lease_id: str, backend: str) -> None:
        self._move(ticket, Phase.RESERVING)
        ticket.lease_id = lease_id
        ticket.backend = backend
        self._leases[lease_id] = ticket

    def opened(self, ticket: Ticket) -> None:
        self._move(ticket, Phase.OPEN)

    def unlease(self, ticket: Ticket) -> tuple[str, str] | None:
        """Its lease and backend, which are its no more; None when it had none."""
        lease_id, backend = ticket.lease_id, ticket.backend
        if lease_id is None or backend is None:
            return None
        del self._leases[lease_id]
        ticket.lease_id = ticket.backend = None
        return lease_id, backend

    def refuse(self, ticket: Ticket) -> None:
        self._finish(ticket)
        self.counts.refused += 1

    def end(self, ticket: Ticket, kind: EndKind) -> None:
        self._finish(ticket)
        if kind is EndKind.FINISHED:
            self.counts.finished += 1
        elif kind is EndKind.FAILED:
            self.counts.failed += 1
        else:
            self.counts.cancelled += 1

    def _finish(self, ticket: Ticket) -> None:
        self._move(ticket, Phase.DONE)
        del self._requests[ticket.request.request_id]

    def _move(self, ticket: Ticket, phase: Phase) -> None:
        self._count(ticket.phase, -1)
        if ticket.phase is Phase.HELD:
            queues, kind = self._queues[_queue_name(ticket)], kind_of(ticket)
            queues[kind].left()
            if not queues[kind]:
                del queues[kind]
        ticket.move(phase)
        self._count(phase, 1)

    def _count(self, phase: Phase, change: int) -> None:
        if phase is Phase.HELD:
            self.counts.held += change
        elif phase is Phase.RESERVING:
            self.counts.reserving += change
        elif phase is Phase.OPEN:
            self.counts.open += change

    # --- alarms --------------------------------------------------------------------------------------------

    def next_alarm_s(self) -> float:
        """When the next wait ends; infinity when none does."""
        return _first_s(self._alarms)

    def due(self, now_s: float) -> list[Ticket]:
        """Those whose wait ends by now. They still count as held."""
        return _take_due(self._alarms, now_s)

    def next_yielded_s(self) -> float:
        """When the next has let others go first for long enough; infinity when nobody does."""
        return _first_s(self._yielding)

    def yielded(self, now_s: float) -> list[Ticket]:
        """Those who have by now. They still count as held."""
        return _take_due(self._yielding, now_s)

    def firsts(self, name: str) -> list[Ticket]:
        """The first who waits for a tier, of each model."""
        fronts: dict[str, _Entry] = {}
        for (model, _, _), queue in self._queues.get(name, {}).items():
            front = queue.front()
            if front is not None and (model not in fronts or front < fronts[model]):
                fronts[model] = front
        return [front[2] for front in fronts.values()]


def _first_s(alarms: list[tuple[float, int, Ticket]]) -> float:
    while alarms and not _waits(alarms[0]):
        heappop(alarms)
    return alarms[0][0] if alarms else math.inf


def _take_due(alarms: list[tuple[float, int, Ticket]], now_s: float) -> list[Ticket]:
    due: list[Ticket] = []
    while _first_s(alarms) <= now_s:
        due.append(heappop(alarms)[2])
    return due


def kind_of(ticket: Ticket) -> Kind:
    return ticket.request.model, ticket.excluded, ticket.misfits


def _queue_name(ticket: Ticket) -> str:
    return RELEGATED if ticket.relegated else ticket.tier.name
