"""The sequences that wait for a slot, in the order in which they are admitted."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from tiergate_engine.lockstep import LiveSequence, State

Key = tuple[int, float, int]


def due_s(sequence: LiveSequence) -> float:
    """When the token is due that its prefill brings: the first, or after a preemption the next one."""
    spec = sequence.spec
    return spec.first_due_s + sequence.generated * spec.pace_s if sequence.generated else spec.first_due_s


def by_arrival(sequence: LiveSequence) -> Key:
    """First come, first served. A preempted sequence arrived before everybody who still waits, so arrival alone
    puts it in front."""
    return 0, 0.0, sequence.holder.number


def by_priority(sequence: LiveSequence) -> Key:
    """Small priority values first, then by arrival."""
    return sequence.spec.priority, 0.0, sequence.holder.number


def by_deadline(sequence: LiveSequence) -> Key:
    """Relegated ones last, else the first token that is due, then by arrival."""
    return int(sequence.relegated), due_s(sequence), sequence.holder.number


def by_relegation(sequence: LiveSequence) -> Key:
    """Relegated ones last, then by arrival."""
    return int(sequence.relegated), 0.0, sequence.holder.number


class Waiting:
    """A queue by `key`; who left it is dropped when it comes to the front."""

    def __init__(self, key: Callable[[LiveSequence], Key]) -> None:
        self._key = key
        self._heap: list[tuple[int, float, int, LiveSequence]] = []
        self._late: list[LiveSequence] = []

    def push(self, sequence: LiveSequence) -> None:
        """Queue it."""
        heapq.heappush(self._heap, (*self._key(sequence), sequence))

    def push_late(self, sequence: LiveSequence) -> None:
        """Queue it when `let_late_in` is called: it came after the next step was filled."""
        self._late.append(sequence)

    def let_late_in(self) -> None:
        """Queue those who came late."""
        for sequence in self._late:
            self.push(sequence)
        self._late.clear()

    def pop(self) -> LiveSequence | None:
        """Take the first one that still waits; None when nobody does."""
        while self._heap:
            sequence = heapq.heappop(self._heap)[3]
            if sequence.state is State.WAITING:
                return sequence
        return None
