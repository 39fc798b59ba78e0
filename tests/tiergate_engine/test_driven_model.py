"""A driven engine model: equal to the plan that looks at everybody, and what it does for promises."""

from __future__ import annotations

import math
from dataclasses import replace

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
