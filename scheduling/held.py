"""Requests that wait for a place: one queue a tier by the policy's key, and when each wait ends."""

from __future__ import annotations

import math
from enum import Enum
from heapq import heappop, heappush

from scheduling.decisions import Decision, Outcome
from scheduling.feasible import Ask
from scheduling.ledger import Resident
from scheduling.requests import Request
from scheduling.tiers import Tier


class Phase(Enum):
    """Where a request is. Illegal moves are bugs, and raise."""

    NEW = "new"
    HELD = "held"
    RESERVING = "reserving"
    OPEN = "open"
    DONE = "done"


_MOVES = {
    Phase.NEW: {Phase.HELD, Phase.RESERVING, Phase.DONE},
    Phase.HELD: {Phase.RESERVING, Phase.DONE},
    Phase.RESERVING: {Phase.HELD, Phase.RESERVING, Phase.OPEN, Phase.DONE},
    Phase.OPEN: {Phase.HELD, Phase.RESERVING, Phase.DONE},
    Phase.DONE: set[Phase](),
}


class Ticket:
    """One request on its way. Lives until it is answered, refused or gone."""

    __slots__ = (
        "ask",
        "attempts",
        "backend",
        "cause",
        "decision",
        "excluded",
        "gone",
        "lease_id",
        "outcome",
        "phase",
        "relegated",
        "request",
        "resident",
        "store_refusals",
        "tier",
        "until_s",
    )

    def __init__(self, request: Request, tier: Tier, ask: Ask) -> None:
        self.request = request
        self.tier = tier
        self.ask = ask
        self.phase = Phase.NEW
        self.attempts = 0
        self.store_refusals = 0
        self.excluded: frozenset[str] = frozenset()
        self.lease_id: str | None = None
        self.backend: str | None = None
        self.resident: Resident | None = None
        self.decision: Decision | None = None
        self.outcome: Outcome | None = None
        self.relegated = False
        self.gone = False
        self.until_s = math.inf
        self.cause = ""

    def move(self, phase: Phase) -> None:
        if phase not in _MOVES[self.phase]:
            raise AssertionError(f"request {self.request.request_id}: {self.phase.value} -> {phase.value}")
        self.phase = phase


class HeldQueue:
    """A heap of held tickets. A ticket that left is skipped when it surfaces; `len` counts the live ones."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Ticket]] = []
        self._next = 0
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def push(self, key: float, ticket: Ticket) -> None:
        heappush(self._heap, (key, self._next, ticket))
        self._next += 1
        self._live += 1

    def left(self) -> None:
        """A ticket of this queue is held no longer."""
        self._live -= 1
        if not self._live:
            self._heap.clear()

    def head(self) -> Ticket | None:
        heap = self._heap
        while heap:
            ticket = heap[0][2]
            if ticket.phase is Phase.HELD and not ticket.gone:
                return ticket
            heappop(heap)
        return None

    def live(self) -> list[Ticket]:
        """All held tickets, in order; for looking at, not for deciding."""
        return [entry[2] for entry in sorted(self._heap) if entry[2].phase is Phase.HELD]


class Alarms:
    """When the waits end."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Ticket]] = []
        self._next = 0

    def set(self, at_s: float, ticket: Ticket) -> None:
        if math.isfinite(at_s):
            heappush(self._heap, (at_s, self._next, ticket))
            self._next += 1

    def next_s(self) -> float:
        heap = self._heap
        while heap and (heap[0][2].phase is not Phase.HELD or heap[0][2].until_s != heap[0][0]):
            heappop(heap)
        return heap[0][0] if heap else math.inf

    def due(self, now_s: float) -> list[Ticket]:
        due: list[Ticket] = []
        while self.next_s() <= now_s:
            due.append(heappop(self._heap)[2])
        return due
