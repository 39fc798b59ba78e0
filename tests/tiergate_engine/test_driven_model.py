"""A driven engine model: equal to the plan that looks at everybody, and what it does for promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiergate_engine.naive_driven import NaiveDriven
from tiergate_engine.drive import Rules
from tiergate_engine.model import EngineConfig, EngineModel, SequenceSpec
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime

# All times are sums of few powers of two, so that two ways of adding them up give the same.
STEP_TIME = RooflineStepTime(c0_s=2**-7, per_token_s=2**-15, per_seq_s=2**-13, per_kv_s=2**-20)
RULES = Rules(skip=True)
CONFIG = EngineConfig(
    kv_tokens=1_000_000, max_model_tokens=50_000, max_running_seqs=24, max_batched_tokens=512, drive=RULES
)
MS = 2**-10


def engine(config: EngineConfig = CONFIG) -> EngineModel:
    return EngineModel(config, STEP_TIME)


def ms(milliseconds: float) -> float:
    return milliseconds * MS


rules = st.builds(
    Rules,
    margin=st.sampled_from([1.0, 1.25]),
    host_step_s=st.sampled_from([0.0, ms(1)]),
    host_seq_s=st.sampled_from([0.0, ms(1 / 16)]),
    chunk_from_slack=st.booleans(),
    deadline_order=st.booleans(),
    skip=st.booleans(),
    relegate=st.booleans(),
    longest_s=st.sampled_from([None, ms(25)]),
)
promises = st.one_of(
    st.tuples(st.sampled_from([20, 40, 100, 400]), st.sampled_from([9.0, 12.0, 30.0, 100.0])),
    st.just((math.inf, math.inf)),
    st.tuples(st.just(100), st.just(math.inf)),
)
newcomers = st.tuples(st.integers(1, 700), st.integers(1, 30), promises, st.booleans())
arrivals = st.lists(st.lists(newcomers, max_size=5), min_size=1, max_size=25)


@settings(max_examples=150, deadline=None)
@given(arrivals, rules, st.sampled_from([24, 5]), st.sampled_from([512, 64, 4096]))
def test_the_model_does_what_a_plan_that_looks_at_everybody_says(
    work: list[list[tuple[int, int, tuple[float, float], bool]]],
    drive: Rules,
    cap: int,
    budget: int,
) -> None:
    """Step by step the same contents and tokens, with decodes left out, prompts relegated and requests aborted."""
    config = replace(CONFIG, drive=drive, max_running_seqs=cap, max_batched_tokens=budget)
    model, naive, now_s = engine(config), NaiveDriven(config, STEP_TIME), 0.0
    for turn in range(10_000):
        for number, (prompt, output, (ttft_ms, pace_ms), given_up) in enumerate(
            work[turn] if turn < len(work) else ()
        ):
            spec = SequenceSpec(
                f"{turn}.{number}",
                prompt,
                output,
                first_due_s=now_s + ms(ttft_ms),
                pace_s=ms(pace_ms),
                relegated=given_up and number == 4,
            )
            model.submit(spec, now_s)
            naive.submit(spec)
        if turn % 7 == 3:
            gone = f"{turn - 2}.0"
            model.abort(gone, now_s)
            naive.abort(gone)
        naive.now_s = now_s
        expected, skipped = naive.plan()
        planned = model.next_step(now_s)
        if planned is None:
            assert expected == Step()
            if turn >= len(work):
                break
            now_s += ms(5)
            continue
        assert planned.step == expected
        assert model.held_up == skipped
        now_s += planned.duration_s
        mine = sorted((token.sequence_id, token.index, token.finished) for token in model.finish_step(now_s))
        assert mine == sorted(naive.finish())
    assert model.idle
    assert model.preemptions == 0


# --- what it does for promises ------------------------------------------------------------------------------


def promised(
    name: str, prompt: int, output: int, ttft_ms: float = math.inf, pace_ms: float = math.inf
) -> SequenceSpec:
    return SequenceSpec(name, prompt, output, first_due_s=ms(ttft_ms), pace_s=ms(pace_ms))


def token_times(
    config: EngineConfig, specs: list[SequenceSpec], then: SequenceSpec | None = None
) -> dict[str, list[float]]:
    """When each token comes. `then` comes when all others have begun to answer, and its times count from there."""
    model, now_s, came_s = engine(config), 0.0, 0.0
    times: dict[str, list[float]] = {}
    for spec in specs:
        model.submit(spec, now_s)
    while (planned := model.next_step(now_s)) is not None:
        now_s += planned.duration_s
        for token in model.finish_step(now_s):
            times.setdefault(token.sequence_id, []).append(now_s)
        if then is not None and len(times) == len(specs):
            came_s = now_s
            model.submit(replace(then, first_due_s=then.first_due_s + now_s), now_s)
            times[then.sequence_id] = []
            then = None
    assert model.idle
    assert model.kv_used_tokens == 0
    if came_s:
        name = next(reversed(times))
        times[name] = [at_s - came_s for at_s in times[name]]
    return times


def late(spec: SequenceSpec, times: list[float]) -> list[int]:
    return [index for index, at_s in enumerate(times) if at_s > spec.first_due_s + index * spec.pace_s]


def test_the_queue_goes_by_deadline_and_best_effort_waits() -> None:
    specs = [promised("free", 100, 1), promised("late", 100, 1, 900), promised("soon", 100, 1, 300)]
    times = token_times(replace(CONFIG, max_running_seqs=1), specs)
    assert times["soon"] < times["late"] < times["free"]


def test_a_stock_engine_knows_no_promise() -> None:
    specs = [
        promised("free", 100, 1),
        replace(promised("soon", 100, 1, 300), relegated=True),
        promised("x", 50, 1),
    ]
    times = token_times(replace(CONFIG, drive=None, max_running_seqs=1), specs)
    assert times["free"] < times["soon"] < times["x"]


def test_a_prompt_spends_the_slack_that_was_banked_and_makes_nobody_late() -> None:
    stream = promised("stream", 16, 60, 100, 12)
    prompt = promised("prompt", 3000, 2, 2000, 100)
    config = replace(CONFIG, max_batched_tokens=4096)
    quick, slow = config, replace(config, drive=replace(RULES, chunk_from_slack=False))
    by_slack = token_times(quick, [stream], prompt)
    by_pace = token_times(slow, [stream], prompt)
    assert not late(stream, by_slack["stream"])
    assert not late(stream, by_pace["stream"])
    assert by_slack["prompt"][0] < by_pace["prompt"][0]


def test_a_hopeless_prompt_makes_way_and_holds_nobody_back_when_it_decodes() -> None:
    hopeless = promised("hopeless", 3000, 30, 20, 8)
    other = promised("other", 1500, 5, 110, 100)
    for relegate in (True, False):
        config = replace(CONFIG, drive=replace(RULES, relegate=relegate))
        times = token_times(config, [hopeless, other])
        assert bool(late(other, times["other"])) is not relegate


def test_loose_decodes_make_way_for_a_tight_stream_and_are_on_time_themselves() -> None:
    loose = [promised(f"loose{index}", 400, 40, 4000, 200) for index in range(20)]
    tight = promised("tight", 40, 60, 100, 16)  # a step of all takes longer than its pace
    for skip in (True, False):
        config = replace(CONFIG, drive=replace(RULES, skip=skip), max_running_seqs=64)
        times = token_times(config, loose, tight)
        assert bool(late(tight, times["tight"])) is not skip
        assert not any(late(spec, times[spec.sequence_id]) for spec in loose)


@pytest.mark.parametrize("kv_tokens", [9_600, 8_080, 7_456, 7_040])
def test_no_block_is_lost_on_who_is_left_out_nor_when_blocks_run_short_just_then(kv_tokens: int) -> None:
    config = replace(CONFIG, max_running_seqs=64, kv_tokens=kv_tokens)
    model, now_s, number, left_out = engine(config), 0.0, 0, 0
    tokens: dict[str, int] = {}
    for index in range(20):
        model.submit(promised(f"loose{index}", 300 + index, 150, 4000, 400), 0.0)
    while (planned := model.next_step(now_s)) is not None:
        left_out += model.held_up
        now_s += planned.duration_s
        number += 1
        if number == 18:
            model.submit(SequenceSpec("tight", 40, 200, first_due_s=now_s + ms(100), pace_s=ms(13)), now_s)
        assert planned.step.decode_seqs + model.held_up <= model.running
        for token in model.finish_step(now_s):
            tokens[token.sequence_id] = tokens.get(token.sequence_id, 0) + 1
            assert token.index + 1 == tokens[token.sequence_id]
    assert left_out > 0
    assert (model.preemptions > 0) is (kv_tokens < 9_000)
    assert sum(tokens.values()) == 20 * 150 + 200
    assert model.kv_used_tokens == 0


def test_who_was_left_out_comes_back_as_a_milestone() -> None:
    """So that whoever infers the tokens in between from the count of steps sees the pause."""
    config = replace(CONFIG, max_running_seqs=64)
    exact, told = engine(config), engine(config)
    for index in range(20):
        exact.submit(promised(f"loose{index}", 400, 40, 4000, 200), 0.0)
        told.submit(promised(f"loose{index}", 400, 40, 4000, 200), 0.0)
    now_s, number = 0.0, 0
    seen: dict[str, list[tuple[int, int]]] = {}
    times: dict[str, list[int]] = {}
    while (planned := exact.next_step(now_s)) is not None:
        assert told.next_step(now_s) == planned
        now_s += planned.duration_s
        number += 1
        if number == 18:
            tight = SequenceSpec("tight", 40, 60, first_due_s=now_s + ms(100), pace_s=ms(16))
            exact.submit(tight, now_s)
            told.submit(tight, now_s)
        for token in exact.finish_step(now_s):
            times.setdefault(token.sequence_id, []).append(number)
        for token in told.finish_step_milestones(now_s):
            seen.setdefault(token.sequence_id, []).append((token.index, number))
    assert any(len(milestones) > 2 for milestones in seen.values())
    for name, steps in times.items():
        inferred: list[int] = []
        for (index, step), (following, _) in zip(seen[name], [*seen[name][1:], (len(steps), 0)], strict=True):
            inferred += [step + k for k in range(following - index)]
        assert inferred == steps


@settings(max_examples=60, deadline=None)
@given(arrivals, rules, st.sampled_from([(1600, 512), (3200, 24), (800, 100)]), st.booleans())
def test_everybody_ends_when_kv_and_budget_are_short(
    work: list[list[tuple[int, int, tuple[float, float], bool]]],
    drive: Rules,
    sizes: tuple[int, int],
    overlapping: bool,
) -> None:
    """Preemption and decodes that starve included; every token comes once, in order, and no block is lost."""
    kv_tokens, budget = sizes
    config = replace(
        CONFIG, drive=drive, kv_tokens=kv_tokens, max_batched_tokens=budget, async_scheduling=overlapping
    )
    model, now_s = engine(config), 0.0
    tokens: dict[str, int] = {}
    lengths: dict[str, int] = {}
    turn = 0
    while turn < len(work) or not model.idle:
        for number, (prompt, output, (ttft_ms, pace_ms), given_up) in enumerate(
            work[turn] if turn < len(work) else ()
        ):
            spec = SequenceSpec(
                f"{turn}.{number}", prompt, output, 0, (), 0, now_s + ms(ttft_ms), ms(pace_ms), given_up
            )
            lengths[spec.sequence_id] = output
            model.submit(spec, now_s)
        turn += 1
        assert turn < 20_000, "it does not come to an end"
        planned = model.next_step(now_s)
        if planned is None:
            continue
        assert planned.step.tokens <= budget
        now_s += planned.duration_s
        for token in model.finish_step(now_s):
            assert token.index == tokens.get(token.sequence_id, 0)
            tokens[token.sequence_id] = token.index + 1
    assert tokens == lengths
    assert model.kv_used_tokens == 0


def test_a_promise_must_be_one() -> None:
    for fields in ({"first_due_s": math.nan}, {"pace_s": 0.0}, {"pace_s": math.nan}):
        with pytest.raises(ValueError, match="first_due_s must be a time and pace_s positive"):
            SequenceSpec("a", 1, 1, **fields)  # type: ignore[arg-type]  # any field by its name
