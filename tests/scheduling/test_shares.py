"""Shares of a fleet without a pool."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from scheduling.shares import Move, Shares, split

ORDER = ["fast", "mid", "slow"]
demands = st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 100), max_size=6)


@given(demands, st.integers(0, 40))
def test_split_gives_out_every_backend_and_nobody_in_demand_goes_without(
    demand: dict[str, float], backends: int
) -> None:
    shares = split(demand, backends)
    wanting = {tier for tier, need in demand.items() if need > 0}
    assert set(shares) <= wanting
    assert sum(shares.values()) == (backends if wanting else 0) or backends < len(wanting)
    if backends >= len(wanting):
        assert all(shares[tier] >= 1 for tier in wanting) or not backends
    else:
        assert sum(shares.values()) == backends


@given(demands, st.integers(7, 40))
def test_split_is_within_one_of_the_exact_share(demand: dict[str, float], backends: int) -> None:
    shares = split(demand, backends)
    total = sum(demand.values())
    for tier, count in shares.items():
        exact = 1 + (backends - len(shares)) * demand[tier] / total
        assert math.floor(exact) <= count <= math.ceil(exact + 1e-9)


def test_split_by_largest_remainder() -> None:
    assert split({"a": 5.0, "b": 3.0, "c": 2.0}, 10) == {"a": 5, "b": 3, "c": 2}, "one each; then 3.5, 2.1 and 1.4"
    assert split({"a": 1.0, "b": 1.0}, 5) == {"a": 3, "b": 2}, "ties go by name"
    assert split({"a": 1.0, "b": 9.0, "c": 5.0}, 2) == {"b": 1, "c": 1}
    assert split({"a": 0.0}, 3) == {}
    assert split({"a": 1.0}, 0) == {}


def rounds(shares: Shares, demand: dict[str, float], held: dict[str, int], times: int) -> list[Move | None]:
    moves = []
    for _ in range(times):
        for tier, need in demand.items():
            shares.add(tier, need)
        moves.append(shares.close_round(held, ORDER))
    return moves


def test_a_target_counts_when_it_was_computed_twice() -> None:
    held = {"fast": 0, "mid": 1, "slow": 3}
    assert rounds(Shares(weight=1.0), {"fast": 1.0, "mid": 1.0, "slow": 2.0}, held, 3) == [
        None,
        Move("slow", "fast"),
        Move("slow", "fast"),
    ]


def test_nothing_moves_when_all_is_as_it_should_be() -> None:
    held = {"fast": 1, "mid": 1, "slow": 2}
    assert rounds(Shares(weight=1.0), {"fast": 1.0, "mid": 1.0, "slow": 2.0}, held, 4) == [None] * 4


def test_a_burst_of_one_round_moves_nothing() -> None:
    shares = Shares(weight=1.0)
    held = {"fast": 2, "mid": 0, "slow": 2}
    even, burst = {"fast": 1.0, "slow": 1.0}, {"fast": 9.0, "slow": 1.0}
    moves = rounds(shares, even, held, 2) + rounds(shares, burst, held, 1) + rounds(shares, even, held, 1)
    assert moves == [None] * 4


def test_demand_decays_until_it_is_forgotten() -> None:
    shares = Shares(weight=0.5)
    rounds(shares, {"fast": 1.0}, {"fast": 1, "mid": 1}, 2)
    moves = rounds(shares, {"mid": 1.0}, {"fast": 2, "mid": 0}, 30)
    assert moves[-1] == Move("fast", "mid")
    assert rounds(shares, {}, {"fast": 2, "mid": 0}, 60)[-1] is None, "no demand, no target"


def test_the_largest_surplus_gives_to_the_largest_need() -> None:
    held = {"fast": 4, "mid": 3, "slow": 0}
    moves = rounds(Shares(weight=1.0), {"fast": 1.0, "slow": 5.0}, held, 2)
    assert moves[-1] == Move("mid", "slow")
