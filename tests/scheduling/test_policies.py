"""The ladder's order, and the baselines'."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.decisions import Outcome
from scheduling.fleet import Fleet
from scheduling.lengths import FixedLength
from scheduling.load import LoadVector
from scheduling.policies import POLICIES, Admission, Policy, Stage, make
from scheduling.policies.headroom import Headroom
from scheduling.policies.polyserve import PolyServe, Promotion
from scheduling.residents import Resident
from scheduling.tiers import Slo
from tests.scheduling.play import TIERS, backend, cost_of, request
from tiergate_engine.steptime import RooflineStepTime


def fleet_of(**homes: str | None) -> Fleet:
    fleet = Fleet(TIERS, demand_window_s=30.0)
    for name, tier in homes.items():
        fleet.put(backend(name), 0.0)
        fleet.set_membership(name, tier, 1, 0.0)
    return fleet


def load(fleet: Fleet, name: str, decodes: int, kv: int = 0) -> None:
    fleet[name].set_foreign(LoadVector(decodes, kv, 0), math.inf, 0.0)
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


def test_every_switch_of_the_ladder() -> None:
    fleet = fleet_of(a="fast", b="mid", c="slow", d="slow", e="slow", p=None)
    load(fleet, "d", 7)
    load(fleet, "e", 3)

    def rungs(policy: Policy, tier: str = "slow") -> str:
        return " ".join(backends for _, backends, _ in ladder(policy, fleet, tier) if backends)

    assert rungs(PolyServe()) == "dec b a"
    assert rungs(PolyServe(fullest_first=False)) == "ced b a"
    assert rungs(PolyServe(promotion=Promotion.EAGER)) == "b a dec"
    assert rungs(PolyServe(promotion=Promotion.EAGER, nearest_first=False)) == "a b dec"
    never = PolyServe(promotion=Promotion.NEVER)
    assert rungs(never) == "dec"
    assert never.stage_on(TIERS["slow"], fleet["a"], fleet, 0.0) is None
    assert rungs(never, "best") == "dec b a", "no backend of its own: it lives with others"


def test_a_tier_without_a_backend_may_be_promoted_even_when_nobody_is() -> None:
    fleet = fleet_of(a="fast")
    never = PolyServe(promotion=Promotion.NEVER)
    assert ladder(never, fleet, "slow")[0] == ("promoted", "a", 0.02)
    stage = never.stage_on(TIERS["slow"], fleet["a"], fleet, 0.0)
    assert stage is not None


def test_the_held_may_go_first_come_first_served() -> None:
    policy = PolyServe(held_by_deadline=False)
    early = request("a", slo=Slo(9.0, 0.1), arrival_s=0.0)
    late = request("b", slo=Slo(0.1, 0.1), arrival_s=1.0)
    assert policy.held_key(early) < policy.held_key(late)
    assert PolyServe().held_key(early) > PolyServe().held_key(late)


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


def test_lmetric_multiplies_pending_tokens_and_batch_size() -> None:
    """The newcomer brings 100: 5 x (100 + 900), 8 x (100 + 0), 0."""
    fleet = fleet_of(a=None, b=None, c=None)
    fleet["a"].set_foreign(LoadVector(5, 1000, 900), math.inf, 0.0)
    fleet["b"].set_foreign(LoadVector(8, 1000, 0), math.inf, 0.0)
    for name in "ab":
        fleet[name].refresh(0.0)
        fleet.reorder(fleet[name])
    assert order(make("lmetric", Random(1)), fleet) == "cba"
    stages = make("lmetric", Random(1)).stages(
        request("r", "mid", 4000, cached_tokens=3990), TIERS["mid"], fleet, 0.0
    )
    assert [ledger.backend.name for stage in stages for ledger in stage.ledgers] == ["c", "b", "a"]


def test_headroom_packs_the_fullest_that_keeps_the_pace() -> None:
    """Steps take 10 ms and 1 ms a decode: 45 decodes miss a pace of 50 ms, 60 miss it by more."""
    fleet = fleet_of(a=None, b=None, c=None, d=None, e=None)
    for name, decodes in (("a", 5), ("b", 30), ("c", 45), ("d", 60)):
        load(fleet, name, decodes)
    policy = make("headroom", Random(1))
    assert order(policy, fleet) == "baecd"
    assert order(Headroom(least=False), fleet) == "eabcd"


def test_headroom_minds_the_tightest_resident() -> None:
    fleet = fleet_of(a=None, b=None)
    for name, tier in (("a", "fast"), ("b", "slow")):
        for index in range(12):
            asked = request(f"{name}{index}", tier, slo=Slo(60.0, TIERS[tier].slo.tpot_s))
            one = Resident(asked.request_id, asked, cost_of(asked), FixedLength(50.0), 0.0, guest=False)
            one.expected_first_s = 0.0
            fleet[name].place(one, 0.0)
            fleet[name].first_token(asked.request_id, 0.0)
        fleet.reorder(fleet[name])
    assert order(make("headroom", Random(1)), fleet) == "ba", "13 decodes take 23 ms: too slow for those of a"


def test_headroom_prefers_missing_the_pace_to_missing_the_first_token() -> None:
    fleet = fleet_of(a=None, b=None, c=None)
    fleet["a"].set_foreign(LoadVector(1, 0, 20_000), math.inf, 0.0)  # two seconds of prompts
    fleet["b"].set_foreign(LoadVector(60, 0, 0), math.inf, 0.0)
    fleet["c"].set_foreign(LoadVector(60, 0, 20_000), math.inf, 0.0)
    for name in "abc":
        fleet[name].refresh(0.0)
        fleet.reorder(fleet[name])
    assert order(make("headroom", Random(1)), fleet) == "bac"


def test_a_silo_is_the_least_loaded_of_its_own() -> None:
    fleet = fleet_of(a="mid", b="mid", c="fast", p=None)
    load(fleet, "a", 5)
    policy = make("qoserve_silo", Random(1))
    assert ladder(policy, fleet, "mid") == [("routed", "ba", 0.05)]
    assert ladder(policy, fleet, "slow") == [("routed", "ba", 0.05)], "it has none: with the nearest tighter"
    assert policy.stage_on(TIERS["mid"], fleet["c"], fleet, 0.0) is None
    alone = fleet_of(c="slow")
    assert ladder(policy, alone, "fast") == [("routed", "c", 0.1)], "with the looser when there is no tighter"
    assert ladder(policy, fleet_of(p=None), "fast") == []


# --- what holds for all of them ----------------------------------------------------------------------------

homes = st.dictionaries(
    st.sampled_from("abcdefgh"), st.sampled_from([None, "fast", "mid", "slow", "best"]), max_size=8
)


@given(
    st.sampled_from(sorted(POLICIES)),
    homes,
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3000)), min_size=8, max_size=8),
    st.sampled_from(["fast", "mid", "slow", "best"]),
    st.integers(0, 1000),
)
def test_every_policy_offers_each_open_backend_of_the_fleet_at_most_once_and_always_in_the_same_order(
    name: str, where: dict[str, str | None], loads: list[tuple[int, int]], tier: str, seed: int
) -> None:
    def offered() -> list[str]:
        fleet = fleet_of(**where)
        for backend_name, (decodes, queued) in zip(sorted(where), loads, strict=False):
            fleet[backend_name].set_foreign(LoadVector(decodes, decodes * 50 + queued, queued), math.inf, 0.0)
            fleet[backend_name].refresh(0.0)
            fleet.reorder(fleet[backend_name])
        policy = make(name, Random(seed))
        asked = request("r", tier)
        stages = list(policy.stages(asked, TIERS[tier], fleet, 0.0))
        listed = [(stage, list(stage.ledgers)) for stage in stages]
        for stage, ledgers in listed:
            assert stage.host_tpot_s > 0.0
            assert all(fleet[ledger.backend.name] is ledger for ledger in ledgers)
            for ledger in ledgers:
                again = policy.stage_on(TIERS[tier], ledger, fleet, 0.0)
                assert again is not None, "what a look would try, a held request may use"
                assert again.outcome is stage.outcome
        return [ledger.backend.name for _, ledgers in listed for ledger in ledgers]

    names = offered()
    assert len(set(names)) == len(names)
    assert set(names) <= set(where)
    assert names == offered(), "the same fleet and seed, the same order"
    uses_tiers = make(name, Random(seed)).uses_tiers
    assert uses_tiers or set(names) == set(where), "a router without tiers tries them all"


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
