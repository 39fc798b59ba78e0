"""How many backends each tier deserves in a fleet without a pool: shares follow demand, slowly.

Demand is backend-seconds per second; the split is by largest remainder, one backend at least for every tier in
demand. A target counts only when two rounds in a row computed it (the two-round hysteresis of independent
PolyServe ports; multi-slo notes §1.7), and one backend moves a round, so that labels do not flap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Move:
    """Relabel one backend of `giver` for `taker`."""

    giver: str
    taker: str


def split(demand: Mapping[str, float], backends: int) -> dict[str, int]:
    """Backends per tier by largest remainder. Tiers without demand get none; ties go to the name first in
    order. With fewer backends than tiers in demand, the largest demands get one each."""
    wanting = {tier: need for tier, need in demand.items() if need > 0}
    if not wanting or backends <= 0:
        return {}
    if backends <= len(wanting):
        first = sorted(wanting, key=lambda tier: (-wanting[tier], tier))[:backends]
        return dict.fromkeys(first, 1)
    total = sum(wanting.values())
    free = backends - len(wanting)
    exact = {tier: free * need / total for tier, need in wanting.items()}
    shares = {tier: 1 + math.floor(value) for tier, value in exact.items()}
    left = backends - sum(shares.values())
    by_remainder = sorted(exact, key=lambda tier: (math.floor(exact[tier]) - exact[tier], tier))
    for tier in by_remainder[:left]:
        shares[tier] += 1
    return shares


class Shares:
    """Demand per tier as a decaying mean over rounds, and the target that outlived one round."""

    def __init__(self, weight: float = 0.5) -> None:
        self._weight = weight
        self._round: dict[str, float] = {}
        self._mean: dict[str, float] = {}
        self._last_target: dict[str, int] | None = None

    def add(self, tier: str, backend_s: float) -> None:
        """A request of the tier arrived that will take this share of a backend's time."""
        self._round[tier] = self._round.get(tier, 0.0) + backend_s

    def close_round(self, held: Mapping[str, int], order: Sequence[str]) -> Move | None:
        """End a round: the one move that brings `held` backends per tier nearer to the target, if it is due."""
        for tier in set(self._mean) | set(self._round):
            mean = self._mean.get(tier, 0.0)
            self._mean[tier] = mean + self._weight * (self._round.get(tier, 0.0) - mean)
            if self._mean[tier] < 1e-6:
                del self._mean[tier]
        self._round.clear()
        target = split(self._mean, sum(held.values()))
        settled = target == self._last_target
        self._last_target = target
        return self.next_move(held, order) if settled else None

    def next_move(self, held: Mapping[str, int], order: Sequence[str]) -> Move | None:
        """The move that brings `held` nearer to the last target; None when it is met, or there is none."""
        target = self._last_target
        if not target:
            return None
        surplus = [tier for tier in order if held.get(tier, 0) > target.get(tier, 0)]
        missing = [tier for tier in order if held.get(tier, 0) < target.get(tier, 0)]
        if not surplus or not missing:
            return None
        giver = max(surplus, key=lambda tier: held.get(tier, 0) - target.get(tier, 0))
        taker = max(missing, key=lambda tier: target.get(tier, 0) - held.get(tier, 0))
        return Move(giver, taker)
