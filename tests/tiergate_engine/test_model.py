"""The engine model: each rule of the scheduler, and its equality with a plain one on random work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiergate_engine.naive_engine import NaiveEngine
from tiergate_engine.model import (
    Emitted,
    EngineConfig,
    EngineFull,
    EngineModel,
    PlannedStep,
    SequenceSpec,
    SequenceTooLong,
)
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime

STEP_TIME = RooflineStepTime(c0_s=0.01, per_token_s=1e-5, per_kv_s=1e-7)
CONFIG = EngineConfig(kv_tokens=16_000, max_model_tokens=8_000)


def engine(config: EngineConfig = CONFIG) -> EngineModel:
    return EngineModel(config, STEP_TIME)


def spec(name: str, prompt: int = 10, output: int = 5, priority: int = 0) -> SequenceSpec:
    return SequenceSpec(name, prompt, output, priority)


def plan(model: EngineModel) -> PlannedStep:
    planned = model.next_step(0.0)
    assert planned is not None
    return planned


def run_step(model: EngineModel) -> list[tuple[str, int, bool]]:
    plan(model)
    return [(token.sequence_id, token.index, token.finished) for token in model.finish_step(0.0)]


def run_out(model: EngineModel, most: int = 100_000) -> list[Emitted]:
    tokens: list[Emitted] = []
    for _ in range(most):
        if model.next_step(0.0) is None:
            return tokens
        tokens.extend(model.finish_step(0.0))
    raise AssertionError("the engine does not come to an end")


# --- the rules ---------------------------------------------------------------------------------------------


def test_an_idle_engine_plans_nothing() -> None:
    model = engine()
    assert model.next_step(0.0) is None
    assert model.idle


def test_the_step_that_finishes_the_prompt_emits_the_first_token() -> None:
    model = engine(replace(CONFIG, max_batched_tokens=100))
    model.submit(spec("a", prompt=250, output=3), 0.0)
    assert plan(model).step == Step.chunk(100)
    assert model.finish_step(0.0) == ()
    assert plan(model).step == Step.chunk(100, 100)
    assert model.finish_step(0.0) == ()
    assert plan(model).step == Step.chunk(50, 200)
    assert model.finish_step(0.0) == (Emitted("a", 0, False),)
    assert plan(model).step == Step.decode(1, 251)
    assert model.finish_step(0.0) == (Emitted("a", 1, False),)
    assert plan(model).step == Step.decode(1, 252)
    assert model.finish_step(0.0) == (Emitted("a", 2, True),)
    assert model.idle
    assert model.kv_used_tokens == 0
    assert model.steps == 5


def test_an_answer_of_one_token_ends_with_its_prompt() -> None:
    model = engine()
    model.submit(spec("a", output=1), 0.0)
    assert run_step(model) == [("a", 0, True)]
    assert model.idle


def test_decodes_go_before_prompts_and_prompts_fill_the_rest() -> None:
    model = engine(replace(CONFIG, max_batched_tokens=100))
    model.submit(spec("a", 10), 0.0)
    run_step(model)
    model.submit(spec("b", 60), 0.0)
    model.submit(spec("c", 60), 0.0)
    assert plan(model).step == Step.decode(1, 11) + Step.chunk(60) + Step.chunk(39)
    model.finish_step(0.0)
    assert plan(model).step == Step.decode(2, 12 + 61) + Step.chunk(21, 39)


def test_a_step_takes_its_profile_time_and_host_time() -> None:
    model = engine(replace(CONFIG, host_step_s=0.5, host_seq_s=0.1))
    model.submit(spec("a"), 0.0)
    model.submit(spec("b"), 0.0)
    planned = model.next_step(7.0)
    assert planned is not None
    assert planned.duration_s == pytest.approx(STEP_TIME.seconds(planned.step) + 0.5 + 2 * 0.1)
    assert planned.ends_s == 7.0 + planned.duration_s


def test_no_more_run_than_the_cap() -> None:
    model = engine(replace(CONFIG, max_running_seqs=2))
    for name in "abc":
        model.submit(spec(name, output=2), 0.0)
    assert plan(model).step.prefill_seqs == 2
    assert (model.running, model.waiting) == (2, 1)
    model.finish_step(0.0)
    assert [token[0] for token in run_step(model)] == ["a", "b"]
    assert [token[0] for token in run_step(model)] == ["c"]


def test_a_running_cap_set_live_keeps_those_who_run() -> None:
    model = engine()
    for name in "ab":
        model.submit(spec(name), 0.0)
    run_step(model)
    model.set_running_cap(1)
    model.submit(spec("c", output=1), 0.0)
    assert plan(model).step == Step.decode(2, 22)
    model.finish_step(0.0)
    model.set_running_cap(None)
    assert plan(model).step.prefill_seqs == 1


def test_a_running_cap_of_nothing_leaves_the_queue_waiting() -> None:
    model = engine()
    model.set_running_cap(0)
    model.submit(spec("a"), 0.0)
    assert model.next_step(0.0) is None
    assert not model.idle


def test_a_budget_set_live_holds_from_the_next_step_and_never_exceeds_the_engines_own() -> None:
    model = engine(replace(CONFIG, max_batched_tokens=100))
    model.submit(spec("a", 300), 0.0)
    model.set_budget(30)
    assert plan(model).step.tokens == 30
    model.finish_step(0.0)
    model.set_budget(10_000)
    assert plan(model).step.tokens == 100
    model.finish_step(0.0)
    model.set_budget(None)
    assert plan(model).step.tokens == 100


def test_a_budget_below_the_decodes_starves_the_later_ones() -> None:
    # As measured on vLLM 0.32: a budget of 2 and 5 streams run 2 by 2.
    model = engine()
    for name in "abcde":
        model.submit(spec(name, output=4), 0.0)
    run_step(model)
    model.set_budget(2)
    order = [[token[0] for token in run_step(model)] for _ in range(8)]
    assert order == [["a", "b"]] * 3 + [["c", "d"]] * 3 + [["e"]] * 2


def test_chunks_are_cut_to_a_pace_and_decodes_always_go() -> None:
    model = engine()
    model.submit(spec("a", prompt=100, output=50), 0.0)
    run_step(model)
    model.submit(spec("b", prompt=2000, output=3), 0.0)
    model.set_pace(0.015)
    planned = plan(model)
    assert planned.step.decode_seqs == 1
    assert 0 < planned.step.prefill_tokens < 600
    assert planned.duration_s <= 0.015
    one_more = planned.step + Step.chunk(1)
    assert STEP_TIME.seconds(one_more) > 0.015 - 1e-5
    model.finish_step(0.0)
    model.set_pace(0.001)  # shorter than the decode alone
    assert plan(model).step == Step.decode(1, 102)
    model.finish_step(0.0)
    model.set_pace(None)
    assert plan(model).step.prefill_tokens > 1000
    with pytest.raises(ValueError, match="seconds must be positive"):
        model.set_pace(0.0)


def test_an_engine_that_cannot_keep_its_pace_at_all_goes_on() -> None:
    model = engine()
    model.set_pace(0.001)
    model.submit(spec("a", prompt=100, output=2), 0.0)
    assert [token.sequence_id for token in run_out(model)] == ["a", "a"]


def test_received_kv_takes_blocks_but_no_time() -> None:
    model = engine()
    model.submit(SequenceSpec("a", 1000, 3, received_tokens=1000), 0.0)
    assert plan(model).step == Step.chunk(1, 999)
    assert model.kv_used_tokens == 1008
    assert model.finish_step(0.0) == (Emitted("a", 0, False),)
    assert model.decode_progress() == [("a", 1)]
    run_out(model)
    assert model.kv_used_tokens == 0
    with pytest.raises(ValueError, match="received_tokens"):
        SequenceSpec("b", 10, 1, received_tokens=11)


def test_received_kv_is_lost_in_a_preemption() -> None:
    model = engine(replace(CONFIG, kv_tokens=160, max_model_tokens=200))
    model.submit(SequenceSpec("a", 60, 40, received_tokens=60), 0.0)
    model.submit(SequenceSpec("b", 60, 40, received_tokens=60), 0.0)
    chunks = []
    while (planned := model.next_step(0.0)) is not None:
        chunks.append(planned.step.prefill_tokens)
        model.finish_step(0.0)
    assert model.preemptions > 0
    assert chunks[0] == 2
    assert max(chunks[1:]) > 60


def test_the_queue_goes_by_arrival() -> None:
    model = engine(replace(CONFIG, max_running_seqs=1))
    for name, priority in (("a", 5), ("b", 1), ("c", 3)):
        model.submit(spec(name, output=1, priority=priority), 0.0)
    assert [token.sequence_id for token in run_out(model)] == ["a", "b", "c"]


def test_the_queue_goes_by_priority_then_arrival_when_asked() -> None:
    model = engine(replace(CONFIG, max_running_seqs=1, priority_scheduling=True))
    for name, priority in (("a", 5), ("b", 1), ("c", 1), ("d", -3)):
        model.submit(spec(name, output=1, priority=priority), 0.0)
    assert [token.sequence_id for token in run_out(model)] == ["d", "b", "c", "a"]


def test_kv_grows_by_blocks() -> None:
    model = engine()
    model.submit(spec("a", prompt=16, output=20), 0.0)
    run_step(model)
    assert model.kv_used_tokens == 16
    run_step(model)
    assert model.kv_used_tokens == 32
    for _ in range(15):
        run_step(model)
    assert model.kv_used_tokens == 32
    run_step(model)
    assert model.kv_used_tokens == 48


def crowded(priority_scheduling: bool = False) -> EngineModel:
    """Two sequences that fill all four blocks, and of whom both want a fifth in the next step."""
    config = replace(CONFIG, kv_tokens=64, max_model_tokens=64, priority_scheduling=priority_scheduling)
    model = engine(config)
    model.submit(spec("a", prompt=32, output=10, priority=9), 0.0)
    model.submit(spec("b", prompt=32, output=10, priority=1), 0.0)
    assert {token[0] for token in run_step(model)} == {"a", "b"}
    assert model.kv_used_tokens == 64
    return model


def test_without_kv_the_last_running_sequence_is_preempted_and_recomputed() -> None:
    model = crowded()
    assert plan(model).step == Step.decode(1, 33)
    assert (model.preemptions, model.running, model.waiting) == (1, 1, 1)
    assert model.finish_step(0.0) == (Emitted("a", 1, False),)
    # 33 tokens of b's prompt and answer need three blocks, of which one is free: it waits for a to end.
    for _ in range(7):
        assert plan(model).step.prefill_tokens == 0
        model.finish_step(0.0)
    assert [(t.sequence_id, t.finished) for t in (run_step_tokens(model))] == [("a", True)]
    assert plan(model).step == Step.chunk(33)
    assert model.finish_step(0.0) == (Emitted("b", 1, False),)
    assert [token.index for token in run_out(model)] == list(range(2, 10))


def run_step_tokens(model: EngineModel) -> tuple[Emitted, ...]:
    plan(model)
    return model.finish_step(0.0)


def test_without_kv_the_largest_priority_value_is_preempted_when_scheduled_by_priority() -> None:
    model = crowded(priority_scheduling=True)
    plan(model)
    assert model.finish_step(0.0) == (Emitted("b", 1, False),)
    assert model.preemptions == 1


def test_a_victim_that_had_its_block_already_gives_it_back() -> None:
    model = engine(replace(CONFIG, kv_tokens=80, max_model_tokens=80, priority_scheduling=True))
    model.submit(spec("a", prompt=31, output=9, priority=9), 0.0)
    run_step(model)
    model.submit(spec("b", prompt=32, output=4, priority=1), 0.0)
    run_step(model)
    assert model.kv_used_tokens == 64
    # Both want a block and one is left: a, which runs longer, gets it, then loses it and its place to b.
    assert run_step(model) == [("b", 1, False)]
    assert (model.preemptions, model.kv_used_tokens) == (1, 48)
    run_out(model)
    assert model.kv_used_tokens == 0


def test_a_victims_budget_goes_to_those_behind_it() -> None:
    model = engine(replace(CONFIG, kv_tokens=80, max_model_tokens=80, priority_scheduling=True))
    model.submit(spec("a", prompt=10, output=9, priority=9), 0.0)
    run_step(model)
    model.submit(spec("b", prompt=32, output=4, priority=1), 0.0)
    model.submit(spec("c", prompt=20, output=4, priority=1), 0.0)
    run_step(model)
    assert model.kv_used_tokens == 80
    model.set_budget(2)
    # a has room in its block and takes half the budget; b needs a block, so a goes, and its token is c's.
    assert run_step(model) == [("b", 1, False), ("c", 1, False)]
    assert model.preemptions == 1


def test_a_chunk_that_made_room_for_itself_stays_as_it_is() -> None:
    config = replace(CONFIG, kv_tokens=64, max_model_tokens=64, max_batched_tokens=17, priority_scheduling=True)
    model = engine(replace(config, whole_prompt=False))
    model.submit(spec("a", prompt=16, output=20, priority=9), 0.0)
    run_step(model)
    model.submit(spec("p", prompt=60, output=1, priority=1), 0.0)
    run_step(model)
    run_step(model)
    # The chunk of 16 needs a block, so a goes; the token of budget it gives back stays unused, as in vLLM.
    assert plan(model).step == Step.chunk(16, 32)
    assert model.preemptions == 1


def test_prompts_that_were_looked_at_and_not_admitted_stay_in_the_queue() -> None:
    model = engine(replace(CONFIG, kv_tokens=64, max_model_tokens=64))
    model.submit(spec("a", prompt=33, output=3), 0.0)
    run_step(model)
    for name, prompt in (("b", 20), ("c", 1), ("d", 2)):
        model.submit(spec(name, prompt=prompt, output=1), 0.0)
    assert plan(model).step.prefill_seqs == 0
    assert (model.running, model.waiting) == (1, 3)
    model.finish_step(0.0)
    assert [token.sequence_id for token in run_out(model)] == ["a", "b", "c", "d"]


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    model = crowded()
    model.submit(spec("c", prompt=1, output=1), 0.0)
    assert plan(model).step.prefill_seqs == 0
    assert model.preemptions == 1


def test_a_prompt_is_admitted_only_when_all_of_it_fits() -> None:
    config = replace(CONFIG, kv_tokens=160, max_model_tokens=160, max_batched_tokens=32)
    for whole_prompt, chunk in ((True, 0), (False, 31)):
        model = engine(replace(config, whole_prompt=whole_prompt))
        model.submit(spec("a", prompt=32, output=40), 0.0)
        run_step(model)
        model.submit(spec("b", prompt=140, output=2), 0.0)
        assert plan(model).step.prefill_tokens == chunk


def test_an_abort_frees_at_once_between_steps() -> None:
    model = engine()
    model.submit(spec("a"), 0.0)
    model.submit(spec("b"), 0.0)
    run_step(model)
    assert model.abort("a", 0.0)
    assert (model.running, model.kv_used_tokens) == (1, 16)
    assert run_step(model) == [("b", 1, False)]
    assert not model.abort("a", 0.0)


def test_an_abort_during_a_step_frees_at_its_end_and_emits_nothing() -> None:
    model = engine()
    model.submit(spec("a"), 0.0)
    model.submit(spec("b", prompt=5000), 0.0)
    plan(model)
    assert model.abort("a", 0.0)
    assert model.abort("b", 0.0)
    assert model.kv_used_tokens > 0
    assert not model.abort("a", 0.0)
    assert model.finish_step(0.0) == ()
    assert model.kv_used_tokens == 0
    assert model.idle


def test_an_abort_in_the_queue_leaves_no_trace() -> None:
    model = engine(replace(CONFIG, max_running_seqs=1))
    for name in "abc":
        model.submit(spec(name, output=1), 0.0)
    assert model.abort("b", 0.0)
    assert model.waiting == 2
    assert [token.sequence_id for token in run_out(model)] == ["a", "c"]


def test_an_id_can_be_used_again_while_its_aborted_sequence_is_in_flight() -> None:
    model = engine()
    model.submit(spec("a", output=3), 0.0)
    plan(model)
    model.abort("a", 0.0)
    model.submit(spec("a", output=1), 0.0)
    assert model.finish_step(0.0) == ()
    assert [token.finished for token in run_out(model)] == [True]


def test_what_cannot_be_taken_is_refused_by_name() -> None:
    model = engine(replace(CONFIG, kv_tokens=160, max_queued_seqs=1))
    with pytest.raises(SequenceTooLong, match="model length of 8000"):
        model.submit(spec("long", prompt=7_999, output=2), 0.0)
    with pytest.raises(SequenceTooLong, match="KV cache of 160"):
        model.submit(spec("large", prompt=160, output=2), 0.0)
    model.submit(spec("fits", prompt=160, output=1), 0.0)
    with pytest.raises(ValueError, match="in use"):
        model.submit(spec("fits"), 0.0)
    with pytest.raises(EngineFull, match="cap is 1"):
        model.submit(spec("more"), 0.0)
    assert [token.finished for token in run_out(model)] == [True]


@pytest.mark.parametrize(
    ("named", "make"),
    [
        ("kv_tokens", lambda: replace(CONFIG, kv_tokens=0)),
        ("kv_tokens", lambda: replace(CONFIG, kv_tokens=15)),
        ("max_running_seqs", lambda: replace(CONFIG, max_running_seqs=0)),
        ("host_step_s", lambda: replace(CONFIG, host_step_s=-1.0)),
        ("host_seq_s", lambda: replace(CONFIG, host_seq_s=float("nan"))),
    ],
)
def test_settings_that_make_no_engine_are_refused(named: str, make: Callable[[], EngineConfig]) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_steps_come_one_at_a_time_and_never_end_before_they_start() -> None:
    model = engine()
    with pytest.raises(RuntimeError, match="no step"):
        model.finish_step(0.0)
    model.submit(spec("a"), 0.0)
    model.next_step(5.0)
    with pytest.raises(RuntimeError, match="in flight"):
        model.next_step(5.0)
    with pytest.raises(ValueError, match="before"):
        model.finish_step(4.0)


def test_with_asynchronous_scheduling_a_late_sequence_waits_one_step_more() -> None:
    for asynchronous, seqs in ((False, [1, 0]), (True, [0, 1])):
        model = engine(replace(CONFIG, async_scheduling=asynchronous))
        model.submit(spec("a"), 0.0)
        plan(model)
        model.submit(spec("b"), 0.0)
        model.finish_step(0.0)
        seen = []
        for _ in range(2):
            seen.append(plan(model).step.prefill_seqs)
            model.finish_step(0.0)
        assert seen == seqs


def test_with_asynchronous_scheduling_an_empty_engine_starts_at_once() -> None:
    model = engine(replace(CONFIG, async_scheduling=True))
    model.submit(spec("a", output=1), 0.0)
    plan(model)
    model.submit(spec("b"), 0.0)
    assert model.waiting == 1
    model.finish_step(0.0)
    assert plan(model).step.prefill_seqs == 1


# --- the prefix cache --------------------------------------------------------------------------------------

CACHED = replace(CONFIG, prefix_caching=True)


def test_equal_prefix_blocks_are_computed_once() -> None:
    model = engine(CACHED)
    model.submit(SequenceSpec("a", 100, 1, prefix_blocks=(1, 2, 3, 4)), 0.0)
    run_step(model)
    assert model.kv_used_tokens == 0
    model.submit(SequenceSpec("b", 100, 1, prefix_blocks=(1, 2, 3, 9)), 0.0)
    assert plan(model).step == Step.chunk(52, 48)


def test_prefix_blocks_in_use_are_shared() -> None:
    model = engine(CACHED)
    model.submit(SequenceSpec("a", 64, 50, prefix_blocks=(1, 2, 3, 4)), 0.0)
    run_step(model)
    model.submit(SequenceSpec("b", 64, 50, prefix_blocks=(1, 2, 3, 4)), 0.0)
    # The last token is always computed, so only three of the four blocks are a hit.
    assert plan(model).step == Step.decode(1, 65) + Step.chunk(16, 48)
    assert model.kv_used_tokens == 5 * 16 + 16
    model.finish_step(0.0)
    run_out(model)
    assert model.kv_used_tokens == 0


def test_the_least_recently_used_blocks_go_first() -> None:
    model = engine(replace(CACHED, kv_tokens=64, max_model_tokens=64))
    for name, prefix in (("a", (1, 2)), ("b", (3, 4)), ("c", (5,))):
        model.submit(SequenceSpec(name, 16 * len(prefix), 1, prefix_blocks=prefix), 0.0)
        run_step(model)
    # c took a block of a's: its second one, since a tail goes before its head.
    model.submit(SequenceSpec("a2", 33, 1, prefix_blocks=(1, 2)), 0.0)
    assert plan(model).step == Step.chunk(17, 16)


def test_a_preempted_sequence_finds_what_is_left_of_its_kv() -> None:
    config = replace(CACHED, kv_tokens=64, max_model_tokens=64)
    model = engine(config)
    model.submit(spec("a", prompt=32, output=2), 0.0)
    model.submit(spec("b", prompt=32, output=4), 0.0)
    run_step(model)
    run_step(model)  # a takes its third block, b is preempted; a ends
    assert model.preemptions == 1
    # b's second block became a's third.
    assert plan(model).step == Step.chunk(17, 16)
    assert model.finish_step(0.0) == (Emitted("b", 1, False),)


# --- random work -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What happens before each step: sequences that come, ids that are aborted, a budget that is set."""

    submits: dict[int, list[SequenceSpec]]
    aborts: dict[int, list[str]]
    budgets: dict[int, int | None]

    @property
    def last(self) -> int:
        return max([*self.submits, *self.aborts, *self.budgets, 0])


