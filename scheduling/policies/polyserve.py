"""PolyServe: bins by TPOT, the highest-loaded backend that keeps every promise, lazy promotion.

Zhu et al., arXiv 2507.17769: request binning (§4.2), greedy routing and the load gradient (§4.3), lazy promotion
(§4.4). Profile-based admission (§4.5), wait time (§4.6) and chunked prefill prediction (§4.7) are in
`scheduling.feasible` and `scheduling.predict`, which every policy shares. The order among tighter tiers is not in
the paper: nearest first wastes the least tight capacity, and is a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scheduling.decisions import Outcome
from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.policies.protocol import Admission, Stage
from scheduling.requests import Request
from scheduling.tiers import Tier


@dataclass(frozen=True, slots=True)
class PolyServe:
    """`nearest_first`: promote to the next tighter tier first; else to the tightest first. `uses_pool`: tiers grow
    and shrink with what they hold; else every backend is in a tier, and shares follow demand."""

    nearest_first: bool = True
    uses_pool: bool = True
    name: str = "polyserve"
    admission: Admission = Admission.EVERY_PROMISE
    uses_tiers: bool = True

    def stages(self, request: Request, tier: Tier, fleet: Fleet, now_s: float) -> Iterator[Stage]:
        """Own tier, then promotion, then (for a tier that has no backend) the looser neighbour it lives with."""
        own = fleet.tier_size(tier.name)
        if own:
            yield Stage(Outcome.OWN_TIER, fleet.walk_tier(tier.name), self._pace(tier, fleet, now_s))
        tighter = fleet.tiers.tiers[: tier.rank]
        for host in reversed(tighter) if self.nearest_first else tighter:
            if fleet.tier_size(host.name):
                yield Stage(Outcome.PROMOTED, fleet.walk_tier(host.name), self._pace(host, fleet, now_s))
        if not own:
            yield Stage(Outcome.SHARED, fleet.neighbours(tier), tier.host_tpot_s)

    def last_resort(self, request: Request, tier: Tier, fleet: Fleet, now_s: float) -> Iterator[Stage]:
        """What is left: loosest tier first."""
        for host in reversed(fleet.tiers.tiers):
            if fleet.tier_size(host.name):
                yield Stage(Outcome.RELEGATED, fleet.walk_tier(host.name), self._pace(host, fleet, now_s))

    def stage_on(self, tier: Tier, ledger: Ledger, fleet: Fleet, now_s: float) -> Stage | None:
        if ledger.tier is None or ledger.tier not in fleet.tiers:
            return None
        host = fleet.tiers[ledger.tier]
        if host.rank == tier.rank:
            return Stage(Outcome.OWN_TIER, (ledger,), fleet.host_tpot_s(ledger, now_s))
        if host.rank < tier.rank:
            return Stage(Outcome.PROMOTED, (ledger,), fleet.host_tpot_s(ledger, now_s))
        if not fleet.tier_size(tier.name) and any(ledger is other for other in fleet.neighbours(tier)):
            return Stage(Outcome.SHARED, (ledger,), tier.host_tpot_s)
        return None

    def held_key(self, request: Request) -> float:
        """Earliest first-token deadline first; requests without one in order of arrival, behind."""
        due_s = request.slo.deadline_s(request.arrival_s, 0)
        return due_s if math.isfinite(due_s) else 1e12 + request.arrival_s

    def _pace(self, host: Tier, fleet: Fleet, now_s: float) -> float:
        if fleet.tier_size(host.name) == 1:
            for ledger in fleet.walk_tier(host.name):
                return fleet.host_tpot_s(ledger, now_s)
        return host.host_tpot_s
