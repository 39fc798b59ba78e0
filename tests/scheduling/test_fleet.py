"""The gradient's order, the pool, and which pace a backend keeps for whom."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.backends import BackendState
from scheduling.fleet import Fleet
from scheduling.ledger import Ledger
from scheduling.load import LoadVector
from scheduling.tiers import Tier, TierSet
from tests.scheduling.play import TIERS, backend


def fleet_of(*homes: tuple[str, str | None], tiers: TierSet = TIERS) -> Fleet:
    fleet = Fleet(tiers, demand_window_s=30.0)
    for name, tier in homes:
        fleet.put(backend(name, kv_tokens=10_000), 0.0)
        fleet.set_membership(name, tier, 1, 0.0)
    return fleet


def load(fleet: Fleet, name: str, decodes: int, kv: int = 0) -> Ledger:
    ledger = fleet[name]
    ledger.set_foreign(LoadVector(decodes, kv, 0), math.inf, 0.0)
    ledger.refresh(0.0)
    fleet.reorder(ledger)
    return ledger


def names(ledgers: object) -> list[str]:
    return [ledger.backend.name for ledger in ledgers]  # type: ignore[attr-defined]


# --- order -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40), st.sampled_from([0, 100, 900])), max_size=30)
)
def test_a_tier_is_kept_in_order_of_load(changes: list[tuple[str, int, int]]) -> None:
    fleet = fleet_of(*((name, "mid") for name in "abcdef"))
    for name, decodes, kv in changes:
        load(fleet, name, decodes, kv)
    expected = sorted("abcdef", key=lambda name: (-fleet[name].load, -fleet[name].kv_fraction(), name))
    assert names(fleet.in_tier("mid")) == names(fleet.walk_tier("mid")) == expected


def test_load_is_the_steady_step_over_the_hosts_pace() -> None:
    fleet = fleet_of(("a", "fast"), ("b", "slow"), ("c", "best"), ("d", None))
    assert load(fleet, "a", 10).load == pytest.approx(1.0)
    assert load(fleet, "b", 10).load == pytest.approx(0.2)
    assert load(fleet, "c", 10, 2500).load == 0.25, "without a pace the KV fraction counts"
    assert load(fleet, "d", 0).load == 0.0


def test_ties_go_by_kv_and_then_by_name() -> None:
    fleet = fleet_of(("b", "mid"), ("a", "mid"), ("c", "mid"))
    assert names(fleet.in_tier("mid")) == ["a", "b", "c"]
    for name, kv in (("a", 10), ("b", 20), ("c", 20)):
        load(fleet, name, 5, kv)
    assert names(fleet.in_tier("mid")) == ["b", "c", "a"]


# --- membership --------------------------------------------------------------------------------------------


def test_a_new_backend_is_in_the_pool() -> None:
    fleet = fleet_of()
    fleet.put(backend("a"), 0.0)
    assert names(fleet.pool()) == ["a"]
    fleet["a"].claiming_for = "mid"
    assert names(fleet.pool()) == []


def test_an_older_epoch_is_no_news() -> None:
    fleet = fleet_of(("a", "mid"))
    fleet.set_membership("a", "slow", 5, 0.0)
    fleet.set_membership("a", "fast", 4, 0.0)
    assert fleet["a"].tier == "slow"
    fleet.set_membership("nobody", "fast", 9, 0.0)


def test_a_backend_of_a_tier_that_is_gone_counts_as_pool() -> None:
    fleet = fleet_of(("a", "slow"), ("b", "mid"))
    fleet.set_tiers(TierSet((TIERS["fast"], TIERS["mid"]), "mid"))
    assert names(fleet.pool()) == ["a"]
    assert fleet["a"].tier == "slow", "the store still says so"
    assert names(fleet.in_tier("mid")) == ["b"]


def test_a_backend_that_takes_nothing_is_in_no_tiers_order() -> None:
    fleet = fleet_of(("a", "mid"), ("b", "mid"), ("c", None))
    for name, state in (("a", BackendState.DOWN), ("c", BackendState.DRAINING)):
        fleet.put(backend(name, state=state), 1.0)
    assert names(fleet.in_tier("mid")) == ["b"]
    assert names(fleet.pool()) == []
    assert len(fleet) == 3
    fleet.put(backend("a"), 2.0)
    assert fleet.tier_size("mid") == 2


def test_remove() -> None:
    fleet = fleet_of(("a", "mid"))
    assert fleet.remove("a", 1.0) is not None
    assert fleet.remove("a", 1.0) is None
    assert fleet.tier_size("mid") == 0


# --- paces -------------------------------------------------------------------------------------------------


def test_a_backend_keeps_its_tiers_pace() -> None:
    fleet = fleet_of(("a", "mid"), ("p", None))
    assert fleet.host_tpot_s(fleet["a"], 0.0) == 0.05
    assert fleet.host_tpot_s(fleet["p"], 0.0) == float("inf")


def test_it_keeps_a_homeless_tighter_tiers_pace_while_that_is_in_demand() -> None:
    fleet = fleet_of(("a", "slow"))
    assert fleet.host_tpot_s(fleet["a"], 0.0) == 0.1
    fleet.note_demand("mid", 0.0)
    assert fleet.host_tpot_s(fleet["a"], 1.0) < 0.05
    fleet.note_demand("fast", 10.0)
    assert fleet.host_tpot_s(fleet["a"], 11.0) < 0.02, "the tightest of them"
    assert 0.02 < fleet.host_tpot_s(fleet["a"], 1000.0) == 0.1


def test_it_need_not_once_the_tighter_tier_has_a_home() -> None:
    fleet = fleet_of(("a", "slow"), ("b", "fast"))
    fleet.note_demand("fast", 0.0)
    assert fleet.host_tpot_s(fleet["a"], 0.0) == 0.1
    fleet.note_demand("mid", 0.0)
    assert fleet.host_tpot_s(fleet["a"], 0.0) < 0.05, "mid has none: it lives with slow, not with fast"


def test_neighbours_are_the_nearest_looser_tiers() -> None:
    fleet = fleet_of(("a", "slow"), ("b", "best"))
    assert names(fleet.neighbours(TIERS["fast"])) == ["a"]
    assert names(fleet.neighbours(TIERS["slow"])) == ["b"]
    assert names(fleet.neighbours(TIERS["best"])) == []


# --- relabelling -------------------------------------------------------------------------------------------


def test_the_emptiest_of_the_largest_holder_is_relabelled() -> None:
    fleet = fleet_of(("a", "slow"), ("b", "slow"), ("c", "slow"), ("d", "mid"), ("e", "mid"))
    load(fleet, "a", 5)
    load(fleet, "b", 1)
    load(fleet, "c", 9)
    taken = fleet.to_relabel(TIERS["fast"], "m")
    assert taken is fleet["b"]


def test_the_last_backend_of_a_tier_stays() -> None:
    fleet = fleet_of(("a", "slow"), ("b", "mid"))
    assert fleet.to_relabel(TIERS["fast"], "m") is None


def test_pinned_and_foreign_models_are_not_relabelled() -> None:
    fleet = fleet_of(("a", "slow"), ("b", "slow"), ("c", "slow"))
    fleet.put(backend("a", pinned=True), 0.0)
    fleet.put(backend("b", models=frozenset({"other"})), 0.0)
    assert fleet.to_relabel(TIERS["fast"], "m") is fleet["c"]
    fleet["c"].claiming_for = "mid"
    assert fleet.to_relabel(TIERS["fast"], "m") is None


# --- cost --------------------------------------------------------------------------------------------------


def test_backend_seconds_are_those_in_a_tier() -> None:
    fleet = fleet_of(("a", None), ("b", "mid"))
    assert fleet.backend_seconds(10.0) == 10.0
    fleet.set_membership("a", "slow", 2, 10.0)
    assert fleet.backend_seconds(20.0) == 30.0
    fleet.set_membership("b", None, 2, 20.0)
    fleet.set_membership("a", "mid", 3, 25.0)
    assert fleet.backend_seconds(30.0) == 40.0
    fleet.remove("a", 30.0)
    assert fleet.backend_seconds(99.0) == 40.0


def test_demand_fades() -> None:
    fleet = fleet_of(("a", "mid"))
    assert fleet.active_tiers(0.0) == []
    fleet.note_demand("mid", 5.0)
    assert fleet.active_tiers(35.0) == [TIERS["mid"]]
    assert fleet.active_tiers(35.1) == []


def test_one_tier_alone_is_a_fleet_too() -> None:
    only = TierSet((Tier("all", TIERS["mid"].slo, 0),), "all")
    fleet = fleet_of(("a", "all"), tiers=only)
    assert list(fleet.neighbours(only["all"])) == []
    assert fleet.to_relabel(only["all"], "m") is None
