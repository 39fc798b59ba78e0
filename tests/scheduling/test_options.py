"""The dispatcher's knobs for those who wait, and tiers without a pool."""

from __future__ import annotations

from scheduling import events as ev
from scheduling.checks import Checks
from scheduling.options import Options
from scheduling.policies.polyserve import PolyServe
from scheduling.tiers import Slo
from tests.scheduling.play import Play

SHORT = Slo(0.5, 0.02)


def full(options: Options) -> Play:
    """A backend with room for three sequences: one of three answers, and another of one, are on it already."""
    play = Play(options=options)
    play.add("a", "fast", max_running_seqs=4)
    play.opens("three", sequences=3)
    play.opens("one")
    return play


def test_head_of_line_waits_for_the_first_and_scanning_goes_on_behind_it() -> None:
    for scanned, expected in ((1, []), (4, ["reserve small#1 on a: own_tier"])):
        play = full(Options(scan_held=scanned))
        play.arrives("large", sequences=3, slo=SHORT)
        play.arrives("small", slo=Slo(0.6, 0.02))
        assert play.ended("one#1") == ["release one#1 on a", *expected], scanned


def test_only_so_many_are_scanned() -> None:
    play = full(Options(scan_held=2))
    for index in range(3):
        play.arrives(f"large{index}", sequences=3, slo=SHORT)
    play.arrives("small", slo=Slo(0.6, 0.02))
    assert play.ended("one#1") == ["release one#1 on a"], "it is the fourth"


def test_a_newcomer_may_or_may_not_overtake_those_who_wait() -> None:
    for overtaking, expected in ((True, "reserve small#1 on a: own_tier"), (False, "hold small until 0.48: held")):
        play = full(Options(overtaking=overtaking))
        play.arrives("large", sequences=3, slo=Slo(0.4, 0.02))
        play.ended("one#1")
        assert play.arrives("small", slo=SHORT) == [expected]
    reason = play.dispatcher.held_requests()[-1].decision
    assert reason is not None
    assert "others of its tier wait before it" in reason.reason


def test_without_overtaking_an_earlier_deadline_still_goes_first() -> None:
    play = full(Options(overtaking=False))
    play.arrives("large", sequences=3, slo=Slo(9.0, 0.02))
    play.ended("one#1")
    assert play.arrives("urgent", slo=SHORT) == ["reserve urgent#1 on a: own_tier"]


def test_without_refusal_a_late_one_keeps_its_place_and_is_served_late() -> None:
    play = full(Options(refuses=False))
    play.arrives("late", slo=SHORT)
    play.arrives("later", slo=Slo(0.6, 0.02))
    play.arrives("soon", slo=Slo(3.0, 0.02))
    assert play.wait(1.0) == ["hold late until inf: held", "hold later until inf: held"]
    assert play.dispatcher.counts.refused == 0
    assert play.ended("one#1")[-1] == "reserve late#1 on a: own_tier"
    assert play.ledger("a").residents["late#1"].lost, "it holds nobody back"
    assert play.ended("three#1")[1:] == ["reserve later#1 on a: own_tier", "reserve soon#1 on a: own_tier"]


def test_without_refusal_a_pace_that_nobody_keeps_is_refused_all_the_same() -> None:
    play = full(Options(refuses=False))
    assert play.arrives("hopeless", slo=Slo(0.5, 0.001)) == ["refuse hopeless: deadline_cannot_be_met"]


def test_without_refusal_the_queue_is_bounded_as_ever() -> None:
    play = full(Options(refuses=False, max_held=1))
    play.arrives("x", slo=SHORT)
    assert play.arrives("y", slo=SHORT) == ["refuse y: saturated"]


def test_without_a_pool_backends_are_dealt_and_stay() -> None:
    policy = PolyServe(uses_pool=False)
    play = Play(policy, options=Options(handback_checks=1, handback_period_s=1.0, rebalance_period_s=1e6))
    assert play.add("a") == play.add("b") == []
    assert play.dispatcher.next_wake_s() == 0.0
    assert play.wait(0.0) == ["claim a for fast at 1", "claim b for mid at 1"]
    play.claimed("a", "fast", 2)
    play.claimed("b", "mid", 2)
    assert play.add("c") == []
    assert play.arrives("first", "slow") == ["claim c for slow at 1", "reserve first#1 on b: promoted"]
    assert play.wait(5.0) == [], "empty, but nobody hands it back"
    assert play.arrives("r", "mid") == ["reserve r#1 on b: own_tier"]


def test_the_policys_checks_are_used() -> None:
    hurried = Slo(0.5, 0.02)
    for checks, expected in ((Checks(), "refuse"), (Checks(first_token=False, second_token=False), "reserve")):
        play = Play(PolyServe(checks=checks))
        play.add("a", "fast")
        assert play.arrives("r", prompt_tokens=8000, slo=hurried)[0].startswith(expected)


def test_a_prompt_that_became_too_long_for_all_bars_nobodys_way() -> None:
    play = Play("least_load")
    play.add("long", max_running_seqs=1)
    play.opens("x")
    play.arrives("big", prompt_tokens=3000, slo_stated=False, slo=Slo(0.5, 0.02))
    play.arrives("small", slo_stated=False, slo=Slo(0.5, 0.02))
    play.wait(0.6)
    play.add("short", max_model_tokens=2000)
    assert play.dispatcher.counts.held == 2, "both gave up their promise; the first is too long for the new one"
    play.tell(ev.BackendRemoved("long"))
    assert play.wait(1.1) == ["refuse big: prompt_too_long", "reserve small#1 on short: relegated"]
