"""A driven step: its length from slack, who is left out of it, which prompts come first and which are given up."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiergate_engine.board import Decode
from tiergate_engine.drive import Demand, Ruled, Rules, StepPlan, least_step_s, plan_step, step_behind
from tiergate_engine.fill import Prefill, StepLimits
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime

STEP_TIME = RooflineStepTime(c0_s=0.005, per_token_s=1e-4, per_seq_s=1e-4, per_kv_s=1e-6)
LIMITS = StepLimits(4096)
RULES = Rules()


def plan(
    decodes: list[Decode], prefills: list[Prefill] | None = None, rules: Rules = RULES, limits: StepLimits = LIMITS
) -> StepPlan:
    return plan_step(decodes, prefills or [], limits, rules, STEP_TIME)


def served(decodes: list[Decode], planned: StepPlan) -> list[Decode]:
    return [one for index, one in enumerate(decodes) if index not in planned.skipped]


def step_of(decodes: list[Decode], prefills: list[Prefill], planned: StepPlan) -> Step:
    step = Step()
    for one in served(decodes, planned):
        step += Step.decode(1, one.kv_tokens)
    for prompt, chunk in zip(prefills, planned.chunks, strict=True):
        if chunk:
            step += Step.chunk(chunk, prompt.context_tokens)
    return step


# --- how long the step may take -----------------------------------------------------------------------------


def test_the_step_lasts_until_the_first_token_is_due() -> None:
    planned = plan([Decode(100, 0.25, 0.02), Decode(100, 0.1, 0.05)], [Prefill(5000)])
    assert planned.within_s == 0.1
    step = Step.decode(2, 200) + Step.chunk(planned.chunks[0])
    assert (
        STEP_TIME.seconds(step) <= 0.1 < STEP_TIME.seconds(Step.decode(2, 200) + Step.chunk(planned.chunks[0] + 1))
    )
    assert planned.tokens == step.tokens


def test_without_slack_it_lasts_as_long_as_the_tightest_pace() -> None:
    """PolyServe's form (§4.7): what was banked is not spent."""
    decodes = [Decode(100, 0.25, 0.02), Decode(100, 0.1, 0.05)]
    assert plan(decodes, [Prefill(5000)], replace(RULES, chunk_from_slack=False)).within_s == 0.02


def test_who_is_late_already_binds_with_its_pace_only() -> None:
    planned = plan([Decode(100, -0.3, 0.02), Decode(100, 0.5, 0.05)], [Prefill(5000)])
    assert planned.within_s == 0.02
    assert planned.chunks[0] > 0


def test_who_has_less_than_a_step_of_decodes_binds_with_its_pace() -> None:
    assert plan([Decode(100, 0.004, 0.02), Decode(100, 0.5, 0.05)]).within_s == 0.02


def test_a_pace_that_no_step_keeps_stops_no_prompt() -> None:
    """A client may ask for a pace that this engine has not; others' prompts must not starve for it."""
    hopeless = Decode(100, -0.3, 0.001)
    for rules in (RULES, replace(RULES, chunk_from_slack=False)):
        assert plan([hopeless], [Prefill(5000)], rules).chunks == [4095]
        assert plan([hopeless, Decode(100, 0.5, 0.05)], [Prefill(5000)], rules).within_s in (0.5, 0.05)


def test_a_step_that_leaves_somebody_out_for_a_tight_token_brings_it_in_time() -> None:
    decodes = [Decode(1, 0.008, 0.01), Decode(3000, 0.5, 0.05)]
    for rules in (RULES, replace(RULES, chunk_from_slack=False)):
        planned = plan(decodes, [Prefill(500)], rules)
        assert planned.skipped == (1,)
        assert planned.within_s == 0.008


def test_without_a_promise_on_board_only_tokens_limit_the_step() -> None:
    planned = plan([Decode(100)], [Prefill(5000)])
    assert planned.within_s == math.inf
    assert planned.chunks == [4095]


