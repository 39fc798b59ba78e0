"""How a gateway notices that a backend is gone or back: it looks now and then, and at once when in doubt.

The periods are those of the live gateway's defaults (`gateway.config.HealthSettings`, `gateway.fleet`).
"""

from __future__ import annotations

from collections.abc import Callable

from simulator.agenda import Agenda

EVERY_S = 2.0
AGAIN_S = 0.2
"""After a look in vain, while the backend still counts as up."""
FAILURES = 2
"""Looks in vain until the backend counts as down."""


class Watch:
    """Looks at one backend. `changed` is told when it is noticed to be up or down."""

    def __init__(self, agenda: Agenda, alive: Callable[[], bool], changed: Callable[[bool], None]) -> None:
        self._agenda = agenda
        self._alive = alive
        self._changed = changed
        self._up = True
        self._failures = 0
        self._looks = 0
        self._wait(EVERY_S)

    def suspect(self) -> None:
        """An answer broke off, or could not be opened."""
        if not self._failures or not self._up:
            self._look()

    def _wait(self, seconds: float) -> None:
        number = self._looks
        self._agenda.at(self._agenda.now_s + seconds, lambda: self._due(number))

    def _due(self, number: int) -> None:
        if number == self._looks:  # else somebody looked meanwhile
            self._look()

    def _look(self) -> None:
        self._looks += 1
        if self._alive():
            self._failures = 0
            if not self._up:
                self._up = True
                self._changed(True)
        else:
            self._failures += 1
            if self._up and self._failures < FAILURES:
                self._wait(AGAIN_S)
                return
            if self._up:
                self._up = False
                self._changed(False)
        self._wait(EVERY_S)
