"""What every step time promises: continuous, non-decreasing, inverse exact within one token, empty is zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tiergate_engine.curves import Curve, Surface
from tiergate_engine.step import Step, StepTime
from tiergate_engine.steptime import (
    RAMP_TOKENS,
    RooflineStepTime,
    ScaledStepTime,
    ShiftedStepTime,
    TableStepTime,
    largest_chunk,
)

QWEN = RooflineStepTime(
    c0_s=0.0218, weights_s=0.0268, per_token_s=1.62e-4, sharpness=2.13, per_seq_s=6.4e-5, per_kv_s=8.7e-8,
    mixed_kv_s=4.6e-7, per_context_s=9.8e-7, per_attention_s=6.4e-9, host_step_s=0.001, host_seq_s=2e-5,
)  # fmt: skip


def _coefficient(top: float) -> st.SearchStrategy[float]:
    return st.one_of(st.just(0.0), st.floats(top / 1e3, top))


@st.composite
def rooflines(draw: st.DrawFn) -> RooflineStepTime:
    return RooflineStepTime(
        c0_s=draw(_coefficient(0.02)),
        weights_s=draw(_coefficient(0.03)),
        per_token_s=draw(_coefficient(2e-4)),
        sharpness=draw(st.floats(1.0, 32.0)),
        per_seq_s=draw(_coefficient(1e-4)),
        per_kv_s=draw(_coefficient(1e-6)),
        mixed_kv_s=draw(_coefficient(1e-6)),
        per_context_s=draw(_coefficient(1e-6)),
        per_attention_s=draw(_coefficient(1e-8)),
        host_step_s=draw(_coefficient(2e-3)),
        host_seq_s=draw(_coefficient(5e-5)),
    )


def _climb(draw: st.DrawFn, count: int, top: float, start: float = 0.0) -> tuple[float, ...]:
    rises = draw(st.lists(st.floats(0.0, top / count), min_size=count, max_size=count))
    values, total = [], start
    for rise in rises:
        total += rise
        values.append(total)
    return tuple(values)


@st.composite
def table_times(draw: st.DrawFn) -> TableStepTime:
    tokens = Curve((0.0, 1.0, 40.0, 700.0, 2000.0), _climb(draw, 5, 0.2, 0.005))
    first = _climb(draw, 4, 0.05)
    rows = [first]
    for _ in range(3):
        rises = draw(st.lists(st.floats(0.0, 0.02), min_size=4, max_size=4))
        lifted = [a + b for a, b in zip(rows[-1], rises, strict=True)]
        rows.append(tuple(max(lifted[: i + 1]) for i in range(4)))
    decode = Surface((0.0, 8.0, 60.0, 300.0), (0.0, 500.0, 20_000.0, 90_000.0), tuple(rows))
    area = draw(st.booleans())
    attention = Curve((0.0, 1e4, 1e6), (0.0, *_climb(draw, 2, 0.1))) if area else None
    return TableStepTime(tokens, decode, attention, draw(rooflines()))


@st.composite
def scaled(draw: st.DrawFn) -> ScaledStepTime:
    factor = st.floats(0.3, 3.0)
    return ScaledStepTime(draw(st.one_of(rooflines(), table_times())), draw(factor), draw(factor))


@st.composite
def shifted(draw: st.DrawFn) -> ShiftedStepTime:
    return ShiftedStepTime(draw(st.one_of(rooflines(), table_times())), draw(st.floats(0.0, 0.02)))


STEP_TIMES: st.SearchStrategy[StepTime] = st.one_of(rooflines(), table_times(), scaled(), shifted())
SUMS = st.tuples(
    st.integers(0, 4000),
    st.integers(0, 8),
    st.integers(0, 50_000),
    st.floats(0.0, 1e7),
    st.integers(0, 1500),
    st.integers(0, 150_000),
)


@given(STEP_TIMES, SUMS, st.integers(0, 5), st.integers(1, 3000))
def test_non_decreasing_in_every_argument(
    step_time: StepTime, sums: tuple[int, int, int, float, int, int], which: int, more: int
) -> None:
    grown = list(sums)
    grown[which] += more
    before = step_time.seconds_of(*sums)
    after = step_time.seconds_of(*grown)  # type: ignore[arg-type]  # the one float stays where it was
    assert after >= before - 1e-12


@given(STEP_TIMES, SUMS)
def test_one_token_more_is_a_small_step(step_time: StepTime, sums: tuple[int, int, int, float, int, int]) -> None:
    # The steepest cost of a prefill token: the ramp spreads a chunk's fixed costs over RAMP_TOKENS tokens.
    tokens, seqs, context, area, decodes, kv = sums
    assume(tokens + decodes > 0)
    if not tokens:
        area = 0.0  # nothing attends without a token, and the sums must not contradict each other
    jump = step_time.seconds_of(tokens + 1, seqs, context, area, decodes, kv) - step_time.seconds_of(
        tokens, seqs, context, area, decodes, kv
    )
    assert jump <= _steepest(step_time, context, kv) + 1e-9


def _steepest(step_time: StepTime, context: int, kv: int) -> float:
    """An upper bound of what one more prefill token may cost, from the parts the step time is made of."""
    if isinstance(step_time, ShiftedStepTime):
        return _steepest(step_time.base, context, kv)
    if isinstance(step_time, ScaledStepTime):
        factors = (step_time.decode_factor, step_time.mixed_factor)
        spread = abs(factors[1] - factors[0]) / RAMP_TOKENS
        # While the greater factor comes in, a share of the whole (already steep) step comes with each token.
        whole = step_time.base.seconds_of(4001, 8, 60_000, 1.1e7, 1500, 160_000)
        return max(factors) * _steepest(step_time.base, context, kv) + spread * whole
    roofline = step_time.beyond if isinstance(step_time, TableStepTime) else step_time
    assert isinstance(roofline, RooflineStepTime)
    steepest = roofline.per_token_s
    if isinstance(step_time, TableStepTime):
        axis, values = step_time.tokens.axis, step_time.tokens.values_s
        slopes = [(values[i + 1] - values[i]) / (axis[i + 1] - axis[i]) for i in range(len(axis) - 1)]
        edge = roofline.linear_seconds(axis[-1])
        steepest = max(*slopes, steepest * (values[-1] / edge if values[-1] > 0 and edge > 0 else 1.0))
    return steepest + (roofline.mixed_kv_s * kv + roofline.per_context_s * context) / RAMP_TOKENS


@given(STEP_TIMES, st.integers(1, 1500), st.floats(0.0, 200_000.0))
def test_decode_seconds_is_the_same_step(step_time: StepTime, seqs: int, kv: float) -> None:
    assert step_time.decode_seconds(seqs, kv) == pytest.approx(step_time.seconds_of(0, 0, 0, 0.0, seqs, kv))


@given(STEP_TIMES)
def test_empty_step_takes_nothing(step_time: StepTime) -> None:
    assert step_time.seconds(Step()) == 0.0
    assert step_time.decode_seconds(0, 0) == 0.0


@given(STEP_TIMES, SUMS)
def test_seconds_reads_the_step(step_time: StepTime, sums: tuple[int, int, int, float, int, int]) -> None:
    step = Step(*sums)
    assert astuple(step) == sums
    assert step_time.seconds(step) == step_time.seconds_of(*sums)


@settings(max_examples=300)
@given(
    STEP_TIMES,
    st.integers(0, 200),
    st.integers(0, 2000),
    st.integers(0, 700),
    st.floats(0.0, 0.6),
    st.integers(0, 30_000),
    st.integers(0, 6000),
)
def test_inverse_is_exact_within_a_token(
    step_time: StepTime, seqs: int, mean_kv: int, tokens: int, within_s: float, context: int, limit: int
) -> None:
    base = Step.decode(seqs, seqs * mean_kv)
    if tokens:
        base += Step.chunk(tokens, 300)
    found = step_time.chunk_tokens(base, within_s, context, limit)
    assert 0 <= found <= limit
    if found > 0:
        assert step_time.seconds(base + Step.chunk(found, context)) <= within_s
    if found < limit:
        assert step_time.seconds(base + Step.chunk(found + 1, context)) > within_s


def test_inverse_takes_few_evaluations() -> None:
    calls = 0

    def counted(*sums: float) -> float:
        nonlocal calls
        calls += 1
        return QWEN.seconds_of(*sums)  # type: ignore[arg-type]  # counts pass through as they came

    base = Step.decode(60, 60_000)
    for milliseconds in range(60, 400, 10):
        calls = 0
        largest_chunk(counted, base, milliseconds / 1e3, 1024, 8192)
        assert calls <= 14


def test_inverse_survives_a_cliff() -> None:
    # A step function is the worst a secant can meet; bisection must take over.
    calls = 0

    def cliff(tokens: int, *_: float) -> float:
        nonlocal calls
        calls += 1
        return 1.0 if tokens > 4321 else 1e-9 * tokens

    assert largest_chunk(cliff, Step(), 0.5, 0, 1_000_000) == 4321
    assert calls <= 40


def test_formula_in_its_own_words() -> None:
    step = Step.chunk(512, 1024) + Step.decode(60, 60_000)
    w, compute, s = 0.0268, 1.62e-4 * 572, 2.13
    expected = (
        0.0218 + 0.001 + (w**s + compute**s) ** (1 / s) + (6.4e-5 + 2e-5) * 60
        + 8.7e-8 * 60_000 + 4.6e-7 * 60_000 + 9.8e-7 * 1024 + 6.4e-9 * 512 * (1024 + 256)
    )  # fmt: skip
    assert QWEN.seconds(step) == pytest.approx(expected, rel=1e-9)


def test_table_is_met_inside_and_at_the_edge() -> None:
    tokens = Curve((0.0, 100.0, 2000.0), (0.010, 0.012, 0.090))
    decode = Surface(
        (0.0, 10.0, 100.0),
        (0.0, 1000.0, 50_000.0),
        ((0.0, 0.0, 0.0), (0.001, 0.002, 0.006), (0.003, 0.004, 0.009)),
    )
    table = TableStepTime(tokens, decode, None, replace(QWEN, mixed_kv_s=0.0, per_context_s=0.0))
    assert table.decode_seconds(10, 1000) == pytest.approx(0.0102 + 0.002)
    assert table.decode_seconds(55, 25_500) == pytest.approx(0.0111 + (0.002 + 0.006 + 0.004 + 0.009) / 4)
    assert table.seconds_of(2000, 1, 0, 0.0, 0, 0) == pytest.approx(0.090)
    # Outside it grows by the formula's increments, scaled by table over formula at the far corner.
    scale = 0.090 / QWEN.linear_seconds(2000)
    grown = 0.090 + scale * (QWEN.linear_seconds(3000) - QWEN.linear_seconds(2000))
    assert table.seconds_of(3000, 1, 0, 0.0, 0, 0) == pytest.approx(grown)
    corner = 0.009 / ((QWEN.per_seq_s + QWEN.host_seq_s) * 100 + QWEN.per_kv_s * 50_000)
    assert table.decode_seconds(100, 90_000) == pytest.approx(0.012 + 0.009 + corner * QWEN.per_kv_s * 40_000)


@pytest.mark.parametrize(("decode", "mixed"), [(1.3, 0.8), (0.8, 1.3), (1.1, 1.1)])
def test_each_regime_has_its_factor(decode: float, mixed: float) -> None:
    corrected = ScaledStepTime(QWEN, decode, mixed)
    assert corrected.decode_seconds(20, 9000) == pytest.approx(decode * QWEN.decode_seconds(20, 9000))
    step = Step.chunk(1000) + Step.decode(20, 9000)
    assert corrected.seconds(step) == pytest.approx(mixed * QWEN.seconds(step))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RooflineStepTime(c0_s=-1.0), "c0_s"),
        (lambda: RooflineStepTime(per_kv_s=float("nan")), "per_kv_s"),
        (lambda: RooflineStepTime(sharpness=0.5), "sharpness"),
        (lambda: ScaledStepTime(QWEN, 0.0, 1.0), "decode_factor"),
        (lambda: ScaledStepTime(QWEN, 1.0, float("inf")), "mixed_factor"),
        (lambda: ShiftedStepTime(QWEN, -1e-6), "extra_s"),
        (lambda: ShiftedStepTime(QWEN, float("nan")), "extra_s"),
        (lambda: Curve((0.0, 5.0, 5.0), (1.0, 2.0, 3.0)), r"axis\[2\]"),
        (lambda: Curve((0.0, 5.0), (2.0, 1.0)), r"values_s\[1\]"),
        (lambda: Curve((0.0,), (2.0,)), "two points"),
        (lambda: Surface((0.0, 1.0), (0.0, 1.0), ((0.0, 1.0), (0.0, 0.5))), "column 1"),
        (lambda: Surface((0.0, 1.0), (0.0, 1.0), ((0.0, 1.0), (1.0, 0.5))), r"rows_s\[1\]\[1\]"),
        (lambda: Surface((0.0, 1.0), (0.0, 1.0), ((0.0, 1.0), (1.0,))), r"rows_s\[1\] has 1"),
        (
            lambda: TableStepTime(
                Curve((0.0, 1.0), (0.0, 1.0)),
                Surface((0.0, 1.0), (0.0, 1.0), ((0.0, 0.0), (0.0, 0.0))),
                Curve((1.0, 2.0), (0.0, 1.0)),
                QWEN,
            ),
            "area 0",
        ),
    ],
)
def test_wrong_numbers_are_refused_with_the_place(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(scaled(), st.integers(1, 200), st.integers(0, 100_000), st.integers(1, 200))
def test_a_chunk_never_shortens_a_corrected_step(
    step_time: ScaledStepTime, seqs: int, kv: int, chunk: int
) -> None:
    decodes = Step.decode(seqs, kv)
    with_chunk = step_time.seconds(decodes + Step.chunk(chunk))
    assert with_chunk >= step_time.seconds(decodes) * (1 - 1e-12)  # but for the last bit
    if step_time.mixed_factor < step_time.decode_factor:
        assert with_chunk >= step_time.mixed_factor * step_time.base.seconds(decodes + Step.chunk(chunk))


@given(table_times(), st.floats(0.0, 0.02), SUMS)
def test_a_shift_is_added_once_to_every_step_that_holds_anything(
    base: TableStepTime, extra_s: float, sums: tuple[int, int, int, float, int, int]
) -> None:
    step = Step(*sums)
    longer = ShiftedStepTime(base, extra_s).seconds(step) - base.seconds(step)
    assert longer == pytest.approx(extra_s if step.tokens else 0.0, abs=1e-12)
