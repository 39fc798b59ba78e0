"""Each verdict alone, and what the limits of a reservation really promise."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import profiles
from scheduling.backends import Backend, EngineLimits
from scheduling.checks import ALL_CHECKS, Checks, KvGrowth
from scheduling.decisions import Verdict
from scheduling.feasible import Ask, _wait_verdict, judge, limits_for, residents_keep_pace
from scheduling.ledger import Ledger
from scheduling.lengths import FixedLength
from scheduling.load import LoadVector
from scheduling.placing import _at_a_glance
from scheduling.predict import Prefill, own_prompt_tokens, walk_prefill
from scheduling.requests import Request
from scheduling.residents import Resident
from scheduling.tiers import Slo
from tests.scheduling.play import backend, cost_of, request
from tiergate_engine.steptime import RooflineStepTime

PROFILE = profiles.load("rtxpro6000-qwen3-32b-bf16")
LENGTHS = FixedLength(50.0)


def ask_for(asked: Request, output_tokens: float = 50.0) -> Ask:
    tpot_s = math.inf if asked.slo.tpot_s is None else asked.slo.tpot_s
    return Ask(asked, output_tokens, tpot_s, asked.slo.deadline_s(asked.arrival_s, 0))


def put(ledger: Ledger, name: str, generated: int = 0, now_s: float = 0.0, **changes: object) -> Resident:
    """A resident; one with tokens decodes."""
    asked = request(name, **changes)  # type: ignore[arg-type]  # a test's shorthand
    one = Resident(name, asked, cost_of(asked), LENGTHS, now_s, guest=False)
    one.expected_first_s = now_s
    ledger.place(one, now_s)
    if generated:
        ledger.first_token(name, now_s)
        one.advance(generated, now_s)
        ledger.refresh(now_s)
    return one


def verdict(ledger: Ledger, asked: Request, host_s: float = math.inf, now_s: float = 0.0) -> Verdict:
    return judge(ledger, ask_for(asked), host_s, now_s).verdict


# --- verdicts ----------------------------------------------------------------------------------------------


def test_feasible_with_every_number() -> None:
    judged = judge(Ledger(backend()), ask_for(request("a")), 0.015, 0.0)
    assert judged.feasible
    assert judged.ttft_s == pytest.approx(0.020)
    assert judged.tpot_s == pytest.approx(0.011)
    assert judged.peak_kv_tokens == 150
    assert judged.pace_s == 0.015, "the tightest of host, newcomer and residents"


def test_steady_state_by_the_host() -> None:
    ledger = Ledger(backend())
    put(ledger, "other", 20, slo=Slo(9.0, 0.5))
    assert verdict(ledger, request("a", "slow"), host_s=0.0125) is Verdict.FEASIBLE
    assert verdict(ledger, request("a", "slow"), host_s=0.0115) is Verdict.STEADY_STATE


def test_steady_state_by_the_newcomer() -> None:
    assert verdict(Ledger(backend()), request("a", slo=Slo(1.0, 0.0109))) is Verdict.STEADY_STATE


def test_steady_state_by_a_resident_who_is_tighter_than_host_and_newcomer() -> None:
    """A backend that was relabelled keeps the pace of those who were there before."""
    ledger = Ledger(backend())
    put(ledger, "tight", 20, slo=Slo(5.0, 0.0115))
    assert verdict(ledger, request("a", "slow"), host_s=0.1) is Verdict.STEADY_STATE


def test_the_margin_counts() -> None:
    assert verdict(Ledger(backend(margin=1.9)), request("a")) is Verdict.STEADY_STATE
    assert verdict(Ledger(backend(margin=1.5)), request("a")) is Verdict.FEASIBLE


def test_steady_state_looks_at_the_kv_peak_not_at_today() -> None:
    step_time = RooflineStepTime(c0_s=0.010, per_kv_s=1e-5)
    ledger = Ledger(backend(step_time=step_time))
    asked = request("a", prompt_tokens=900)
    assert judge(ledger, ask_for(asked, 50), math.inf, 0.0).feasible
    assert judge(ledger, ask_for(asked, 200), math.inf, 0.0).verdict is Verdict.STEADY_STATE


def test_the_steady_state_has_no_prefill_in_it() -> None:
    """A prompt whose chunk takes 200 ms is welcome on a 20 ms backend while nobody is there to be hurt."""
    assert verdict(Ledger(backend()), request("a", prompt_tokens=2000), host_s=0.020) is Verdict.FEASIBLE


def test_memory() -> None:
    ledger = Ledger(backend(kv_tokens=400))
    put(ledger, "x", 20, tier="slow", prompt_tokens=200)
    assert verdict(ledger, request("a", "slow", 120)) is Verdict.FEASIBLE
    assert verdict(ledger, request("a", "slow", 121)) is Verdict.MEMORY


def test_an_idle_backend_takes_what_memory_may_not_hold() -> None:
    """The expected length may be wrong; the engine's own limit decides."""
    assert verdict(Ledger(backend(kv_tokens=100)), request("a", "slow", 90)) is Verdict.FEASIBLE


