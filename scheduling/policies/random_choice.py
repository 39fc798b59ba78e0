"""Random: any backend, all alike (PolyServe §5 baseline)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.policies.baseline import Baseline
from scheduling.requests import Request


class RandomChoice(Baseline):
    name = "random"

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def order(self, request: Request, fleet: Fleet, now_s: float) -> Sequence[Ledger]:
        ledgers = sorted(fleet, key=lambda ledger: ledger.backend.name)
        self._rng.shuffle(ledgers)
        return ledgers
