"""Runs of one setting brought together: seeds become intervals, rates become curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from profiles.catalogue import load
from profiles.format import Profile
from simulator.campaign.interval import Interval, t_interval
from simulator.outcome import TierOutcome
from simulator.report.values import ProfileNote, Run, Setting
from simulator.scenario import Workload

OVERALL = "all"


@dataclass(frozen=True, slots=True)
class TierPoint:
    """One tier (or all of them, named `all`) at one rate, over the seeds."""

    tier: str
    offered: int
    attainment: Interval | None
    attainment_one_based: Interval | None
    attainment_admitted: Interval | None
    refused: Interval | None
    failed: Interval | None
    ttft_p50_s: Interval | None
    ttft_p99_s: Interval | None
    tpot_p50_s: Interval | None
    tpot_p99_s: Interval | None


@dataclass(frozen=True, slots=True)
class Point:
    """One contender at one rate, over the seeds.

    Attributes:
        worst: the tier that fares worst when the seeds are taken together; None when no tier has a promise.
        backends_in_tiers: how many backends a tier held, mean over the window; all for policies without tiers.
        backends_busy: how many had anybody on board, mean over the window.
    """

    contender: str
    rate_rps: float
    seeds: tuple[int, ...]
    overall: TierPoint
    worst: TierPoint | None
    tiers: tuple[TierPoint, ...]
    refusals: tuple[tuple[str, int], ...]
    cost_s: Interval | None
    backends_in_tiers: Interval | None
    backends_busy: Interval | None
    preemptions: int
    decision_p50_s: float | None
    decision_p99_s: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All contenders under one setting, at all rates."""

    setting: Setting
    contenders: tuple[str, ...]
    points: tuple[Point, ...]
    runs: tuple[Run, ...]

    @property
    def rates_rps(self) -> tuple[float, ...]:
        return tuple(sorted({point.rate_rps for point in self.points}))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({seed for point in self.points for seed in point.seeds}))

    def curve(self, contender: str) -> tuple[Point, ...]:
        """A contender's points, by rate."""
        return tuple(point for point in self.points if point.contender == contender)


def compare(runs: Iterable[Run]) -> tuple[Comparison, ...]:
    """Runs by setting, then by contender and rate, in the order in which settings and contenders first came.

    Runs of one contender, rate and setting are its seeds; the same cell twice counts once.
    """
    settings: dict[Setting, dict[tuple[str, float], dict[int, Run]]] = {}
    for run in runs:
        cell = run.cell
        of_setting = settings.setdefault(Setting.of(cell), {})
        of_setting.setdefault((cell.contender.label, cell.rate_rps), {})[cell.seed] = run
    found = []
    for setting, groups in settings.items():
        contenders = tuple(dict.fromkeys(name for name, _ in groups))
        ordered = sorted(groups, key=lambda key: (contenders.index(key[0]), key[1]))
        points = tuple(_point(*key, [run for _, run in sorted(groups[key].items())]) for key in ordered)
        kept = tuple(run for key in ordered for _, run in sorted(groups[key].items()))
        found.append(Comparison(setting, contenders, points, kept))
    return tuple(found)


def _point(contender: str, rate_rps: float, runs: Sequence[Run]) -> Point:
    outcomes = [run.outcome for run in runs]
    promises = promised_tiers(runs[0].cell.workload)
    tiers = tuple(
        _tier_point(tier.tier, [outcome.tiers[place] for outcome in outcomes], promised=tier.tier in promises)
        for place, tier in enumerate(outcomes[0].tiers)
    )
    judged = [(tier.attainment.mean, tier) for tier in tiers if tier.attainment is not None]
    refusals: dict[str, int] = {}
    for outcome in outcomes:
        for reason, count in outcome.refusals.items():
            refusals[reason] = refusals.get(reason, 0) + count
    timings = [outcome.timing for outcome in outcomes if outcome.timing is not None]
    windows = [outcome for outcome in outcomes if outcome.window_s > 0]
    return Point(
        contender=contender,
        rate_rps=rate_rps,
        seeds=tuple(run.cell.seed for run in runs),
        overall=_tier_point(OVERALL, [outcome.overall for outcome in outcomes]),
        worst=min(judged, key=lambda pair: pair[0])[1] if judged else None,
        tiers=tiers,
        refusals=tuple(sorted(refusals.items(), key=lambda item: (-item[1], item[0]))),
        cost_s=_over([outcome.instance_s_per_request for outcome in outcomes]),
        backends_in_tiers=_over([outcome.backend_seconds / outcome.window_s for outcome in windows]),
        backends_busy=_over([outcome.backend_seconds_busy / outcome.window_s for outcome in windows]),
        preemptions=sum(outcome.preemptions for outcome in outcomes),
        decision_p50_s=_highest([timing.decision_p50_s for timing in timings]),
        decision_p99_s=_highest([timing.decision_p99_s for timing in timings]),
    )


def promised_tiers(workload: Workload) -> frozenset[str]:
    """The tiers that can attain or miss: best effort, which has no promise, cannot."""
    return frozenset(tier.name for tier in workload.tiers if workload.ttft_s or tier.slo.ttft_s is not None)


def _tier_point(name: str, seeds: Sequence[TierOutcome], *, promised: bool = True) -> TierPoint:
    def share(part: Callable[[TierOutcome], int]) -> Interval | None:
        shares = [part(tier) / tier.offered for tier in seeds if tier.offered]
        return _within(shares, 1.0)

    def kept(part: Callable[[TierOutcome], int]) -> Interval | None:
        return share(part) if promised else None

    admitted = [tier.attainment_admitted for tier in seeds if tier.attainment_admitted is not None]
    return TierPoint(
        tier=name,
        offered=sum(tier.offered for tier in seeds),
        attainment=kept(lambda tier: tier.attained),
        attainment_one_based=kept(lambda tier: tier.attained_one_based),
        attainment_admitted=_within(admitted, 1.0) if promised else None,
        refused=share(lambda tier: tier.refused),
        failed=share(lambda tier: tier.failed),
        ttft_p50_s=_over([tier.ttft_p50_s for tier in seeds]),
        ttft_p99_s=_over([tier.ttft_p99_s for tier in seeds]),
        tpot_p50_s=_over([tier.tpot_p50_s for tier in seeds]),
        tpot_p99_s=_over([tier.tpot_p99_s for tier in seeds]),
    )


def _over(values: Iterable[float | None]) -> Interval | None:
    return _within([value for value in values if value is not None], math.inf)


def _within(values: Sequence[float], most: float) -> Interval | None:
    """The mean with its interval, cut to what is possible: from zero to `most`. None without values."""
    if not values:
        return None
    found = t_interval(values)
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(0.0, found.low), high=min(most, found.high))


def _highest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def profile_notes(runs: Iterable[Run]) -> tuple[ProfileNote, ...]:
    """Where the profiles of these runs come from. Raises ProfileError when one cannot be read."""
    used = dict.fromkeys(kind.profile for run in runs for kind in run.cell.fleet.engines)
    return tuple(_note(name, load(name)) for name in used)


def _note(name: str, profile: Profile) -> ProfileNote:
    file = profile.file
    source = f"decode steps {file.regimes.decode.source}, steps with prefill {file.regimes.mixed.source}"
    made = file.provenance
    return ProfileNote(name, file.model, file.hardware, source, made.origin, made.licence, made.conditions)