def test_full() -> None:
    ledger = Ledger(backend(max_running_seqs=2))
    put(ledger, "x", 20, tier="slow")
    assert verdict(ledger, request("a", "slow")) is Verdict.FEASIBLE
    assert verdict(ledger, request("a", "slow", sequences=2)) is Verdict.FULL


def test_more_answers_than_the_engine_runs_go_to_an_idle_one() -> None:
    ledger = Ledger(backend(max_running_seqs=2))
    asked = request("a", "slow", sequences=3)
    ask = ask_for(asked)
    judged = judge(ledger, ask, math.inf, 0.0)
    assert judged.feasible
    assert limits_for(ledger, ask, judged, resident_slack=True).decodes == 3
    put(ledger, "x", 20, tier="slow")
    assert verdict(ledger, asked) is Verdict.FULL


def test_too_long() -> None:
    assert verdict(Ledger(backend(max_model_tokens=100)), request("a", "slow", 100)) is Verdict.TOO_LONG


def test_too_long_with_its_answer() -> None:
    """Engines refuse what may outgrow them, and prompts beyond a limit of their own."""
    ledger = Ledger(backend(max_model_tokens=100, max_prompt_tokens=60))
    asked = request("a", "slow", 50)
    assert judge(ledger, replace(ask_for(asked), answer_tokens=50), math.inf, 0.0).feasible
    assert judge(ledger, replace(ask_for(asked), answer_tokens=51), math.inf, 0.0).verdict is Verdict.TOO_LONG
    assert verdict(ledger, request("a", "slow", 60)) is Verdict.FEASIBLE
    assert verdict(ledger, request("a", "slow", 61)) is Verdict.TOO_LONG


def test_kv_that_is_taken_ahead_counts_as_taken() -> None:
    """50 tokens are expected of each, and 60 taken for each: two leases, or as much as its client allows."""
    grows, takes = (Ledger(backend(kv_tokens=400, lease_tokens=tokens)) for tokens in (None, 30))
    for ledger in (grows, takes):
        put(ledger, "x", 20, tier="slow", prompt_tokens=200)
    assert verdict(grows, request("a", "slow", 120)) is Verdict.FEASIBLE
    assert verdict(takes, request("a", "slow", 81)) is Verdict.MEMORY
    assert verdict(takes, request("a", "slow", 80)) is Verdict.FEASIBLE
    assert verdict(takes, request("a", "slow", 100, max_output_tokens=40)) is Verdict.FEASIBLE
    assert verdict(takes, request("a", "slow", 101, max_output_tokens=40)) is Verdict.MEMORY
    assert takes.own_load().peak_kv_tokens == 260, "other replicas are told what is taken"
    capacity = takes.backend.limits.kv_tokens
    judged = judge(takes, ask_for(request("a", "slow", 80)), math.inf, 0.0)
    limits = limits_for(takes, ask_for(request("a", "slow", 80)), judged, resident_slack=True)
    assert capacity is not None
    assert limits.peak_kv_tokens <= capacity


