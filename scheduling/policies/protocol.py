"""What a policy is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from scheduling.checks import Checks
from scheduling.decisions import Outcome
from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.requests import Request
from scheduling.tiers import Tier


class Admission(Enum):
    """Which promises a placement must keep."""

    EVERY_PROMISE = "every_promise"  # the newcomer's and every resident's
    OWN_FIRST_TOKEN = "own_first_token"  # only the newcomer's TTFT: what a router without tiers can promise


@dataclass(frozen=True, slots=True)
class Stage:
    """Backends to try in order, before the next stage. `host_tpot_s` is the pace they keep for newcomers."""

    outcome: Outcome
    ledgers: Iterable[Ledger]
    host_tpot_s: float


class Policy(Protocol):
    """Pure but for its own counters; chance comes from the generator it was made with."""

    @property
    def name(self) -> str: ...

    @property
    def admission(self) -> Admission: ...

    @property
    def uses_tiers(self) -> bool:
        """Whether backends belong to tiers (and are claimed from and handed back to the pool)."""
        ...

    @property
    def uses_pool(self) -> bool:
        """Whether tiers take backends when they hold requests, and empty ones go back (PolyServe §4.3). Without,
        every backend is in some tier, and how many each has follows demand."""
        ...

    @property
    def checks(self) -> Checks:
        """What a placement is checked for under `Admission.EVERY_PROMISE`."""
        ...

    def stages(self, request: Request, tier: Tier, fleet: Fleet, now_s: float) -> Iterator[Stage]:
        """Where to look, best first. The dispatcher takes the first backend that passes."""
        ...

    def last_resort(self, request: Request, tier: Tier, fleet: Fleet, now_s: float) -> Iterator[Stage]:
        """Where a request goes whose own promise was given up."""
        ...

    def stage_on(self, tier: Tier, ledger: Ledger, fleet: Fleet, now_s: float) -> Stage | None:
        """The stage in which a held request of the tier may use this one backend, or None."""
        ...

    def held_key(self, request: Request) -> float:
        """Held requests of a tier are tried by this, smallest first."""
        ...
