"""Who got what was promised: attainment, goodput and token-deadline slack.

Token i (from zero) of a request is due at ``arrival + ttft + i * tpot`` (DSLO, PolyServe §2.3). A streamed request
attains its SLO when EVERY token is on time; one that is not streamed is judged by its last token's deadline, since
its client sees nothing earlier. An answer without any token is judged by its end against the first deadline.
Refused, failed and unfinished requests are missed. Requests without a promise (best effort) can neither attain nor
miss: they are reported in their own tier and are not in the overall denominator.

The *one-based* variant counts tokens from one, so every token is due one TPOT later. It is reported beside the
other because papers differ; it is never the headline.

The *slack* of a request is the smallest ``deadline - time`` over its tokens: how much later every token could have
come. Negative slack is a miss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from scheduling.tiers import Slo


class RequestEnd(Enum):
    """How a request ended, for scoring."""

    FINISHED = "finished"
    REFUSED = "refused"
    FAILED = "failed"
    UNFINISHED = "unfinished"  # whoever measured stopped waiting


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as its client saw it. All times are on one clock.

    Attributes:
        tier: the tier asked for; scores are kept under this name.
        slo: the pace asked for.
        arrival_s: when it was due to arrive, not when a late sender sent it.
        end: how it ended.
        ended_s: when it ended; None when it never did.
        token_times_s: when each event with tokens came, in order.
        token_counts: tokens in each of these events; None when every event carried one.
        streamed: judged token by token; otherwise by its last token.
        reason: why it was refused or failed, in one word.
    """

    tier: str
    slo: Slo
    arrival_s: float
    end: RequestEnd
    ended_s: float | None = None
    token_times_s: Sequence[float] = ()
    token_counts: Sequence[int] | None = None
    streamed: bool = True
    prompt_tokens: int = 0
    reason: str | None = None

    @property
    def output_tokens(self) -> int:
        return len(self.token_times_s) if self.token_counts is None else sum(self.token_counts)


