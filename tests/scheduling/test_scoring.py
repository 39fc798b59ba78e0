"""Scoring against a brute-force oracle that looks at every single token."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.scoring import (
    DeadlineMeter,
    RequestEnd,
    RequestRecord,
    TierCounter,
    judge,
    judge_meter,
    quantile,
    score,
    score_predictions,
)
from scheduling.tiers import Slo

SLO = Slo(1.0, 0.1)


def record(times: list[float], **changes: object) -> RequestRecord:
    values: dict[str, object] = {
        "tier": "chat",
        "slo": SLO,
        "arrival_s": 10.0,
        "end": RequestEnd.FINISHED,
        "ended_s": times[-1] if times else None,
        "token_times_s": times,
    }
    return RequestRecord(**{**values, **changes})  # type: ignore[arg-type]  # a test's shorthand


slos = st.one_of(
    st.just(Slo(None, None)),
    st.just(Slo(None, 0.1)),
    st.builds(Slo, st.floats(0.01, 5), st.one_of(st.none(), st.floats(0.001, 0.5))),
)
events = st.lists(st.tuples(st.floats(0.0, 0.6), st.integers(1, 4)), max_size=30)


def oracle_slack(item: RequestRecord, first_index: int) -> float:
    """The smallest slack over all tokens, one by one; `first_index` is 0 or 1."""
    counts = item.token_counts or [1] * len(item.token_times_s)
    times = [time for time, count in zip(item.token_times_s, counts, strict=True) for _ in range(count)]
    assert item.slo.ttft_s is not None
    pace = item.slo.tpot_s

    def due(index: int) -> float:
        assert item.slo.ttft_s is not None
        if pace is None:
            return item.arrival_s + item.slo.ttft_s if index == 0 else math.inf
        return item.arrival_s + item.slo.ttft_s + (index + first_index) * pace

    if not item.streamed:
        assert item.ended_s is not None
        return due(max(len(times) - 1, 0)) - item.ended_s
    if not times:
        assert item.ended_s is not None
        return due(0) - item.ended_s
    return min(due(index) - time for index, time in enumerate(times))


@given(slo=slos, gaps=events, streamed=st.booleans(), arrival_s=st.floats(0, 1000))
def test_judge_agrees_with_a_look_at_every_token(
    slo: Slo, gaps: list[tuple[float, int]], streamed: bool, arrival_s: float
) -> None:
    now_s, times, counts = arrival_s, [], []
    for gap_s, count in gaps:
        now_s += gap_s
        times.append(now_s)
        counts.append(count)
    item = record(times, slo=slo, arrival_s=arrival_s, token_counts=counts, streamed=streamed, ended_s=now_s)
    judged = judge(item)
    assert judged.output_tokens == sum(counts)
    if slo.ttft_s is None:
        assert not judged.promised
        assert not judged.attained
        return
    expected = oracle_slack(item, 0)
    assert judged.slack_s == pytest.approx(expected, abs=1e-9)
    if abs(expected) > 1e-6:
        assert judged.attained is (expected > 0)
    one_based = oracle_slack(item, 1)
    if slo.tpot_s is not None and abs(one_based) > 1e-6:
        assert judged.attained_one_based is (one_based > 0)


@pytest.mark.parametrize(
    ("times", "attained", "one_based"),
    [
        ([11.0, 11.1, 11.2], True, True),  # every token exactly at its deadline
        ([11.05, 11.1, 11.2], False, True),  # the first is late by less than one TPOT
        ([10.1, 10.2, 11.21], False, True),
        ([10.1, 11.31, 11.32], False, False),
        ([11.0], True, True),
    ],
)
def test_every_token_has_its_deadline(times: list[float], attained: bool, one_based: bool) -> None:
    # Dyadic-free times: shift by a hair so that rounding is not what is tested.
    judged = judge(record([time - 1e-9 for time in times]))
    assert (judged.attained, judged.attained_one_based) == (attained, one_based)


def test_early_tokens_do_not_excuse_a_late_one() -> None:
    times = [10.1 + 0.09 * index for index in range(50)]
    assert judge(record(times)).attained
    times[20] = 13.001  # due at 10 + 1 + 20 * 0.1
    times[21:] = [13.001] * 29
    assert not judge(record(times)).attained


def test_tokens_of_one_event_came_together() -> None:
    # Three tokens at 11.05: the first of them was due at 11.0, whatever the others' deadlines.
    assert not judge(record([11.05], token_counts=[3])).attained
    assert judge(record([10.95, 11.05], token_counts=[1, 3])).attained
    assert not judge(record([10.95, 11.15], token_counts=[1, 3])).attained  # its first was due at 11.1


def test_an_answer_in_one_piece_is_judged_by_its_last_token() -> None:
    whole = record([11.35], token_counts=[5], streamed=False)
    assert judge(whole).attained  # due at 10 + 1 + 4 * 0.1
    assert not judge(record([11.45], token_counts=[5], streamed=False)).attained
    assert not judge(record([11.35], token_counts=[5])).attained
    assert judge(whole).ttft_s is None


@pytest.mark.parametrize("end", [RequestEnd.REFUSED, RequestEnd.FAILED, RequestEnd.UNFINISHED])
def test_what_did_not_finish_is_missed(end: RequestEnd) -> None:
    assert not judge(record([10.1, 10.2], end=end)).attained
    assert not judge(record([], end=end)).attained


def test_an_answer_without_tokens_is_judged_by_its_end() -> None:
    assert judge(record([], ended_s=10.9)).attained
    assert not judge(record([], ended_s=11.1)).attained


def test_a_promise_of_only_the_first_token_asks_nothing_of_the_others() -> None:
    slo = Slo(1.0, None)
    assert judge(record([10.9, 99.0], slo=slo)).attained
    assert not judge(record([11.1, 11.2], slo=slo)).attained


def test_best_effort_is_not_in_the_overall_denominator() -> None:
    records = [
        record([10.1]),
        record([99.0]),
        record([], end=RequestEnd.REFUSED, ended_s=10.0),
        record([99.0], tier="batch", slo=Slo(None, None)),
    ]
    result = score(records, 10.0, ["chat", "batch"])
    assert result.offered == 4
    assert (result.overall.offered, result.overall.attained) == (3, 1)
    assert result.attainment == pytest.approx(1 / 3)
    chat, batch = result.tiers
    assert (chat.finished, chat.refused) == (2, 1)
    assert batch.attainment is None
    assert batch.output_tokens_per_s == pytest.approx(0.1)
    assert result.overall.goodput_tokens_per_s == pytest.approx(0.1)
    assert result.overall.output_tokens_per_s == pytest.approx(0.2)


def test_ttft_and_tpot_count_from_the_scheduled_arrival() -> None:
    judged = judge(record([10.5, 10.6, 10.8], token_counts=[1, 1, 2]))
    assert judged.ttft_s == pytest.approx(0.5)
    assert judged.tpot_s == pytest.approx(0.1)
    assert judge(record([10.5])).tpot_s is None


def test_score_needs_a_window() -> None:
    with pytest.raises(ValueError, match="measured_s"):
        score([], 0.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2), st.integers(1, 99))
def test_quantile_is_the_usual_one(values: list[float], percent: int) -> None:
    expected = statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
    assert quantile(sorted(values), percent / 100) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_quantile_of_nothing_is_unknown() -> None:
    assert quantile([], 0.5) is None


@given(slo=slos, gaps=events)
def test_a_meter_says_what_the_list_says(slo: Slo, gaps: list[tuple[float, int]]) -> None:
    meter, now_s, times, counts = DeadlineMeter(slo, 5.0), 5.0, [], []
    for gap_s, count in gaps:
        now_s += gap_s
        meter.on_tokens(now_s, count)
        times.append(now_s)
        counts.append(count)
    live = judge_meter(meter, slo, 5.0, RequestEnd.FINISHED, ended_s=now_s)
    assert live == judge(record(times, slo=slo, arrival_s=5.0, token_counts=counts, ended_s=now_s))


def test_counters_agree_with_the_score() -> None:
    records = [
        record([10.1, 10.2]),
        record([11.5]),
        record([], end=RequestEnd.REFUSED),
        record([10.1], end=RequestEnd.FAILED),
    ]
    counter = TierCounter()
    for item in records:
        counter.add(item.end, judge(item))
    tier = score(records, 1.0).tiers[0]
    assert (counter.offered, counter.promised, counter.attained) == (tier.offered, tier.promised, tier.attained)
    assert (counter.finished, counter.refused, counter.failed) == (tier.finished, tier.refused, tier.failed)
    assert counter.attainment == tier.attainment == pytest.approx(0.25)
    assert counter.output_tokens == tier.output_tokens


def test_prediction_errors_are_relative_to_what_happened() -> None:
    found = score_predictions([(1.1, 1.0), (0.8, 1.0), (3.0, 2.0), (1.0, 0.0)])
    assert found.count == 3
    assert found.p50 == pytest.approx(0.2)
    assert found.p90 == pytest.approx(0.44)
    assert found.bias == pytest.approx((0.1 - 0.2 + 0.5) / 3)
    assert score_predictions([]).p50 is None
