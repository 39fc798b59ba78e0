"""Which backend is claimed for whom, and which one goes back."""

from __future__ import annotations

import math

import pytest

from scheduling.elastic import Elastic
from scheduling.events import Claim, HandBack
from scheduling.feasible import Ask
from scheduling.fleet import Fleet
from scheduling.lengths import FixedLength
from scheduling.load import LoadVector
from scheduling.options import Options
from scheduling.policies.polyserve import PolyServe
from scheduling.tickets import Ticket
from tests.scheduling.play import TIERS, backend, request


def fleet_of(*homes: tuple[str, str | None], **changes: object) -> Fleet:
    fleet = Fleet(TIERS, demand_window_s=30.0)
    for name, tier in homes:
        fleet.put(backend(name, **changes), 0.0)
        fleet.set_membership(name, tier, 1, 0.0)
    return fleet


def elastic_of(fleet: Fleet, handback_checks: int = 2, uses_pool: bool = True, moves: int = 1) -> Elastic:
    options = Options(handback_checks=handback_checks, moves_per_round=moves)
    return Elastic(fleet, PolyServe(uses_pool=uses_pool), options)


def busy(fleet: Fleet, name: str, decodes: int = 3) -> None:
    fleet[name].set_foreign(LoadVector(decodes, 100, 0), math.inf, 0.0)
    fleet[name].refresh(0.0)
    fleet.reorder(fleet[name])


def ticket(tier: str = "fast", model: str = "m", prompt_tokens: int = 100) -> Ticket:
    asked = request("r", tier, prompt_tokens, model=model)
    tpot_s = asked.slo.tpot_s or float("inf")
    return Ticket(asked, TIERS[tier], Ask(asked, 50.0, tpot_s, asked.slo.deadline_s(0.0, 0)), FixedLength())


def claimed(claim: Claim | None) -> tuple[str, str, int] | None:
    return (claim.backend, claim.tier, claim.expected_epoch) if claim else None


def test_a_free_backend_is_claimed_once_at_a_time() -> None:
    fleet = fleet_of(("a", None), ("b", None))
    elastic = elastic_of(fleet, 2)
    assert claimed(elastic.claim_for(ticket("mid"), 0.0)) == ("a", "mid", 1)
    assert elastic.claim_for(ticket("mid"), 0.0) is None
    assert claimed(elastic.claim_for(ticket("fast"), 0.0)) == ("b", "fast", 1)
    assert elastic.settle("a", "mid", 2, 1.0) == "mid"
    assert (fleet["a"].tier, fleet["a"].claiming_for) == ("mid", None)
    assert elastic.settle("nobody", "mid", 2, 1.0) is None


@pytest.mark.parametrize("why", ["resting", "excluded", "another model", "too slow"])
def test_what_cannot_help_is_not_claimed(why: str) -> None:
    fleet = fleet_of(("a", None), models=frozenset({"n"}) if why == "another model" else frozenset())
    wants = ticket()
    if why == "resting":
        fleet["a"].blocked_until_s = 5.0
    elif why == "excluded":
        wants.excluded = frozenset({"a"})
    elif why == "too slow":
        fleet.put(backend("a", margin=2.0), 0.0)
    assert elastic_of(fleet, 2).claim_for(wants, 0.0) is None
    assert fleet["a"].claiming_for is None


def test_a_tier_that_has_a_backend_takes_none_from_its_neighbours() -> None:
    fleet = fleet_of(("a", "fast"), ("b", "slow"), ("c", "slow"))
    for name in "abc":
        busy(fleet, name)
    assert elastic_of(fleet, 2).claim_for(ticket("fast"), 0.0) is None
    assert claimed(elastic_of(fleet, 2).claim_for(ticket("mid"), 0.0)) == ("c", "mid", 1)


def test_tails_go_back_after_as_many_empty_looks_as_asked() -> None:
    fleet = fleet_of(("a", "fast"), ("b", "fast"), ("p", None))
    busy(fleet, "a")
    elastic = elastic_of(fleet, 2)
    assert elastic.tails() == []
    assert elastic.tails() == [HandBack("b", 1)]
    assert elastic.tails() == [], "it was asked for; the count starts again"


