"""The dispatcher as a playbook: events in, the actions it wants out."""

from __future__ import annotations

import math

import pytest

from scheduling import events as ev
from scheduling.backends import BackendState
from scheduling.decisions import Outcome, RefusalKind, Verdict
from scheduling.load import LoadVector
from scheduling.options import Options
from scheduling.tiers import OnMiss, Slo, Tier, TierSet
from tests.scheduling.play import TIERS, Play, backend, request
from tiergate_engine.steptime import RooflineStepTime

# --- the ladder --------------------------------------------------------------------------------------------


def test_own_tier_first() -> None:
    play = Play()
    play.add("a", "fast")
    play.add("b", "mid")
    assert play.arrives("r1", "mid") == ["reserve r1#1 on b: own_tier"]
    assert play.granted("r1#1") == ["open r1#1 on b"]
    assert play.first("r1#1") == []
    assert play.ended("r1#1") == ["release r1#1 on b"]
    assert play.dispatcher.counts.finished == 1
    assert play.ledger("b").own_load().idle


def test_the_highest_loaded_backend_that_keeps_every_promise_comes_first() -> None:
    play = two_backends()
    leases = []
    for index in range(10):
        leases.append(play.opens(f"s{index}", prompt_tokens=10))
        assert play.log[-2:] == [f"reserve s{index}#1 on a: own_tier", f"open s{index}#1 on a"]
        play.now_s += 0.1
        play.first(leases[-1])
        play.progress(leases)
    # Ten decodes take 20 ms; the eleventh goes next door, and so do those after it.
    assert play.arrives("t1", prompt_tokens=10) == ["reserve t1#1 on b: own_tier"]
    play.ended(leases[0])
    assert play.arrives("t2", prompt_tokens=10) == ["reserve t2#1 on a: own_tier"]


def test_promotion_is_lazy() -> None:
    """A looser request goes to a tighter tier's backend only when its own is full."""
    play = Play()
    play.add("a", "fast")
    play.add("b", "mid", max_running_seqs=1)
    assert play.arrives("r1", "mid") == ["reserve r1#1 on b: own_tier"]
    assert play.arrives("r2", "mid") == ["reserve r2#1 on a: promoted"]
    decision = play.last[0].decision  # type: ignore[union-attr]
    assert [(c.backend, c.verdict) for c in decision.candidates] == [("b", Verdict.FULL), ("a", Verdict.FEASIBLE)]


def test_promotion_goes_to_the_nearest_tier_first() -> None:
    play = Play()
    play.add("a", "fast")
    play.add("b", "mid")
    play.add("c", "slow", max_running_seqs=1)
    play.opens("r1", "slow")
    assert play.arrives("r2", "slow") == ["reserve r2#1 on b: promoted"]


def test_a_guest_obeys_the_hosts_pace() -> None:
    """Ten decodes fill a 20 ms backend for guests too, though each of them would be content with 100 ms."""
    play = Play()
    play.add("a", "fast")
    leases = play.crowd(10, "slow")
    assert len(play.ledger("a").residents) == 10
    assert play.arrives("r1", "slow")[0].startswith("hold r1")
    assert play.last[0].decision.candidates[0].verdict is Verdict.STEADY_STATE  # type: ignore[union-attr]
    play.ended(leases[0])
    assert play.ended(leases[1])[-1] == "reserve r1#1 on a: promoted" or play.ledger("a").seqs == 9


def test_no_demotion() -> None:
    """A tight request never goes to a looser tier's backend while its own tier has one."""
    play = Play()
    play.add("a", "fast", max_running_seqs=1)
    play.add("b", "slow")
    play.opens("r1")
    assert play.arrives("r2")[0].startswith("hold r2")


def test_a_tier_that_begins_to_hold_takes_a_backend_from_the_pool() -> None:
    play = Play()
    play.add("a")
    play.add("b")
    assert play.arrives("r1", "mid") == ["hold r1 until 0.98: claimed", "claim a for mid at 1"]
    assert play.arrives("r2", "mid")[0].startswith("hold r2"), "one claim at a time"
    assert play.claimed("a", "mid", 2) == ["reserve r1#1 on a: own_tier", "reserve r2#1 on a: own_tier"]
    assert play.ledger("a").tier == "mid"