def test_a_limit_from_outside_holds_beside_the_slack() -> None:
    decodes = [Decode(100, 0.25, 0.02)]
    assert plan(decodes, [Prefill(5000)], limits=replace(LIMITS, within_s=0.05)).within_s == 0.05
    assert plan(decodes, [Prefill(5000)], limits=replace(LIMITS, within_s=0.5)).within_s == 0.25


def test_a_prompt_that_ends_in_the_step_is_not_made_late_by_those_behind_it() -> None:
    prefills = [Prefill(3000, remaining_s=2.0), Prefill(100, remaining_s=0.05)]
    planned = plan([], prefills)
    assert planned.within_s == 0.05
    assert planned.chunks[1] == 100
    assert 0 < planned.chunks[0] < 3000
    assert STEP_TIME.seconds(step_of([], prefills, planned)) <= 0.05
    # one that has no time for it in this step, or that was given up, binds nobody
    assert plan([], [Prefill(3000, remaining_s=0.1)], replace(RULES, relegate=False)).within_s == math.inf
    assert plan([], [Prefill(3000, remaining_s=0.1)]).within_s == math.inf
    assert plan([], prefills, replace(RULES, chunk_from_slack=False)).within_s == math.inf
    assert plan([], prefills, limits=replace(LIMITS, new_seqs=0)).within_s == math.inf


def test_no_chunk_makes_a_step_longer_than_the_longest() -> None:
    rules = replace(RULES, longest_s=0.06)
    assert plan([], [Prefill(3000)], rules).within_s == 0.06
    assert plan([Decode(100, 0.25, 0.02)], [Prefill(3000)], rules).within_s == 0.06
    assert plan([Decode(100, 0.05, 0.02)], [Prefill(3000)], rules).within_s == 0.05


def test_margin_and_host_time_come_out_of_the_chunk() -> None:
    decodes = [Decode(100, 0.1, 0.02)]
    careful = replace(RULES, margin=1.2, host_step_s=0.01, host_seq_s=0.001)
    chunk = plan(decodes, [Prefill(5000)], careful).chunks[0]
    step = Step.decode(1, 100) + Step.chunk(chunk)
    assert 1.2 * STEP_TIME.seconds(step) + 0.01 + 2 * 0.001 <= 0.1
    assert chunk < plan(decodes, [Prefill(5000)]).chunks[0]


def test_a_step_that_keeps_no_time_still_goes_on_when_nobody_decodes() -> None:
    planned = plan([], [Prefill(500)], replace(RULES, floor_tokens=32), replace(LIMITS, within_s=0.001))
    assert planned.chunks == [32]
    assert planned.tokens == 32


def test_an_empty_engine_plans_an_empty_step() -> None:
    assert plan([]) == StepPlan(math.inf, (), (), [], 0, ())


# --- who is left out ----------------------------------------------------------------------------------------

# 40 decodes of 500 tokens take 29 ms, 5 of them 8 ms.
CROWD = [Decode(500, 0.2 + 0.001 * index, 0.1) for index in range(40)]


def test_loose_decodes_are_left_out_for_a_tight_token_the_loosest_first_and_no_more_than_needed() -> None:
    decodes = [Decode(500, 0.02, 0.02), *CROWD]
    planned = plan(decodes)
    assert planned.skipped == tuple(range(40, 40 - len(planned.skipped), -1))
    assert STEP_TIME.seconds(step_of(decodes, [], planned)) <= 0.02
    one_more = Step.decode(42 - len(planned.skipped), 500 * (42 - len(planned.skipped)))
    assert STEP_TIME.seconds(one_more) > 0.02
    assert planned.within_s == 0.02


def test_nobody_is_left_out_when_it_is_switched_off_or_not_needed() -> None:
    tight = Decode(500, 0.02, 0.02)
    assert not plan([tight, *CROWD], rules=replace(RULES, skip=False)).skipped
    assert not plan([tight, *CROWD[:5]]).skipped
    assert not plan(CROWD).skipped


def test_nobody_is_left_out_for_a_token_that_is_late_anyway() -> None:
    assert not plan([Decode(500, 0.004, 0.02), *CROWD]).skipped
    assert not plan([Decode(500, -0.1, 0.02), *CROWD]).skipped


