"""The ladder's order, and the baselines'."""

from __future__ import annotations

import math
from random import Random

import pytest

from scheduling.decisions import Outcome
from scheduling.fleet import Fleet
from scheduling.load import LoadVector
from scheduling.policies import POLICIES, Admission, Policy, Stage, make
from scheduling.policies.polyserve import PolyServe
from scheduling.tiers import Slo
from tests.scheduling.play import TIERS, backend, request
from tiergate_engine.steptime import RooflineStepTime


def fleet_of(**homes: str | None) -> Fleet:
    fleet = Fleet(TIERS, demand_window_s=30.0)
    for name, tier in homes.items():
        fleet.put(backend(name), 0.0)
        fleet.set_membership(name, tier, 1, 0.0)
    return fleet


def load(fleet: Fleet, name: str, decodes: int, kv: int = 0) -> None:
    fleet[name].foreign = LoadVector(decodes, kv, 0)
    fleet[name].refresh(0.0)
    fleet.reorder(fleet[name])


def read(stages: object) -> list[tuple[str, str, float]]:
    """(outcome, backends, pace) of each stage."""
    return [
        (stage.outcome.value, "".join(ledger.backend.name for ledger in stage.ledgers), stage.host_tpot_s)
        for stage in stages  # type: ignore[attr-defined]
    ]


def ladder(policy: Policy, fleet: Fleet, tier: str) -> list[tuple[str, str, float]]:
    return read(policy.stages(request("r", tier), TIERS[tier], fleet, 0.0))


# --- polyserve ---------------------------------------------------------------------------------------------


def test_own_tier_by_load_then_promotion_nearest_first() -> None:
    fleet = fleet_of(a="fast", b="mid", c="slow", d="slow", e="slow", p=None)
    load(fleet, "d", 7)
    load(fleet, "e", 3)
    assert ladder(PolyServe(), fleet, "slow") == [
        ("own_tier", "dec", 0.1),
        ("promoted", "b", 0.05),
        ("promoted", "a", 0.02),
    ]
    assert [stage[1] for stage in ladder(PolyServe(nearest_first=False), fleet, "slow")] == ["dec", "a", "b"]
    assert ladder(PolyServe(), fleet, "fast") == [("own_tier", "a", 0.02)], "never to a looser one"


def test_a_homeless_tier_tries_the_tighter_ones_and_then_lives_with_the_looser() -> None:
    fleet = fleet_of(a="fast", c="slow")
    assert ladder(PolyServe(), fleet, "mid") == [("promoted", "a", 0.02), ("shared", "c", 0.05)]


def test_best_effort_may_go_anywhere() -> None:
    fleet = fleet_of(a="fast", b="best")
    assert ladder(PolyServe(), fleet, "best") == [("own_tier", "b", math.inf), ("promoted", "a", 0.02)]


def test_what_is_left_is_tried_loosest_first() -> None:
    fleet = fleet_of(a="fast", b="mid", c="slow", p=None)
    stages = PolyServe().last_resort(request("r", "fast"), TIERS["fast"], fleet, 0.0)
    assert [stage[:2] for stage in read(stages)] == [("relegated", "c"), ("relegated", "b"), ("relegated", "a")]


@pytest.mark.parametrize(
    ("tier", "name", "outcome"),
    [
        ("mid", "b", Outcome.OWN_TIER),
        ("mid", "a", Outcome.PROMOTED),
        ("mid", "c", None),
        ("mid", "p", None),
        ("best", "c", Outcome.PROMOTED),
    ],
)
def test_the_stage_of_one_backend_agrees_with_the_ladder(tier: str, name: str, outcome: Outcome | None) -> None:
    fleet = fleet_of(a="fast", b="mid", c="slow", p=None)
    stage = PolyServe().stage_on(TIERS[tier], fleet[name], fleet, 0.0)
    assert (stage.outcome if stage else None) is outcome


def test_the_stage_of_a_neighbour() -> None:
    fleet = fleet_of(b="mid", c="slow")
    stage = PolyServe().stage_on(TIERS["fast"], fleet["b"], fleet, 0.0)
    assert stage is not None
    assert (stage.outcome, stage.host_tpot_s) == (Outcome.SHARED, 0.02)
    assert PolyServe().stage_on(TIERS["fast"], fleet["c"], fleet, 0.0) is None, "the nearest only"


def test_the_held_go_by_deadline_and_those_without_one_behind() -> None:
    policy = PolyServe()
    keys = [
        policy.held_key(request("a", slo=Slo(1.0, 0.1), arrival_s=5.0)),
        policy.held_key(request("b", slo=Slo(9.0, 0.1), arrival_s=0.0)),
        policy.held_key(request("c", slo=Slo(None, None), arrival_s=1.0)),
        policy.held_key(request("d", slo=Slo(None, None), arrival_s=2.0)),
    ]
    assert keys == sorted(keys)


# --- baselines ---------------------------------------------------------------------------------------------


def order(policy: Policy, fleet: Fleet) -> str:
    (stage,) = ladder(policy, fleet, "mid")
    assert (stage[0], stage[2]) == ("routed", math.inf)
    return stage[1]


def test_round_robin_takes_turns() -> None:
    policy = make("round_robin", Random(1))
    fleet = fleet_of(b=None, a="mid", c="fast")
    assert [order(policy, fleet) for _ in range(4)] == ["abc", "bca", "cab", "abc"]
    assert order(policy, fleet_of()) == ""


def test_least_load_counts_sequences_then_kv() -> None:
    fleet = fleet_of(a=None, b=None, c=None)
    load(fleet, "a", 5, 10)
    load(fleet, "b", 3, 900)
    load(fleet, "c", 3, 100)
    assert order(make("least_load", Random(1)), fleet) == "cba"


def test_minimal_takes_the_shortest_step() -> None:
    fleet = fleet_of(a=None, b=None)
    fleet.put(backend("c", step_time=RooflineStepTime(c0_s=0.001)), 0.0)
    load(fleet, "a", 5)
    load(fleet, "b", 6)
    load(fleet, "c", 50)
    assert order(make("minimal", Random(1)), fleet) == "cab"


def test_random_is_seeded_and_even() -> None:
    fleet = fleet_of(a=None, b=None, c=None)
    policies = [make("random", Random(7)) for _ in range(2)]
    first, second = ([order(policy, fleet) for _ in range(300)] for policy in policies)
    assert first == second
    for name in "abc":
        assert 60 < sum(line[0] == name for line in first) < 140


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_says_what_it_is(name: str) -> None:
    policy = make(name, Random(1))
    assert policy.name == name
    assert policy.uses_tiers is (name in ("polyserve", "qoserve_silo"))
    assert policy.uses_pool is (name == "polyserve")
    promises_all = name == "polyserve"
    assert policy.admission is (Admission.EVERY_PROMISE if promises_all else Admission.OWN_FIRST_TOKEN)
    fleet = fleet_of(a="mid")
    stage = policy.stage_on(TIERS["mid"], fleet["a"], fleet, 0.0)
    assert isinstance(stage, Stage)


def test_an_unknown_policy_names_the_known() -> None:
    with pytest.raises(KeyError, match="polyserve"):
        make("fastest", Random(1))