def test_somebody_else_claimed_first() -> None:
    play = Play()
    play.add("a", max_running_seqs=1)
    play.add("b")
    assert play.arrives("r1", "mid")[-1] == "claim a for mid at 1"
    play.foreign("a", decodes=1)
    assert play.tell(ev.ClaimRefused("a", "fast", 2)) == ["claim b for mid at 1"]
    assert play.ledger("a").tier == "fast"
    assert play.claimed("b", "mid", 2) == ["reserve r1#1 on b: own_tier"]


def test_a_lost_claim_may_help_all_the_same() -> None:
    """Another replica took the backend for a tier that this request may use."""
    play = Play()
    play.add("a")
    play.arrives("r1", "mid")
    assert play.tell(ev.ClaimRefused("a", "fast", 2)) == ["reserve r1#1 on a: promoted"]


def test_an_emptied_backend_goes_back_to_the_pool() -> None:
    play = Play(options=Options(handback_period_s=1.0, handback_checks=2))
    play.add("a", "mid")
    lease = play.runs("r1", "mid")
    assert [play.wait(1.0) for _ in range(3)] == [[], [], []], "it is not empty"
    play.ended(lease)
    assert play.wait(1.0) == []
    assert play.wait(1.0) == ["hand back a at 1"]
    assert play.tell(ev.HandedBack("a", 2)) == []
    assert play.ledger("a").tier is None
    assert play.arrives("r2", "slow")[-1] == "claim a for slow at 2"


def test_a_request_between_two_looks_starts_the_count_again() -> None:
    play = Play(options=Options(handback_period_s=1.0, handback_checks=2))
    play.add("a", "mid")
    play.wait(1.0)
    lease = play.runs("r1", "mid")
    play.wait(1.0)
    play.ended(lease)
    assert play.wait(1.0) == []
    assert play.wait(1.0) == ["hand back a at 1"]


def test_a_hand_back_that_the_store_refuses_leaves_the_backend_where_it_is() -> None:
    play = Play(options=Options(handback_period_s=1.0, handback_checks=1))
    play.add("a", "mid")
    assert play.wait(1.0) == ["hand back a at 1"]
    assert play.tell(ev.HandBackRefused("a", "mid", 1)) == []
    assert play.arrives("r1", "mid") == ["reserve r1#1 on a: own_tier"]


def test_a_pinned_backend_is_never_handed_back() -> None:
    play = Play(options=Options(handback_period_s=1.0, handback_checks=1))
    play.add("a", "mid", pinned=True)
    assert [play.wait(1.0) for _ in range(4)] == [[]] * 4


# --- holding and refusing ----------------------------------------------------------------------------------


def full_backend(**changes: object) -> Play:
    """One backend of tier fast that takes one sequence and has it."""
    play = Play(**changes)  # type: ignore[arg-type]
    play.add("a", "fast", max_running_seqs=1)
    play.runs("r0")
    return play


def test_held_until_the_latest_start_then_refused_with_the_time_to_try_again() -> None:
    play = full_backend()
    # An idle backend needs 20 ms for 100 prompt tokens, so the request must start by 0.48.
    assert play.arrives("r1") == ["hold r1 until 0.48: held"]
    assert play.dispatcher.next_wake_s() == pytest.approx(0.48)
    assert play.wait(0.4) == []
    assert play.wait(0.08) == ["refuse r1: saturated"]
    refusal = play.last[0].refusal  # type: ignore[union-attr]
    assert refusal.retry_after_s is not None
    assert 0.1 < refusal.retry_after_s < 2.0, "about fifty steps of 11 ms are left to the resident"
    assert "full" in refusal.message


def test_a_held_request_is_placed_when_room_appears() -> None:
    play = full_backend()
    play.arrives("r1")
    play.now_s = 0.3
    assert play.ended("r0#1") == ["release r0#1 on a", "reserve r1#1 on a: own_tier"]
    assert play.dispatcher.counts.held == 0


def test_held_requests_go_by_deadline() -> None:
    play = full_backend()
    play.arrives("late", slo=Slo(0.9, 0.02))
    play.arrives("soon", slo=Slo(0.4, 0.02))
    play.now_s = 0.1
    assert play.ended("r0#1")[-1] == "reserve soon#1 on a: own_tier"


def test_tight_tiers_are_offered_room_first() -> None:
    play = full_backend()
    play.arrives("loose", "slow")
    play.arrives("tight", "fast")
    assert play.ended("r0#1")[-1] == "reserve tight#1 on a: own_tier"


