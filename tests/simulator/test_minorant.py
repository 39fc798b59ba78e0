"""No step takes less than a minorant says, and where it was asked to be tight it nearly is."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.catalogue import load
from scheduling.backends import EngineLimits
from simulator.minorant import Minorant, Minorants, Range
from simulator.reference import with_fixed_s
from tests.simulator.offers import LIMITS, LINEAR
from tiergate_engine.step import Step, StepTime
from tiergate_engine.steptime import RooflineStepTime, ScaledStepTime

LONGEST = 9_000
SIZES = (0.05, 0.3, 1.0)  # of the greatest step


def _step_time(name: str) -> StepTime:
    if name == "formula":
        return RooflineStepTime(
            c0_s=0.002, weights_s=0.006, per_token_s=21e-6, sharpness=2.5, per_seq_s=4e-6, per_kv_s=3e-8,
            mixed_kv_s=1e-8, per_context_s=1e-7, per_attention_s=8e-10, host_seq_s=3e-5,
        )  # fmt: skip
    if name == "scaled":
        return ScaledStepTime(load("h100-llama-3.1-8b-bf16").step_time, 1.2, 0.9)
    if name == "shifted":
        return with_fixed_s(load("h200-llama-3.1-8b-bf16").step_time, 0.008)
    return load(name).step_time


MEASURED = ("h200-llama-3.1-8b-fp8", "l40s-llama-3.1-8b-bf16", "rtxpro6000-qwen3-32b-bf16")
NAMES = ("formula", "scaled", "shifted", *MEASURED)


def _range(name: str) -> Range:
    if name not in MEASURED:
        return Range.of(LIMITS, LONGEST)
    found = load(name).limits
    return Range.of(EngineLimits(found.max_running_seqs, found.max_batched_tokens, found.kv_tokens), LONGEST)


@functools.cache
def _minorants(name: str) -> tuple[Minorant, ...]:
    steps = _range(name)
    found = Minorants(_step_time(name), steps)
    most = min(steps.prefill_tokens / 1000, steps.seqs / 200, steps.kv_tokens / (200 * 1100))
    mixed = [_balanced(size * most) for size in SIZES]
    return (
        *(found.tight_at([step]) for step in mixed),
        found.tight_at(mixed),
        found.tight_at([Step.chunk(steps.prefill_tokens)]),
        found.tight_at([Step.decode(steps.seqs // 2, min(steps.seqs * 500, steps.kv_tokens))]),
    )


def _balanced(size: float) -> Step:
    seqs = max(round(200 * size), 1)
    return Step.chunk(max(round(1000 * size), 1)) + Step.decode(seqs, 1100 * seqs)


@given(st.sampled_from(NAMES), st.data())
def test_no_step_is_faster(name: str, data: st.DataObject) -> None:
    steps = _range(name)
    share = st.floats(0.0, 1.0) | st.sampled_from([0.0, 1.0])
    prefill = round(steps.prefill_tokens ** data.draw(share)) if data.draw(st.booleans()) else 0
    least = 0 if prefill else 1
    seqs = max(round(steps.seqs ** data.draw(share)) if data.draw(st.booleans()) else 0, least)
    kv = round(min(seqs * LONGEST ** data.draw(share), steps.kv_tokens)) if seqs else 0
    area = prefill * LONGEST ** data.draw(share) / 2
    step = Step(prefill, 1 if prefill else 0, 0, area, seqs, max(kv, seqs))
    time_s = _step_time(name).seconds(step)
    for minorant in _minorants(name):
        assert minorant.seconds(step) <= time_s


@pytest.mark.parametrize("name", NAMES)
def test_no_step_is_faster_at_the_corners_of_the_range(name: str) -> None:
    steps = _range(name)
    step_time = _step_time(name)
    for prefill in (0, 1, 15, 16, 17, 63, 255, 256, 257, 511, 512, 1023, steps.prefill_tokens):
        for seqs in (0, 1, 2, 31, 64, 127, 128, steps.seqs):
            for kv in (seqs, 40 * seqs, min(seqs * LONGEST, steps.kv_tokens)):
                for context in (0.5, prefill / 2, LONGEST / 2, LONGEST):
                    if not prefill and not seqs:
                        continue
                    held = min(kv, steps.kv_tokens)
                    step = Step(prefill, 1 if prefill else 0, 0, prefill * context, seqs, held)
                    assert all(m.seconds(step) <= step_time.seconds(step) for m in _minorants(name))


@pytest.mark.parametrize("name", NAMES)
def test_tight_where_it_was_asked_to_be(name: str) -> None:
    steps = _range(name)
    most = min(steps.prefill_tokens / 1000, steps.seqs / 200, steps.kv_tokens / (200 * 1100))
    for size, minorant in zip(SIZES, _minorants(name), strict=False):
        step = _balanced(size * most)
        # Costs that a step has only beside a chunk are not in a minorant, nor do tables bend one way only.
        assert minorant.seconds(step) >= 0.7 * _step_time(name).seconds(step)


def test_a_straight_step_time_is_found_to_the_shave() -> None:
    minorant = Minorants(LINEAR, Range.of(LIMITS, LONGEST)).tight_at([_balanced(0.5), _balanced(1.0)])
    found = (minorant.step_s, minorant.prefill_token_s, minorant.decode_s, minorant.kv_token_s, minorant.pair_s)
    assert found == pytest.approx((0.005, 20e-6, 50e-6, 30e-9, 1e-9), rel=3e-3)


def test_host_time_is_added_per_step_and_sequence() -> None:
    bare = Minorants(LINEAR, Range.of(LIMITS, LONGEST)).tight_at([_balanced(1.0)])
    step = Step.chunk(100) + Step.chunk(50) + Step.decode(7, 900)
    more = bare.with_host(0.001, 1e-4).seconds(step) - bare.seconds(step)
    assert more == pytest.approx(0.001 + 9 * 1e-4)


def test_the_same_every_time() -> None:
    steps = Range.of(LIMITS, LONGEST)
    step_time = load("h200-llama-3.1-8b-bf16").step_time
    assert Minorants(step_time, steps).tight_at([_balanced(1.0)]) == Minorants(step_time, steps).tight_at(
        [_balanced(1.0)]
    )


def test_needs_a_step() -> None:
    with pytest.raises(ValueError, match="steps: at least one"):
        Minorants(LINEAR, Range.of(LIMITS, LONGEST)).tight_at([])


def test_the_range_is_that_of_the_engine_and_the_requests() -> None:
    assert Range.of(LIMITS, 1000) == Range(4096, 256, 256_000, 1000)
    assert Range.of(LIMITS, 9000).kv_tokens == 400_000
    assert Range.of(LIMITS, 9000, prefix_caching=True).kv_tokens == 256 * 9000  # shared text is read by all
    assert Range.of(EngineLimits(), 100) == Range(8192, 1024, 102_400, 100)