class DeadlineMeter:
    """Follows one stream against its deadlines with a few counters, never a list of tokens.

    `on_tokens` is called for every event of a live stream, so it does only arithmetic.
    """

    __slots__ = ("_base_s", "_slack_s", "_tpot_s", "first_s", "last_s", "tokens")

    def __init__(self, slo: Slo, arrival_s: float) -> None:
        self._base_s = math.inf if slo.ttft_s is None else arrival_s + slo.ttft_s
        self._tpot_s = math.inf if slo.tpot_s is None else slo.tpot_s
        self._slack_s = math.inf
        self.tokens = 0
        self.first_s = math.nan
        self.last_s = math.nan

    def on_tokens(self, now_s: float, count: int = 1) -> None:
        """`count` tokens (at least one) arrived together at `now_s`."""
        tokens = self.tokens
        if tokens:
            slack_s = self._base_s + tokens * self._tpot_s - now_s
        else:
            slack_s = self._base_s - now_s
            self.first_s = now_s
        if slack_s < self._slack_s:
            self._slack_s = slack_s
        self.last_s = now_s
        self.tokens = tokens + count

    @property
    def slack_s(self) -> float:
        """The smallest slack of any token so far; infinity before the first and without a promise."""
        return self._slack_s

    def last_token_slack_s(self, ended_s: float) -> float:
        """The slack of an answer that came in one piece at `ended_s`."""
        last = self.tokens - 1
        return (self._base_s + last * self._tpot_s if last > 0 else self._base_s) - ended_s

    @property
    def mean_tpot_s(self) -> float | None:
        """Time per output token after the first; None with fewer than two tokens."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Judgement:
    """One request judged. `slack_s` is None without a promise, or when nothing came that could be judged."""

    promised: bool
    attained: bool
    attained_one_based: bool
    slack_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    output_tokens: int


def judge(record: RequestRecord) -> Judgement:
    """Whether one request got its promise (module docstring)."""
    meter = DeadlineMeter(record.slo, record.arrival_s)
    if record.token_counts is None:
        for time_s in record.token_times_s:
            meter.on_tokens(time_s)
    else:
        for time_s, count in zip(record.token_times_s, record.token_counts, strict=True):
            if count > 0:
                meter.on_tokens(time_s, count)
    return judge_meter(
        meter, record.slo, record.arrival_s, record.end, ended_s=record.ended_s, streamed=record.streamed
    )


def judge_meter(
    meter: DeadlineMeter,
    slo: Slo,
    arrival_s: float,
    end: RequestEnd,
    *,
    ended_s: float | None,
    streamed: bool = True,
) -> Judgement:
    """`judge` for a live stream, of which only its meter was kept."""
    promised = slo.ttft_s is not None
    slack_s: float | None = None
    if promised:
        if streamed and meter.tokens:
            slack_s = meter.slack_s
        elif end is RequestEnd.FINISHED and ended_s is not None:
            slack_s = meter.last_token_slack_s(ended_s)
    finished = end is RequestEnd.FINISHED and promised and slack_s is not None
    grace_s = slo.tpot_s or 0.0
    return Judgement(
        promised=promised,
        attained=finished and slack_s is not None and slack_s >= 0,
        attained_one_based=finished and slack_s is not None and slack_s + grace_s >= 0,
        slack_s=slack_s,
        ttft_s=meter.first_s - arrival_s if meter.tokens and streamed else None,
        tpot_s=meter.mean_tpot_s if streamed else None,
        output_tokens=meter.tokens,
    )


def quantile(ordered: Sequence[float], fraction: float) -> float | None:
    """The quantile of an ascending sequence, linear between its two neighbours; None when it is empty."""
    if not ordered:
        return None
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    if ordered[low] == ordered[high]:
        return ordered[low]
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """What the usual table shows of a distribution, in seconds; None where nothing was measured."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    count: int = 0

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles:
        ordered = sorted(values)
        return cls(quantile(ordered, 0.5), quantile(ordered, 0.9), quantile(ordered, 0.99), len(ordered))


@dataclass(frozen=True, slots=True)
class Slack:
    """The low end of the requests' slack, in seconds: that is where promises break."""

    minimum: float | None = None
    p1: float | None = None
    p10: float | None = None
    p50: float | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> Slack:
        ordered = sorted(values)
        return cls(
            ordered[0] if ordered else None,
            quantile(ordered, 0.01),
            quantile(ordered, 0.1),
            quantile(ordered, 0.5),
        )


@dataclass(frozen=True, slots=True)
class TierScore:
    """One tier, or all tiers with a promise together.

    Attributes:
        offered: every request that was due to arrive, whatever became of it.
        promised: how many of them had a promise: the denominator of attainment.
        goodput_tokens_per_s: output tokens of requests that attained, over the measured time.
        output_tokens_per_s: output tokens of all requests, over the measured time.
    """

    tier: str
    offered: int
    promised: int
    attained: int
    attained_one_based: int
    finished: int
    refused: int
    failed: int
    unfinished: int
    ttft_s: Quantiles
    tpot_s: Quantiles
    slack_s: Slack
    output_tokens: int
    goodput_tokens_per_s: float
    output_tokens_per_s: float

    @property
    def attainment(self) -> float | None:
        """Attained over offered with a promise, 0..1; None when nothing was promised."""
        return self.attained / self.promised if self.promised else None

    @property
    def attainment_one_based(self) -> float | None:
        """The same with tokens counted from one."""
        return self.attained_one_based / self.promised if self.promised else None


@dataclass(frozen=True, slots=True)
class Score:
    """A whole run. `overall` covers only requests with a promise; best effort is in `tiers` alone."""

    tiers: tuple[TierScore, ...]
    overall: TierScore
    offered: int
    measured_s: float

    @property
    def attainment(self) -> float | None:
        return self.overall.attainment