def test_first_token() -> None:
    ledger = Ledger(backend())
    assert verdict(ledger, request("a", slo=Slo(0.020001, 0.02))) is Verdict.FEASIBLE
    assert verdict(ledger, request("a", slo=Slo(0.0199, 0.02))) is Verdict.FIRST_TOKEN
    asked = request("a", slo=Slo(0.5, 0.02))
    assert verdict(ledger, asked, now_s=0.479) is Verdict.FEASIBLE, "time already waited counts"
    assert verdict(ledger, asked, now_s=0.4811) is Verdict.FIRST_TOKEN


def test_second_token_looks_at_the_step_after_the_first() -> None:
    """Engines that serve prompts in order make this step a decode step, which the steady state bounds already; so
    the check is asked directly, with a slower one."""
    ledger = Ledger(backend())
    ask = ask_for(request("a", slo=Slo(0.5, 0.02)))
    for next_s, expected in ((0.119, Verdict.FEASIBLE), (0.121, Verdict.SECOND_TOKEN)):
        prefill = Prefill(0.1, 0.3, 0.3, 1, 0.3, 1.0, next_s)
        assert _wait_verdict(ledger, ask, prefill, 0.0, ALL_CHECKS) is expected


def test_resident_slack() -> None:
    """200 ms of prompt on a backend whose resident has less than that banked."""
    for generated, expected in ((2, Verdict.RESIDENT_SLACK), (30, Verdict.FEASIBLE)):
        ledger = Ledger(backend())
        put(ledger, "x", generated, now_s=0.45)
        asked = request("a", "slow", 2000, arrival_s=0.45)
        assert verdict(ledger, asked, host_s=0.1, now_s=0.45) is expected, generated


# --- switches ----------------------------------------------------------------------------------------------


def only(**changes: object) -> Checks:
    return replace(ALL_CHECKS, **changes)  # type: ignore[arg-type]  # a test's shorthand


def test_without_the_wait_checks_a_late_one_is_let_in() -> None:
    late = request("a", slo=Slo(0.1, 0.02), prompt_tokens=2000)
    ledger = Ledger(backend())
    assert judge(ledger, ask_for(late), 0.1, 0.0).verdict is Verdict.FIRST_TOKEN
    second = only(first_token=False)
    assert judge(ledger, ask_for(late), 0.1, 0.0, second).verdict is Verdict.SECOND_TOKEN
    assert judge(ledger, ask_for(late), 0.1, 0.0, only(first_token=False, second_token=False)).feasible


def test_without_the_slack_check_a_prompt_may_hurt_a_resident() -> None:
    ledger = Ledger(backend())
    put(ledger, "x", 2, now_s=0.45)
    asked = ask_for(request("a", "slow", 2000, arrival_s=0.45))
    assert judge(ledger, asked, 0.1, 0.45).verdict is Verdict.RESIDENT_SLACK
    assert judge(ledger, asked, 0.1, 0.45, only(resident_slack=False)).feasible


def test_a_driven_engine_needs_no_slack_of_its_residents() -> None:
    ledger = Ledger(backend(dynamic_chunk=True))
    put(ledger, "x", 2, now_s=0.45)
    assert verdict(ledger, request("a", "slow", 500, arrival_s=0.45), host_s=0.1, now_s=0.45) is Verdict.FEASIBLE


def test_a_chunk_has_to_last_on_a_driven_engine() -> None:
    """1000 tokens at 50 ms: 400 tokens a step alone, and the few behind ten thousand of context are fewer."""
    slowing = RooflineStepTime(c0_s=0.010, per_token_s=0.0001, per_seq_s=0.0009, per_kv_s=1e-6)
    ledger = Ledger(backend(dynamic_chunk=True, step_time=slowing))
    for index in range(4):
        put(ledger, f"x{index}", 0, tier="mid", prompt_tokens=4000, slo=Slo(60.0, 0.05))
    ttft_s = walk_prefill(ledger, request("a", prompt_tokens=4000), 0.0, 0.05).service_s
    seen = {
        (factor, kept): judge(
            ledger,
            ask_for(request("a", prompt_tokens=4000, slo=Slo(ttft_s * factor, 0.05))),
            0.05,
            0.0,
            only(chunk_kept=kept),
        ).verdict
        for factor in (1.02, 1.5)
        for kept in (True, False)
    }
    assert seen[1.02, True] is Verdict.CHUNK
    assert seen[1.02, False] is Verdict.FEASIBLE
    assert seen[1.5, True] is seen[1.5, False] is Verdict.FEASIBLE