def test_a_deadline_that_not_even_an_idle_backend_makes_is_refused_at_once() -> None:
    play = Play()
    play.add("a", "fast")
    assert play.arrives("r1", prompt_tokens=10_000) == ["refuse r1: deadline_cannot_be_met"]
    assert play.last[0].refusal.retry_after_s is None  # type: ignore[union-attr]


def test_a_pace_that_not_even_an_idle_backend_keeps_is_refused_at_once() -> None:
    play = Play()
    play.add("a", "fast")
    play.add("b")
    assert play.arrives("r1", slo=Slo(5.0, 0.010)) == ["refuse r1: deadline_cannot_be_met"]
    assert play.last[0].refusal.message == "no backend makes a token every 10 ms, not even when idle"  # type: ignore[union-attr]
    assert play.arrives("r2", slo=Slo(5.0, 0.010), slo_stated=False)[0] == "reserve r2#1 on a: relegated"


def test_the_fastest_backend_decides_what_can_still_be_met() -> None:
    play = Play()
    for name in "abcde":
        play.add(name, "fast", step_time=RooflineStepTime(c0_s=0.4))
    play.add("z", "fast", max_running_seqs=1)
    play.opens("r0", "fast")
    assert play.arrives("r1", "fast") == ["hold r1 until 0.48: held"], "z needs 20 ms; the others cannot at all"


def test_a_request_that_stated_no_slo_is_never_refused_for_it() -> None:
    play = Play()
    play.add("a", "mid")
    assert play.arrives("r1", "mid", 20_000, slo_stated=False) == ["reserve r1#1 on a: relegated"]


def test_an_unstated_request_waits_on_when_its_deadline_passes() -> None:
    play = full_backend()
    play.arrives("r1", slo_stated=False)
    assert play.wait(0.48) == ["hold r1 until inf: held"]
    assert play.dispatcher.held_by_tier()["(relegated)"] == 1
    assert play.ended("r0#1")[-1] == "reserve r1#1 on a: relegated"
    assert play.ledger("a").tightest_tpot_s == math.inf, "a relegated request holds nobody back"
    assert play.ledger("a").own_load().residents == {"(relegated)": 1}, "here or elsewhere"


def test_a_tier_may_relegate_instead_of_refusing() -> None:
    tiers = TierSet((Tier("fast", Slo(0.5, 0.02), 0, OnMiss.RELEGATE),), "fast")
    play = full_backend(tiers=tiers)
    play.arrives("r1")
    assert play.wait(0.48) == ["hold r1 until inf: held"]


def test_best_effort_waits_without_end_and_takes_what_is_left() -> None:
    play = full_backend()
    assert play.arrives("r1", "best") == ["hold r1 until inf: held"]
    assert play.wait(1000.0) == []
    assert play.ended("r0#1")[-1] == "reserve r1#1 on a: promoted"


def test_too_many_held_requests_are_refused() -> None:
    play = full_backend(options=Options(max_held=1))
    play.arrives("r1")
    assert play.arrives("r2") == ["refuse r2: saturated"]


def test_prompt_longer_than_any_backend_takes() -> None:
    play = Play()
    play.add("a", "fast", max_model_tokens=1000)
    assert play.arrives("r1", prompt_tokens=1000) == ["refuse r1: prompt_too_long"]
    play.add("b", "fast")
    assert play.arrives("r2", "best", 1000)[0].startswith("reserve r2#1 on b"), "b's limit is not known"


def test_model_that_nobody_serves() -> None:
    play = Play()
    play.add("a", "fast", models=frozenset({"other"}))
    assert play.arrives("r1") == ["refuse r1: no_backend"]
    assert play.last[0].refusal.retry_after_s == 1.0  # type: ignore[union-attr]


def test_nothing_is_up() -> None:
    play = Play()
    assert play.arrives("r0") == ["refuse r0: no_backend"]
    play.add("a", "fast")
    play.down("a")
    assert play.arrives("r1") == ["refuse r1: no_backend"]


def test_several_answers_count_as_several_sequences() -> None:
    play = Play()
    play.add("a", "fast", max_running_seqs=4)
    play.opens("r1", sequences=3)
    assert play.ledger("a").seqs == 3
    assert play.arrives("r2", sequences=2)[0].startswith("hold r2")
    assert play.arrives("r3", sequences=1)[0] == "reserve r3#1 on a: own_tier"


