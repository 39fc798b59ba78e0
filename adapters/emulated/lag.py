"""How late the event loop is: the share of lateness that is this process's or this machine's fault."""

from __future__ import annotations

import asyncio

from adapters.emulated.driver import LATENESS_BOUNDS_S
from adapters.emulated.histograms import Histogram

_TICK_S = 0.05


class LoopLag:
    """Sleeps in a loop and notes how much longer than asked it took. One for a process."""

    def __init__(self) -> None:
        self.lateness = Histogram(LATENESS_BOUNDS_S)
        self.worst_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _TICK_S
            await asyncio.sleep(_TICK_S)
            late_s = max(loop.time() - due_s, 0.0)
            self.lateness.observe(late_s)
            self.worst_s = max(self.worst_s, late_s)
