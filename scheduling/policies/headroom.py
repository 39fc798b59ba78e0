"""Headroom: the fullest backend that is predicted to keep the request's pace, as llm-d routes by predicted
latency.

After llm-d's predicted-latency scorer: a backend is valid when its predicted TTFT is within the request's
promise and its predicted TPOT within the request's own and its tightest resident's. Among valid ones the least
headroom goes first (bin packing); the two headrooms are normalised over the candidates and weighted 0.8 and
0.2. The others follow: idle ones, then those that miss the pace only, the first token only, both; the least
deficit first.

What is left out: the trained predictor (all policies share `scheduling.predict`), the exploration of one
request in a hundred, and the gate on prefix affinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.policies.baseline import Baseline
from scheduling.predict import expected_tpot_s, walk_prefill
from scheduling.requests import Request

TTFT_WEIGHT, TPOT_WEIGHT = 0.8, 0.2


@dataclass(frozen=True, slots=True)
class _Room:
    """How far a backend's predictions are within the bounds; negative where they are beyond. Seconds."""

    ledger: Ledger
    ttft_s: float
    tpot_s: float

    @property
    def valid(self) -> bool:
        return self.ttft_s > 0.0 and self.tpot_s > 0.0

    @property
    def bucket(self) -> int:
        """Which of those that are not valid goes first: idle, pace missed, first token missed, both."""
        if not self.ledger.seqs:
            return 0
        return 1 + (self.tpot_s < 0.0 and self.ttft_s < 0.0) + (self.ttft_s < 0.0)


class Headroom(Baseline):
    """`ttft_weight` and `tpot_weight`: how much each headroom counts. `least`: fullest first; else emptiest."""

    name = "headroom"

    def __init__(
        self, ttft_weight: float = TTFT_WEIGHT, tpot_weight: float = TPOT_WEIGHT, least: bool = True
    ) -> None:
        self._weights = ttft_weight, tpot_weight
        self._sign = 1.0 if least else -1.0

    def order(self, request: Request, fleet: Fleet, now_s: float) -> Sequence[Ledger]:
        rooms = [_room(ledger, request, now_s) for ledger in fleet]
        valid = [room for room in rooms if room.valid]
        rank, sign = self._ranking(valid), self._sign
        valid.sort(key=lambda room: (sign * rank(room), room.ledger.backend.name))
        others = [room for room in rooms if not room.valid]
        deficit = self._ranking(others)
        others.sort(key=lambda room: (room.bucket, -deficit(room), room.ledger.backend.name))
        return [room.ledger for room in [*valid, *others]]

    def _ranking(self, rooms: Sequence[_Room]) -> Callable[[_Room], float]:
        """Headroom as one number: each of the two from 0 to 1 over these backends, weighted. One that is the same
        on all of them, or that nothing was promised for, leaves the other to decide."""
        ttft_weight, tpot_weight = self._weights
        ttft = _Scale([room.ttft_s for room in rooms])
        tpot = _Scale([room.tpot_s for room in rooms])
        return lambda room: ttft_weight * ttft(room.ttft_s) + tpot_weight * tpot(room.tpot_s)


class _Scale:
    """From the least to the greatest of some finite numbers as 0 to 1; infinity is 1."""

    def __init__(self, values: Sequence[float]) -> None:
        finite = [value for value in values if math.isfinite(value)]
        self._least = min(finite, default=0.0)
        self._range = max(finite, default=0.0) - self._least

    def __call__(self, value: float) -> float:
        if math.isinf(value):
            return 1.0
        return (value - self._least) / self._range if self._range > 0.0 else 0.0


def _room(ledger: Ledger, request: Request, now_s: float) -> _Room:
    margin = ledger.backend.margin
    slo = request.slo
    own_s = math.inf if slo.tpot_s is None else slo.tpot_s
    within_s = min(own_s, ledger.tightest_tpot_s)
    prefill = walk_prefill(ledger, request, now_s, within_s)
    seqs = request.sequences
    peak = ledger.peak_kv_tokens + request.prompt_tokens * seqs
    steady_s = ledger.backend.step_time.decode_seconds(ledger.seqs + seqs, peak)
    tpot_s = expected_tpot_s(ledger, steady_s, now_s, within_s)
    due_s = slo.deadline_s(request.arrival_s, 0)
    return _Room(ledger, due_s - now_s - prefill.service_s * margin, within_s - tpot_s * margin)
