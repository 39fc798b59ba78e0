"""Policies: rank the candidates of a request and order the held. One small file each, behind one protocol.

Reserving, holding, retrying, claiming and refusing are the dispatcher's, the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType

from scheduling.policies.headroom import Headroom
from scheduling.policies.least_load import LeastLoad
from scheduling.policies.lmetric import LMetric
from scheduling.policies.minimal import Minimal
from scheduling.policies.polyserve import PolyServe
from scheduling.policies.protocol import Admission, Policy, Stage
from scheduling.policies.random_choice import RandomChoice
from scheduling.policies.round_robin import RoundRobin
from scheduling.policies.silo import Silo

__all__ = ["POLICIES", "Admission", "Policy", "Stage", "make"]

POLICIES: Mapping[str, Callable[[Random], Policy]] = MappingProxyType(
    {
        "polyserve": lambda _rng: PolyServe(),
        "round_robin": lambda _rng: RoundRobin(),
        "random": RandomChoice,
        "least_load": lambda _rng: LeastLoad(),
        "minimal": lambda _rng: Minimal(),
        "lmetric": lambda _rng: LMetric(),
        "headroom": lambda _rng: Headroom(),
        "qoserve_silo": lambda _rng: Silo(),
    }
)


def make(name: str, rng: Random) -> Policy:
    """The policy of that name. Raises KeyError naming the known ones."""
    if name not in POLICIES:
        raise KeyError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name](rng)
