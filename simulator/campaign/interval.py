"""Confidence intervals over seeds: small samples, so Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `count` independent values. `low` and `high` are None where one value says nothing of spread."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean with Student's t interval (`mean ± t · s / sqrt(n)`). Raises ValueError for no values."""
    if not values:
        raise ValueError("an interval needs at least one value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    t = float(stdtrit(len(values) - 1, 0.5 + confidence / 2))
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def ratio_interval(above: Sequence[float], below: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The ratio of two things measured under the same seeds, in the same order.

    Paired, because the seeds' luck is common and cancels; over the logarithms, because a ratio and its inverse
    must say the same. The mean is the geometric one. Raises ValueError where counts differ or a value is not
    positive.
    """
    if len(above) != len(below):
        raise ValueError(f"a paired ratio needs the same seeds on both sides, got {len(above)} and {len(below)}")
    if min(*above, *below, 1.0) <= 0:
        raise ValueError("a ratio needs positive values")
    logs = t_interval([math.log(a / b) for a, b in zip(above, below, strict=True)], confidence)
    return Interval(
        math.exp(logs.mean),
        None if logs.low is None else math.exp(logs.low),
        None if logs.high is None else math.exp(logs.high),
        logs.count,
    )
