"""One trace through both shells: the same decisions in the same order at the same times (design.md, section 3).

The live one is the real gateway in front of emulated engines, over loopback sockets on a stepped clock. Nothing is
learned in either. Takes about fifteen seconds.
"""

from __future__ import annotations

import pytest

import simulator.fleet
from tests.twin.live import live
from tests.twin.simulated import simulated
from tests.twin.witness import Log, first_difference
from tests.twin.world import Outage, trace

TRACE = trace(seed=4, requests=150, rates=(30.0, 10.0, 30.0))
NOT_COMPARED = ("Reserved",)  # the store's word; the simulator has it before the next action, a gateway after


@pytest.fixture(scope="module")
def lived() -> Log:
    """What the gateway did with `polyserve`."""
    return live("polyserve", TRACE)


def assert_same(lived: Log, simulated: Log) -> None:
    """Decisions first, as they are what counts; then everything that the dispatchers were told."""
    assert first_difference(lived.decided, simulated.decided) is None
    assert first_difference(lived.told_but(NOT_COMPARED), simulated.told_but(NOT_COMPARED)) is None


def test_the_gateway_decides_what_the_simulator_says(lived: Log) -> None:
    assert_same(lived, simulated("polyserve", TRACE))


def test_the_trace_stands_on_every_rung(lived: Log) -> None:
    """Else the comparison would say little."""
    outcomes = {decided.outcome.partition(" for ")[0] for decided in lived.decided}
    assert outcomes >= {
        "own_tier",
        "promoted",
        "shared",
        "held",
        "claimed",
        "claim",
        "hand back",
        "refused: saturated",
    }
    assert sum(event.event.startswith("Ended") for event in lived.told) > 100


@pytest.mark.parametrize("policy", ["round_robin", "least_load"])
def test_baselines_too(policy: str) -> None:
    assert_same(live(policy, TRACE), simulated(policy, TRACE))


def test_a_live_run_can_be_repeated() -> None:
    few = TRACE[:40]
    assert live("polyserve", few).told == live("polyserve", few).told


def test_it_is_noticed_when_streams_are_looked_at_less_often(lived: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator.fleet, "PROGRESS_PERIOD_S", 0.06)
    assert first_difference(lived.decided, simulated("polyserve", TRACE).decided) is not None


def test_it_is_noticed_when_the_candidates_come_in_another_order(lived: Log) -> None:
    assert first_difference(lived.decided, simulated("round_robin", TRACE).decided) is not None


@pytest.mark.parametrize("policy", ["polyserve", "least_load"])
def test_a_backend_that_fails_and_returns(policy: str) -> None:
    outage = Outage("b", 3.01, 6.53)
    lived = live(policy, TRACE, outage)
    told = [event.event for event in lived.told]
    assert any(event.startswith("OpenFailed") for event in told)
    assert any(event.endswith("failed") or " failed " in event for event in told)
    assert "BackendChanged b down" in told
    assert told.count("BackendChanged b up") == 2
    assert_same(lived, simulated(policy, TRACE, outage))
