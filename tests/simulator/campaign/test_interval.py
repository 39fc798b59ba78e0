"""Intervals against values worked out elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.campaign.interval import ratio_interval, t_interval


def test_students_interval_of_a_textbook_sample() -> None:
    # n = 10, mean 5.5, s = 3.02765; t(0.975, 9) = 2.262157 (any table): half = 2.165853
    found = t_interval([float(n) for n in range(1, 11)])
    assert found.mean == 5.5
    assert found.half == pytest.approx(2.165853, abs=1e-5)
    assert found.count == 10


def test_three_seeds_use_the_t_of_two_degrees() -> None:
    # s = 1, t(0.975, 2) = 4.302653
    found = t_interval([1.0, 2.0, 3.0])
    assert found.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)


def test_another_confidence() -> None:
    assert t_interval([1.0, 2.0, 3.0], 0.90).half == pytest.approx(2.919986 / 3**0.5, abs=1e-5)


def test_one_value_has_no_spread_and_none_has_no_mean() -> None:
    one = t_interval([2.0])
    assert (one.mean, one.low, one.high, one.half) == (2.0, None, None, None)
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_pairing_takes_out_the_luck_of_the_seeds() -> None:
    below = [10.0, 12.0, 17.0]
    above = [value * 1.2 for value in below]
    found = ratio_interval(above, below)
    assert found.mean == pytest.approx(1.2)
    assert found.half == pytest.approx(0.0, abs=1e-9)


def test_a_known_ratio() -> None:
    # logs of 1, 2, 4: mean ln 2, s = ln 2
    found = ratio_interval([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    assert found.mean == pytest.approx(2.0)
    assert found.high == pytest.approx(2.0 * 2.0 ** (4.302653 / 3**0.5), rel=1e-5)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=6))
def test_a_ratio_and_its_inverse_say_the_same(pairs: list[tuple[float, float]]) -> None:
    above, below = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    one, other = ratio_interval(above, below), ratio_interval(below, above)
    assert one.low is not None
    assert other.high is not None
    assert one.mean == pytest.approx(1 / other.mean)
    assert one.low == pytest.approx(1 / other.high)


def test_seeds_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="same seeds"):
        ratio_interval([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive"):
        ratio_interval([1.0], [0.0])
