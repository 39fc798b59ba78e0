"""Goodput: the highest offered rate at which attainment stays at or above a target, by bisection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """One load of a search: the rate factor and the attainment it reached."""

    factor: float
    attainment: float


@dataclass(frozen=True, slots=True)
class Goodput:
    """What a search found.

    Attributes:
        target: the attainment asked for, 0..1.
        factor: the highest factor that reached it; None when not even the lowest did.
        failed_factor: the lowest factor that missed it; None when not even the highest did. The goodput lies
            between the two; a finer answer needs more runs.
        points: every load of the search, in order.
    """

    target: float
    factor: float | None
    failed_factor: float | None
    points: tuple[Point, ...]


class Bisection:
    """Which factor to try next: first the two ends, then the middle of what is left.

    Attainment is taken to fall with the rate. Where noise breaks that, the answer stays the highest factor below
    every one that failed.
    """

    def __init__(self, low: float, high: float, runs: int, target: float = 0.9) -> None:
        """Raises ValueError unless 0 < low < high, runs >= 2 and 0 < target <= 1."""
        if not 0 < low < high:
            raise ValueError(f"the factors must satisfy 0 < low < high, not {low:g} and {high:g}")
        if runs < 2:
            raise ValueError(f"a search needs at least 2 runs, not {runs}")
        if not 0 < target <= 1:
            raise ValueError(f"the target attainment must be in (0, 1], not {target:g}")
        self._low = low
        self._high = high
        self._runs = runs
        self._target = target
        self._points: list[Point] = []

    def next_factor(self) -> float | None:
        """The factor to run next; None when the search is over."""
        if len(self._points) >= self._runs:
            return None
        if not self._points:
            return self._low
        passed, failed = self._passed(), self._failed()
        if passed is None:
            return None
        if failed is None:
            return self._high if passed < self._high else None
        return (passed + failed) / 2

    def add(self, factor: float, attainment: float) -> None:
        """The attainment that a load at `factor` reached."""
        self._points.append(Point(factor, attainment))

    def _failed(self) -> float | None:
        return min((point.factor for point in self._points if point.attainment < self._target), default=None)

    def _passed(self) -> float | None:
        failed = self._failed()
        return max(
            (
                point.factor
                for point in self._points
                if point.attainment >= self._target and (failed is None or point.factor < failed)
            ),
            default=None,
        )

    def result(self) -> Goodput:
        """What is known so far."""
        return Goodput(self._target, self._passed(), self._failed(), tuple(self._points))


async def find_goodput(bisection: Bisection, offer: Callable[[float], Awaitable[float]]) -> Goodput:
    """Run loads until the search is over. `offer` runs one at a rate factor and returns its attainment."""
    while (factor := bisection.next_factor()) is not None:
        bisection.add(factor, await offer(factor))
    return bisection.result()
