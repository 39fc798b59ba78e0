"""LMetric: the least product of pending prompt tokens and batch size ("Simple is Better", OSDI'26; no knobs).

Pending tokens are those of the prompts queued there and of the newcomer, without what a prefix cache is
expected to have; the batch is the sequences that are there. Nothing is known of paces: it is the strongest
router without them.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.policies.baseline import Baseline
from scheduling.predict import own_prompt_tokens
from scheduling.requests import Request


class LMetric(Baseline):
    name = "lmetric"

    def order(self, request: Request, fleet: Fleet, now_s: float) -> Sequence[Ledger]:
        own = own_prompt_tokens(request)

        def score(ledger: Ledger) -> tuple[int, int, str]:
            pending = ledger.queued_prefill_tokens + own
            return pending * ledger.seqs, pending, ledger.backend.name

        return sorted(fleet, key=score)
