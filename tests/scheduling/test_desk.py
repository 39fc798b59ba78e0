"""Tickets move as they may, and the counts are the truth."""

from __future__ import annotations

import math

import pytest

from scheduling.desk import RELEGATED, Desk
from scheduling.events import EndKind
from scheduling.feasible import Ask
from scheduling.lengths import FixedLength
from scheduling.tickets import Phase, Ticket
from tests.scheduling.play import TIERS, request


def ticket(name: str, tier: str = "fast", until_s: float = math.inf, model: str = "m") -> Ticket:
    asked = request(name, tier, model=model)
    made = Ticket(asked, TIERS[tier], Ask(asked, 50.0, 0.02, 0.5), FixedLength())
    made.until_s = until_s
    return made


def test_the_way_of_a_ticket_and_its_counts() -> None:
    desk = Desk()
    one = ticket("r1", until_s=5.0)
    desk.arrive(one)
    desk.hold(one, 1.0)
    assert desk.counts.held == 1
    assert desk.counts.conserved
    desk.lease(one, "r1#1", "a")
    assert (desk.counts.held, desk.counts.reserving) == (0, 1)
    assert desk.of_lease("r1#1") is one
    desk.opened(one)
    assert desk.unlease(one) == ("r1#1", "a")
    assert desk.unlease(one) is None
    desk.end(one, EndKind.FINISHED)
    assert desk.of_request("r1") is None
    assert (desk.counts.finished, desk.counts.open) == (1, 0)
    assert desk.counts.conserved


@pytest.mark.parametrize("kind", list(EndKind))
def test_every_end_is_counted_where_it_belongs(kind: EndKind) -> None:
    desk = Desk()
    one = ticket("r1")
    desk.arrive(one)
    desk.end(one, kind)
    assert getattr(desk.counts, kind.value) == 1
    assert desk.counts.conserved


def test_illegal_moves_raise() -> None:
    desk = Desk()
    one = ticket("r1")
    desk.arrive(one)
    with pytest.raises(AssertionError, match="arrived twice"):
        desk.arrive(ticket("r1"))
    with pytest.raises(AssertionError, match="new -> open"):
        one.move(Phase.OPEN)
    desk.refuse(one)
    for phase in Phase:
        with pytest.raises(AssertionError, match="done ->"):
            one.move(phase)


def test_the_smallest_key_is_first_whatever_its_kind() -> None:
    desk = Desk()
    keys = {"r1": 3.0, "r2": 1.0, "r3": 2.0}
    made = {name: ticket(name, model="n" if name == "r2" else "m") for name in keys}
    for name, key in keys.items():
        desk.arrive(made[name])
        desk.hold(made[name], key)
    assert desk.head("fast") is made["r2"]
    assert desk.head("fast", {("n", frozenset(), frozenset())}) is made["r3"]
    assert desk.head("fast", {("n", frozenset(), frozenset()), ("m", frozenset(), frozenset())}) is None
    assert desk.head("mid") is None
    desk.end(made["r2"], EndKind.CANCELLED)
    assert desk.head("fast") is made["r3"]
    assert desk.queued("fast") == 2
    assert set(desk.waiting()) == {made["r1"], made["r3"]}


def test_one_that_waits_again_does_not_leave_its_old_place_behind() -> None:
    desk = Desk()
    first, again = ticket("r1"), ticket("r2", until_s=9.0)
    for one in (first, again):
        desk.arrive(one)
    desk.hold(again, 1.0)
    desk.lease(again, "r2#1", "a")
    desk.unlease(again)
    desk.hold(again, 5.0)
    desk.hold(first, 3.0)
    assert desk.head("fast") is first
    assert desk.held(TIERS) == {"fast": 2}


def test_queues_that_nobody_waits_in_are_dropped() -> None:
    desk = Desk()
    for index in range(100):
        one = ticket(f"r{index}", model=f"model-{index}")
        desk.arrive(one)
        desk.hold(one, 1.0)
        desk.end(one, EndKind.CANCELLED)
    assert desk._queues == {"fast": {}}


def test_alarms_ring_once_in_order_and_only_for_those_who_still_wait() -> None:
    desk = Desk()
    made = [ticket(f"r{index}", until_s=until_s) for index, until_s in enumerate([3.0, 1.0, 2.0, math.inf])]
    for one in made:
        desk.arrive(one)
        desk.hold(one, 0.0)
    assert desk.next_alarm_s() == 1.0
    assert desk.due(0.5) == []
    desk.unhold(made[2])
    assert desk.due(1.0) == [made[1]]
    assert desk.due(10.0) == [made[0]]
    assert desk.next_alarm_s() == math.inf


def test_the_relegated_wait_in_a_queue_of_their_own() -> None:
    desk = Desk()
    one = ticket("r1")
    desk.arrive(one)
    desk.hold(one, 0.0)
    desk.unhold(one)
    one.relegated = True
    desk.hold(one, 0.0)
    assert desk.head("fast") is None
    assert desk.head(RELEGATED) is one
    assert desk.held(TIERS) == {"fast": 0, RELEGATED: 1}
