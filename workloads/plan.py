"""Who comes: every request of a load, planned ahead and seeded, so the same seed offers the same load."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from scheduling.tiers import Slo
from workloads.arrivals import gamma
from workloads.mix import TierMix, WorkloadError
from workloads.traces import Trace, TraceRequest


@dataclass(frozen=True, slots=True)
class Window:
    """What is measured: requests arriving in [warmup_s, warmup_s + measured_s).

    Load before and after (cool-down) is offered but not scored; the cool-down keeps the fleet busy while the last
    measured requests finish, and ends as soon as they have.
    """

    warmup_s: float
    measured_s: float
    cooldown_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup_s", "cooldown_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise WorkloadError(f"{name} must be zero or more seconds, not {getattr(self, name)!r}")
        if not (math.isfinite(self.measured_s) and self.measured_s > 0):
            raise WorkloadError(f"the measured time must be positive, not {self.measured_s!r} s")

    @property
    def total_s(self) -> float:
        return self.warmup_s + self.measured_s + self.cooldown_s

    def measures(self, at_s: float) -> bool:
        return self.warmup_s <= at_s < self.warmup_s + self.measured_s


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request that will be sent at `at_s` after the start, whatever the server does.

    `output_tokens` is the true length of the answer; only the (emulated) engine is told.
    """

    index: int
    at_s: float
    tier: str
    slo: Slo
    prompt_tokens: int
    output_tokens: int
    measured: bool = True
    streamed: bool = True
    client: str | None = None
    prefix_blocks: tuple[int, ...] = ()
    block_tokens: int | None = None


def plan(
    trace: Trace,
    mix: TierMix,
    window: Window,
    seed: int,
    *,
    unstreamed_share: float = 0.0,
    max_requests: int | None = None,
) -> tuple[PlannedRequest, ...]:
    """Give every request of a trace that arrives inside the window its tier.

    Tiers and streaming are drawn from `seed` by position in the trace, independently of lengths and times, so two
    loads with the same seed and different rates put the same requests in the same tiers.
    Raises WorkloadError when nothing arrives in the measured time.
    """
    rng = random.Random(f"{seed}:tiers")
    tiers = mix.draw(rng, len(trace.requests))
    streamed = [rng.random() >= unstreamed_share for _ in trace.requests]
    planned: list[PlannedRequest] = []
    for index, (item, share) in enumerate(zip(trace.requests, tiers, strict=True)):
        if item.arrival_s >= window.total_s or (max_requests is not None and len(planned) >= max_requests):
            break
        planned.append(
            PlannedRequest(
                index=index,
                at_s=item.arrival_s,
                tier=share.name,
                slo=share.slo,
                prompt_tokens=item.prompt_tokens,
                output_tokens=item.output_tokens,
                measured=window.measures(item.arrival_s),
                streamed=streamed[index],
                client=item.client,
                prefix_blocks=item.prefix_blocks,
                block_tokens=trace.block_tokens,
            )
        )
    if not any(request.measured for request in planned):
        raise WorkloadError(
            f"nothing arrives in the measured time, {window.warmup_s:g} s to "
            f"{window.warmup_s + window.measured_s:g} s of {trace.name}"
        )
    return tuple(planned)


def synthetic_trace(
    rate_rps: float, duration_s: float, prompt_tokens: int, output_tokens: int, seed: int, cv: float = 1.0
) -> Trace:
    """Fixed lengths, random gaps: Poisson, or with bursts when `cv` is above 1 (see `arrivals.gamma`)."""
    for name, tokens in (("prompt tokens", prompt_tokens), ("output tokens", output_tokens)):
        if tokens < 1:
            raise WorkloadError(f"{name} must be at least 1, not {tokens}")
    arrivals = gamma(rate_rps, duration_s, cv, random.Random(f"{seed}:arrivals"))
    name = f"Poisson {rate_rps:g}/s" if cv == 1.0 else f"Gamma {rate_rps:g}/s, CV {cv:g}"
    return Trace(name, tuple(TraceRequest(at_s, prompt_tokens, output_tokens) for at_s in arrivals))
