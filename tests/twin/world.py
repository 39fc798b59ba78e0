"""What both shells are given: the same fleet, the same requests, and nothing learned on the way."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import profiles
from scheduling.backends import Backend, EngineLimits
from scheduling.options import Options
from scheduling.requests import Request
from scheduling.tiers import OnMiss, Slo, Tier, TierSet
from tiergate_engine.model import EngineConfig

MODEL = "twin"
PROFILE = profiles.load("rtxpro6000-qwen3-32b-bf16")
TIERS = TierSet(
    (
        Tier("t75", Slo(1.5, 0.075), 0),
        Tier("t100", Slo(2.0, 0.100), 1),
        Tier("t150", Slo(3.0, 0.150), 2),
        Tier("batch", Slo(None, None), 3, OnMiss.RELEGATE),
    ),
    "t150",
)
HOMES: dict[str, str | None] = {"a": "t75", "b": "t100", "c": None, "d": None}
"""Backends, and the tier each begins in; None is the pool."""

ENGINE = EngineConfig(20_000, 8_000, max_running_seqs=24, max_batched_tokens=512)
LIMITS = EngineLimits(24, 512, 20_000, 8_000, 16)
MARGIN = 1.05
OPTIONS = Options(handback_period_s=2.0, rebalance_period_s=5.0)
SEED = 1
START_S = 1.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the trace, with the length that its answer will have."""

    at_s: float
    tier: str
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int
    streamed: bool

    def request(self, number: int) -> Request:
        """As the gateway classifies it."""
        return Request(
            f"r{number}",
            MODEL,
            self.tier,
            TIERS[self.tier].slo,
            self.prompt_tokens,
            self.at_s,
            max_output_tokens=self.max_output_tokens,
            streamed=self.streamed,
        )


@dataclass(frozen=True, slots=True)
class Outage:
    """One backend's engine is gone for a while, and everything it had with it."""

    backend: str
    from_s: float
    until_s: float


def backend(name: str) -> Backend:
    """As the gateway publishes it."""
    return Backend(name, PROFILE.step_time, frozenset({MODEL}), LIMITS, margin=MARGIN)


def trace(seed: int, requests: int, rates: tuple[float, ...]) -> tuple[Asked, ...]:
    """Poisson arrivals, the rate changing in equal parts of the trace; long-tailed lengths; four tiers."""
    rng = Random(seed)
    made: list[Asked] = []
    now_s = START_S
    for number in range(requests):
        now_s += rng.expovariate(rates[number * len(rates) // requests])
        prompt = min(max(int(rng.lognormvariate(6.2, 0.9)), 10), 3000)
        output = min(max(int(rng.lognormvariate(4.0, 0.7)), 2), 300)
        tier = rng.choices([tier.name for tier in TIERS.tiers], (0.25, 0.3, 0.3, 0.15))[0]
        limit = rng.choice((2048, 512, max(output, 64)))
        made.append(Asked(now_s, tier, prompt, output, limit, rng.random() < 0.85))
    return tuple(made)
