"""Attainment against rate: one seed's curve, and the rate at which it falls below a level.

Attainment falls with the rate, but single runs are noisy: the curve is the closest non-increasing one (isotonic
regression by pooling adjacent violators; Ayer et al. 1955). Between tested rates the log-odds of attainment are
interpolated, which follow the rate more evenly than attainment does where nearly all or nearly none are on time.
Nothing is extrapolated: outside the tested rates the crossing is a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Point:
    """One run on the curve: `attainment` of `offered` requests at a rate."""

    rate: float
    attainment: float
    offered: int


class Bound(StrEnum):
    """How a value stands to what it measures."""

    EXACT = "exact"
    AT_LEAST = "at least"  # the target was never missed inside the range
    AT_MOST = "at most"  # never reached
    UNKNOWN = "unknown"  # bounded on neither side


@dataclass(frozen=True, slots=True)
class Crossing:
    """The highest rate that keeps a level; `rate` is the end of the tested range where it is a bound."""

    rate: float
    bound: Bound


@dataclass(frozen=True, slots=True)
class Bracket:
    """Neighbouring tested rates between which a level is crossed, and where about. `low`, `high` None: outside."""

    low: float | None
    high: float | None
    guess: float | None


def falling(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points by rate, moved to the closest non-increasing curve, weighted by what was offered."""
    blocks: list[list[Point]] = []
    levels: list[float] = []
    for point in sorted(points, key=lambda point: point.rate):
        blocks.append([point])
        levels.append(point.attainment)
        while len(blocks) > 1 and levels[-2] < levels[-1]:
            blocks[-2].extend(blocks.pop())
            levels.pop()
            weight = sum(max(1, point.offered) for point in blocks[-1])
            levels[-1] = math.fsum(max(1, point.offered) * point.attainment for point in blocks[-1]) / weight
    return tuple(
        Point(point.rate, level, point.offered)
        for block, level in zip(blocks, levels, strict=True)
        for point in block
    )


def bracket(points: Iterable[Point], level: float) -> Bracket:
    """Where the falling curve through the points crosses `level`."""
    curve = falling(points)
    kept = [point for point in curve if point.attainment >= level]
    missed = [point for point in curve if point.attainment < level]
    low, high = (kept[-1] if kept else None), (missed[0] if missed else None)
    if low is None or high is None:
        return Bracket(low.rate if low else None, high.rate if high else None, None)
    return Bracket(low.rate, high.rate, _between(low, high, level))


def crossing(points: Iterable[Point], level: float) -> Crossing:
    """The highest rate that keeps `level`, never outside the tested rates. Raises ValueError for no points."""
    found = bracket(points, level)
    if found.guess is not None:
        return Crossing(found.guess, Bound.EXACT)
    if found.low is not None:
        return Crossing(found.low, Bound.AT_LEAST)
    if found.high is not None:
        return Crossing(found.high, Bound.AT_MOST)
    raise ValueError("a crossing needs at least one point")


def shifted(known: Iterable[Point], point: Point, level: float) -> Crossing:
    """Where `level` would be crossed if a known curve were stretched along the rate to go through `point`.

    So one run near a known crossing tells how far it has moved. A point that the known curve does not reach gives
    a bound, as does a level. Raises ValueError where the known curve is empty.
    """
    curve = tuple(known)
    there = crossing(curve, point.attainment)
    goal = crossing(curve, level)
    if there.bound is Bound.EXACT or goal.bound is not Bound.EXACT:
        bound = goal.bound
    else:  # better than the curve ever was: at least; worse: at most
        bound = Bound.AT_LEAST if there.bound is Bound.AT_MOST else Bound.AT_MOST
    return Crossing(point.rate * goal.rate / there.rate, bound)


def _between(low: Point, high: Point, level: float) -> float:
    offered = max(1, min(low.offered, high.offered))
    top, bottom, at = (_log_odds(value, offered) for value in (low.attainment, high.attainment, level))
    part = (top - at) / (top - bottom) if top > bottom else 0.5
    return low.rate + min(1.0, max(0.0, part)) * (high.rate - low.rate)


def _log_odds(attainment: float, offered: int) -> float:
    """Half a request is added to both sides, so that all and none stay finite (Haldane 1956)."""
    kept = attainment * offered
    return math.log((kept + 0.5) / (offered - kept + 0.5))