# --- the store ---------------------------------------------------------------------------------------------


def test_the_store_says_no_twice_then_the_request_is_held() -> None:
    play = Play()
    play.add("a", "fast")
    play.arrives("r1")
    assert play.denied("r1#1") == ["reserve r1#2 on a: own_tier"]
    assert play.denied("r1#2") == ["reserve r1#3 on a: own_tier"]
    assert play.denied("r1#3")[0].startswith("hold r1")
    assert play.ledger("a").residents == {}, "a denied place is not counted"


def test_after_a_no_the_decision_is_made_from_what_the_store_told() -> None:
    play = Play()
    play.add("a", "fast")
    play.add("b", "fast")
    play.arrives("r1")
    name = play.last[0].candidates[0].backend  # type: ignore[union-attr]
    other = "b" if name == "a" else "a"
    assert play.denied("r1#1", **{name: LoadVector(10, 500, 0)}) == [f"reserve r1#2 on {other}: own_tier"]


def test_an_answer_for_a_lease_that_is_no_more_gives_it_back() -> None:
    play = Play()
    play.add("a", "fast")
    play.arrives("r1")
    play.denied("r1#1")
    assert play.granted("r1#1") == ["release r1#1 on a"]


def test_a_second_answer_changes_nothing_for_an_open_stream() -> None:
    play = Play()
    play.add("a", "fast")
    play.opens("r1")
    assert play.granted("r1#1") == []
    assert play.denied("r1#1") == []
    assert play.dispatcher.counts.open == 1
    assert play.ended("r1#1") == ["release r1#1 on a"]


# --- failures and retries ----------------------------------------------------------------------------------


def two_backends() -> Play:
    play = Play()
    play.add("a", "fast")
    play.add("b", "fast")
    return play


def test_a_failed_opening_is_tried_elsewhere() -> None:
    play = two_backends()
    play.opens("r1")
    assert play.failed("r1#1") == ["release r1#1 on a", "reserve r1#2 on b: own_tier"]
    decision = play.last[1].decision  # type: ignore[union-attr]
    assert decision.candidates[0].verdict is Verdict.UNAVAILABLE


def test_a_backend_that_failed_rests() -> None:
    play = two_backends()
    play.opens("r1")
    play.failed("r1#1")
    assert play.arrives("r2") == ["reserve r2#1 on b: own_tier"]
    play.now_s = 0.3
    lease = play.ended("r1#2")
    assert lease == ["release r1#2 on b"]
    play.ended("r2#1")
    assert play.arrives("r3") == ["reserve r3#1 on a: own_tier"]


def test_rests_become_longer_until_it_answers() -> None:
    play = Play()
    play.add("a", "fast")
    rests = []
    for index in range(8):
        play.opens(f"r{index}")
        play.failed(f"r{index}#1")
        rests.append(play.ledger("a").blocked_until_s - play.now_s)
        play.wait(100.0)
    assert rests == pytest.approx([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0])
    play.runs("good")
    play.opens("bad")
    play.failed("bad#1")
    assert play.ledger("a").blocked_until_s - play.now_s == pytest.approx(0.25)


def test_it_is_not_tried_for_ever() -> None:
    play = Play()
    for name in "abcd":
        play.add(name, "fast")
    play.opens("r1")
    play.failed("r1#1")
    play.granted("r1#2")
    play.failed("r1#2")
    play.granted("r1#3")
    assert play.failed("r1#3") == ["release r1#3 on c", "refuse r1: upstream_failed"]
    assert "connection refused" in play.last[1].refusal.message  # type: ignore[union-attr]


def test_no_other_backend_to_try() -> None:
    play = Play()
    play.add("a", "fast")
    play.opens("r1")
    assert play.failed("r1#1") == ["release r1#1 on a", "refuse r1: upstream_failed"]


def test_the_engine_calls_the_request_wrong() -> None:
    play = two_backends()
    play.opens("r1")
    assert play.failed("r1#1", retryable=False) == ["release r1#1 on a"]
    assert play.dispatcher.counts.failed == 1
    assert play.ledger("a").blocked_until_s < 0, "the backend is not to blame"


