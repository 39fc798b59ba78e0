"""Evidence of several observers: exact to add, told without an echo, and worth what one observer's is."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from profiles.correct import CALIBRATED_STEPS, Corrector
from profiles.evidence import UNIT, LengthClass, LengthEvidence, RegimeEvidence, StepEvidence, binned
from profiles.lengths import LengthBook
from tiergate_engine.steptime import RooflineStepTime

BASE = RooflineStepTime(
    c0_s=0.004, weights_s=0.010, per_token_s=5e-5, sharpness=2.0, per_seq_s=4e-5, per_kv_s=1e-7, mixed_kv_s=1e-7,
    per_attention_s=1e-9,
)  # fmt: skip
OTHER_BASE = RooflineStepTime(
    c0_s=0.008, weights_s=0.010, per_token_s=5e-5, sharpness=2.0, per_seq_s=4e-5, per_kv_s=1e-7, mixed_kv_s=1e-7,
    per_attention_s=1e-9,
)  # fmt: skip
BUCKETS = LengthBook().evidence().buckets

bins = st.dictionaries(st.integers(-800, 800), st.integers(0, 10**6), max_size=6)
regimes = st.builds(RegimeEvidence, log_ratios=bins, errors=bins, observations=st.integers(0, 10**6))
steps = st.builds(
    StepEvidence, base=st.sampled_from(("a", "b")), decode=regimes, mixed=regimes, steps=st.integers(0, 10**6)
)
weights = st.dictionaries(st.integers(1, 5), st.integers(1, 10**6), max_size=4)
classes = st.builds(
    LengthClass,
    model=st.sampled_from(("m", "n")),
    tier=st.sampled_from((None, "chat", "code")),
    ended=weights,
    censored=weights,
)
lengths = st.builds(
    LengthEvidence,
    buckets=st.just(6),
    classes=st.lists(classes, max_size=4, unique_by=lambda one: (one.model, one.tier)).map(tuple),
)


@given(st.lists(steps, max_size=5), st.integers(0, 5), st.randoms(use_true_random=False))
def test_merged_steps_are_the_same_in_every_order_and_grouping(
    parts: list[StepEvidence], cut: int, chance: random.Random
) -> None:
    together = StepEvidence.merge("a", parts)
    shuffled = list(parts)
    chance.shuffle(shuffled)
    assert StepEvidence.merge("a", shuffled) == together
    first, rest = StepEvidence.merge("a", parts[:cut]), StepEvidence.merge("a", parts[cut:])
    assert StepEvidence.merge("a", [first, rest]) == together
    assert together.steps == sum(part.steps for part in parts if part.base == "a")
    for name in ("log_ratios", "errors"):
        total = sum(sum(getattr(part.decode, name).values()) for part in parts if part.base == "a")
        assert sum(getattr(together.decode, name).values()) == total


@given(st.lists(lengths, max_size=5), st.integers(0, 5), st.randoms(use_true_random=False))
def test_merged_lengths_are_the_same_in_every_order_and_grouping(
    parts: list[LengthEvidence], cut: int, chance: random.Random
) -> None:
    together = LengthEvidence.merge(6, parts)
    shuffled = list(parts)
    chance.shuffle(shuffled)
    assert LengthEvidence.merge(6, shuffled) == together
    first, rest = LengthEvidence.merge(6, parts[:cut]), LengthEvidence.merge(6, parts[cut:])
    assert LengthEvidence.merge(6, [first, rest]) == together
    assert sum(sum(one.ended.values()) for one in together.classes) == sum(
        sum(one.ended.values()) for part in parts for one in part.classes
    )


@given(steps, lengths)
def test_evidence_is_told_as_json(step: StepEvidence, length: LengthEvidence) -> None:
    assert StepEvidence.model_validate_json(step.model_dump_json()) == step
    assert LengthEvidence.model_validate_json(length.model_dump_json()) == length


@given(steps, st.floats(0.0, 1.0))
def test_old_evidence_is_worth_less(evidence: StepEvidence, factor: float) -> None:
    less = evidence.worth(factor)
    assert less.steps == pytest.approx(evidence.steps * factor, abs=1)
    for bin_, weight in evidence.decode.log_ratios.items():
        assert less.decode.log_ratios.get(bin_, 0) == pytest.approx(weight * factor, abs=1)
    assert evidence.worth(0.0).decode.log_ratios == {}


def _corrector(factor: float, count: int, seed: int, base: RooflineStepTime = BASE) -> Corrector:
    corrector = Corrector(base, measured=False)
    chance = random.Random(seed)
    for _ in range(count):
        seqs = chance.randint(1, 60)
        noise = math.exp(chance.gauss(0.0, 0.05))
        corrector.observe_decode(seqs, 1000 * seqs, factor * noise * base.decode_seconds(seqs, 1000 * seqs))
    return corrector


def test_a_fresh_replica_starts_from_what_another_knows() -> None:
    known = _corrector(1.4, CALIBRATED_STEPS, 1)
    fresh = Corrector(BASE, measured=False)
    before = fresh.snapshot()
    fresh.hear([known.evidence()])
    after, there = fresh.snapshot(), known.snapshot()
    assert (before.calibrated, after.calibrated) == (False, True)
    assert after.version > before.version
    assert after.decode.factor == pytest.approx(there.decode.factor, rel=0.006)
    assert after.mixed.factor == pytest.approx(there.mixed.factor, rel=0.006)
    assert after.p90_error == pytest.approx(there.p90_error, abs=0.003)
    assert after.decode.observations == there.decode.observations


def test_hearing_has_no_echo() -> None:
    one, two = _corrector(1.2, 50, 1), _corrector(1.6, 50, 2)
    told = one.evidence()
    for _ in range(5):
        one.hear([two.evidence()])
        two.hear([one.evidence()])
    assert one.evidence() == told
    # Both have the same observations, so they hold the same factor, between their own two.
    assert one.snapshot().decode.factor == pytest.approx(two.snapshot().decode.factor, rel=0.006)
    assert 1.2 < one.snapshot().decode.factor < 1.6
    assert one.snapshot().decode.observations == 100
    one.hear([])
    assert one.snapshot().decode.factor == pytest.approx(1.2, rel=0.03)


def test_more_observers_outvote_one() -> None:
    odd = _corrector(3.0, 100, 9)
    odd.hear([_corrector(1.2, 100, seed).evidence() for seed in range(4)])
    assert odd.snapshot().decode.factor == pytest.approx(1.2, rel=0.05)


def test_what_is_relative_to_another_profile_is_left_out() -> None:
    fresh = Corrector(BASE)
    fresh.hear([_corrector(1.5, 100, 1, OTHER_BASE).evidence()])
    assert fresh.snapshot().decode.factor == 1.0
    assert fresh.base != _corrector(1.0, 0, 1, OTHER_BASE).base


def test_first_mixed_steps_are_judged_by_what_others_know() -> None:
    known = Corrector(BASE)
    for _ in range(100):
        known.observe_prefill(1000, 0, 0, 2.0 * BASE.seconds_of(1000, 1, 0, 500_000, 0, 0))
    fresh = Corrector(BASE)
    fresh.hear([known.evidence()])
    assert fresh.snapshot().mixed.factor == pytest.approx(known.snapshot().mixed.factor, rel=0.006)


def _book(seed: int, count: int, mean: float = 400.0) -> LengthBook:
    chance = random.Random(seed)
    book = LengthBook()
    for _ in range(count):
        tokens = max(round(chance.expovariate(1 / mean)), 1)
        book.observe("m", "chat", min(tokens, 600), finished=tokens <= 600)
    return book


def test_lengths_of_others_are_added() -> None:
    one, two, fresh = _book(1, 200), _book(2, 100, mean=100.0), LengthBook()
    assert fresh.hear([one.evidence(), two.evidence()]) == {("m", "chat")}
    assert fresh.hear([two.evidence(), one.evidence()]) == set()  # nothing has changed
    told = one.evidence()
    one.hear([two.evidence()])
    two.hear([told])
    assert one.evidence() == told
    for book in (two, fresh):
        known, here = one.snapshot("m", "chat"), book.snapshot("m", "chat")
        assert here.answers == pytest.approx(known.answers, rel=0.001)
        assert here.survival == pytest.approx(known.survival, abs=0.001)
    # A tier that nobody has seen leans on the model's, which the others know.
    assert fresh.snapshot("m", "new").remaining(0) == pytest.approx(
        one.snapshot("m", "new").remaining(0), rel=0.01
    )
    one.hear([])
    assert one.snapshot("m", "chat") == _book(1, 200).snapshot("m", "chat")


def test_lengths_in_other_buckets_are_left_out_and_wrong_ones_refused() -> None:
    fresh = LengthBook()
    one = LengthClass(model="m", tier="chat", ended={1: 9 * UNIT})
    fresh.hear([LengthEvidence(buckets=BUCKETS - 1, classes=(one,))])
    assert fresh.snapshot("m", "chat").answers == 0
    with pytest.raises(ValidationError):
        LengthEvidence(buckets=BUCKETS, classes=(one.model_copy(update={"ended": {BUCKETS: 1}}),))
    with pytest.raises(ValidationError):
        RegimeEvidence(log_ratios={10**9: 1})


@given(st.lists(st.tuples(st.floats(-4, 4), st.floats(0, 3)), max_size=20))
def test_bins_keep_the_weight(weighted: list[tuple[float, float]]) -> None:
    found = binned(weighted, 0.005)
    assert sum(found.values()) == pytest.approx(sum(weight for _, weight in weighted) * UNIT, abs=len(weighted))
    assert all(abs(bin_ * 0.005) <= 4.0025 for bin_ in found)
