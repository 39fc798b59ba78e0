"""PolyServe: bins by TPOT, the highest-loaded backend that keeps every promise, lazy promotion.

Zhu et al., arXiv 2507.17769: request binning (§4.2), greedy routing and the load gradient (§4.3), lazy
promotion (§4.4). Profile-based admission (§4.5), wait time (§4.6) and chunked prefill prediction (§4.7) are in
`scheduling.feasible` and `scheduling.predict`, which every policy shares; `Checks` switches them. Refusal and
the discipline of the queues are the dispatcher's (`scheduling.options`). Binning is the tier set's: one tier is
one bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from scheduling.checks import ALL_CHECKS, Checks
from scheduling.decisions import Outcome
from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.policies.protocol import Admission, Stage
from scheduling.requests import Request
from scheduling.tiers import Tier


class Promotion(Enum):
    """When a request may go to a tighter tier's backend, where it obeys the host's pace."""

    LAZY = "lazy"  # when all backends of its own tier are full (§4.4)
    EAGER = "eager"  # whenever a tighter tier has room
    NEVER = "never"  # but for a tier that has no backend at all


@dataclass(frozen=True, slots=True)
class PolyServe:
    """The defaults are the paper's; what it leaves open is said.

    Attributes:
        fullest_first: the load gradient (§4.3); else the emptiest backend first.
        promotion: when looser requests go to tighter tiers (§4.4).
        nearest_first: promote to the next tighter tier first, which wastes the least tight capacity; else to the
            tightest first. The paper does not say.
        uses_pool: tiers grow when they hold and shrink when they are empty (§4.3); else every backend is in a
            tier, and how many each has follows demand.
        held_by_deadline: the held of a tier go by their first token's deadline; else first come, first served.
            The paper does not say.
        checks: what a placement is checked for (§4.5-4.7).
    """

    fullest_first: bool = True
    promotion: Promotion = Promotion.LAZY
    nearest_first: bool = True
    uses_pool: bool = True
    held_by_deadline: bool = True
    checks: Checks = ALL_CHECKS
    name: str = "polyserve"
    admission: Admission = Admission.EVERY_PROMISE
    uses_tiers: bool = True

    def stages(self, request: Request, tier: Tier, fleet: Fleet, now_s: float) -> Iterator[Stage]:
        """Own tier, then promotion, then (for a tier that has no backend) the looser neighbour it lives with."""
        own = fleet.tier_size(tier.name)
        if own and not self.uses_pool:
            # no claim brings a backend of another model here
            own = any(ledger.backend.serves(request.model) for ledger in fleet.walk_tier(tier.name))
        if self.promotion is Promotion.EAGER:
            yield from self._promotions(tier, fleet, now_s)
        if own:
            yield Stage(Outcome.OWN_TIER, self._walk(tier, fleet), self._pace(tier, fleet, now_s))
        if self.promotion is Promotion.LAZY or (self.promotion is Promotion.NEVER and not own):
            yield from self._promotions(tier, fleet, now_s)
        if own:
            return
        if self.uses_pool:
            yield Stage(Outcome.SHARED, fleet.neighbours(tier), tier.host_tpot_s)
        else:
            for looser in fleet.tiers.tiers[tier.rank + 1 :]:
                yield Stage(Outcome.SHARED, self._walk(looser, fleet), tier.host_tpot_s)

    def _promotions(self, tier: Tier, fleet: Fleet, now_s: float) -> Iterator[Stage]:
        tighter = fleet.tiers.tiers[: tier.rank]
        for host in reversed(tighter) if self.nearest_first else tighter:
            if fleet.tier_size(host.name):
                yield Stage(Outcome.PROMOTED, self._walk(host, fleet), self._pace(host, fleet, now_s))

    def _walk(self, tier: Tier, fleet: Fleet) -> Iterator[Ledger]:
        return fleet.walk_tier(tier.name, not self.fullest_first)

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
            if self.promotion is Promotion.NEVER and fleet.tier_size(tier.name):
                return None
            return Stage(Outcome.PROMOTED, (ledger,), fleet.host_tpot_s(ledger, now_s))
        if not fleet.tier_size(tier.name) and any(ledger is other for other in fleet.neighbours(tier)):
            return Stage(Outcome.SHARED, (ledger,), tier.host_tpot_s)
        return None

    def held_key(self, request: Request) -> float:
        """Earliest first-token deadline first; requests without one in order of arrival, behind."""
        if not self.held_by_deadline:
            return request.arrival_s
        due_s = request.slo.deadline_s(request.arrival_s, 0)
        return due_s if math.isfinite(due_s) else 1e12 + request.arrival_s

    def _pace(self, host: Tier, fleet: Fleet, now_s: float) -> float:
        if fleet.tier_size(host.name) == 1:
            for ledger in fleet.walk_tier(host.name):
                return fleet.host_tpot_s(ledger, now_s)
        return host.host_tpot_s