def test_a_retry_waits_its_turn_when_the_others_are_full() -> None:
    play = two_backends()
    play.change("b", limits=backend(max_running_seqs=1).limits)
    play.opens("r1")
    play.tell(ev.LoadPublished("b", LoadVector(1, 100, 0)))
    assert play.failed("r1#1")[1].startswith("hold r1")
    assert play.foreign("b") == ["reserve r1#2 on b: own_tier"]


def test_held_requests_get_the_backend_after_its_rest() -> None:
    play = Play()
    play.add("a", "fast")
    play.opens("r1")
    play.failed("r1#1")
    assert play.arrives("r2")[0].startswith("hold r2")
    assert play.dispatcher.next_wake_s() == pytest.approx(0.25)
    assert play.wait(0.25) == ["reserve r2#1 on a: own_tier"]


def test_a_pool_backend_is_claimed_after_its_rest() -> None:
    play = Play()
    play.add("a")
    play.arrives("r1", "mid")
    play.claimed("a", "mid", 2)
    play.granted("r1#1")
    play.failed("r1#1")
    play.tell(ev.HandedBack("a", 3))
    assert play.arrives("r2", "mid")[0].startswith("hold r2")
    assert play.wait(0.25) == ["claim a for mid at 3"]


# --- clients that go away ----------------------------------------------------------------------------------


def test_cancel_while_held() -> None:
    play = full_backend()
    play.arrives("r1")
    assert play.cancelled("r1") == []
    assert play.dispatcher.counts.held == 0
    assert play.ended("r0#1") == ["release r0#1 on a"], "nobody waits any more"
    assert play.cancelled("r1") == []


def test_cancel_while_the_store_is_asked_and_it_says_yes() -> None:
    play = Play()
    play.add("a", "fast")
    play.arrives("r1")
    assert play.cancelled("r1") == []
    assert play.granted("r1#1") == ["release r1#1 on a"]
    assert play.dispatcher.counts.cancelled == 1
    assert play.ledger("a").own_load().idle


def test_cancel_while_the_store_is_asked_and_it_says_no() -> None:
    play = Play()
    play.add("a", "fast")
    play.arrives("r1")
    play.cancelled("r1")
    assert play.denied("r1#1") == []
    assert play.dispatcher.counts.cancelled == 1
    assert play.ledger("a").own_load().idle


def test_cancel_while_open() -> None:
    play = Play()
    play.add("a", "fast")
    lease = play.runs("r1")
    assert play.cancelled("r1") == ["release r1#1 on a"]
    assert play.ended(lease) == [], "it has ended already"
    assert play.releases == {lease: 1}
    assert play.dispatcher.counts.cancelled == 1


def test_room_that_a_cancel_makes_is_offered() -> None:
    """Whatever phase the request that goes away is in, those who wait for its place get it."""
    for phase in ("granted after the cancel", "denied after the cancel", "open"):
        play = Play()
        play.add("a", "fast", max_running_seqs=1)
        play.arrives("r0")
        if phase == "open":
            play.granted("r0#1")
        play.arrives("r1", "best")
        lines = play.cancelled("r0")
        if phase == "granted after the cancel":
            lines = play.granted("r0#1")
        elif phase == "denied after the cancel":
            lines = play.denied("r0#1")
        assert lines[-1:] == ["reserve r1#1 on a: promoted"], phase


# --- uncalibrated backends ---------------------------------------------------------------------------------


def test_nothing_is_refused_for_a_predicted_miss_on_an_uncalibrated_backend() -> None:
    play = Play()
    play.add("a", "fast", calibrated=False)
    for index in range(30):
        assert play.arrives(f"r{index}", "fast", 5000) == [f"reserve r{index}#1 on a: own_tier"]
        play.granted(f"r{index}#1")


def test_explicit_caps_hold_on_an_uncalibrated_backend() -> None:
    play = Play()
    play.add("a", "fast", calibrated=False, max_running_seqs=2)
    play.opens("r1")
    play.opens("r2")
    assert play.arrives("r3")[0].startswith("hold r3")


# --- small and fixed fleets --------------------------------------------------------------------------------


def test_a_tier_without_a_backend_lives_with_its_looser_neighbour() -> None:
    play = Play()
    play.add("a", "slow")
    assert play.arrives("r1", "fast") == ["reserve r1#1 on a: shared"]
    # From then on loose requests leave a quarter of the room between an idle step and 20 ms to it.
    assert play.dispatcher.fleet.host_tpot_s(play.ledger("a"), play.now_s) == pytest.approx(0.020 - 0.009 / 4)
    assert play.dispatcher.fleet.host_tpot_s(play.ledger("a"), play.now_s + 31.0) == 0.100


