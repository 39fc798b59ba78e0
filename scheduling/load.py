"""Load as a vector, and the box of loads within which every promise holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_NOBODY: Mapping[str, int] = MappingProxyType({})

Floor = tuple[tuple[float, float], ...]
"""(pace in seconds, least slack in seconds of those promised it), each pace once."""


@dataclass(frozen=True, slots=True)
class LoadVector:
    """What one backend carries. Never negative; zero when idle.

    ``peak_kv_tokens`` is the KV its residents are expected to need together at their peak.
    ``residents`` counts sequences by tier name. Age is how old the reading is; 0 for one's own.
    ``slack`` is how long the next token of those who decode may still take, ``queued_slack`` how much later than
    expected the first token of those whose prompts are queued may come. Both are as measured at the last publish:
    reservations since then are not in them.
    """

    decodes: int = 0
    peak_kv_tokens: int = 0
    queued_prefill_tokens: int = 0
    residents: Mapping[str, int] = field(default_factory=lambda: _NOBODY)
    age_s: float = 0.0
    slack: Floor = ()
    queued_slack: Floor = ()

    def __add__(self, other: LoadVector) -> LoadVector:
        residents = dict(self.residents)
        for tier, count in other.residents.items():
            residents[tier] = residents.get(tier, 0) + count
        return LoadVector(
            self.decodes + other.decodes,
            self.peak_kv_tokens + other.peak_kv_tokens,
            self.queued_prefill_tokens + other.queued_prefill_tokens,
            residents,
            max(self.age_s, other.age_s),
            least_of(self.slack, other.slack),
            least_of(self.queued_slack, other.queued_slack),
        )

    @property
    def idle(self) -> bool:
        return not (self.decodes or self.peak_kv_tokens or self.queued_prefill_tokens)


def least_of(one: Floor, other: Floor) -> Floor:
    """Two floors as one: the least slack of each pace, tightest pace first."""
    if not one or not other:
        return one or other
    floor = dict(one)
    for tpot_s, slack_s in other:
        floor[tpot_s] = min(slack_s, floor.get(tpot_s, slack_s))
    return tuple(sorted(floor.items()))


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request adds to a backend's load vector while it lives there."""

    decodes: int
    peak_kv_tokens: int
    prefill_tokens: int
    tier: str
    tpot_ms: float  # the request's own pace, in milliseconds; infinity without a promise


@dataclass(frozen=True, slots=True)
class Limits:
    """A box of load vectors in which every promise holds, given the tightest resident it was made for."""

    decodes: int
    peak_kv_tokens: int
    queued_prefill_tokens: int


@dataclass(frozen=True, slots=True)
class ReserveCandidate:
    """One place a request may go, in order of preference.

    The store takes the first candidate whose membership is still at `epoch`, which has no resident tighter
    than `tightest_resident_ms`, and where total + cost stays within `limits`.
    """

    backend: str
    cost: Cost
    limits: Limits
    tightest_resident_ms: float
    epoch: int
