"""Prompts wait for their turn where an engine's chunk cannot be set: see `scheduling.pacing` for the rate."""

from __future__ import annotations

import math

from scheduling.control import prefill_rate_tokens_s
from scheduling.ledger import Ledger
from scheduling.pacing import PrefillBucket


class Pacer:
    """A bucket for each backend that is paced; it lets in a chunk at once, and then what the decodes can bear."""

    def __init__(self) -> None:
        self._buckets: dict[str, PrefillBucket] = {}

    def wait_s(self, ledger: Ledger, pace_s: float, prompt_tokens: int, now_s: float) -> float:
        """How long a prompt has to wait before it is let in; 0.0 where nothing is paced.

        An engine that is driven sizes its chunks itself, and one without decodes makes nobody wait.
        """
        backend = ledger.backend
        if backend.dynamic_chunk or not backend.calibrated or not ledger.decodes:
            return 0.0
        within_s = min(pace_s, ledger.tightest_tpot_s)
        rate = math.inf if within_s == math.inf else prefill_rate_tokens_s(ledger, within_s)
        bucket = self._buckets.get(backend.name)
        if bucket is None:
            bucket = self._buckets[backend.name] = PrefillBucket(ledger.full_chunk_tokens, rate, now_s)
        else:
            bucket.set_rate(rate, now_s)
        return bucket.wait_s(prompt_tokens, now_s)

    def took(self, ledger: Ledger, prompt_tokens: int, now_s: float) -> None:
        """A prompt was let in, whether it was to wait or not."""
        bucket = self._buckets.get(ledger.backend.name)
        if bucket is not None:
            bucket.take(prompt_tokens, now_s)
