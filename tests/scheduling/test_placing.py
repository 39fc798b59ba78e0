"""One look over the fleet."""

from __future__ import annotations

import math

from scheduling.backends import BackendState
from scheduling.decisions import Outcome, Verdict
from scheduling.feasible import Ask
from scheduling.ledger import Ledger
from scheduling.load import LoadVector
from scheduling.placing import RECORDED_CANDIDATES, Choice, candidate_for, look, reason_for
from scheduling.policies.protocol import Admission, Stage
from scheduling.requests import Request
from scheduling.tiers import Slo
from tests.scheduling.play import backend, request

EVERY = Admission.EVERY_PROMISE


def ask_for(asked: Request) -> Ask:
    tpot_s = math.inf if asked.slo.tpot_s is None else asked.slo.tpot_s
    return Ask(asked, 50.0, tpot_s, asked.slo.deadline_s(asked.arrival_s, 0))


ASK = ask_for(request("r"))


def stage(*ledgers: Ledger, host_s: float = math.inf, outcome: Outcome = Outcome.OWN_TIER) -> Stage:
    return Stage(outcome, ledgers, host_s)


def busy(name: str) -> Ledger:
    """A backend on which others decode already: one more makes its steps longer than 12.5 ms."""
    ledger = Ledger(backend(name))
    ledger.set_foreign(LoadVector(4, 0, 0), math.inf, 0.0)
    ledger.refresh(0.0)
    return ledger


def test_the_first_that_passes_in_the_order_of_the_stages() -> None:
    slow, good, never = busy("a"), Ledger(backend("b")), Ledger(backend("c"))
    found = look((stage(slow, host_s=0.0125), stage(good, never, outcome=Outcome.PROMOTED)), ASK, EVERY, 0.0)
    assert found.choice is not None
    assert (found.choice.ledger, found.choice.outcome) == (good, Outcome.PROMOTED)
    assert [candidate.verdict for candidate in found.candidates] == [Verdict.STEADY_STATE, Verdict.FEASIBLE]
    assert found.looked_at == 2


def test_a_pace_that_the_engine_misses_even_idle_binds_nobody() -> None:
    idle = Ledger(backend("a"))
    assert look((stage(idle, host_s=0.0109),), ASK, EVERY, 0.0).choice is not None
    assert (
        look((stage(idle, host_s=0.0109),), ask_for(request("r", slo=Slo(9.0, 0.0109))), EVERY, 0.0).choice is None
    )


def test_what_is_not_available_says_so() -> None:
    down = Ledger(backend("a", state=BackendState.DOWN))
    other = Ledger(backend("b", models=frozenset({"n"})))
    failed = Ledger(backend("c"))
    resting = Ledger(backend("d"))
    resting.blocked_until_s = 0.4
    for admission in Admission:
        found = look((stage(down, other, failed, resting),), ASK, admission, 0.3, frozenset({"c"}))
        assert found.choice is None
        assert found.verdicts == {Verdict.UNAVAILABLE: 4}
        assert found.why() == "4 unavailable"
    assert look((stage(resting),), ASK, EVERY, 0.4).choice is not None


def test_a_router_without_tiers_looks_at_the_first_token_and_the_caps_only() -> None:
    ledger = Ledger(backend("a"))
    tight = ask_for(request("r", slo=request("x").slo))
    assert look((stage(ledger, host_s=0.001),), tight, Admission.OWN_FIRST_TOKEN, 0.0).choice is not None
    late = look((stage(ledger),), tight, Admission.OWN_FIRST_TOKEN, 0.49)
    assert late.verdicts == {Verdict.FIRST_TOKEN: 1}


def test_of_many_candidates_the_first_and_the_last_are_recorded_and_all_are_counted() -> None:
    ledgers = [busy(f"b{index:03}") for index in range(100)]
    found = look((stage(*ledgers, host_s=0.0125),), ASK, EVERY, 0.0)
    assert found.looked_at == 100
    assert found.why() == "100 steady_state"
    assert len(found.candidates) == RECORDED_CANDIDATES
    assert (found.candidates[0].backend, found.candidates[-1].backend) == ("b000", "b099")
    assert look((), ASK, EVERY, 0.0).why() == "no backend"


def test_what_the_store_is_asked() -> None:
    ledger = Ledger(backend("a"))
    ledger.epoch = 7
    asked = request("r", prompt_tokens=100, sequences=2, cached_tokens=40)
    ask = ask_for(asked)
    choice = look((stage(ledger, host_s=0.015),), ask, EVERY, 0.0).choice
    assert choice is not None
    candidate = candidate_for(choice, ask)
    assert (candidate.backend, candidate.epoch) == ("a", 7)
    cost = candidate.cost
    assert (cost.decodes, cost.peak_kv_tokens, cost.prefill_tokens, cost.tier, cost.tpot_ms) == (
        2,
        300,
        120,
        "fast",
        20.0,
    )
    assert candidate.tightest_resident_ms == 15.0
    limits = candidate.limits
    assert limits.decodes >= cost.decodes
    assert limits.peak_kv_tokens >= cost.peak_kv_tokens
    assert limits.queued_prefill_tokens >= cost.prefill_tokens


def test_every_placing_outcome_has_its_reason() -> None:
    ledger = Ledger(backend("a"))
    found = look((stage(ledger),), ASK, EVERY, 0.0)
    assert found.choice is not None
    reasons = {
        reason_for(outcome, Choice(ledger, outcome, 0.1, found.choice.judged))
        for outcome in (Outcome.OWN_TIER, Outcome.PROMOTED, Outcome.SHARED, Outcome.RELEGATED, Outcome.ROUTED)
    }
    assert len(reasons) == 5
    assert all("a " in reason for reason in reasons)
