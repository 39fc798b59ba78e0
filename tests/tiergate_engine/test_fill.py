"""Step filling: who gets how many tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiergate_engine.fill import Order, Prefill, StepLimits, fill, new_blocks
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime

NOTHING = Step()
STEP_TIME = RooflineStepTime(c0_s=0.004, weights_s=0.006, per_token_s=3e-5, sharpness=2.0, per_attention_s=1e-9)


def test_decodes_come_first_and_prefills_share_the_rest_in_order() -> None:
    prefills = [Prefill(300, 700, admitted=True), Prefill(500), Prefill(500)]
    assert fill(Step.decode(100, 5000), prefills, StepLimits(tokens=1000)) == [300, 500, 100]


def test_no_budget_left_means_no_chunk() -> None:
    assert fill(Step.decode(10, 100), [Prefill(5)], StepLimits(tokens=10)) == [0]


def test_the_first_prompt_without_a_slot_ends_admission_but_running_ones_go_on() -> None:
    prefills = [Prefill(10), Prefill(10), Prefill(10, admitted=True)]
    assert fill(NOTHING, prefills, StepLimits(tokens=100, new_seqs=1)) == [10, 0, 10]


def test_a_prompt_that_does_not_fit_the_blocks_is_not_overtaken() -> None:
    prefills = [Prefill(32), Prefill(64), Prefill(16)]
    assert fill(NOTHING, prefills, StepLimits(tokens=1000, free_blocks=5)) == [32, 0, 0]


def test_whole_prompt_asks_for_all_blocks_and_its_absence_for_the_chunk_only() -> None:
    prefills = [Prefill(160)]
    limits = StepLimits(tokens=32, free_blocks=4)
    assert fill(NOTHING, prefills, limits) == [0]
    assert fill(NOTHING, prefills, StepLimits(tokens=32, free_blocks=4, whole_prompt=False)) == [32]


def test_blocks_a_cache_hit_revives_count() -> None:
    hit = Prefill(16, 32, revived_blocks=2)
    assert fill(NOTHING, [hit], StepLimits(tokens=100, free_blocks=2)) == [0]
    assert fill(NOTHING, [hit], StepLimits(tokens=100, free_blocks=3)) == [16]


def test_a_running_prompt_is_cut_to_the_free_blocks() -> None:
    running = Prefill(100, 10, admitted=True)
    assert fill(NOTHING, [running], StepLimits(tokens=100, free_blocks=1)) == [22]
    assert fill(NOTHING, [running], StepLimits(tokens=100, free_blocks=0)) == [6]


def test_deadline_order_serves_the_most_urgent_and_keeps_ties_as_given() -> None:
    prefills = [
        Prefill(60, remaining_s=2.0),
        Prefill(60, remaining_s=-0.5),
        Prefill(60),
        Prefill(60, remaining_s=2.0),
    ]
    assert fill(NOTHING, prefills, StepLimits(tokens=150), Order.DEADLINE) == [60, 60, 0, 30]


@pytest.mark.parametrize("order", list(Order))
def test_relegated_prompts_come_last_in_every_order(order: Order) -> None:
    prefills = [Prefill(60, remaining_s=0.1, relegated=True), Prefill(60, remaining_s=5.0)]
    assert fill(NOTHING, prefills, StepLimits(tokens=80), order) == [20, 60]


def test_a_time_budget_sizes_the_chunk_and_goes_on_with_what_is_left() -> None:
    within_s = 0.025
    prefills = [Prefill(200), Prefill(5000)]
    decodes = Step.decode(20, 20_000)
    first, second = fill(decodes, prefills, StepLimits(8192, within_s=within_s), step_time=STEP_TIME)
    assert first == 200
    assert 0 < second < 5000
    base = decodes + Step.chunk(first)
    assert (
        STEP_TIME.seconds(base + Step.chunk(second)) <= within_s < STEP_TIME.seconds(base + Step.chunk(second + 1))
    )


def test_decodes_go_even_when_they_alone_break_the_time_budget() -> None:
    limits = StepLimits(8192, within_s=0.001)
    assert fill(Step.decode(5, 500), [Prefill(10)], limits, step_time=STEP_TIME) == [0]


def test_a_time_budget_needs_a_step_time() -> None:
    with pytest.raises(ValueError, match="step_time"):
        fill(NOTHING, [Prefill(10)], StepLimits(100, within_s=0.1))


@pytest.mark.parametrize(
    ("context", "tokens", "blocks"), [(0, 1, 1), (0, 16, 1), (0, 17, 2), (16, 1, 1), (15, 1, 0), (15, 2, 1)]
)
def test_new_blocks(context: int, tokens: int, blocks: int) -> None:
    assert new_blocks(context, tokens, 16) == blocks


@st.composite
def prefill_values(draw: st.DrawFn) -> Prefill:
    return Prefill(
        tokens=draw(st.integers(1, 3000)),
        context_tokens=draw(st.integers(0, 3000)),
        admitted=draw(st.booleans()),
        remaining_s=draw(st.floats(-5, 5)),
        relegated=draw(st.booleans()),
        revived_blocks=draw(st.integers(0, 5)),
    )


@given(
    prefills=st.lists(prefill_values(), max_size=12),
    decodes=st.integers(0, 100),
    tokens=st.integers(1, 4096),
    slots=st.integers(0, 5),
    free_blocks=st.integers(0, 300),
    whole_prompt=st.booleans(),
    within_s=st.none() | st.floats(0.0, 0.2),
    order=st.sampled_from(Order),
)
def test_no_limit_is_ever_broken(
    prefills: list[Prefill],
    decodes: int,
    tokens: int,
    slots: int,
    free_blocks: int,
    whole_prompt: bool,
    within_s: float | None,
    order: Order,
) -> None:
    limits = StepLimits(tokens, slots, free_blocks, 16, whole_prompt, within_s)
    base = Step.decode(decodes, decodes * 100)
    chunks = fill(base, prefills, limits, order, STEP_TIME)
    served = [(prefill, chunk) for prefill, chunk in zip(prefills, chunks, strict=True) if chunk]
    assert all(0 < chunk <= prefill.tokens for prefill, chunk in served)
    assert sum(chunks) <= max(tokens - decodes, 0)
    assert sum(not prefill.admitted for prefill, _ in served) <= slots
    taken = sum(new_blocks(prefill.context_tokens, chunk, 16) for prefill, chunk in served)
    assert taken + sum(prefill.revived_blocks for prefill, _ in served if not prefill.admitted) <= free_blocks
    if within_s is not None and served:
        whole = base
        for prefill, chunk in served:
            whole += Step.chunk(chunk, prefill.context_tokens)
        assert STEP_TIME.seconds(whole) <= within_s


@given(prefills=st.lists(prefill_values(), min_size=1, max_size=12), tokens=st.integers(1, 4096))
def test_by_deadline_only_the_last_one_served_is_cut(prefills: list[Prefill], tokens: int) -> None:
    chunks = fill(NOTHING, prefills, StepLimits(tokens), Order.DEADLINE)
    served = [(p.relegated, p.remaining_s) for p, chunk in zip(prefills, chunks, strict=True) if chunk]
    short = [(p.relegated, p.remaining_s) for p, chunk in zip(prefills, chunks, strict=True) if chunk < p.tokens]
    assert not short or max(served) <= min(short)
    assert sum(chunks) == min(tokens, sum(prefill.tokens for prefill in prefills))