def test_a_tier_in_demand_takes_a_backend_from_the_largest_holder() -> None:
    play = Play()
    for name in "ab":
        play.add(name, "slow", max_running_seqs=1)
        play.opens(f"x{name}", "slow")
    assert play.arrives("r1", "fast") == ["hold r1 until 0.48: claimed", "claim b for fast at 1"]
    assert play.claimed("b", "fast", 2) == []
    lease = next(iter(play.ledger("b").residents))
    assert play.ended(lease)[-1] == "reserve r1#1 on b: own_tier", "residents drained under their own promise"


def test_one_backend_four_tiers_and_constant_loose_load_do_not_starve_a_tight_request() -> None:
    """Forty loose requests come every second; a tight client comes again a second after it was refused."""
    play = Play(options=Options(rebalance_period_s=1e9, handback_period_s=1e9))
    play.add("a", "slow")
    running: dict[str, float] = {}
    seen = tries = most = 0
    for tick in range(400):
        play.now_s = tick * 0.05
        for lease in [lease for lease, until_s in running.items() if until_s <= play.now_s]:
            del running[lease]
            play.ended(lease)
        play.progress(list(running))
        play.tell(ev.TimePassed())
        for index in range(2):
            play.arrives(f"loose{tick}-{index}", "slow", 10)
        if tick >= 60 and tick % 20 == 0:
            tries += 1
            most = most or play.ledger("a").seqs
            play.arrives(f"tight{tries}", "fast", 50)
        while seen < len(play.log):
            if play.log[seen].startswith("reserve"):
                lease = play.log[seen].split()[1]
                play.granted(lease)
                play.first(lease)
                running[lease] = play.now_s + 4.0
            seen += 1
    assert most == 90, "when it first came the backend was full of loose requests"
    served = [line for line in play.log if line.startswith("open tight")]
    refused = [line for line in play.log if line.startswith("refuse tight")]
    assert len(refused) <= 6, "the residents of the time it first came are gone after four seconds"
    assert len(served) >= tries - 6


def test_a_tier_whose_only_backend_is_down_lives_with_its_neighbour() -> None:
    play = Play()
    play.add("a", "fast", pinned=True)
    play.add("b", "slow")
    play.down("a")
    assert play.arrives("r1", "fast") == ["reserve r1#1 on b: shared"]


# --- backends that change ----------------------------------------------------------------------------------


def test_a_draining_backend_finishes_what_it_has() -> None:
    play = Play()
    play.add("a", "fast")
    play.add("b", "fast")
    lease = play.runs("r1")
    play.change("a", state=BackendState.DRAINING)
    assert play.arrives("r2") == ["reserve r2#1 on b: own_tier"]
    assert play.ended(lease) == ["release r1#1 on a"]


def test_a_backend_that_comes_back_takes_those_who_wait() -> None:
    play = Play()
    play.add("a", "fast")
    play.add("b", "fast", max_running_seqs=1)
    play.down("a")
    play.opens("r1")
    assert play.arrives("r2")[0].startswith("hold r2")
    assert play.change("a", state=BackendState.UP) == ["reserve r2#1 on a: own_tier"]


def test_a_backend_is_removed_under_its_residents() -> None:
    play = Play()
    play.add("a", "fast")
    lease = play.runs("r1")
    play.arrives("r2")
    assert play.tell(ev.BackendRemoved("a")) == []
    assert play.granted("r2#1") == ["open r2#1 on a"], "the shell will find out"
    assert play.failed("r2#1") == ["release r2#1 on a", "refuse r2: upstream_failed"]
    assert play.ended(lease, ev.EndKind.FAILED) == ["release r1#1 on a"]


def test_a_backend_is_removed_while_it_is_claimed() -> None:
    play = Play()
    play.add("a")
    play.add("b")
    assert play.arrives("r1", "mid")[-1] == "claim a for mid at 1"
    assert play.tell(ev.BackendRemoved("a")) == ["claim b for mid at 1"]
    assert play.tell(ev.ClaimRefused("a", None, 0)) == []


