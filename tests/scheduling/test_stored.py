"""What a replica believes the store counts of its load, beside the store itself.

Reservations, releases and publishes travel for as long as they like, answers are refused, late or lost. Where one
way is left in which the store may count, it counts so; else it counts in one of those that are kept, and limits
rest on the least.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduling.load import Cost, Limits, LoadVector, ReserveCandidate
from scheduling.stored import Stored
from state.contract import Denied, Publication
from state.memory import MemoryState

WIDE = Limits(10**9, 10**9, 10**9)
NONE = Limits(0, 0, 0)
Answer = TypeVar("Answer")

costs = st.builds(
    Cost,
    decodes=st.integers(0, 3),
    peak_kv_tokens=st.integers(0, 900),
    prefill_tokens=st.integers(1, 500),
    tier=st.sampled_from(["fast", "slow"]),
    tpot_ms=st.sampled_from([20.0, 50.0]),
)
vectors = st.builds(LoadVector, st.integers(0, 6), st.integers(0, 2000), st.integers(0, 900))


def now(call: Coroutine[object, object, Answer]) -> Answer:
    """The result of a coroutine that never waits, as all of the memory store."""
    try:
        call.send(None)
    except StopIteration as done:
        answer: Answer = done.value
        return answer
    raise AssertionError


@dataclass
class Lease:
    name: str
    cost: Cost
    number: int
    limits: Limits


@dataclass
class Letter:
    """A publish on its way; `answer` is what the store said when it came."""

    publication: Publication
    answer: bool | None = None
    arrived: bool = False


class Believed(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryState(lambda: 0.0).replica("one")
        self.stored = Stored()
        self.names = 0
        self.asked: list[Lease] = []
        self.standing: list[Lease] = []
        self.ending: list[Lease] = []
        self.letter: Letter | None = None
        self.strays: list[Letter] = []  # given up, and perhaps still on their way

    @initialize()
    def begin(self) -> None:
        self.epoch = now(self.store.add_backend("b", "fast")).epoch

    @rule(cost=costs, fits=st.booleans())
    def ask(self, cost: Cost, fits: bool) -> None:
        self.names += 1
        number = self.stored.add(cost)
        self.asked.append(Lease(str(self.names), cost, number, WIDE if fits else NONE))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        lease = self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))
        answer = now(
            self.store.reserve(lease.name, [ReserveCandidate("b", lease.cost, lease.limits, 0.0, self.epoch)])
        )
        if isinstance(answer, Denied):
            self.stored.take(lease.cost, lease.number)
        else:
            self.standing.append(lease)

    @precondition(lambda self: self.standing)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lease = self.standing.pop(data.draw(st.integers(0, len(self.standing) - 1)))
        self.stored.take(lease.cost, lease.number)
        self.ending.append(lease)

    @precondition(lambda self: self.ending)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        now(self.store.release(self.ending.pop(data.draw(st.integers(0, len(self.ending) - 1))).name))

    @precondition(lambda self: not (self.asked or self.ending or self.letter))
    @rule(own=vectors)
    def publish(self, own: LoadVector) -> None:
        sequence = self.store.sequence_of("b")
        if not self.standing:
            own = LoadVector()
        self.stored.begin(own)
        self.letter = Letter(Publication("b", own, sequence + 1))

    @precondition(lambda self: self.letter and not self.letter.arrived)
    @rule()
    def arrive(self) -> None:
        assert self.letter is not None
        self.letter.answer = bool(now(self.store.publish([self.letter.publication])))
        self.letter.arrived = True

    @precondition(lambda self: self.letter and self.letter.arrived)
    @rule()
    def answer(self) -> None:
        assert self.letter is not None
        self.stored.settle(self.letter.answer)
        self.letter = None

    @rule(some=st.lists(costs, min_size=1, max_size=3))
    def come(self, some: list[Cost]) -> None:
        """At once, as most do."""
        for cost in some:
            self.names += 1
            lease = Lease(str(self.names), cost, self.stored.add(cost), WIDE)
            now(self.store.reserve(lease.name, [ReserveCandidate("b", cost, WIDE, 0.0, self.epoch)]))
            self.standing.append(lease)

    @precondition(lambda self: self.standing)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        lease = self.standing.pop(data.draw(st.integers(0, len(self.standing) - 1)))
        self.stored.take(lease.cost, lease.number)
        now(self.store.release(lease.name))

    @precondition(lambda self: not (self.asked or self.ending or self.letter))
    @rule(own=vectors)
    def tell(self, own: LoadVector) -> None:
        self.publish(own)
        assert self.letter is not None
        self.arrive()
        self.answer()

    @precondition(lambda self: self.letter)
    @rule()
    def lose(self) -> None:
        assert self.letter is not None
        self.stored.settle(None)
        if not self.letter.arrived:
            self.strays.append(self.letter)
        self.letter = None

    @precondition(lambda self: self.strays)
    @rule(data=st.data())
    def stray_arrives(self, data: st.DataObject) -> None:
        stray = self.strays.pop(data.draw(st.integers(0, len(self.strays) - 1)))
        # One that is taken though another of ours is known to have been taken since would be a fault of the store.
        taken = now(self.store.publish([stray.publication]))
        assert not (taken and self.stored.certain)

    @invariant()
    def is_right(self) -> None:
        assert self.stored.leases == len(self.asked) + len(self.standing)
        if self.asked or self.ending:
            return
        counted = now(self.store.view())["b"].own
        counts = (counted.decodes, counted.peak_kv_tokens, counted.queued_prefill_tokens)
        believed = (self.stored.decodes, self.stored.kv_tokens, self.stored.prefill_tokens)
        if self.stored.certain:
            assert believed == counts
        else:
            assert all(ours <= theirs for ours, theirs in zip(believed, counts, strict=True)), (believed, counts)

    def teardown(self) -> None:
        """Once everything has been answered, one publish puts an end to all doubt."""
        while self.asked:
            lease = self.asked.pop()
            self.stored.take(lease.cost, lease.number)
            self.ending.append(lease)
        while self.ending:
            now(self.store.release(self.ending.pop().name))
        if self.letter is not None:
            self.stored.settle(None)
        own = LoadVector(1, 2, 3) if self.standing else LoadVector()
        self.stored.begin(own)
        taken = now(self.store.publish([Publication("b", own, self.store.sequence_of("b") + 1)]))
        self.stored.settle(bool(taken))
        assert self.stored.certain
        assert (self.stored.decodes, self.stored.kv_tokens, self.stored.prefill_tokens) == (
            own.decodes,
            own.peak_kv_tokens,
            own.queued_prefill_tokens,
        )


Believed.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBelieved = Believed.TestCase


def test_limits_rest_on_the_least_while_a_publish_is_on_its_way() -> None:
    stored = Stored()
    stored.add(Cost(1, 100, 50, "fast", 20.0))
    stored.begin(LoadVector(1, 90, 0))
    assert (stored.decodes, stored.kv_tokens, stored.prefill_tokens) == (1, 90, 0)
    stored.add(Cost(1, 10, 5, "fast", 20.0))
    stored.settle(taken=False)
    assert (stored.decodes, stored.kv_tokens, stored.prefill_tokens) == (2, 110, 55)


def test_the_tightest_pace_is_that_of_the_leases() -> None:
    stored = Stored()
    first = stored.add(Cost(1, 100, 50, "fast", 20.0))
    stored.add(Cost(1, 100, 50, "slow", 50.0))
    again = stored.add(Cost(1, 100, 50, "fast", 20.0))
    stored.take(Cost(1, 100, 50, "fast", 20.0), first)
    assert stored.tightest_ms == 20.0
    stored.take(Cost(1, 100, 50, "fast", 20.0), again)
    assert stored.tightest_ms == pytest.approx(50.0)
