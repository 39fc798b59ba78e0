"""The goodput search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.search import Bisection, Goodput, find_goodput


async def search(limit: float, low: float = 0.5, high: float = 4.5, runs: int = 8) -> Goodput:
    async def offer(factor: float) -> float:
        return 1.0 if factor <= limit else 0.5

    return await find_goodput(Bisection(low, high, runs), offer)


@given(limit=st.floats(0.5, 4.4))
async def test_the_answer_brackets_the_truth(limit: float) -> None:
    found = await search(limit)
    assert found.factor is not None
    assert found.failed_factor is not None
    assert found.factor <= limit < found.failed_factor
    assert found.failed_factor - found.factor == pytest.approx(4.0 / 2**6)
    assert len(found.points) == 8


async def test_beyond_either_end_is_said_and_costs_no_more_runs() -> None:
    below, above = await search(0.1), await search(100.0)
    assert (below.factor, below.failed_factor, len(below.points)) == (None, 0.5, 1)
    assert (above.factor, above.failed_factor, len(above.points)) == (4.5, None, 2)


def test_noise_never_yields_a_factor_above_a_failed_one() -> None:
    bisection = Bisection(1.0, 3.0, 6)
    for factor, attainment in ((1.0, 0.95), (3.0, 0.99), (2.0, 0.5), (2.5, 0.95)):
        bisection.add(factor, attainment)
    result = bisection.result()
    assert (result.factor, result.failed_factor) == (1.0, 2.0)
    assert bisection.next_factor() == pytest.approx(1.5)


@pytest.mark.parametrize(
    "values", [(0.0, 1.0, 3, 0.9), (2.0, 1.0, 3, 0.9), (1.0, 2.0, 1, 0.9), (1.0, 2.0, 3, 0.0)]
)
def test_a_search_that_makes_no_sense_is_refused(values: tuple[float, float, int, float]) -> None:
    with pytest.raises(ValueError, match=r"must|needs"):
        Bisection(*values)
