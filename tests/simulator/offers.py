"""Requests for the tests of bounds and references."""

from __future__ import annotations

import random
from collections.abc import Sequence

from scheduling.backends import EngineLimits
from scheduling.requests import Request
from scheduling.tiers import Slo
from simulator.requests import SimRequest
from tiergate_engine.steptime import RooflineStepTime

LINEAR = RooflineStepTime(
    c0_s=0.005, per_token_s=20e-6, per_seq_s=30e-6, per_kv_s=30e-9, per_attention_s=1e-9
)  # the formula is straight with sharpness 1
LIMITS = EngineLimits(max_running_seqs=256, max_batched_tokens=4096, kv_tokens=400_000)
PACES_S = (0.020, 0.030, 0.050, 0.100)


def offer(
    place: int,
    prompt_tokens: int,
    output_tokens: int,
    slo: Slo,
    *,
    arrival_s: float = 0.0,
    tier: str = "only",
    measured: bool = True,
    streamed: bool = True,
    prefix_blocks: tuple[int, ...] = (),
) -> SimRequest:
    request = Request(str(place), "sim", tier, slo, prompt_tokens, arrival_s, streamed=streamed)
    return SimRequest(request, output_tokens, prefix_blocks, measured=measured)


def papers_mix(
    lengths: Sequence[tuple[int, int]], count: int, rate_rps: float, seed: int, slack: float = 1.0
) -> list[SimRequest]:
    """PolyServe's promises on lengths drawn from a list, Poisson arrivals; `slack` stretches every promise."""
    rng = random.Random(seed)
    now_s = 0.0
    offers = []
    for place in range(count):
        now_s += rng.expovariate(rate_rps)
        prompt, output = rng.choice(lengths)
        tier = rng.choices(range(4), [1, 2, 3, 4])[0]
        slo = Slo(rng.choice((0.3, 0.5, 1.0)) * slack, PACES_S[tier] * slack)
        offers.append(offer(place, prompt, output, slo, arrival_s=now_s, tier=f"t{tier}"))
    return offers
