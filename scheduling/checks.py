"""Which mechanisms a placement is checked by: one switch each, so that what each is worth can be measured.

The defaults are what serves live. `docs/policies.md` tells which paper each switch comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class KvGrowth(Enum):
    """How much KV everybody is taken to need once a newcomer has joined."""

    PEAK = "peak"  # the largest sum on the way, everybody growing and leaving as expected (PolyServe §4.5)
    UPPER = "upper"  # as if nobody left before all had grown by a whole mean answer (an independent port's bound)
    CURRENT = "current"  # what is there now and the newcomer's prompt: no look ahead


@dataclass(frozen=True, slots=True)
class Checks:
    """What `scheduling.feasible` looks at under `Admission.EVERY_PROMISE`.

    Attributes:
        first_token: the newcomer's TTFT, with the wait for the step in flight and the queue (PolyServe §4.6).
        second_token: the token after it, by TTFT + TPOT (§4.6).
        resident_slack: no resident's token is late for the newcomer's prompt; engines with a static budget only.
        chunk_kept: the least chunk on the way, were it kept from the start, still makes the TTFT (§4.7, read
            strictly); else it is enough that the chunks as predicted make it. Driven engines only.
        kv_growth: the KV that memory and steady state are judged by (§4.5).
    """

    first_token: bool = True
    second_token: bool = True
    resident_slack: bool = True
    chunk_kept: bool = True
    kv_growth: KvGrowth = KvGrowth.PEAK

    @property
    def looks_ahead(self) -> bool:
        """Whether KV is taken to grow at all, so that the residents' own peak bounds every newcomer."""
        return self.kv_growth is not KvGrowth.CURRENT


ALL_CHECKS = Checks()