def test_nobody_is_left_out_when_it_does_not_help_enough() -> None:
    busy = [Decode(500, 0.022, 0.02)] * 30  # these alone take longer than their slack
    assert not plan([*busy, *CROWD]).skipped


def test_nobody_is_left_out_whose_own_token_would_then_be_late() -> None:
    """The step behind has all of them, which takes 29 ms, behind one of 20."""
    tight = Decode(500, 0.02, 0.02)
    assert not plan([tight, *[Decode(500, 0.045, 0.1)] * 40]).skipped
    assert plan([tight, *[Decode(500, 0.055, 0.1)] * 40]).skipped


def test_decodes_are_left_out_for_a_prompt_that_has_to_end_in_this_step() -> None:
    decodes = [Decode(500, 0.038, 0.035), *CROWD]
    urgent = Prefill(100, remaining_s=0.05)  # the step behind ends after 0.071 s
    planned = plan(decodes, [urgent])
    assert planned.skipped
    assert planned.within_s == 0.038
    assert planned.chunks == [100]
    assert STEP_TIME.seconds(step_of(decodes, [urgent], planned)) <= 0.038


def test_nobody_is_left_out_for_a_prompt_that_has_time_or_none_or_needs_more_than_a_step() -> None:
    decodes = [Decode(500, 0.038, 0.035), *CROWD]
    for prompt in (Prefill(100, remaining_s=0.08), Prefill(100, remaining_s=0.01), Prefill(400, remaining_s=0.05)):
        assert not plan(decodes, [prompt], replace(RULES, relegate=False)).skipped
    assert not plan(decodes, [Prefill(20, remaining_s=0.05)]).skipped, "it ends in this step as it is"


def test_nobody_is_left_out_for_best_effort_or_relegated_prompts() -> None:
    decodes = [Decode(500, 0.038, 0.035), *CROWD]
    assert not plan(decodes, [Prefill(100)]).skipped
    assert not plan(decodes, [Prefill(100, remaining_s=0.05, relegated=True)]).skipped


def test_prompts_that_cannot_be_admitted_make_nobody_wait() -> None:
    decodes = [Decode(500, 0.038, 0.035), *CROWD]
    assert not plan(decodes, [Prefill(100, remaining_s=0.05)], limits=replace(LIMITS, new_seqs=0)).skipped


def test_somebody_always_decodes() -> None:
    """A prompt may find no KV block, and then nothing at all would go on."""
    decodes = [Decode(50_000, 0.3, 0.1)] * 2
    one_out, both_out = Prefill(300, remaining_s=0.13), Prefill(500, remaining_s=0.08)
    assert len(plan(decodes, [one_out], limits=replace(LIMITS, free_blocks=0)).skipped) == 1
    planned = plan(decodes, [both_out], limits=replace(LIMITS, free_blocks=0))
    assert not planned.skipped
    assert planned.tokens == 2


# --- prompts ------------------------------------------------------------------------------------------------


def test_prompts_by_deadline_the_promised_before_the_rest_and_the_given_up_last() -> None:
    prefills = [
        Prefill(10),
        Prefill(10, remaining_s=3.0),
        Prefill(10, remaining_s=1.0, relegated=True),
        Prefill(10, remaining_s=2.0),
    ]
    assert plan([], prefills).order == (3, 1, 0, 2)
    assert plan([], prefills, replace(RULES, deadline_order=False)).order == (0, 1, 3, 2)


def test_a_prompt_that_cannot_be_on_time_comes_last() -> None:
    prefills = [Prefill(4000, remaining_s=0.3), Prefill(1000, remaining_s=0.4)]  # 4,000 tokens take 0.4 s
    planned = plan([], prefills)
    assert planned.order == (1, 0)
    assert planned.relegated == (0,)
    assert planned.chunks[1] == 1000
    assert planned.chunks[0] > 0
    kept = plan([], prefills, replace(RULES, relegate=False))
    assert kept.order == (0, 1)
    assert not kept.relegated


def test_a_late_prompt_is_given_up_and_one_with_time_is_not() -> None:
    assert plan([], [Prefill(10, remaining_s=-0.1)]).relegated == (0,)
    assert not plan([], [Prefill(10, remaining_s=0.1), Prefill(10)]).relegated


