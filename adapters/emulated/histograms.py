"""A histogram for a hot path, and its Prometheus text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts observations by bucket; `observe` takes a weight, so a whole step's tokens cost one call."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    @property
    def total(self) -> float:
        return self._total

    def quantile(self, fraction: float) -> float:
        """The upper bound of the bucket that holds this quantile; infinity beyond the last, 0 when empty."""
        left = fraction * self.count
        if not left:
            return 0.0
        for bound, count in zip(self._bounds, self._counts, strict=False):
            left -= count
            if left <= 0:
                return bound
        return float("inf")

    def lines(self, name: str, labels: str) -> list[str]:
        """The samples in Prometheus' text format; `labels` without braces."""
        seen = 0
        lines = []
        for bound, count in zip((*map(_number, self._bounds), "+Inf"), self._counts, strict=True):
            seen += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {seen}')
        lines.append(f"{name}_count{{{labels}}} {seen}")
        lines.append(f"{name}_sum{{{labels}}} {self._total!r}")
        return lines


def _number(value: float) -> str:
    return repr(float(value))
