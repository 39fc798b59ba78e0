"""How much slower an engine's steps are of late than its profile says.

A gateway learns that too, and tells a better profile; but by then a second of steps was planned too full, and
their tokens came late: throttled clocks, or a neighbour on the machine, are known here within a few steps.
"""

from __future__ import annotations

STEPS = 16
"""About as many steps decide."""
NEWS = 1.1
"""What is planned by changes with the drift in parts of this size, not with each step."""
MOST = 4.0
"""No step counts as slower than that: one that stood still for a second says nothing of the next one."""


class Drift:
    """A mean of actual over predicted times in which old steps fade; never below 1, which is the profile."""

    __slots__ = ("_mean", "factor")

    def __init__(self) -> None:
        self._mean = 1.0
        self.factor = 1.0

    def note(self, actual_s: float, predicted_s: float) -> bool:
        """A step took so long. Whether `factor`, by which step times are to be multiplied, is another one now."""
        if predicted_s <= 0.0:
            return False
        self._mean += (min(actual_s / predicted_s, MOST) - self._mean) / STEPS
        wanted = max(self._mean, 1.0)
        if self.factor / NEWS <= wanted <= self.factor * NEWS and (wanted > 1.0 or self.factor == 1.0):
            return False
        self.factor = wanted
        return True