def test_a_chunk_need_not_last_on_an_idle_engine() -> None:
    """There is none with a lower load, and it serves the prompt in time in chunks that shrink with the context."""
    slowing = RooflineStepTime(c0_s=0.010, per_token_s=0.0001, per_context_s=4e-6)
    ledger = Ledger(backend(dynamic_chunk=True, step_time=slowing))
    alone = walk_prefill(ledger, request("a", prompt_tokens=4000), 0.0, 0.05)
    assert alone.tokens > alone.steps * alone.least_chunk_tokens
    asked = ask_for(request("a", prompt_tokens=4000, slo=Slo(alone.service_s * 1.02, 0.05)))
    assert judge(ledger, asked, 0.05, 0.0, only(chunk_kept=True)).feasible


def test_how_kv_is_taken_to_grow() -> None:
    """Ten residents with 100 tokens each that have 50 to come; the newcomer brings 100 and has 50 to come."""
    ledger = Ledger(backend())
    for index in range(10):
        put(ledger, f"x{index}", 1, tier="slow")
    ask = ask_for(request("a", "slow"))
    peaks = {growth: judge(ledger, ask, 0.1, 0.0, only(kv_growth=growth)).peak_kv_tokens for growth in KvGrowth}
    assert peaks[KvGrowth.CURRENT] == 10 * 101 + 100
    assert peaks[KvGrowth.UPPER] == 10 * 101 + 100 + 11 * 50
    current, peak, upper = peaks[KvGrowth.CURRENT], peaks[KvGrowth.PEAK], peaks[KvGrowth.UPPER]
    assert current is not None
    assert peak is not None
    assert upper is not None
    assert current < peak <= upper


def test_one_without_a_promise_is_hurt_by_nothing() -> None:
    ledger = Ledger(backend())
    put(ledger, "x", 2, tier="best")
    assert verdict(ledger, request("a", "slow", 2000), host_s=0.1) is Verdict.FEASIBLE


def test_nothing_predicted_counts_while_uncalibrated() -> None:
    ledger = Ledger(backend(calibrated=False, max_running_seqs=2, kv_tokens=20_000))
    put(ledger, "x", 2, now_s=0.6)
    late = request("a", slo=Slo(0.001, 0.001), prompt_tokens=5000)
    judged = judge(ledger, ask_for(late), 0.001, 5.0)
    assert judged.feasible
    assert judged.ttft_s is not None
    assert judged.ttft_s > 5.0, "the numbers are told all the same"
    put(ledger, "y", 2, now_s=0.6)
    assert verdict(ledger, late) is Verdict.FULL


# --- residents ---------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.integers(1, 9000),
    st.sampled_from([256, 512, 2048]),
    st.floats(0.3, 0.5),
)
def test_a_placement_that_passes_makes_no_residents_token_late(
    generated: list[int], prompt_tokens: int, chunk_tokens: int, now_s: float
) -> None:
    """The closed form against walking the prompt's steps one by one: each gives every resident one token."""
    ledger = Ledger(backend(max_batched_tokens=chunk_tokens))
    for index, tokens in enumerate(generated):
        put(ledger, f"x{index}", tokens, now_s=now_s)
    walked = walk_prefill(ledger, request("a", "slow", prompt_tokens), now_s, math.inf)
    if not residents_keep_pace(ledger, walked):
        return
    room = chunk_tokens - ledger.decodes
    at_s, left, step = now_s + walked.wait_s, prompt_tokens, 0
    while left > 0:
        chunk = min(room, left)
        at_s += ledger.backend.step_time.seconds_of(chunk, 1, 0, 0.0, ledger.decodes, ledger.decode_kv_tokens)
        left -= chunk
        for one in ledger.residents.values():
            if not one.lost:
                due_s = one.request.slo.deadline_s(0.0, one.generated_tokens + step)
                assert at_s <= due_s + 1e-9
        step += 1


