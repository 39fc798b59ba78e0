"""Minimal: the backend whose next steps are predicted to be the shortest (PolyServe §5 baseline)."""

from __future__ import annotations

from collections.abc import Sequence

from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.policies.baseline import Baseline
from scheduling.requests import Request


class Minimal(Baseline):
    name = "minimal"

    def order(self, request: Request, fleet: Fleet, now_s: float) -> Sequence[Ledger]:
        return sorted(fleet, key=lambda ledger: (ledger.floor_s, ledger.seqs, ledger.backend.name))
