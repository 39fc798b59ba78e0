"""What a load came to: one result a request, and how well the generator itself kept time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduling.scoring import PredictionScore, RequestRecord, Score, judge, quantile, score, score_predictions
from workloads.mix import TierMix
from workloads.plan import PlannedRequest


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said about a request besides its tokens; None where it said nothing.

    `emulated`: the engine said that it emulates one.
    """

    status: int | None = None
    tier: str | None = None
    backend: str | None = None
    decision: str | None = None
    queue_s: float | None = None
    predicted_ttft_s: float | None = None
    predicted_tpot_s: float | None = None
    retry_after_s: float | None = None
    emulated: bool = False
    message: str | None = None


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request as it was sent and answered. Times in `record` are seconds from the start of the load.

    Attributes:
        lateness_s: how long after its scheduled arrival the generator began to send it.
        counts_estimated: the server's usage named another number of tokens than there were events; the tokens were
            spread evenly over the events.
    """

    planned: PlannedRequest
    record: RequestRecord
    answer: Answer
    lateness_s: float
    counts_estimated: bool = False


@dataclass(frozen=True, slots=True)
class Timekeeping:
    """How the generator kept time. A lateness that is not small against the SLOs makes a run worthless.

    Latency counts from the scheduled arrival, so the generator's own lateness is never hidden in a good score.
    """

    lateness_p50_s: float | None
    lateness_p99_s: float | None
    lateness_max_s: float | None
    loop_lag_p50_s: float | None
    loop_lag_p99_s: float | None
    loop_lag_max_s: float | None

    @classmethod
    def of(cls, lateness_s: Iterable[float], loop_lag_s: Iterable[float]) -> Timekeeping:
        late, lag = sorted(lateness_s), sorted(loop_lag_s)
        return cls(
            quantile(late, 0.5),
            quantile(late, 0.99),
            late[-1] if late else None,
            quantile(lag, 0.5),
            quantile(lag, 0.99),
            lag[-1] if lag else None,
        )


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A whole load.

    Attributes:
        results: every request that was sent, warm-up and cool-down included, in order of arrival.
        measured_s: length of the window in which the measured requests arrived.
        wall_s: from the start to the end of the last measured request.
        cpu_s: CPU time of this process during the load (whatever else runs in the process is in it).
        peak_in_flight: most requests open at one moment.
    """

    results: tuple[RequestResult, ...]
    measured_s: float
    wall_s: float
    cpu_s: float
    events: int
    peak_in_flight: int
    timekeeping: Timekeeping

    @property
    def measured(self) -> tuple[RequestResult, ...]:
        """The requests that count."""
        return tuple(result for result in self.results if result.planned.measured)


def summarise(result: LoadResult, mix: TierMix) -> Score:
    """Score the measured requests of a load, tiers in the order of the mix."""
    return score((item.record for item in result.measured), result.measured_s, mix.names)


def refusals(results: Sequence[RequestResult]) -> dict[str, int]:
    """How many requests were refused or failed, by reason."""
    counts: dict[str, int] = {}
    for result in results:
        reason = result.record.reason
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True)
class PredictionScores:
    """The gateway's predictions, read from its answer headers, against what its clients saw."""

    ttft: PredictionScore
    tpot: PredictionScore


def predictions(results: Sequence[RequestResult]) -> PredictionScores:
    """Score predicted against actual TTFT and TPOT of the streamed requests that finished."""
    ttft: list[tuple[float, float]] = []
    tpot: list[tuple[float, float]] = []
    for result in results:
        judged = judge(result.record)
        answer = result.answer
        if answer.predicted_ttft_s is not None and judged.ttft_s is not None:
            ttft.append((answer.predicted_ttft_s, judged.ttft_s))
        if answer.predicted_tpot_s is not None and judged.tpot_s is not None:
            tpot.append((answer.predicted_tpot_s, judged.tpot_s))
    return PredictionScores(score_predictions(ttft), score_predictions(tpot))