def test_the_tokens_of_a_resident_whose_prompt_is_ahead_stay_on_time() -> None:
    ledger = Ledger(backend(max_batched_tokens=500))
    one = put(ledger, "x", 0, prompt_tokens=100, slo=Slo(0.1, 0.012))
    one.expected_first_s = 0.02
    ledger.refresh(0.0)
    small = walk_prefill(ledger, request("a", prompt_tokens=20), 0.0, 1.0)
    assert residents_keep_pace(ledger, small)
    large = walk_prefill(ledger, request("a", prompt_tokens=4000), 0.0, 1.0)
    assert not residents_keep_pace(ledger, large)


# --- limits ------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**31),
    st.integers(0, 60),
    st.sampled_from([0.06, 0.075, 0.1, 0.15, 0.3]),
    st.sampled_from([1.0, 1.1]),
    st.sampled_from([None, 80_000]),
)
def test_any_load_inside_the_box_keeps_the_steady_pace(
    seed: int, residents: int, host_s: float, margin: float, kv_tokens: int | None
) -> None:
    """Whatever other replicas add within the limits, the steps at the KV peak stay within the pace."""
    rng = Random(seed)
    limits = EngineLimits(256, 2048, kv_tokens, 40_000)
    ledger = Ledger(Backend("a", PROFILE.step_time, limits=limits, margin=margin))
    ledger.set_foreign(LoadVector(rng.randrange(5), rng.randrange(5000), 0), math.inf, 0.0)
    for index in range(residents):
        put(ledger, f"x{index}", rng.randrange(1, 50), slo=Slo(5.0, 1.0), prompt_tokens=rng.randrange(10, 2000))
    asked = request("new", slo=Slo(60.0, 1.0), prompt_tokens=rng.randrange(10, 4000))
    ask = ask_for(asked, rng.randrange(1, 500))
    judged = judge(ledger, ask, host_s, 0.0)
    if not judged.feasible:
        return
    assert judged.peak_kv_tokens is not None
    box = limits_for(ledger, ask, judged, resident_slack=True)
    cost = cost_of(asked, ask.output_tokens)
    base_decodes = ledger.stored.decodes + ledger.foreign.decodes + cost.decodes
    base_kv = ledger.stored.kv_tokens + ledger.foreign.peak_kv_tokens + cost.peak_kv_tokens
    assert base_decodes <= box.decodes, "the placement itself is inside"
    assert base_kv <= box.peak_kv_tokens
    assert ledger.stored.prefill_tokens + cost.prefill_tokens <= box.queued_prefill_tokens
    more = rng.randint(0, box.decodes - base_decodes), rng.randint(0, box.peak_kv_tokens - base_kv)
    seqs, kv = ledger.seqs + 1 + more[0], judged.peak_kv_tokens + more[1]
    assert PROFILE.step_time.decode_seconds(seqs, kv) * margin <= host_s + 1e-9
    if kv_tokens is not None:
        assert kv <= max(kv_tokens, judged.peak_kv_tokens)
    assert seqs <= 256


def test_a_box_is_not_empty_of_room() -> None:
    ledger = Ledger(backend())
    ask = ask_for(request("a"))
    box = limits_for(ledger, ask, judge(ledger, ask, 0.02, 0.0), resident_slack=True)
    assert box.decodes in {9, 10}, "ten decodes take 20 ms"