@st.composite
def works(draw: st.DrawFn, aborts: bool = True, budgets: bool = True) -> Work:
    count = draw(st.integers(1, 10))
    submits: dict[int, list[SequenceSpec]] = {}
    for index in range(count):
        prompt, output = draw(st.integers(1, 25)), draw(st.integers(1, 20))
        prefix = draw(st.sampled_from(PREFIXES))[: prompt // BLOCK]
        sequence = SequenceSpec(str(index), prompt, output, draw(st.integers(-2, 2)), prefix)
        submits.setdefault(draw(st.integers(0, 30)), []).append(sequence)
    names = st.lists(st.integers(0, count - 1).map(str), max_size=3)
    return Work(
        submits,
        draw(st.dictionaries(st.integers(0, 60), names, max_size=4)) if aborts else {},
        draw(st.dictionaries(st.integers(0, 40), st.none() | st.integers(1, 20), max_size=4)) if budgets else {},
    )


BLOCK = 4
PREFIXES = ((), (1, 2, 3, 4, 5, 6), (1, 2, 13, 14, 15, 16))
CONFIGS = st.builds(
    EngineConfig,
    kv_tokens=st.integers(48, 160),
    block_tokens=st.just(BLOCK),
    max_model_tokens=st.just(45),
    max_running_seqs=st.integers(1, 8),
    max_batched_tokens=st.integers(1, 40),
    priority_scheduling=st.booleans(),
    whole_prompt=st.booleans(),
)


def drive(model: EngineModel, work: Work, milestones: bool = False) -> list[tuple[Step, tuple[Emitted, ...]]]:
    """Run the work to its end; what each step held and emitted."""
    seen: list[tuple[Step, tuple[Emitted, ...]]] = []
    for turn in range(10_000):
        for name in work.aborts.get(turn, ()):
            model.abort(name, 0.0)
        for sequence in work.submits.get(turn, ()):
            model.submit(sequence, 0.0)
        if turn in work.budgets:
            model.set_budget(work.budgets[turn])
        planned = model.next_step(0.0)
        assert model.kv_used_tokens <= model.kv_capacity_tokens
        if planned is None:
            assert model.idle
            if turn > work.last:
                return seen
            continue
        seen.append((planned.step, model.finish_step_milestones(0.0) if milestones else model.finish_step(0.0)))
    raise AssertionError("the engine does not come to an end")


@settings(max_examples=200, deadline=None)
@given(config=CONFIGS, work=works())
def test_it_does_what_a_plain_scheduler_does(config: EngineConfig, work: Work) -> None:
    naive = NaiveEngine(config)
    seen = iter(drive(model := EngineModel(config, STEP_TIME), work))
    turn = 0
    while turn <= work.last or naive.running or naive.waiting:
        for name in work.aborts.get(turn, ()):
            naive.abort(name)
        for sequence in work.submits.get(turn, ()):
            naive.submit(sequence)
        if turn in work.budgets:
            budget = work.budgets[turn]
            naive.budget = config.max_batched_tokens if budget is None else min(budget, config.max_batched_tokens)
        turn += 1
        planned = naive.plan()
        if not planned.tokens:
            continue
        step, tokens = next(seen)
        assert step == planned
        assert sorted((t.sequence_id, t.index, t.finished) for t in tokens) == sorted(naive.finish())
    assert next(seen, None) is None
    assert model.preemptions == naive.preemptions


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, caching=st.booleans(), asynchronous=st.booleans(), work=works())
def test_every_token_comes_once_and_in_order(
    config: EngineConfig, caching: bool, asynchronous: bool, work: Work
) -> None:
    model = EngineModel(replace(config, prefix_caching=caching, async_scheduling=asynchronous), STEP_TIME)
    count: Counter[str] = Counter()
    finished: set[str] = set()
    for step, tokens in drive(model, work):
        assert 0 < step.tokens <= config.max_batched_tokens
        for token in tokens:
            assert token.index == count[token.sequence_id]
            assert token.sequence_id not in finished
            count[token.sequence_id] += 1
            if token.finished:
                finished.add(token.sequence_id)
    aborted = {name for names in work.aborts.values() for name in names}
    for sequence in (sequence for specs in work.submits.values() for sequence in specs):
        name = sequence.sequence_id
        assert count[name] <= sequence.output_tokens
        assert (count[name] == sequence.output_tokens) == (name in finished)
        assert name in finished or name in aborted
    assert model.kv_used_tokens == 0
    assert model.running == model.waiting == 0


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, caching=st.booleans(), work=works(aborts=False))
def test_milestones_tell_the_step_of_every_token(config: EngineConfig, caching: bool, work: Work) -> None:
    config = replace(config, prefix_caching=caching)
    every: dict[tuple[str, int], int] = {}
    for number, (_, tokens) in enumerate(drive(EngineModel(config, STEP_TIME), work)):
        every.update({(token.sequence_id, token.index): number for token in tokens})
    told: dict[tuple[str, int], int] = {}
    latest: dict[str, tuple[int, int]] = {}
    for number, (_, tokens) in enumerate(drive(EngineModel(config, STEP_TIME), work, milestones=True)):
        for token in tokens:
            index, step = latest.get(token.sequence_id, (token.index, number))
            told.update({(token.sequence_id, index + k): step + k for k in range(1, token.index - index)})
            told[token.sequence_id, token.index] = number
            latest[token.sequence_id] = token.index, number
    assert told == every


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, work=works(aborts=False))
def test_first_come_first_served_lets_nobody_starve(config: EngineConfig, work: Work) -> None:
    config = replace(config, priority_scheduling=False)
    seen = drive(EngineModel(config, STEP_TIME), work)
    came = [s.sequence_id for turn in sorted(work.submits) for s in work.submits[turn]]
    assert [token.sequence_id for _, tokens in seen for token in tokens if token.index == 0] == came