# --- invariants ---------------------------------------------------------------------------------------------

decode_lists = st.lists(
    st.builds(
        lambda kv, slack_ms, pace_ms, free: Decode(kv) if free else Decode(kv, slack_ms * 1e-3, pace_ms * 1e-3),
        st.integers(1, 5000),
        st.integers(-20, 300),
        st.sampled_from([10, 20, 50, 100]),
        st.integers(0, 9).map(lambda n: n == 0),
    ),
    max_size=40,
)
prefill_lists = st.lists(
    st.builds(
        Prefill,
        st.integers(1, 3000),
        st.integers(0, 3000),
        st.booleans(),
        st.one_of(st.just(math.inf), st.floats(-0.1, 2.0)),
        st.booleans(),
    ),
    max_size=8,
)
any_rules = st.builds(
    Rules,
    margin=st.sampled_from([1.0, 1.2]),
    host_step_s=st.sampled_from([0.0, 0.002]),
    host_seq_s=st.sampled_from([0.0, 0.0001]),
    chunk_from_slack=st.booleans(),
    deadline_order=st.booleans(),
    skip=st.booleans(),
    relegate=st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(decode_lists, prefill_lists, any_rules, st.sampled_from([64, 1024, 8192]))
def test_what_every_plan_keeps(decodes: list[Decode], prefills: list[Prefill], rules: Rules, tokens: int) -> None:
    limits, ruled = StepLimits(tokens), Ruled(rules, STEP_TIME)
    planned = plan_step(decodes, prefills, limits, rules, STEP_TIME)
    step = step_of(decodes, prefills, planned)
    left = served(decodes, planned)
    duration_s = ruled.seconds(step)
    alone_s = ruled.seconds(Step.decode(len(left), sum(one.kv_tokens for one in left)))

    assert planned.tokens == step.tokens
    assert sorted(planned.order) == list(range(len(prefills)))
    assert all(0 <= chunk <= one.tokens for chunk, one in zip(planned.chunks, prefills, strict=True))
    if any(planned.chunks) and left:
        assert duration_s <= planned.within_s * (1 + 1e-9)
        if rules.chunk_from_slack:
            # so it makes nobody late who would not be late without it
            for one in left:
                if one.slack_s >= alone_s:
                    assert one.slack_s >= duration_s * (1 - 1e-9)
    if planned.skipped:
        assert rules.skip
        assert left, "somebody decodes"
        everybody = Step.decode(len(decodes), sum(one.kv_tokens + 1 for one in decodes))
        behind_s = max(duration_s, alone_s) + ruled.seconds(everybody)
        for index in planned.skipped:
            assert decodes[index].slack_s >= behind_s * (1 - 1e-9), "left out, but on time in the step behind"
        least = min(decodes[index].slack_s for index in planned.skipped)
        skippable = [one.slack_s for one in left]
        assert sum(slack > least for slack in skippable) == 0 or len(left) == 1, "the loosest go first"
    order = [prefills[index] for index in planned.order]
    lost = set(planned.relegated)
    given_up = [prefills[index].relegated or index in lost for index in planned.order]
    assert given_up == sorted(given_up), "the given up come last"
    if rules.deadline_order:
        kept = [one.remaining_s for one, gone in zip(order, given_up, strict=True) if not gone]
        assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("margin", 0.9),
        ("margin", math.inf),
        ("host_step_s", -0.1),
        ("host_seq_s", math.nan),
        ("floor_tokens", 0),
        ("longest_s", 0.0),
    ],
)
def test_rules_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(RULES, **{field: value})  # type: ignore[arg-type]  # any field by its name


def test_the_step_behind_holds_everybody_who_may_come() -> None:
    demand = Demand(Step(), math.inf, seqs=2, kv_tokens=300)
    assert step_behind(Step.decode(3, 600), demand) == Step.decode(5, 600 + 3 + 300 + 2)
    assert least_step_s(Ruled(RULES, STEP_TIME)) == STEP_TIME.seconds(Step.decode(1, 1))
