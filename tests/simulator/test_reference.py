"""The tier-packed reference against hand computation, its closed form, and engines that really run it."""

from __future__ import annotations

import math

import pytest

from bench.sim_reference import main as print_table
from profiles.catalogue import load
from scheduling.backends import EngineLimits
from scheduling.tiers import Slo
from simulator.prefixes import free_tokens
from simulator.reference import (
    Lengths,
    TierNeed,
    closed_form_gain,
    fixed_s,
    needs_of,
    reference,
    with_fixed_s,
)
from simulator.scenario import Form
from tests.simulator.offers import LIMITS, LINEAR, PACES_S, offer
from tiergate_engine.model import EngineConfig, EngineModel, SequenceSpec
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime

H200 = load("h200-llama-3.1-8b-bf16").step_time
TOKENS_ONLY = RooflineStepTime(c0_s=0.005, per_token_s=20e-6)
WIDE = EngineLimits(max_running_seqs=4096, max_batched_tokens=100_000)


def needs(lengths: Lengths, shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)) -> list[TierNeed]:
    return [TierNeed(str(pace), share, pace, lengths) for pace, share in zip(PACES_S, shares, strict=True)]


def test_a_class_alone_by_hand() -> None:
    # 100 prompt tokens and 101 answer tokens: one prefill token beside every decode, so 2 tokens a sequence.
    lengths = Lengths.equal(100, 101)
    found = reference(TOKENS_ONLY, WIDE, [TierNeed("a", 1.0, 0.025, lengths)]).tiers[0]
    assert (found.batch, found.chunk_tokens) == (500, 500)
    assert found.step_s == pytest.approx(0.025)
    assert found.cost_s == pytest.approx(100 * 0.025 / 500)
    apart = reference(TOKENS_ONLY, WIDE, [TierNeed("a", 1.0, 0.025, lengths)], Form.DISAGGREGATED)
    assert apart.tiers[0].batch == 1000
    assert apart.tiers[0].decode_s == pytest.approx(100 * 0.025 / 1000)
    assert apart.tiers[0].prefill_s == pytest.approx(100 * (0.005 + 2.0) / 100_000)
    assert apart.optimal_rate(20) == pytest.approx(20 / (0.0025 + 0.002005))


@pytest.mark.parametrize(
    "limits", [EngineLimits(16, 100_000), EngineLimits(4096, 32), EngineLimits(4096, 10**6, 2408)]
)
def test_limits_of_the_engine_bind(limits: EngineLimits) -> None:
    # 16 sequences; 32 tokens a step are 16 of each kind; 16 residents of 150.5 tokens fill 2,408.
    found = reference(TOKENS_ONLY, limits, [TierNeed("a", 1.0, 0.025, Lengths.equal(100, 101))]).tiers[0]
    assert found.batch == 16


@pytest.mark.parametrize("t0_ms", [2.0, 5.0, 8.0, 12.0])
def test_separation_follows_its_closed_form(t0_ms: float) -> None:
    # Where a step is t0 plus so much a token, the cost of a tier is in proportion to TPOT / (TPOT - t0).
    step_time = RooflineStepTime(c0_s=t0_ms / 1e3, per_token_s=2e-6)
    found = reference(step_time, EngineLimits(10**5, 10**6), needs(Lengths.equal(500, 251)))
    assert found.separation_gain == pytest.approx(
        closed_form_gain(t0_ms / 1e3, PACES_S, (0.1, 0.2, 0.3, 0.4)), rel=2e-3
    )


def test_closed_form_figures() -> None:
    gains = [closed_form_gain(t0_s, PACES_S, (1, 2, 3, 4)) for t0_s in (0.002, 0.005, 0.008, 0.012)]
    assert gains == pytest.approx([1.06, 1.18, 1.36, 1.75], abs=0.01)