def test_what_is_pinned_or_being_claimed_stays() -> None:
    fleet = fleet_of(("a", "fast"), ("b", "fast"))
    fleet.put(backend("a", pinned=True), 0.0)
    fleet["b"].claiming_for = "mid"
    assert elastic_of(fleet, 1).tails() == []


def test_demand_moves_backends_in_a_fleet_without_a_pool() -> None:
    fleet = fleet_of(("a", "slow"), ("b", "slow"), ("c", "slow"))
    elastic = elastic_of(fleet, 2)
    for name in "abc":
        busy(fleet, name)
    moves = []
    for _ in range(3):
        for _ in range(5):
            elastic.note_demand(ticket("fast"))
            elastic.note_demand(ticket("slow"))
        moves.append([claimed(claim) for claim in elastic.rebalance()])
    assert moves[0] == [], "a target counts when it was computed twice"
    assert moves[1] == [("c", "fast", 1)]


def test_with_a_pool_nothing_is_relabelled() -> None:
    fleet = fleet_of(("a", "slow"), ("b", "slow"), ("p", None))
    elastic = elastic_of(fleet, 2)
    for _ in range(4):
        elastic.note_demand(ticket("fast"))
        assert elastic.rebalance() == []


def test_without_a_pool_every_backend_is_dealt_to_the_tier_with_the_fewest() -> None:
    fleet = fleet_of(("a", None), ("b", "fast"), ("c", None), ("d", None), ("e", None), ("f", None))
    elastic = elastic_of(fleet, uses_pool=False)
    dealt = [claimed(claim) for claim in elastic.deal(0.0)]
    assert dealt == [("a", "mid", 1), ("c", "slow", 1), ("d", "best", 1), ("e", "fast", 1), ("f", "mid", 1)]
    assert elastic.deal(0.0) == [], "they are asked for"
    assert elastic_of(fleet).deal(0.0) == [], "with a pool they wait until somebody needs them"


def test_without_a_pool_nothing_is_taken_for_a_held_one_nor_handed_back() -> None:
    fleet = fleet_of(("a", "fast"), ("b", "mid"), ("c", "mid"))
    busy(fleet, "a")
    elastic = elastic_of(fleet, handback_checks=1, uses_pool=False)
    assert elastic.tails() == []
    assert elastic.claim_for(ticket("fast"), 0.0) is None, "b and c are empty, but are not fast's"
    assert claimed(elastic.claim_for(ticket("slow"), 0.0)) == ("c", "slow", 1), "a tier without any takes one"


def test_several_backends_may_move_in_a_round() -> None:
    names = "abcdefgh"
    due = 0
    for moves in (64, 2, 1):
        fleet = fleet_of(*((name, "slow") for name in names))
        for name in names:
            busy(fleet, name)
        elastic = elastic_of(fleet, uses_pool=False, moves=moves)
        for _ in range(2):
            for _ in range(6):
                elastic.note_demand(ticket("fast"))
            for _ in range(10):
                elastic.note_demand(ticket("slow"))
            claims = elastic.rebalance()
        due = due or len(claims)
        assert due > 2
        assert len(claims) == min(moves, due)
        assert {(claim.tier, claim.expected_epoch) for claim in claims} == {("fast", 1)}
        assert len({claim.backend for claim in claims}) == len(claims)


def test_a_tighter_pace_and_a_longer_answer_are_more_demand() -> None:
    """Backend-seconds of one request grow with its prompt and with the tightness of its pace."""

    def demand(wants: Ticket) -> float:
        elastic = elastic_of(fleet_of(("a", "slow")), 2)
        elastic.note_demand(wants)
        return elastic._reckon(elastic._demand[wants.tier.name])

    assert demand(ticket("fast")) > demand(ticket("slow")) > 0
    assert demand(ticket("slow", prompt_tokens=5000)) > demand(ticket("slow"))
    assert demand(ticket("best")) > 0
