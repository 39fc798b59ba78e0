"""The verdict of a comparison in sentences: at each rate, who keeps most in its worst tier, and with how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from simulator.campaign.interval import t_interval
from simulator.outcome import CellOutcome
from simulator.report.summary import Comparison, Point

_TARGET = 0.9
_SMALL = 0.01  # of a tier; where the interval says nothing, a difference below it is none


def verdicts(comparison: Comparison) -> tuple[str, ...]:
    """A sentence or three for every rate; none at a rate where no tier has a promise.

    Policies are level where the 95 % interval of their difference, paired by seed, contains zero; but not where
    all seeds say the same of a difference that counts: few seeds have wide intervals, and that is said.
    """
    found, sure = [], True
    for rate_rps in comparison.rates_rps:
        points = [point for point in comparison.points if point.rate_rps == rate_rps and point.worst is not None]
        if points:
            ranked = sorted(points, key=_kept, reverse=True)
            differences = {point.contender: _differences(comparison, ranked[0], point) for point in ranked[1:]}
            found.append(_verdict(comparison, ranked, differences))
            sure = sure and all(_is_sure(own) or _is_level(own) for own in differences.values())
    return tuple(found) if sure else (*found, _unsure(len(comparison.seeds)))


def _kept(point: Point) -> float:
    interval = None if point.worst is None else point.worst.attainment
    return 0.0 if interval is None else interval.mean


def _verdict(comparison: Comparison, ranked: Sequence[Point], differences: Mapping[str, Sequence[float]]) -> str:
    """`ranked`: of one rate, by what is kept in the worst tier; `differences`: of the first to the others."""
    first, rest = ranked[0], ranked[1:]
    level = [first, *(point for point in rest if _is_level(differences[point.contender]))]
    behind = [point for point in rest if point not in level]
    start = f"At {first.rate_rps:.4g} requests/s"
    if not rest:
        parts = [f"{start} {_named(first)} is kept in the worst tier."]
    elif len(level) == 1:
        parts = [f"{start} {_named(first)} keeps most in its worst tier"]
        parts[0] += f"; next is {_named(behind[0])}."
    else:
        parts = [f"{start} a tie within the intervals in the worst tier: {', '.join(map(_named, level))}"]
        parts[0] += f"; then {_named(behind[0])}." if behind else "."
    parts += _busy(level, comparison.setting.fleet.backends)
    if _kept(first) < _TARGET:
        parts.append(f"Nobody keeps {100 * _TARGET:.0f} % of every tier at this rate.")
    return " ".join(parts)


def _named(point: Point) -> str:
    tier = "" if point.worst is None else f" of {point.worst.tier}"
    return f"{point.contender} ({100 * _kept(point):.1f} %{tier})"


def _busy(level: Sequence[Point], backends: int) -> list[str]:
    known = [(point.backends_busy.mean, point.contender) for point in level if point.backends_busy is not None]
    if not known:
        return []
    busy, contender = min(known)
    if len(level) == 1:
        return [f"It keeps {busy:.1f} of {backends} backends busy."]
    return [f"Of these {contender} keeps the fewest backends busy: {busy:.1f} of {backends}."]


def _unsure(seeds: int) -> str:
    if seeds == 1:
        return "One seed has no interval: take more --seeds before you call any of this a difference."
    return (
        f"Not all of these differences are certain: the {seeds} seeds agree on them, but are too few for an "
        f"interval without zero. Take --seeds {2 * seeds}."
    )


def _is_sure(differences: Sequence[float]) -> bool:
    low = t_interval(differences).low
    return low is not None and low > 0.0


def _is_level(differences: Sequence[float]) -> bool:
    if _is_sure(differences):
        return False
    return min(differences) <= 0.0 or math.fsum(differences) / len(differences) < _SMALL


def _differences(comparison: Comparison, one: Point, other: Point) -> list[float]:
    """What one keeps in its worst tier less what the other keeps in its own, for each seed that both have."""
    ones, others = _by_seed(comparison, one), _by_seed(comparison, other)
    return [ones[seed] - others[seed] for seed in ones if seed in others] or [_kept(one) - _kept(other)]


def _by_seed(comparison: Comparison, point: Point) -> Mapping[int, float]:
    found = {}
    for run in comparison.runs:
        cell = run.cell
        if cell.contender.label == point.contender and cell.rate_rps == point.rate_rps and point.worst is not None:
            share = _share(run.outcome, point.worst.tier)
            if share is not None:
                found[cell.seed] = share
    return found


def _share(outcome: CellOutcome, name: str) -> float | None:
    tier = next(tier for tier in outcome.tiers if tier.tier == name)
    return tier.attained / tier.offered if tier.offered else None
