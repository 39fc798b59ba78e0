"""A later request lets an earlier one of another replica go first: once, for a while, and only if it can."""

from __future__ import annotations

import math

from scheduling import events as ev
from scheduling.options import Options
from scheduling.rivals import BELIEVED_S, Waiting
from tests.scheduling.play import Play


def waiting(due_s: float, tier: str = "fast", model: str = "m", kv_tokens: int = 150) -> Waiting:
    return Waiting(model, tier, due_s, 1, kv_tokens)


def play(**limits: int) -> Play:
    made = Play(options=Options(yield_s=0.1))
    made.add("a", "fast", **limits)
    made.runs("there", "slow", 10)
    return made


def test_a_newcomer_lets_an_earlier_one_of_another_replica_go_first() -> None:
    one = play()
    one.tell(ev.OthersHold("other", (waiting(0.3),)))
    assert one.arrives("r1") == ["hold r1 until 0.48: held"]
    assert "another replica's earlier request" in one.last[0].decision.reason  # type: ignore[union-attr]
    assert one.dispatcher.next_wake_s() == 0.1
    assert one.wait(0.05) == []
    assert one.wait(0.05) == ["reserve r1#1 on a: own_tier"], "it has waited long enough"


def test_it_goes_at_once_when_the_other_has_gone() -> None:
    one = play()
    one.tell(ev.OthersHold("other", (waiting(0.3),)))
    one.arrives("r1")
    one.tell(ev.OthersHold("other", ()))
    assert one.foreign("a", decodes=1, kv=150) == ["reserve r1#1 on a: own_tier"]


def test_it_does_not_for_those_that_are_later_elsewhere_or_too_large() -> None:
    for other in (waiting(0.7), waiting(0.3, "mid"), waiting(0.3, model="n"), waiting(0.3, kv_tokens=5000)):
        one = play(kv_tokens=1000)
        one.tell(ev.OthersHold("other", (other,)))
        assert one.arrives("r1") == ["reserve r1#1 on a: own_tier"], other


def test_what_was_told_long_ago_or_is_past_is_not_believed() -> None:
    one = play()
    one.tell(ev.OthersHold("other", (waiting(10.0, "slow"), waiting(1.0))))
    one.now_s = BELIEVED_S + 0.1
    assert one.arrives("r1", "slow", arrival_s=9.0) == ["reserve r1#1 on a: promoted"]
    one.tell(ev.OthersHold("other", (waiting(1.0),)))
    assert one.arrives("r2") == ["reserve r2#1 on a: own_tier"]


def test_it_does_not_at_its_own_promises_cost() -> None:
    one = play()
    one.tell(ev.OthersHold("other", (waiting(0.05),)))
    assert one.arrives("r1", arrival_s=-0.3) == ["reserve r1#1 on a: own_tier"], "0.2 s are left, and a chunk"


def test_it_yields_once() -> None:
    one = play(max_running_seqs=2)
    one.tell(ev.OthersHold("other", (waiting(1.5, "slow"),)))
    assert one.arrives("r1", "slow") == ["hold r1 until 1.98: held"]
    one.foreign("a", decodes=1, kv=100)
    assert one.wait(0.1) == [], "the other went first"
    one.tell(ev.OthersHold("other", (waiting(1.6, "slow"),)))
    assert one.foreign("a") == ["reserve r1#1 on a: promoted"]


def test_it_is_held_back_as_long_as_it_yields() -> None:
    one = play(max_running_seqs=2)
    one.opens("r0")
    one.arrives("r1")
    one.tell(ev.OthersHold("other", (waiting(0.3),)))
    assert one.ended("r0#1") == ["release r0#1 on a"]
    assert one.wait(0.1) == ["reserve r1#1 on a: own_tier"]


def test_on_an_empty_backend_there_is_room_for_both() -> None:
    one = play()
    one.tell(ev.OthersHold("other", (waiting(0.3),)))
    one.ended("there#1")
    assert one.arrives("r1") == ["reserve r1#1 on a: own_tier"]


def test_who_yields_takes_no_backend_meanwhile() -> None:
    one = play()
    one.tell(ev.OthersHold("other", (waiting(0.3),)))
    one.add("b")
    assert one.arrives("r1") == ["hold r1 until 0.48: held"]
    assert one.wait(0.05) == []


def test_it_can_be_switched_off() -> None:
    one = Play(options=Options(yield_s=0.0))
    one.add("a", "fast")
    one.runs("there", "slow", 10)
    one.tell(ev.OthersHold("other", (waiting(0.3),)))
    assert one.arrives("r1") == ["reserve r1#1 on a: own_tier"]


def test_nobody_yields_for_ever() -> None:
    """Two replicas that each hold an earlier one of the other's tier: both go."""
    for index in range(20):
        one = play()
        one.tell(ev.OthersHold("other", (waiting(0.01 * index + 0.02),)))
        one.arrives("r1")
        one.wait(0.2)
        one.granted("r1#1")
        assert one.dispatcher.counts.held == 0
        assert one.dispatcher.counts.open == 2


def test_the_first_that_is_held_is_told() -> None:
    one = play(max_running_seqs=2)
    one.opens("r0")
    one.arrives("r1", prompt_tokens=200)
    one.now_s = 0.1
    one.arrives("r2")
    assert one.dispatcher.first_held() == (Waiting("m", "fast", 0.5, 1, 250),)
    one.arrives("b", "best")
    assert [first.tier for first in one.dispatcher.first_held()] == ["fast"], (
        "without a deadline there is no first"
    )
    assert math.isinf(one.dispatcher._desk.next_yielded_s())
