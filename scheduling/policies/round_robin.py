"""Round robin: the next backend in order of name, whatever it carries."""

from __future__ import annotations

from collections.abc import Sequence

from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.policies.baseline import Baseline
from scheduling.requests import Request


class RoundRobin(Baseline):
    name = "round_robin"

    def __init__(self) -> None:
        self._turn = 0

    def order(self, request: Request, fleet: Fleet, now_s: float) -> Sequence[Ledger]:
        ledgers = sorted(fleet, key=lambda ledger: ledger.backend.name)
        if not ledgers:
            return ledgers
        at = self._turn % len(ledgers)
        self._turn += 1
        return ledgers[at:] + ledgers[:at]