def _tier_score(tier: str, judged: Sequence[tuple[RequestRecord, Judgement]], measured_s: float) -> TierScore:
    ends = dict.fromkeys(RequestEnd, 0)
    for record, _ in judged:
        ends[record.end] += 1
    results = [judgement for _, judgement in judged]
    tokens = sum(result.output_tokens for result in results)
    good_tokens = sum(result.output_tokens for result in results if result.attained)
    return TierScore(
        tier=tier,
        offered=len(judged),
        promised=sum(result.promised for result in results),
        attained=sum(result.attained for result in results),
        attained_one_based=sum(result.attained_one_based for result in results),
        finished=ends[RequestEnd.FINISHED],
        refused=ends[RequestEnd.REFUSED],
        failed=ends[RequestEnd.FAILED],
        unfinished=ends[RequestEnd.UNFINISHED],
        ttft_s=Quantiles.of(result.ttft_s for result in results if result.ttft_s is not None),
        tpot_s=Quantiles.of(result.tpot_s for result in results if result.tpot_s is not None),
        slack_s=Slack.of(result.slack_s for result in results if result.slack_s is not None),
        output_tokens=tokens,
        goodput_tokens_per_s=good_tokens / measured_s,
        output_tokens_per_s=tokens / measured_s,
    )


OVERALL = "overall"


def score(records: Iterable[RequestRecord], measured_s: float, tiers: Sequence[str] = ()) -> Score:
    """Judge every record. `tiers` gives the order; tiers met only in the records follow in order of meeting.

    `measured_s` is the length of the window in which the requests arrived, in seconds.
    Raises ValueError when it is not positive.
    """
    if not measured_s > 0:
        raise ValueError(f"measured_s must be positive, not {measured_s!r}")
    by_tier: dict[str, list[tuple[RequestRecord, Judgement]]] = {tier: [] for tier in tiers}
    promised: list[tuple[RequestRecord, Judgement]] = []
    offered = 0
    for record in records:
        pair = (record, judge(record))
        offered += 1
        by_tier.setdefault(record.tier, []).append(pair)
        if pair[1].promised:
            promised.append(pair)
    return Score(
        tiers=tuple(_tier_score(tier, judged, measured_s) for tier, judged in by_tier.items()),
        overall=_tier_score(OVERALL, promised, measured_s),
        offered=offered,
        measured_s=measured_s,
    )


class TierCounter:
    """Running attainment of one tier: counters only, for a live table or a gateway's metrics."""

    __slots__ = ("attained", "failed", "finished", "offered", "output_tokens", "promised", "refused")

    def __init__(self) -> None:
        self.offered = 0
        self.promised = 0
        self.attained = 0
        self.finished = 0
        self.refused = 0
        self.failed = 0
        self.output_tokens = 0

    def add(self, end: RequestEnd, judgement: Judgement) -> None:
        """Count one request that ended."""
        self.offered += 1
        self.promised += judgement.promised
        self.attained += judgement.attained
        self.output_tokens += judgement.output_tokens
        if end is RequestEnd.FINISHED:
            self.finished += 1
        elif end is RequestEnd.REFUSED:
            self.refused += 1
        else:
            self.failed += 1

    @property
    def attainment(self) -> float | None:
        return self.attained / self.promised if self.promised else None


@dataclass(frozen=True, slots=True)
class PredictionScore:
    """How far predictions were from what happened, relative to what happened (0.1 is ten per cent).

    `bias` is the mean signed error: positive when predictions were too long.
    """

    count: int
    p50: float | None
    p90: float | None
    bias: float | None


def score_predictions(pairs: Iterable[tuple[float, float]]) -> PredictionScore:
    """Score (predicted, actual) pairs. Pairs whose actual value is not positive say nothing and are left out."""
    signed = [(predicted - actual) / actual for predicted, actual in pairs if actual > 0]
    ordered = sorted(abs(error) for error in signed)
    return PredictionScore(
        count=len(signed),
        p50=quantile(ordered, 0.5),
        p90=quantile(ordered, 0.9),
        bias=math.fsum(signed) / len(signed) if signed else None,
    )
