"""Prompts wait for their turn where an engine's chunk cannot be set: see `scheduling.pacing` for the rate."""

from __future__ import annotations

import math

from scheduling.control import prefill_rate_tokens_s
from scheduling.ledger import DEFAULT_CHUNK_TOKENS, Ledger
from scheduling.pacing import PrefillBucket, tokens_at_once
from tiergate_engine.step import Step


class Pacer:
    """A bucket for each backend that is paced: it lets in a chunk, and then what the decodes can bear on average.
    And no prompt joins others in prefill whose step with it would be longer than the pace."""

    def __init__(self) -> None:
        self._buckets: dict[str, PrefillBucket] = {}

    def wait_s(self, ledger: Ledger, pace_s: float, prompt_tokens: int, now_s: float) -> float:
        """How long a prompt has to wait before it is let in; 0.0 where nothing is paced. Infinite: until there is
        less in prefill.

        An engine that is driven sizes its chunks itself, and one without decodes makes nobody wait.
        """
        backend = ledger.backend
        if backend.dynamic_chunk or not backend.calibrated or not ledger.decodes:
            return 0.0
        within_s = min(pace_s, ledger.tightest_tpot_s)
        alone = backend.prefill_interval is not None
        rate = math.inf if within_s == math.inf else prefill_rate_tokens_s(ledger, within_s, alone=alone)
        bucket = self._buckets.get(backend.name)
        if bucket is None:
            bucket = self._buckets[backend.name] = PrefillBucket(ledger.full_chunk_tokens, rate, now_s)
        else:
            bucket.set_rate(rate, now_s)
        if ledger.queued_prefill_tokens:
            budget = backend.limits.max_batched_tokens or DEFAULT_CHUNK_TOKENS
            decodes = Step.decode(ledger.decodes, ledger.decode_kv_tokens)
            most = tokens_at_once(backend.step_time, decodes, budget, within_s / backend.margin, alone=alone)
            if ledger.queued_prefill_tokens + prompt_tokens > most:
                return math.inf
        return bucket.wait_s(prompt_tokens, now_s)

    def took(self, ledger: Ledger, prompt_tokens: int, now_s: float) -> None:
        """A prompt was let in, whether it was to wait or not."""
        bucket = self._buckets.get(ledger.backend.name)
        if bucket is not None:
            bucket.take(prompt_tokens, now_s)