def test_a_claim_that_is_refused_without_a_reason_is_not_asked_again_at_once() -> None:
    """A store that lost the backend answers "pool, epoch 0" for ever; asking in a circle would never end."""
    play = Play()
    play.add("a")
    assert play.arrives("r1", "mid")[-1] == "claim a for mid at 1"
    assert play.tell(ev.ClaimRefused("a", None, 0)) == []
    assert play.wait(0.25) == ["claim a for mid at 1"]


def test_a_new_profile_moves_no_resident_but_closes_the_door() -> None:
    play = Play()
    play.add("a", "fast")
    play.add("b", "fast")
    play.runs("r1")
    play.change("a", margin=1.9)
    assert play.arrives("r2") == ["reserve r2#1 on b: own_tier"]


def test_load_that_other_replicas_queue_counts_before_any_of_ours() -> None:
    play = Play()
    play.add("a", "fast")
    play.foreign("a", decodes=1, kv=3000, queued=3000)
    assert play.arrives("r1", "slow", 100) == ["reserve r1#1 on a: promoted"]
    predicted_s = play.last[0].decision.candidates[0].ttft_s  # type: ignore[union-attr]
    assert predicted_s is not None
    assert 0.3 < predicted_s < 0.5, "3000 tokens at 0.1 ms are ahead"


# --- tiers that change -------------------------------------------------------------------------------------


def test_held_requests_of_a_tier_that_is_gone_wait_as_the_default_tiers() -> None:
    play = Play()
    play.add("a", "fast", max_running_seqs=1)
    play.opens("r0")
    play.arrives("r1", "slow")
    tiers = TierSet((TIERS["fast"], TIERS["mid"]), "mid")
    assert play.tell(ev.TiersChanged(tiers))[0].startswith("hold r1")
    assert play.dispatcher.held_by_tier() == {"fast": 0, "mid": 1} or play.dispatcher.held_by_tier() == {"mid": 1}
    assert play.ended("r0#1")[-1] == "reserve r1#1 on a: promoted"


def test_held_requests_follow_their_tier_to_its_new_rank() -> None:
    play = Play()
    play.add("a", "fast", max_running_seqs=1)
    play.add("b", "slow")
    play.opens("r0")
    assert play.arrives("r1", "fast")[0].startswith("hold r1")
    tighter = Tier("voice", Slo(0.2, 0.015), 0)
    tiers = TierSet((tighter, Tier("fast", Slo(0.5, 0.02), 1), Tier("slow", Slo(2.0, 0.1), 2)), "slow")
    assert play.tell(ev.TiersChanged(tiers)) == []
    assert play.ended("r0#1")[-1] == "reserve r1#1 on a: own_tier"


def test_a_request_of_a_tier_that_has_just_gone_is_taken_as_the_default_tiers() -> None:
    play = Play()
    play.add("a", "mid")
    assert play.arrives("r1", "gone", slo=Slo(1.0, 0.05)) == ["reserve r1#1 on a: own_tier"]


# --- several models ----------------------------------------------------------------------------------------


def test_a_held_request_does_not_bar_the_way_for_another_model() -> None:
    play = Play()
    play.add("a", "fast", max_running_seqs=1, models=frozenset({"m"}))
    play.add("b", "fast", max_running_seqs=1, models=frozenset({"n"}))
    play.opens("m0", model="m")
    play.opens("n0", model="n")
    play.arrives("m1", model="m")
    play.arrives("n1", model="n")
    assert play.ended("n0#1")[-1] == "reserve n1#1 on b: own_tier"


# --- baselines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["round_robin", "random", "least_load", "minimal", "lmetric"])
def test_baselines_look_at_no_tier_and_claim_nothing(policy: str) -> None:
    play = Play(policy)
    play.add("a")
    play.add("b")
    places = []
    for index in range(4):
        lines = play.arrives(f"r{index}", "mid")
        assert lines[0].endswith(": routed")
        places.append(lines[0].split()[3])
        play.granted(f"r{index}#1")
    if policy != "random":
        assert sorted(places) == ["a:", "a:", "b:", "b:"]
    assert play.dispatcher.next_wake_s() is None


def test_baselines_hold_and_refuse_by_the_same_rule() -> None:
    play = Play("round_robin")
    play.add("a", max_running_seqs=1)
    play.runs("r0")
    assert play.arrives("r1") == ["hold r1 until 0.48: held"]
    assert play.wait(0.48) == ["refuse r1: saturated"]


