"""What the baselines share: no tiers, every backend is a candidate, only the order differs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from scheduling.checks import ALL_CHECKS
from scheduling.decisions import Outcome
from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.policies.protocol import Admission, Stage
from scheduling.requests import Request
from scheduling.tiers import Tier


class Baseline(ABC):
    """A router without tiers. A subclass says in which order backends are tried."""

    name = "baseline"
    admission = Admission.OWN_FIRST_TOKEN
    uses_tiers = False
    uses_pool = False
    checks = ALL_CHECKS

    @abstractmethod
    def order(self, request: Request, fleet: Fleet, now_s: float) -> Sequence[Ledger]:
        """Every backend, in the order in which they are tried for a request."""

    def stages(self, request: Request, tier: Tier, fleet: Fleet, now_s: float) -> Iterator[Stage]:
        yield Stage(Outcome.ROUTED, self.order(request, fleet, now_s), math.inf)

    def last_resort(self, request: Request, tier: Tier, fleet: Fleet, now_s: float) -> Iterator[Stage]:
        yield from self.stages(request, tier, fleet, now_s)

    def stage_on(self, tier: Tier, ledger: Ledger, fleet: Fleet, now_s: float) -> Stage | None:
        return Stage(Outcome.ROUTED, (ledger,), math.inf)

    def held_key(self, request: Request) -> float:
        """First come, first served."""
        return request.arrival_s
