"""When waiting cannot help, and when trying again can."""

from __future__ import annotations

import math

import pytest

from scheduling.decisions import RefusalKind, Verdict
from scheduling.feasible import Ask
from scheduling.fleet import Fleet
from scheduling.lengths import FixedLength
from scheduling.placing import Look
from scheduling.policies.polyserve import PolyServe
from scheduling.refusing import at_once, latest_start_s, pace_unreachable, retry_after_s, too_late, too_tight
from scheduling.residents import Resident
from scheduling.tickets import Ticket
from scheduling.tiers import Slo
from tests.scheduling.play import TIERS, backend, cost_of, request
from tiergate_engine.steptime import RooflineStepTime


def fleet_of(**tiers: str | None) -> Fleet:
    fleet = Fleet(TIERS, demand_window_s=30.0)
    for name, tier in tiers.items():
        fleet.put(backend(name, max_model_tokens=2000), 0.0)
        fleet.set_membership(name, tier, 1, 0.0)
    return fleet


def ticket(tier: str = "fast", prompt_tokens: int = 100, slo: Slo | None = None) -> Ticket:
    asked = request("r", tier, prompt_tokens, slo=slo or TIERS[tier].slo)
    tpot_s = math.inf if asked.slo.tpot_s is None else asked.slo.tpot_s
    return Ticket(asked, TIERS[tier], Ask(asked, 50.0, tpot_s, asked.slo.deadline_s(0.0, 0)), FixedLength())


def occupy(fleet: Fleet, name: str, remaining: int) -> None:
    asked = request(f"x-{name}-{remaining}", "slow", 10, expected_output_tokens=remaining)
    one = Resident(asked.request_id, asked, cost_of(asked), FixedLength(50.0), 0.0, guest=False)
    fleet[name].place(one, 0.0)
    fleet.reorder(fleet[name])


def test_at_once() -> None:
    fleet = fleet_of(a="fast")
    assert at_once(ticket(), fleet) is None
    refusal = at_once(ticket(prompt_tokens=2000), fleet)
    assert refusal is not None
    assert (refusal.kind, refusal.retry_after_s) == (RefusalKind.TOO_LONG, None)
    assert "2000 tokens; no backend takes more than 1999" in refusal.message
    fleet.put(backend("b", max_model_tokens=9000), 0.0)
    assert at_once(ticket(prompt_tokens=2000), fleet) is None
    nobody = at_once(ticket(), fleet_of())
    assert nobody is not None
    assert nobody.kind is RefusalKind.NO_BACKEND


def test_latest_start() -> None:
    fleet = fleet_of(a="fast")
    assert latest_start_s(ticket(), fleet, 0.0) == pytest.approx(0.5 - 0.02)
    assert latest_start_s(ticket(prompt_tokens=1900), fleet, 0.0) == pytest.approx(0.5 - 0.2)
    assert latest_start_s(ticket("best"), fleet, 0.0) == math.inf
    fleet.put(backend("a", margin=2.0), 0.0)
    assert latest_start_s(ticket(), fleet, 0.0) == pytest.approx(0.5 - 0.04)
    fleet.put(backend("a", calibrated=False), 0.0)
    assert latest_start_s(ticket(), fleet, 0.0) == 0.5, "nothing is predicted of an uncalibrated one"


def test_residents_do_not_move_the_latest_start() -> None:
    fleet = fleet_of(a="fast")
    before_s = latest_start_s(ticket(), fleet, 0.0)
    occupy(fleet, "a", 40)
    assert latest_start_s(ticket(), fleet, 0.0) == before_s


def test_pace_unreachable() -> None:
    fleet = fleet_of(a="fast")
    assert pace_unreachable(ticket(slo=Slo(1.0, 0.0109)), fleet)
    assert not pace_unreachable(ticket(slo=Slo(1.0, 0.0111)), fleet)
    fleet.put(backend("z", step_time=RooflineStepTime(c0_s=0.005)), 0.0)
    assert not pace_unreachable(ticket(slo=Slo(1.0, 0.0109)), fleet), "a faster one is there"
    fleet.put(backend("y", calibrated=False, step_time=RooflineStepTime(c0_s=0.001)), 0.0)
    assert not pace_unreachable(ticket(slo=Slo(1.0, 0.0005)), fleet), "what an uncalibrated one can is not known"
    assert not pace_unreachable(ticket(), fleet_of())
    assert too_tight(ticket(slo=Slo(1.0, 0.0109))).retry_after_s is None


def test_too_late_says_why() -> None:
    nothing = Look(None, (), 2, {Verdict.FULL: 2})
    at_arrival = too_late(ticket(), nothing, 3.0, now_s=0.0)
    assert (at_arrival.kind, at_arrival.retry_after_s) == (RefusalKind.TOO_LATE, None)
    waited = too_late(ticket(), nothing, 3.0, now_s=0.4)
    assert (waited.kind, waited.retry_after_s) == (RefusalKind.SATURATED, 3.0)
    assert waited.message == "nothing became free within the 500 ms to the first token: 2 full"


def test_retry_after_is_the_first_end_once_for_everybody_before() -> None:
    fleet = fleet_of(a="fast", b="slow")
    occupy(fleet, "a", 40)
    occupy(fleet, "a", 20)
    occupy(fleet, "b", 5)
    step_s = fleet["a"].floor_s
    alone_s = retry_after_s(ticket(), PolyServe(), fleet, 0, 0.0)
    assert alone_s == pytest.approx(20 * step_s), "b is of a looser tier and cannot help"
    assert retry_after_s(ticket(), PolyServe(), fleet, 3, 0.0) == pytest.approx(4 * alone_s)
    assert retry_after_s(ticket(), PolyServe(), fleet_of(b="slow", a="slow", c=None), 0, 0.0) > 0
    assert retry_after_s(ticket(), PolyServe(), fleet_of(), 9, 0.0) == 1.0
