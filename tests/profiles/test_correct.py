"""Online correction: finds the factors, is not led astray, and knows its own error."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.correct import CALIBRATED_STEPS, Corrector
from profiles.format import ProfileError
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime

BASE = RooflineStepTime(
    c0_s=0.004, weights_s=0.010, per_token_s=5e-5, sharpness=2.0, per_seq_s=4e-5, per_kv_s=1e-7, mixed_kv_s=1e-7,
    per_attention_s=1e-9,
)  # fmt: skip


def _step(chance: random.Random, mixed: bool) -> Step:
    seqs = chance.randint(1, 60)
    decodes = Step.decode(seqs, seqs * chance.randint(50, 2000))
    return decodes + Step.chunk(chance.randint(64, 2000)) if mixed else decodes


def _feed(
    corrector: Corrector, count: int, *, decode: float, mixed: float, outliers: float, seed: int = 1
) -> None:
    chance = random.Random(seed)
    for i in range(count):
        step = _step(chance, mixed=i % 3 == 0)
        factor = mixed if step.prefill_tokens else decode
        noise = 10.0 if chance.random() < outliers else math.exp(chance.gauss(0.0, 0.05))
        corrector.observe(step, BASE.seconds(step) * factor * noise)


def test_each_regime_finds_its_factor_among_outliers() -> None:
    corrector = Corrector(BASE)
    _feed(corrector, 600, decode=1.3, mixed=0.8, outliers=0.15)
    found = corrector.snapshot()
    assert found.decode.factor == pytest.approx(1.3, rel=0.04)
    assert found.mixed.factor == pytest.approx(0.8, rel=0.04)
    step = Step.decode(30, 30_000)
    assert found.step_time.seconds(step) == pytest.approx(1.3 * BASE.seconds(step), rel=0.04)
    assert found.decode.p50_error is not None
    assert found.decode.p50_error < 0.1


def test_a_lone_outlier_moves_nothing() -> None:
    corrector = Corrector(BASE)
    corrector.observe_decode(20, 20_000, 5.0)
    assert corrector.snapshot().decode.factor == 1.0


def test_a_change_is_followed() -> None:
    corrector = Corrector(BASE)
    _feed(corrector, 900, decode=1.0, mixed=1.0, outliers=0.0)
    _feed(corrector, 400, decode=1.6, mixed=1.6, outliers=0.0, seed=2)
    found = corrector.snapshot()
    assert found.decode.factor == pytest.approx(1.6, rel=0.05)
    assert found.mixed.factor == pytest.approx(1.6, rel=0.05)


def test_the_error_is_that_of_predictions_made_before() -> None:
    steady, noisy = Corrector(BASE), Corrector(BASE)
    chance = random.Random(3)
    for _ in range(300):
        step = _step(chance, mixed=False)
        steady.observe(step, 1.2 * BASE.seconds(step))
        noisy.observe(step, BASE.seconds(step) * math.exp(chance.gauss(0.0, 0.2)))
    assert steady.snapshot().p90_error < 0.01
    assert 0.15 < noisy.snapshot().p90_error < 0.6
    # Before the factor was learned, the steady backend was mispredicted, and that was seen.
    young = Corrector(BASE)
    young.observe(Step.decode(5, 5000), 1.2 * BASE.decode_seconds(5, 5000))
    assert young.snapshot().decode.p90_error == pytest.approx(0.2)


def test_until_enough_is_observed_the_profiles_own_error_stands() -> None:
    corrector = Corrector(BASE, p90_error=0.07)
    assert corrector.snapshot().p90_error == 0.07
    corrector.observe_decode(5, 5000, 3 * BASE.decode_seconds(5, 5000))
    assert corrector.snapshot().p90_error == 0.07
    assert Corrector(BASE, measured=False).snapshot().p90_error == 0.5


def test_waiting_for_a_first_token_makes_no_margin() -> None:
    corrector = Corrector(BASE, p90_error=0.07)
    chance = random.Random(5)
    for _ in range(100):
        corrector.observe_prefill(1000, 10, 8000, chance.uniform(0.05, 0.5))
        corrector.observe_decode(10, 8000, BASE.decode_seconds(10, 8000))
    found = corrector.snapshot()
    assert found.mixed.p90_error is not None
    assert found.mixed.p90_error > 0.5
    assert found.p90_error < 0.01


def test_mixed_steps_follow_the_decodes_until_they_tell() -> None:
    corrector = Corrector(BASE)
    for _ in range(50):
        corrector.observe_decode(10, 8000, 2 * BASE.decode_seconds(10, 8000))
    found = corrector.snapshot()
    assert found.mixed.observations == 0
    assert found.mixed.factor == pytest.approx(found.decode.factor) == pytest.approx(2.0)


def test_a_prior_is_calibrated_after_enough_steps() -> None:
    corrector = Corrector(BASE, measured=False)
    assert not corrector.snapshot().calibrated
    for _ in range(CALIBRATED_STEPS // 10 - 1):
        corrector.observe_decode(10, 8000, 0.02, steps=10)
    assert not corrector.snapshot().calibrated
    corrector.observe_decode(10, 8000, 0.02, steps=10)
    assert corrector.snapshot().calibrated
    assert Corrector(BASE).snapshot().calibrated


@pytest.mark.parametrize(("prompt", "chunk_tokens"), [(100, 2048), (1500, 512), (9000, 2048)])
def test_prefill_is_cut_as_the_engine_cuts_it(prompt: int, chunk_tokens: int) -> None:
    corrector = Corrector(BASE, chunk_tokens=chunk_tokens)
    # What an engine would show: half a step to wait, then even chunks beside 12 decodes.
    count = math.ceil(prompt / (chunk_tokens - 12))
    size = math.ceil(prompt / count)
    expected = BASE.decode_seconds(12, 12_000) / 2
    for begin in range(0, prompt, size):
        step = Step.chunk(min(size, prompt - begin), begin) + Step.decode(12, 12_000)
        expected += BASE.seconds(step)
    for _ in range(20):
        corrector.observe_prefill(prompt, 12, 12_000, 1.25 * expected)
    found = corrector.snapshot()
    assert found.mixed.factor == pytest.approx(1.25)
    assert found.mixed.observations == 20
    assert found.decode.observations == 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times_are_ignored(seconds: float) -> None:
    corrector = Corrector(BASE)
    corrector.observe_decode(4, 400, seconds)
    corrector.observe(Step.chunk(64), seconds)
    corrector.observe_prefill(64, 0, 0, seconds)
    corrector.observe_prefill(0, 0, 0, 0.1)
    corrector.observe(Step(), 0.1)
    assert corrector.snapshot().version == 0


def test_a_snapshot_stays_and_a_newer_one_has_a_higher_version() -> None:
    corrector = Corrector(BASE)
    before = corrector.snapshot()
    was = before.step_time.decode_seconds(10, 1000)
    _feed(corrector, 200, decode=2.0, mixed=2.0, outliers=0.0)
    assert before.step_time.decode_seconds(10, 1000) == was
    assert corrector.snapshot().version > before.version
    assert corrector.snapshot().step_time.decode_seconds(10, 1000) == pytest.approx(2 * was, rel=0.05)


def test_what_was_learned_survives_a_restart() -> None:
    corrector = Corrector(BASE, measured=False)
    _feed(corrector, 400, decode=1.4, mixed=1.1, outliers=0.05)
    again = Corrector(BASE, measured=False)
    again.restore(corrector.to_json())
    old, new = corrector.snapshot(), again.snapshot()
    assert (new.decode, new.mixed, new.calibrated, new.p90_error) == (
        old.decode,
        old.mixed,
        old.calibrated,
        old.p90_error,
    )
    again.observe(Step.decode(5, 500), 1.4 * BASE.decode_seconds(5, 500))
    assert again.to_json() != corrector.to_json()


@pytest.mark.parametrize("text", ["", "[]", '{"decode": 1}', '{"format": 1}'])
def test_what_was_not_saved_here_is_refused(text: str) -> None:
    corrector = Corrector(BASE)
    with pytest.raises(ProfileError, match="not a saved correction"):
        corrector.restore(text)


@given(st.lists(st.floats(0.02, 50.0), min_size=1, max_size=60))
def test_a_factor_stays_among_what_was_seen(ratios: list[float]) -> None:
    corrector = Corrector(BASE)
    for ratio in ratios:
        corrector.observe_decode(10, 5000, ratio * BASE.decode_seconds(10, 5000))
    factor = corrector.snapshot().decode.factor
    assert min(1.0, *ratios) * (1 - 1e-9) <= factor <= max(1.0, *ratios) * (1 + 1e-9)


def test_steps_that_an_engine_tells_are_all_learned_from_at_first_and_sampled_later() -> None:
    chance = random.Random(5)
    corrector = Corrector(BASE, measured=False)

    def told(factor: float) -> list[tuple[Step, float]]:
        steps = [_step(chance, mixed=i % 4 == 0) for i in range(64)]
        return [(step, BASE.seconds(step) * factor * math.exp(chance.gauss(0.0, 0.03))) for step in steps]

    corrector.observe_told(told(1.5), CALIBRATED_STEPS)
    known = corrector.snapshot()
    assert known.calibrated
    assert known.decode.factor == pytest.approx(1.5, rel=0.05)
    assert known.mixed.factor == pytest.approx(1.5, rel=0.05)
    for _ in range(10):
        corrector.observe_told(told(1.5), 200)
    seen = corrector.snapshot().decode.observations
    corrector.observe_told(told(1.5), 200)
    assert corrector.snapshot().decode.observations == seen + 4
    corrector.observe_told([])
    assert corrector.snapshot().decode.observations == seen + 4
