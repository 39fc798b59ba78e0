"""Silo: the backends of a tier are its own, and nobody else's.

The silo that QoServe (ASPLOS'26, §4) compares itself with, one set of backends for each class, sized by demand:
the least loaded backend of the own tier, no promotion, no pool. It is not QoServe, whose engines spend the
slack of each request within a step; and its engines may be driven to the silo's pace, which is more than the
one static chunk that a silo has there.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduling.checks import ALL_CHECKS
from scheduling.decisions import Outcome
from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.policies.protocol import Admission, Stage
from scheduling.requests import Request
from scheduling.tiers import Tier


class Silo:
    """The policy's registry name is `qoserve_silo`."""

    name = "qoserve_silo"
    admission = Admission.OWN_FIRST_TOKEN
    uses_tiers = True
    uses_pool = False
    checks = ALL_CHECKS

    def stages(self, request: Request, tier: Tier, fleet: Fleet, now_s: float) -> Iterator[Stage]:
        home = _home(tier, fleet, request.model)
        if home is not None:
            yield Stage(Outcome.ROUTED, sorted(fleet.walk_tier(home.name), key=_load), home.host_tpot_s)

    def last_resort(self, request: Request, tier: Tier, fleet: Fleet, now_s: float) -> Iterator[Stage]:
        yield from self.stages(request, tier, fleet, now_s)

    def stage_on(self, tier: Tier, ledger: Ledger, fleet: Fleet, now_s: float) -> Stage | None:
        home = _home(tier, fleet)  # of any model: another home is found by a look over all stages
        if home is None or ledger.tier != home.name:
            return None
        return Stage(Outcome.ROUTED, (ledger,), home.host_tpot_s)

    def held_key(self, request: Request) -> float:
        """First come, first served."""
        return request.arrival_s


def _home(tier: Tier, fleet: Fleet, model: str | None = None) -> Tier | None:
    """The tier whose backends serve this one: its own; where it has none (for the model), the nearest that has
    some, tighter first, since fewer backends than tiers leave somebody homeless."""
    tighter, looser = fleet.tiers.tiers[: tier.rank], fleet.tiers.tiers[tier.rank + 1 :]
    for home in (tier, *reversed(tighter), *looser):
        if any(model is None or ledger.backend.serves(model) for ledger in fleet.walk_tier(home.name)):
            return home
    return None


def _load(ledger: Ledger) -> tuple[int, int, str]:
    return ledger.seqs, ledger.kv_tokens, ledger.backend.name
