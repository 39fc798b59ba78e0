"""What one simulated run gave: numbers only, the same bytes for the same cell (but for `Timing`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scheduling.scoring import PredictionScore


@dataclass(frozen=True, slots=True)
class TierOutcome:
    """One tier's measured requests, or all of them. Times in seconds; None where nothing was served.

    `attained` counts tokens from zero (the strict deadlines); `attained_one_based` from one. Offered are all that
    arrived; admitted are those that were not refused. `unpromised` are those offered without a promise: they can
    neither attain nor miss, and are in no attainment.
    """

    tier: str
    offered: int
    attained: int
    attained_one_based: int
    finished: int
    refused: int
    failed: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    unpromised: int = 0

    @property
    def admitted(self) -> int:
        return self.offered - self.refused

    @property
    def attainment(self) -> float | None:
        """Of what was offered with a promise; None when nothing was."""
        promised = self.offered - self.unpromised
        return self.attained / promised if promised else None

    @property
    def attainment_admitted(self) -> float | None:
        """Of what was admitted with a promise. Nobody without one is refused while a backend is up."""
        promised = self.admitted - self.unpromised
        return self.attained / promised if promised > 0 else None


@dataclass(frozen=True, slots=True)
class Sample:
    """The fleet at one moment.

    Attributes:
        at_s: since the start.
        held: requests waiting in the gateways.
        backends: by tier (`pool`: of none), the loads of its backends, highest first: the gradient.
    """

    at_s: float
    held: int
    backends: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Timing:
    """What the run cost here: differs from run to run."""

    cpu_s: float
    decision_p50_s: float | None
    decision_p99_s: float | None


@dataclass(frozen=True, slots=True)
class CellOutcome:
    """One run.

    Attributes:
        tiers: tight to loose, of measured requests.
        refusals: measured requests refused, by reason.
        outcomes: measured requests by the rung of the ladder they were placed on.
        backend_seconds: time backends spent in a tier while measured requests arrived; all of them, all the time,
            for policies without tiers.
        backend_seconds_busy: time in the same window that backends had anybody on board.
        instance_s_per_request: PolyServe's cost: a step's time over its sequences, summed over every request's
            steps. Summed over all requests that is the engines' time, so it is this over those that finished, of
            the whole run: what was lost on the others, and on those still on board at the end, is in it.
        window_s: from the first to the last measured arrival.
        control: settings that the controller decided for backends, by rung; none without one.
        left_out: part of the trace's requests whose promise no idle engine keeps, and which were not offered.
    """

    tiers: tuple[TierOutcome, ...]
    overall: TierOutcome
    refusals: Mapping[str, int]
    outcomes: Mapping[str, int]
    backend_seconds: float
    backend_seconds_busy: float
    instance_s_per_request: float | None
    window_s: float
    ended_s: float
    preemptions: int
    decisions: int
    left_out: float
    predicted_ttft: PredictionScore
    predicted_tpot: PredictionScore
    samples: tuple[Sample, ...]
    timing: Timing | None = None
    control: Mapping[str, int] = field(default_factory=dict)

    @property
    def worst_tier_attainment(self) -> float | None:
        """The attainment of the tier that fares worst: what "every tier at 90 %" is judged by."""
        return min((tier.attainment for tier in self.tiers if tier.attainment is not None), default=None)
