"""The virtual clock: calls in order of their time, ties in the order in which they were made."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Agenda:
    """What is to happen when. `now_s` is the time of the call that runs."""

    __slots__ = ("_heap", "_number", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Run `call` at a time, which must not be past."""
        if time_s < self.now_s:
            raise ValueError(f"{time_s} is before now ({self.now_s})")
        self._number += 1
        heappush(self._heap, (time_s, self._number, call))

    def soon(self, call: Callable[[], None], turns: int = 1) -> None:
        """Run `call` at this instant, after all that is to happen at it so far; `turns` times over."""
        if turns > 1:
            self.at(self.now_s, lambda: self.soon(call, turns - 1))
        else:
            self.at(self.now_s, call)

    def run_next(self) -> bool:
        """Let the next call happen; False when there is none."""
        if not self._heap:
            return False
        self.now_s, _, call = heappop(self._heap)
        call()
        return True
