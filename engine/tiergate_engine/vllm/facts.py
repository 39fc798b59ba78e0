"""What the engine's recent steps held, and how long they took."""

from __future__ import annotations

from collections import deque

from tiergate_engine.control import StepFact, StepFacts

KEPT_STEPS = 4096
"""About 20 s of steps of 5 ms: a gateway that asks every second misses none."""


class FactsRing:
    """The last steps, each with a number that counts from the engine's start."""

    def __init__(self, run_id: str, kept: int = KEPT_STEPS) -> None:
        self.run_id = run_id
        self._facts: deque[StepFact] = deque(maxlen=kept)
        self.steps = 0

    def add(self, fact: StepFact) -> None:
        """A step ended."""
        self._facts.append(fact)
        self.steps += 1

    def since(self, number: int) -> StepFacts:
        """The steps from `number` on, as far as they are still known."""
        oldest = self.steps - len(self._facts)
        first = min(max(number, oldest), self.steps)
        return StepFacts(self.run_id, first, tuple(self._facts)[first - oldest :])
