"""What the store counts of one replica's load on one backend, followed so that limits can be told in its terms.

The store adds a lease's cost when it grants it and takes it away when it ends; a publish replaces all of that by
what was measured (`state.contract.Store`).
"""

from __future__ import annotations

import math

from scheduling.load import Cost, LoadVector


class Stored:
    """The store's sums."""

    __slots__ = ("decodes", "kv_tokens", "prefill_tokens", "published_s")

    def __init__(self) -> None:
        self.decodes = self.kv_tokens = self.prefill_tokens = 0
        self.published_s = -math.inf

    def add(self, cost: Cost) -> None:
        """A lease was asked for."""
        self.decodes += cost.decodes
        self.kv_tokens += cost.peak_kv_tokens
        self.prefill_tokens += cost.prefill_tokens

    def take(self, cost: Cost, placed_s: float) -> None:
        """A lease that was asked for at `placed_s` ended. Of one that a publish has seen, how much of the prompt
        is still queued is told by the next publish. Never below zero: what was measured may be less."""
        self.decodes = max(self.decodes - cost.decodes, 0)
        self.kv_tokens = max(self.kv_tokens - cost.peak_kv_tokens, 0)
        if placed_s > self.published_s:
            self.prefill_tokens = max(self.prefill_tokens - cost.prefill_tokens, 0)

    def publish(self, own: LoadVector, now_s: float) -> None:
        """From now on the store counts this."""
        self.decodes = own.decodes
        self.kv_tokens = own.peak_kv_tokens
        self.prefill_tokens = own.queued_prefill_tokens
        self.published_s = now_s
