"""Prompts wait for their turn on engines whose chunk cannot be set, where that is switched on."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from profiles import load
from scheduling import events as ev
from scheduling.backends import Backend, EngineLimits
from scheduling.decisions import Verdict
from scheduling.dispatcher import Dispatcher
from scheduling.ledger import Ledger
from scheduling.lengths import FixedLength
from scheduling.load import Cost
from scheduling.options import Options
from scheduling.paced import Pacer
from scheduling.policies import make
from scheduling.requests import Request
from scheduling.residents import Resident
from scheduling.tiers import Slo, Tier, TierSet

_SLO = Slo(2.0, 0.03)
_BACKEND = Backend(
    "e",
    load("h200-llama-3.1-8b-fp8").step_time,
    limits=EngineLimits(max_running_seqs=256, max_batched_tokens=2_048, kv_tokens=400_000),
)


def _request(index: int, tokens: int) -> Request:
    return Request(f"r{index}", "m", "chat", _SLO, prompt_tokens=tokens, arrival_s=0.0)


def _ledger(decodes: int, backend: Backend = _BACKEND) -> Ledger:
    ledger = Ledger(backend)
    for index in range(decodes):
        resident = Resident(
            f"l{index}", _request(index, 500), Cost(1, 600, 500, "chat", 30.0), FixedLength(), 0.0, guest=False
        )
        resident.expected_first_s = 0.1
        ledger.place(resident, 0.0)
        ledger.first_token(f"l{index}", 0.1)
    return ledger


class TestThePacer:
    def test_a_chunk_at_once_and_then_what_the_decodes_can_bear(self) -> None:
        ledger, pacer = _ledger(40), Pacer()
        assert pacer.wait_s(ledger, 0.03, 8_000, 1.0) == 0.0
        pacer.took(ledger, 8_000, 1.0)
        wait_s = pacer.wait_s(ledger, 0.03, 8_000, 1.0)
        assert 0.0 < wait_s < 2.0
        assert pacer.wait_s(ledger, 0.03, 8_000, 1.0 + wait_s + 1e-9) == 0.0

    def test_nobody_waits_without_decodes_or_on_a_driven_engine(self) -> None:
        for ledger in (
            _ledger(0),
            _ledger(40, replace(_BACKEND, dynamic_chunk=True)),
            _ledger(40, replace(_BACKEND, calibrated=False)),
        ):
            pacer = Pacer()
            for _ in range(5):
                assert pacer.wait_s(ledger, 0.03, 8_000, 1.0) == 0.0
                pacer.took(ledger, 8_000, 1.0)


def _decides(options: Options) -> list[ev.Action]:
    """Thirty decode on one backend, and three prompts come at once: what is done about the last."""
    tiers = TierSet((Tier("chat", _SLO, 0), Tier("batch", Slo(None, None), 1)), "chat")
    dispatcher = Dispatcher(tiers, make("polyserve", Random(0)), options)
    dispatcher.handle(ev.BackendChanged(_BACKEND), 0.0)
    dispatcher.handle(ev.MembershipChanged("e", "chat", 1), 0.0)
    actions: list[ev.Action] = []
    asked = [_request(index, 200) for index in range(30)]
    asked += [replace(_request(100 + index, 4_000), slo=Slo(None, None), tier="batch") for index in range(3)]
    for request in asked:
        actions = dispatcher.handle(ev.Arrived(request), 0.0)
        for action in actions:
            if isinstance(action, ev.Reserve):
                dispatcher.handle(ev.Reserved(action.request_id, action.lease_id, "e"), 0.0)
                if request.tier == "chat":
                    dispatcher.handle(ev.FirstToken(action.lease_id), 0.0)
    return actions


def test_a_prompt_is_held_and_its_decision_says_why() -> None:
    (action,) = _decides(Options(paces_prefill=True))
    assert isinstance(action, ev.Hold)
    assert action.decision.candidates[0].verdict is Verdict.PREFILL_PACE
    assert "1 prefill_pace" in action.decision.reason


def test_it_is_off_by_default() -> None:
    assert isinstance(_decides(Options())[0], ev.Reserve)
