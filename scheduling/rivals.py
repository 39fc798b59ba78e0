"""Requests that other replicas hold, and when one of ours lets them go first.

A replica sees at once that a backend got better for what ended there of its own, and hears of the others' a
moment later, so a request that has waited on one is overtaken by a newcomer on another. Therefore a request that
has found a place, and is due later than one that another replica holds for the same model and tier and that fits
there too, waits a little for it. It waits once, for a bounded time, and only if its own promise has that time to
spare.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduling.ledger import Ledger

BELIEVED_S = 2.5
"""How long what another replica held is believed. Replicas tell it anew every second."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The held request of one model and tier that is due first on some replica.

    `decodes` and `kv_tokens` are the room it needs.
    """

    model: str
    tier: str
    due_s: float
    decodes: int
    kv_tokens: int


class Rivals:
    """What other replicas hold, as they told it last."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[float, tuple[Waiting, ...]]] = {}

    def told(self, replica: str, waiting: tuple[Waiting, ...], now_s: float) -> None:
        """A replica holds these, first of each model and tier; nobody, when there are none."""
        if waiting:
            self._waiting[replica] = now_s, waiting
        else:
            self._waiting.pop(replica, None)

    def before(
        self, model: str, tier: str, due_s: float, ledger: Ledger, pace_s: float, now_s: float
    ) -> Waiting | None:
        """One of that model and tier that is due before `due_s` and could go to this backend; None when there is
        none, or when the backend is empty: there is room for both. `pace_s`: what everybody there has to keep."""
        if not ledger.seqs:
            return None
        for told_s, waiting in self._waiting.values():
            if now_s - told_s > BELIEVED_S:
                continue
            for one in waiting:
                same = one.tier == tier and one.model == model
                if same and now_s < one.due_s < due_s and _fits(one, ledger, pace_s):
                    return one
        return None


def _fits(one: Waiting, ledger: Ledger, pace_s: float) -> bool:
    """Whether there is room for it, as far as can be told of a request of which only its room is known."""
    backend = ledger.backend
    limits = backend.limits
    seqs = ledger.seqs + one.decodes
    if limits.max_running_seqs is not None and seqs > limits.max_running_seqs:
        return False
    kv_tokens = ledger.peak_kv_tokens + one.kv_tokens
    if limits.kv_tokens is not None and kv_tokens > limits.kv_tokens:
        return False
    return not backend.calibrated or backend.step_time.decode_seconds(seqs, kv_tokens) * backend.margin <= pace_s