def test_fixed_part_of_the_h200_profile() -> None:
    assert fixed_s(H200) == pytest.approx(0.0013, abs=0.0001)
    assert fixed_s(TOKENS_ONLY) == pytest.approx(0.005)


@pytest.mark.parametrize(("t0_ms", "low", "high"), [(None, 1.0, 1.09), (5.0, 1.12, 1.25), (8.0, 1.3, 1.5)])
def test_separation_on_the_h200_profile(t0_ms: float | None, low: float, high: float) -> None:
    step_time = H200 if t0_ms is None else with_fixed_s(H200, t0_ms / 1e3)
    limits = EngineLimits(1024, 8192, 850_000)
    for prompt, output in ((1155, 211), (2048, 28), (685, 824)):
        found = reference(step_time, limits, needs(Lengths.equal(prompt, output)))
        assert low <= found.separation_gain <= high


def test_the_cheapest_batch_is_taken_not_the_greatest() -> None:
    found = reference(H200, EngineLimits(1024, 8192, 850_000), needs(Lengths.equal(1155, 211))).tiers
    assert found[-1].step_s < 0.5 * PACES_S[-1]
    costs = [tier.cost_s for tier in found]
    assert costs == sorted(costs, reverse=True)


def test_a_fixed_part_can_be_set_but_not_taken_away() -> None:
    assert fixed_s(with_fixed_s(H200, 0.008)) == pytest.approx(0.008)
    longer = with_fixed_s(H200, 0.008).seconds(Step.chunk(100)) - H200.seconds(Step.chunk(100))
    assert longer == pytest.approx(0.008 - fixed_s(H200))
    with pytest.raises(ValueError, match="less than the profile's"):
        with_fixed_s(TOKENS_ONLY, 0.004)


def test_a_pace_that_cannot_be_kept_costs_infinitely_much() -> None:
    found = reference(TOKENS_ONLY, WIDE, [TierNeed("a", 1.0, 0.004, Lengths.equal(100, 101))])
    assert math.isinf(found.cost_s)
    assert found.optimal_rate(20) == 0.0


def test_long_prompts_with_short_answers() -> None:
    # 5,000 prompt tokens for each decode take 105 ms: too much beside one resident at 50 ms, so a prompt is
    # prefilled in chunks of 2,249 tokens beside one.
    lengths = Lengths.equal(5000, 2)
    found = reference(TOKENS_ONLY, WIDE, [TierNeed("a", 1.0, 0.050, lengths)]).tiers[0]
    assert found.batch == 1
    assert found.cost_s == pytest.approx(5000 * 0.050 / 2249, rel=0.01)
    only = reference(TOKENS_ONLY, WIDE, [TierNeed("a", 1.0, 0.050, Lengths.equal(5000, 1))]).tiers[0]
    assert only.cost_s == pytest.approx(5000 * 2.005 / 100_000)


def test_a_tighter_pace_more_host_time_or_more_fixed_time_never_pay() -> None:
    lengths = Lengths.equal(1000, 200)
    rates = [reference(LINEAR, LIMITS, [TierNeed("a", 1.0, pace, lengths)]).optimal_rate(20) for pace in PACES_S]
    assert rates == sorted(rates)
    bare = reference(LINEAR, LIMITS, needs(lengths))
    assert reference(LINEAR, LIMITS, needs(lengths), host_step_s=0.001).cost_s > bare.cost_s
    assert reference(LINEAR, LIMITS, needs(lengths), host_seq_s=1e-5).cost_s > bare.cost_s
    assert bare.pool_rate(20) < bare.optimal_rate(20)


def test_the_split_of_a_disaggregated_fleet_balances_its_sides() -> None:
    found = reference(LINEAR, LIMITS, needs(Lengths.equal(1000, 200)), Form.DISAGGREGATED)
    share = found.prefill_share
    prefill = found.prefill_backends(20)
    assert abs(prefill - 20 * share) < 1.0
    assert [found.prefill_backends(2), reference(LINEAR, LIMITS, needs(Lengths.equal(9, 9))).prefill_share] == [
        1,
        0,
    ]
    with pytest.raises(ValueError, match="at least two"):
        found.prefill_backends(1)