@given(st.integers(0, 2**31), st.sampled_from([1.0, 1.1]), st.sampled_from([None, 0, 1, 3]))
def test_prompts_that_others_queue_within_the_box_make_no_resident_late(
    seed: int, margin: float, interval: int | None
) -> None:
    """What another replica queued since it told of itself spends the same slack."""
    rng = Random(seed)
    ledger = Ledger(replace(backend(max_batched_tokens=512), margin=margin, prefill_interval=interval))
    for index in range(rng.randrange(1, 5)):
        slo = Slo(rng.uniform(0.02, 0.5), rng.choice([0.02, 0.05, 0.1]))
        put(ledger, f"x{index}", rng.randrange(1, 30), slo=slo, prompt_tokens=10)
    asked = request("new", "slow", prompt_tokens=rng.randrange(10, 2000), slo=Slo(60.0, 0.3))
    ask = ask_for(asked)
    judged = judge(ledger, ask, 0.3, 0.0)
    if not judged.feasible:
        return
    box = limits_for(ledger, ask, judged, resident_slack=True)
    room = box.queued_prefill_tokens - ledger.stored.prefill_tokens - own_prompt_tokens(asked)
    assert room >= 0, "the placement itself is inside"
    ledger.set_foreign(LoadVector(queued_prefill_tokens=rng.randint(0, room)), math.inf, 0.0)
    assert residents_keep_pace(ledger, walk_prefill(ledger, asked, 0.0, 0.3))


def test_without_slack_to_spare_the_box_has_no_room_for_others_prompts() -> None:
    ledger = Ledger(backend(max_batched_tokens=512))
    put(ledger, "tight", 1, slo=Slo(0.08, 0.02), prompt_tokens=10)
    ask = ask_for(request("new", "slow", prompt_tokens=400, slo=Slo(60.0, 0.3)))
    judged = judge(ledger, ask, 0.3, 0.0)
    assert judged.feasible
    kept = limits_for(ledger, ask, judged, resident_slack=True).queued_prefill_tokens
    assert 400 <= kept < 1000
    assert limits_for(ledger, ask, judged, resident_slack=False).queued_prefill_tokens > 10_000


# --- what is seen at a glance ------------------------------------------------------------------------------


checks_of = st.builds(
    Checks, st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(list(KvGrowth))
)


@given(
    st.integers(0, 2**31), st.integers(1, 40), st.sampled_from([512, 2048]), st.sampled_from([1.0, 1.2]), checks_of
)
def test_what_is_hopeless_at_a_glance_is_infeasible_in_full(
    seed: int, residents: int, chunk_tokens: int, margin: float, checks: Checks
) -> None:
    """The shortcuts of a look never turn down what the whole judgement would let in."""
    rng = Random(seed)
    driven = rng.random() < 0.5
    limits = EngineLimits(256, chunk_tokens, rng.choice([None, 20_000, 60_000]), 40_000)
    known = Backend("a", PROFILE.step_time, limits=limits, margin=margin, dynamic_chunk=driven)
    ledger = Ledger(replace(known, prefill_interval=rng.choice([None, 0, 2])))
    for index in range(residents):
        slo = Slo(rng.uniform(0.1, 6.0), rng.choice([0.075, 0.3]))
        put(ledger, f"x{index}", rng.randrange(0, 50), now_s=1.0, slo=slo, prompt_tokens=rng.randrange(10, 3000))
    for index in range(rng.randrange(4)):  # prompts in the queue, whose own promise is no matter here
        slo = Slo(60.0, 0.3)
        put(ledger, f"q{index}", 0, now_s=1.0, slo=slo, prompt_tokens=rng.randrange(10, 3000))
    ledger.set_foreign(LoadVector(0, 0, rng.choice([0, 0, 700])), math.inf, 0.0)
    ledger.refresh(1.0)
    now_s = 1.0 + rng.choice([0.0, 0.02, 0.2, 2.0])
    ttft_s = rng.choice([0.03, 0.1, 0.3, 1.0, 60.0])
    asked = request("new", slo=Slo(ttft_s, 0.3), prompt_tokens=rng.randrange(1, 4000), arrival_s=now_s)
    ask = ask_for(asked, rng.randrange(1, 200))
    host_s = rng.choice([0.06, 0.1, 0.3])
    seen = _at_a_glance(ledger, ask, min(host_s, 0.3), own_prompt_tokens(asked), now_s, checks)
    if seen is not None:
        assert not judge(ledger, ask, host_s, now_s, checks).feasible, seen
