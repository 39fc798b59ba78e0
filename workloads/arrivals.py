"""When requests come: seeded arrival processes, in seconds from the start of the load."""

from __future__ import annotations

import math
import random


def poisson(rate_rps: float, duration_s: float, rng: random.Random) -> list[float]:
    """Arrivals of a Poisson process in [0, `duration_s`). Raises ValueError for a rate that is not positive."""
    return gamma(rate_rps, duration_s, 1.0, rng)


def gamma(rate_rps: float, duration_s: float, cv: float, rng: random.Random) -> list[float]:
    """Arrivals with Gamma-distributed gaps of coefficient of variation `cv`: 1 is Poisson, above it bursts.

    Raises ValueError for a rate or `cv` that is not positive.
    """
    for name, value in (("rate_rps", rate_rps), ("cv", cv)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, not {value!r}")
    shape = 1.0 / (cv * cv)
    scale_s = 1.0 / (rate_rps * shape)
    arrivals: list[float] = []
    now_s = rng.gammavariate(shape, scale_s)
    while now_s < duration_s:
        arrivals.append(now_s)
        now_s += rng.gammavariate(shape, scale_s)
    return arrivals
