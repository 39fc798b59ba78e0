"""Prefill pacing: the formula against steps that are walked one by one, and what a bucket lets in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.pacing import ChunkCost, PrefillBucket, tokens_at_once
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime

TIMES = st.floats(0.001, 0.1)
COSTS = st.builds(ChunkCost, st.integers(1, 4096), TIMES, TIMES, st.booleans())


def walked(cost: ChunkCost, rate_tokens_s: float, steps: int) -> tuple[int, float]:
    """Tokens that each decode got, and the time, when a chunk goes in once the rate has brought its tokens."""
    now_s, computed, tokens = 0.0, 0, 0
    for _ in range(steps):
        if rate_tokens_s * now_s - computed >= cost.chunk_tokens:
            computed += cost.chunk_tokens
            now_s += cost.extra_s
            if cost.alone:
                continue
        now_s += cost.decode_step_s
        tokens += 1
    return tokens, now_s


class TestAtOnce:
    STEP_TIME = RooflineStepTime(c0_s=0.005, per_token_s=0.00002, per_seq_s=0.0001, per_kv_s=1e-8)

    @given(st.integers(0, 200), st.floats(0.001, 0.2), st.integers(1, 4096), st.booleans())
    def test_a_step_with_all_of_them_keeps_the_pace_and_one_more_would_not(
        self, seqs: int, tpot_s: float, budget: int, alone: bool
    ) -> None:
        decodes = Step.decode(seqs, seqs * 500)
        most = tokens_at_once(self.STEP_TIME, decodes, budget, tpot_s, alone=alone)

        def gap_s(tokens: int) -> float:
            if alone:
                decode_s = self.STEP_TIME.seconds(decodes) if seqs else 0.0
                return self.STEP_TIME.seconds(Step.chunk(tokens)) + decode_s
            return self.STEP_TIME.seconds(decodes + Step.chunk(tokens))

        whole = max(budget if alone else budget - seqs, 1)
        assert most == math.inf or most <= whole
        if most:
            assert gap_s(whole if most == math.inf else int(most)) <= tpot_s + 1e-9
        if most < whole:
            assert gap_s(int(most) + 1) > tpot_s - 1e-9

    def test_without_a_pace_there_is_no_bound(self) -> None:
        for alone in (True, False):
            assert tokens_at_once(self.STEP_TIME, Step(), 100, math.inf, alone=alone) == math.inf


class TestRate:
    def test_as_written_in_the_formula(self) -> None:
        cost = ChunkCost(chunk_tokens=512 - 32, decode_step_s=0.010, extra_s=0.030)
        assert cost.rate_tokens_s(0.020) == pytest.approx((512 - 32) * (1 - 0.010 / 0.020) / (0.040 - 0.010))

    @given(COSTS, st.floats(1.05, 4.0))
    def test_decodes_keep_the_pace_that_it_was_reckoned_for(self, cost: ChunkCost, times: float) -> None:
        tpot_s = cost.decode_step_s * times
        rate = cost.rate_tokens_s(tpot_s)
        if rate == math.inf:
            assert not cost.alone
            assert cost.decode_step_s + cost.extra_s <= tpot_s * (1 + 1e-9)
            return
        tokens, time_s = walked(cost, rate, 3_000)
        # What is in the way at the end counts for a chunk or two, spread over all tokens.
        assert time_s <= tpot_s * tokens + 2 * cost.extra_s + tpot_s
        at_more, more_s = walked(cost, rate * 1.2, 3_000)
        assert more_s > tpot_s * at_more * 0.999 - 2 * cost.extra_s - tpot_s, "no room is left over"

    @given(COSTS, st.floats(1.05, 4.0))
    def test_there_and_back(self, cost: ChunkCost, times: float) -> None:
        tpot_s = cost.decode_step_s * times
        rate = cost.rate_tokens_s(tpot_s)
        if 0.0 < rate < math.inf:
            assert cost.tpot_s(rate) == pytest.approx(tpot_s, rel=1e-6)
            assert cost.tpot_s(rate * 0.9) < cost.tpot_s(rate) < cost.tpot_s(rate * 1.1)

    @given(COSTS, TIMES, TIMES)
    def test_a_looser_pace_lets_more_in(self, cost: ChunkCost, one_s: float, other_s: float) -> None:
        tight_s, loose_s = sorted((one_s, other_s))
        assert cost.rate_tokens_s(tight_s) <= cost.rate_tokens_s(loose_s)

    def test_the_ends(self) -> None:
        cost = ChunkCost(100, 0.010, 0.030)
        assert cost.rate_tokens_s(math.inf) == math.inf
        assert cost.rate_tokens_s(0.040) == math.inf, "a chunk in every step is still in time"
        assert cost.rate_tokens_s(0.0399) < math.inf
        assert cost.rate_tokens_s(0.010) == 0.0
        assert cost.rate_tokens_s(0.005) == 0.0
        assert ChunkCost(0, 0.010, 0.030).rate_tokens_s(0.05) == 0.0
        assert ChunkCost(100, 0.010, 0.030, alone=True).rate_tokens_s(0.05) == pytest.approx(100 * 0.8 / 0.030)
        assert cost.tpot_s(0.0) == 0.010
        assert cost.tpot_s(1e9) == math.inf
        assert ChunkCost(0, 0.010, 0.0).tpot_s(1.0) == math.inf

    def test_by_a_profile(self) -> None:
        step_time = RooflineStepTime(c0_s=0.002)
        decodes = Step.decode(32, 32 * 1000)
        mixed = ChunkCost.of(step_time, decodes, 512, 0.001)
        assert mixed.chunk_tokens == 480
        assert mixed.decode_step_s == step_time.seconds(decodes) + 0.001
        assert mixed.extra_s == pytest.approx(
            step_time.seconds(decodes + Step.chunk(480)) - step_time.seconds(decodes)
        )
        alone = ChunkCost.of(step_time, decodes, 512, 0.001, alone=True)
        assert (alone.chunk_tokens, alone.extra_s) == (512, step_time.seconds(Step.chunk(512)) + 0.001)
        assert ChunkCost.of(step_time, decodes, 32).chunk_tokens == 0
        assert ChunkCost.of(step_time, Step(), 512).rate_tokens_s(0.02) > 0.0


class TestBucket:
    @given(
        st.integers(1, 5_000),
        st.floats(1.0, 10_000.0),
        st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 20_000)), min_size=1, max_size=30),
    )
    def test_no_stretch_of_time_brings_more(
        self, burst: int, rate: float, arrivals: list[tuple[float, int]]
    ) -> None:
        bucket, now_s = PrefillBucket(burst, rate, 0.0), 0.0
        let_in: list[tuple[float, int]] = []
        for pause_s, tokens in arrivals:
            now_s += pause_s
            now_s += bucket.wait_s(tokens, now_s)
            assert bucket.wait_s(tokens, now_s) <= 1e-6
            bucket.take(tokens, now_s)
            let_in.append((now_s, tokens))
        for first in range(len(let_in)):
            for last in range(first + 1, len(let_in)):
                brought = sum(tokens for _, tokens in let_in[first:last])
                lasted_s = let_in[last][0] - let_in[first][0]
                assert brought <= burst + rate * lasted_s + 1e-3 * brought

    @given(st.integers(1, 5_000), st.floats(1.0, 10_000.0), st.integers(1, 100_000))
    def test_every_prompt_gets_in(self, burst: int, rate: float, tokens: int) -> None:
        bucket = PrefillBucket(burst, rate, 5.0)
        assert bucket.wait_s(tokens, 5.0) == 0.0
        bucket.take(tokens, 5.0)
        wait_s = bucket.wait_s(tokens, 5.0)
        assert wait_s == pytest.approx(max(min(tokens, burst) - (burst - tokens), 0) / rate)
        assert bucket.wait_s(tokens, 5.0 + wait_s) <= 1e-6

    def test_no_rate_and_any_rate(self) -> None:
        bucket = PrefillBucket(100, 0.0, 0.0)
        bucket.take(100, 0.0)
        assert bucket.wait_s(1, 1e9) == math.inf
        bucket.set_rate(math.inf, 1e9)
        assert bucket.wait_s(10**9, 1e9) == 0.0
        bucket.take(10**9, 1e9)
        bucket.set_rate(1.0, 1e9 + 1)
        assert bucket.wait_s(100, 1e9 + 1) == 0.0, "what went in without a limit is no debt"

    def test_a_new_rate_holds_from_now_on(self) -> None:
        bucket = PrefillBucket(100, 10.0, 0.0)
        bucket.take(100, 0.0)
        bucket.set_rate(50.0, 4.0)
        assert bucket.wait_s(100, 4.0) == pytest.approx(60 / 50)
        assert bucket.rate_tokens_s == 50.0

    def test_what_was_not_computed_comes_back(self) -> None:
        bucket = PrefillBucket(100, 10.0, 0.0)
        bucket.take(80, 0.0)
        bucket.give_back(50, 0.0)
        assert bucket.wait_s(70, 0.0) == 0.0
        bucket.give_back(9_999, 0.0)
        bucket.take(100, 0.0)
        assert bucket.wait_s(1, 0.0) > 0.0

    def test_a_clock_that_stands_still_brings_nothing(self) -> None:
        bucket = PrefillBucket(100, 10.0, 3.0)
        bucket.take(100, 3.0)
        assert bucket.wait_s(10, 2.0) == bucket.wait_s(10, 3.0) == 1.0

    @pytest.mark.parametrize(("burst", "rate"), [(0, 1.0), (-1, 1.0), (math.nan, 1.0), (1, -1.0), (1, math.nan)])
    def test_what_is_no_bucket(self, burst: float, rate: float) -> None:
        with pytest.raises(ValueError, match="must be"):
            PrefillBucket(burst, rate, 0.0)