def test_lengths_are_means_over_what_engines_feel() -> None:
    found = Lengths.of([(100, 0, 11), (300, 0, 1), (200, 50, 31)])
    assert found.prompt_tokens == pytest.approx((100 + 300 + 150) / 3)
    assert found.decode_steps == pytest.approx((10 + 0 + 30) / 3)
    contexts = [100 + j for j in range(1, 11)] + [200 + j for j in range(1, 31)]
    assert found.resident_kv_tokens == pytest.approx(sum(contexts) / len(contexts))
    pairs = (100**2 + 300**2 + 200**2 - 50**2) / 2
    assert found.attention_per_token == pytest.approx(pairs / 550)
    same = Lengths.mixed([(2.0, found), (5.0, found)])
    assert same.resident_kv_tokens == pytest.approx(found.resident_kv_tokens)
    assert same.attention_per_token == pytest.approx(found.attention_per_token)
    with pytest.raises(ValueError, match="at least one request"):
        Lengths.of([])
    with pytest.raises(ValueError, match="cached_tokens"):
        Lengths.of([(10, 10, 1)])


def test_needs_are_taken_from_what_is_offered() -> None:
    offers = [
        offer(0, 100, 10, Slo(1.0, 0.05), tier="b", prefix_blocks=(1, 2)),
        offer(1, 100, 10, Slo(1.0, 0.02), tier="a", prefix_blocks=(1, 2, 3)),
        offer(2, 100, 10, Slo(1.0, 0.05), tier="b"),
        offer(3, 100, 10, Slo(None, None), tier="best effort"),
    ]
    assert [(need.name, need.share) for need in needs_of(offers)] == [("a", 1.0), ("b", 2.0)]
    cached = needs_of(offers, prefix_caching=True)
    assert [need.lengths.prompt_tokens for need in cached] == [100 - 32, 100]
    assert free_tokens(offers) == [0, 32, 0, 0]
    with pytest.raises(ValueError, match="TPOT"):
        needs_of(offers[3:])


def test_a_whole_prompt_is_never_cached() -> None:
    offers = [offer(i, 32, 5, Slo(1.0, 0.05), prefix_blocks=(1, 2)) for i in range(2)]
    assert free_tokens(offers) == [0, 31]


def test_an_engine_in_balance_reaches_the_reference() -> None:
    # One request in, one out, for ever: a driven engine fed exactly at the reference's rate.
    lengths = Lengths.equal(300, 61)
    packed = reference(LINEAR, LIMITS, [TierNeed("a", 1.0, 0.030, lengths)]).tiers[0]
    config = EngineConfig(kv_tokens=400_000, max_model_tokens=4096, max_running_seqs=256, max_batched_tokens=4096)
    engine = EngineModel(config, LINEAR)
    engine.set_budget(packed.batch + packed.chunk_tokens)
    for place in range(2000):
        engine.submit(SequenceSpec(str(place), 300, 61), 0.0)
    now_s, finished = 0.0, 0
    marks: dict[int, float] = {}
    while not engine.idle:
        step = engine.next_step(now_s)
        assert step is not None
        now_s = step.ends_s
        finished += sum(token.finished for token in engine.finish_step(now_s))
        for mark in (500, 1500):
            if finished >= mark:
                marks.setdefault(mark, now_s)
    rate_rps = 1000 / (marks[1500] - marks[500])
    assert rate_rps == pytest.approx(1.0 / packed.cost_s, rel=0.03)


def test_the_command_prints_a_row_for_every_fixed_part(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["--profile", "h200-llama-3.1-8b-bf16", "--trace", "uniform:100-200/10-20"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in rows[1:]] == ["1.28", "5.00", "8.00", "12.00"]
