"""Least load: the backend with the fewest sequences, ties by KV, then name."""

from __future__ import annotations

from collections.abc import Sequence

from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.policies.baseline import Baseline
from scheduling.requests import Request


class LeastLoad(Baseline):
    name = "least_load"

    def order(self, request: Request, fleet: Fleet, now_s: float) -> Sequence[Ledger]:
        return sorted(fleet, key=lambda ledger: (ledger.seqs, ledger.kv_tokens, ledger.backend.name))