# --- what is told ------------------------------------------------------------------------------------------


def test_a_decision_names_its_candidates_and_their_numbers() -> None:
    play = two_backends()
    play.arrives("r1")
    decision = play.last[0].decision  # type: ignore[union-attr]
    assert decision.outcome is Outcome.OWN_TIER
    assert decision.backend == "a"
    assert decision.looked_at == 1
    (candidate,) = decision.candidates
    assert candidate.ttft_s == pytest.approx(0.020)
    assert candidate.tpot_s == pytest.approx(0.011)
    assert candidate.peak_kv_tokens == 150
    assert "highest-loaded" in decision.reason


def test_priority_is_the_time_left_to_the_first_token() -> None:
    play = Play()
    play.add("a", "fast")
    play.arrives("r1", arrival_s=-0.1)
    play.granted("r1#1")
    assert play.last[0].priority == pytest.approx(0.4)  # type: ignore[union-attr]


def test_the_refusal_kinds_are_what_the_shell_maps() -> None:
    assert {kind.value for kind in RefusalKind} == {
        "deadline_cannot_be_met",
        "saturated",
        "prompt_too_long",
        "no_backend",
        "upstream_failed",
    }


def test_a_request_arrives_once() -> None:
    play = Play()
    play.add("a", "fast")
    play.arrives("r1")
    with pytest.raises(AssertionError, match="arrived twice"):
        play.tell(ev.Arrived(request("r1")))


# --- no wait is without end --------------------------------------------------------------------------------


def test_a_store_that_refuses_for_ever_ends_in_a_refusal_at_the_deadline() -> None:
    play = Play()
    play.add("a", "fast")
    lines = play.arrives("r1")
    for _ in range(100):
        if lines and lines[0].startswith("reserve"):
            lines = play.denied(lines[0].split()[1])
        elif lines and lines[0].startswith("refuse"):
            break
        else:
            wake_s = play.dispatcher.next_wake_s()
            assert wake_s is not None
            assert wake_s >= play.now_s
            lines = play.tell(ev.TimePassed(), wake_s)
    assert lines == ["refuse r1: saturated"]
    assert 0.4 < play.now_s < 0.6


def test_a_request_without_a_deadline_is_tried_again_though_nothing_is_heard() -> None:
    """The store did not answer three times; the fleet is idle, so no event will ever come from it."""
    play = Play()
    play.add("a", "best")
    play.arrives("r1", "best")
    for attempt in (1, 2, 3):
        lines = play.denied(f"r1#{attempt}")
    assert lines[0].startswith("hold r1")
    assert play.dispatcher.next_wake_s() == pytest.approx(1.0)
    assert play.wait(1.0) == ["reserve r1#4 on a: own_tier"]


def test_store_refusals_are_no_failures_of_a_backend() -> None:
    play = two_backends()
    play.arrives("r1")
    play.denied("r1#1")
    play.denied("r1#2")
    play.granted("r1#3")
    assert play.failed("r1#3") == ["release r1#3 on a", "reserve r1#4 on b: own_tier"]


def test_a_retry_whose_other_backends_are_gone_is_refused() -> None:
    play = two_backends()
    play.change("b", limits=backend(max_running_seqs=1).limits)
    play.foreign("b", decodes=1)
    play.opens("r1", "best")
    play.failed("r1#1")
    assert play.dispatcher.counts.held == 1
    play.tell(ev.BackendRemoved("b"))
    assert play.wait(1.0) == ["refuse r1: upstream_failed"]
    assert "the last: connection refused" in play.last[0].refusal.message  # type: ignore[union-attr]


@pytest.mark.parametrize("home", [None, "fast", "mid", "slow", "best"])
def test_a_request_that_states_no_pace_is_served_by_engines_slower_than_its_tier(home: str | None) -> None:
    """Its tier's pace is out of reach, and so is that of the backend's own: neither may keep it waiting."""
    play = Play()
    play.add("a", home, step_time=RooflineStepTime(c0_s=0.065, per_token_s=0.0001, per_seq_s=0.0009))
    said = play.arrives("r1", "mid", slo_stated=False)
    if home is None:
        assert said[-1].startswith("claim a for mid")
        said = play.claimed("a", "mid", 2)
    assert any(line.startswith("reserve r1#1 on a: relegated") for line in said), said
