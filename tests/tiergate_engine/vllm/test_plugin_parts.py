"""The parts of the vLLM plug-in that need no vLLM: queue, promises, facts, and what is set for a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiergate_engine.control import ControlError, Mode, Orders, StepFact
from tiergate_engine.drive import Rules
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime
from tiergate_engine.vllm.content import step_of
from tiergate_engine.vllm.drift import MOST, NEWS, Drift
from tiergate_engine.vllm.facts import FactsRing
from tiergate_engine.vllm.pilot import Pilot, Situation, Turn
from tiergate_engine.vllm.promises import NO_PROMISE, Due, due_of, next_due_s, promise
from tiergate_engine.vllm.running import by_want
from tiergate_engine.vllm.versions import plain_version
from tiergate_engine.vllm.waiting import DeadlineQueue

STEP_TIME = RooflineStepTime(c0_s=0.005, per_token_s=20e-6, per_seq_s=50e-6)
DRIVEN = Orders(Mode.DRIVEN, STEP_TIME, Rules())


@dataclass(eq=False)
class FakeRequest:
    """A stand-in for vLLM's request, with the attributes that the plug-in reads."""

    request_id: str = "r"
    num_prompt_tokens: int = 100
    num_computed_tokens: int = 0
    outputs: int = 0
    tiergate_due: Due = NO_PROMISE
    priority: int = 0
    arrival_time: float = 0.0
    max_tokens: int = 1000
    num_output_placeholders: int = 0
    is_prefill_chunk: bool = False
    spec_token_ids: list[int] = field(default_factory=list)
    kv_transfer_params: dict[str, object] | None = None
    tiergate_first_s: float = 0.0
    tiergate_pace_s: float = 0.0

    def __post_init__(self) -> None:
        promise(self, self.tiergate_due)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.outputs

    @property
    def num_output_tokens(self) -> int:
        return self.outputs


def decode(due: Due = NO_PROMISE, outputs: int = 1, **more: int) -> FakeRequest:
    """One that runs and wants token `outputs`."""
    computed = 100 + outputs - 1 + more.get("num_output_placeholders", 0)
    return FakeRequest(num_computed_tokens=computed, outputs=outputs, tiergate_due=due, **more)  # type: ignore[arg-type]


def pilot(orders: Orders = DRIVEN) -> Pilot:
    made = Pilot(FactsRing("run"))
    made.order(orders, 0.0)
    return made


def turn_of(
    running: list[FakeRequest], queued: list[FakeRequest], orders: Orders = DRIVEN, free_blocks: int | None = None
) -> Turn:
    situation = Situation(running, [], DeadlineQueue(queued), 2048, 64, free_blocks=free_blocks)
    return pilot(orders).turn(situation, 0.0)


class TestQueue:
    @given(
        st.lists(
            st.tuples(
                st.sampled_from([-1.0, 0.5, 2.0, math.inf]), st.booleans(), st.integers(0, 2), st.integers(0, 3)
            ),
            max_size=12,
        ),
        st.data(),
    )
    def test_it_is_sorted_whatever_comes_and_goes(
        self, wants: list[tuple[float, bool, int, int]], data: st.DataObject
    ) -> None:
        queue = DeadlineQueue()
        inside: list[FakeRequest] = []
        for due_s, relegated, priority, arrival in wants:
            one = FakeRequest(
                tiergate_due=Due(due_s, 0.1, relegated), priority=priority, arrival_time=float(arrival)
            )
            queue.add_request(one)
            inside.append(one)
            if data.draw(st.booleans()):
                gone = data.draw(st.sampled_from(inside))
                queue.remove_requests([gone, FakeRequest()])
                inside.remove(gone)
        inside.sort(
            key=lambda one: (one.tiergate_due.relegated, one.tiergate_due.first_s, one.priority, one.arrival_time)
        )
        assert list(queue) == inside
        assert (len(queue), bool(queue)) == (len(inside), bool(inside))
        assert queue.first(3) == inside[:3]
        while queue:
            assert queue.peek_request() is inside[0]
            assert queue.pop_request() is inside.pop(0)

    def test_what_was_answered_in_part_waits_for_its_next_token(self) -> None:
        preempted = FakeRequest(outputs=10, tiergate_due=Due(1.0, 0.5))
        fresh = FakeRequest(tiergate_due=Due(5.0, 0.5))
        queue = DeadlineQueue([preempted, fresh])
        assert list(queue) == [fresh, preempted]

    def test_who_is_given_up_goes_behind_all(self) -> None:
        first, second, free = FakeRequest(tiergate_due=Due(1.0)), FakeRequest(tiergate_due=Due(2.0)), FakeRequest()
        queue = DeadlineQueue([first, second, free])
        queue.give_up(first)
        assert list(queue) == [second, free, first]
        assert [queue.given_up(one) for one in queue] == [False, False, True]

    def test_nothing_to_take(self) -> None:
        queue = DeadlineQueue()
        with pytest.raises(IndexError):
            queue.pop_request()
        with pytest.raises(IndexError):
            queue.peek_request()
        with pytest.raises(KeyError):
            queue.remove_request(FakeRequest())


class TestPromises:
    def test_no_promise_is_due_never(self) -> None:
        assert due_of(None, 0.0, 5.0) == due_of({"other": 1}, 0.0, 5.0) == NO_PROMISE
        assert next_due_s(FakeRequest()) == next_due_s(FakeRequest(outputs=3)) == math.inf

    def test_the_way_to_the_engine_is_taken_off(self) -> None:
        xargs = {"tiergate_ttft_ms": 500, "tiergate_tpot_ms": 50.0}
        assert due_of(xargs, 0.2, 10.0) == Due(10.3, 0.05)
        assert due_of(xargs, -3.0, 10.0) == Due(10.5, 0.05)  # clocks that disagree
        assert due_of(xargs, 1e6, 100.0) == Due(40.5, 0.05)

    def test_a_promise_of_the_first_token_only(self) -> None:
        due = due_of({"tiergate_ttft_ms": 500}, 0.0, 10.0)
        assert due.token_s(0) == 10.5
        assert due.token_s(1) == math.inf

    def test_relegated_without_a_time(self) -> None:
        assert due_of({"tiergate_relegated": 1}, 0.0, 10.0) == Due(relegated=True)

    @pytest.mark.parametrize("xargs", [{"tiergate_ttft_ms": "soon"}, {"tiergate_tpot_ms": 0}])
    def test_nonsense(self, xargs: dict[str, object]) -> None:
        with pytest.raises(ControlError):
            due_of(xargs, 0.0, 0.0)


class TestFacts:
    def test_the_oldest_are_forgotten_and_numbers_stay(self) -> None:
        ring = FactsRing("run", kept=3)
        assert ring.since(0).facts == ()
        facts = [StepFact(Step.chunk(number + 1), 0.01, 100) for number in range(5)]
        for fact in facts:
            ring.add(fact)
        assert ring.steps == 5
        assert (ring.since(0).first, ring.since(0).facts) == (2, tuple(facts[2:]))
        assert (ring.since(4).first, ring.since(4).facts) == (4, (facts[4],))
        assert (ring.since(9).first, ring.since(9).facts) == (5, ())


@dataclass
class FakeOutput:
    """A stand-in for what vLLM scheduled."""

    num_scheduled_tokens: dict[str, int]
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    total_num_scheduled_tokens: int = 0

    def __post_init__(self) -> None:
        self.total_num_scheduled_tokens = sum(self.num_scheduled_tokens.values())


class TestContent:
    """What a step held, told without a look at each decode where it went as planned."""

    @given(
        st.lists(st.integers(2, 500), max_size=6),
        st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), max_size=3),
        st.integers(0, 3),
    )
    def test_it_is_the_same_as_by_a_look_at_each(
        self, outputs: list[int], prompts: list[tuple[int, int]], fault: int
    ) -> None:
        decodes = [decode(outputs=made) for made in outputs]
        for number, one in enumerate(decodes):
            one.request_id = f"d{number}"
        served = [
            FakeRequest(f"p{number}", 1000, before, is_prefill_chunk=True)
            for number, (_, before) in enumerate(prompts)
        ]
        running = by_want([*decodes, *served], 0.0)
        held = running.held(served)
        scheduled = {one.request_id: 1 for one in decodes}
        scheduled |= {one.request_id: tokens for one, (tokens, _) in zip(served, prompts, strict=True)}
        everybody = {one.request_id: one for one in (*decodes, *served)}
        if fault == 1 and decodes:  # one is preempted
            del scheduled["d0"]
        if fault == 2 and decodes:  # and another prompt is let in instead
            del scheduled["d0"]
            scheduled["new"] = 7
            everybody["new"] = FakeRequest("new", 20)
        if fault == 3 and prompts:  # memory cuts a chunk
            del scheduled["p0"]
        for name, tokens in scheduled.items():
            everybody[name].num_computed_tokens += tokens
        output = FakeOutput(scheduled)
        assert step_of(output, everybody, held) == step_of(output, everybody)


class TestFlights:
    """Asynchronous scheduling plans a step while one runs."""

    def fly(self, flown: Pilot, tokens: int, at_s: float) -> FakeOutput:
        output = FakeOutput({"r": tokens})
        prompt = FakeRequest("r", num_prompt_tokens=5000, num_computed_tokens=tokens)
        flown.scheduled(output, {"r": prompt}, (2048, 0), at_s)
        return output

    def test_a_step_begins_when_those_before_it_have_ended(self) -> None:
        flown = pilot()
        long_s, short_s = STEP_TIME.seconds(Step.chunk(1000)), STEP_TIME.seconds(Step.chunk(100))
        first = self.fly(flown, 1000, 1.0)
        assert flown.free_s(1.001) == pytest.approx(1.0 + long_s)
        self.fly(flown, 100, 1.002)
        assert flown.free_s(1.003) == pytest.approx(1.0 + long_s + short_s)
        flown.came_back(first, 1.02)  # sooner than predicted
        assert flown.free_s(1.02) == pytest.approx(1.02 + short_s)
        assert flown.free_s(2.0) == 2.0

    def test_slack_counts_from_then(self) -> None:
        flown = pilot()
        self.fly(flown, 1000, 0.0)  # 25 ms
        running = [decode(Due(0.05, 0.01))]
        turn = flown.turn(
            Situation(running, [], DeadlineQueue([FakeRequest(num_prompt_tokens=5000)]), 2048, 64), 0.0
        )
        assert turn.budget_tokens == pytest.approx(1 + 1496, abs=2)

    def test_times_are_of_steps_that_overlap(self) -> None:
        flown = pilot()
        first, second = self.fly(flown, 1000, 1.0), self.fly(flown, 100, 1.001)
        flown.came_back(first, 1.03)
        flown.came_back(second, 1.04)
        facts = flown.facts.since(0).facts
        assert [fact.seconds for fact in facts] == pytest.approx([0.03, 0.01])
        assert [fact.step for fact in facts] == [Step.chunk(1000), Step.chunk(100)]

    def test_steps_that_held_nothing_leave_the_others_alone(self) -> None:
        flown = pilot()
        nothing = FakeOutput({})
        flown.scheduled(nothing, {}, (2048, 0), 0.9)
        first = self.fly(flown, 1000, 1.0)
        flown.came_back(nothing, 1.01)
        flown.came_back(first, 1.03)
        assert [fact.step.tokens for fact in flown.facts.since(0).facts] == [1000]


class TestTurns:
    def test_a_static_chunk_stands_on_top_of_the_decodes(self) -> None:
        drafting = decode()
        drafting.spec_token_ids = [1, 2]
        turn = turn_of([decode(), drafting, decode()], [], Orders(chunk_tokens=64))
        assert (turn.budget_tokens, turn.running_cap) == (3 + 2 + 64, 64)

    def test_prompts_stand_behind_decodes(self) -> None:
        prompt = FakeRequest(is_prefill_chunk=True)
        one, other = decode(), decode()
        assert turn_of([one, prompt, other], [], Orders(chunk_tokens=64)).running == [one, other, prompt]

    def test_without_promises_a_driven_engine_takes_all_it_can(self) -> None:
        turn = turn_of([decode()], [FakeRequest(num_prompt_tokens=5000)])
        assert turn.budget_tokens == 2048

    def test_the_least_slack_sizes_the_chunk(self) -> None:
        # token 1 is due at 30 ms: 5 ms + 2 decodes of 70 us leave room for 1,243 tokens
        turn = turn_of([decode(Due(0.02, 0.01)), decode()], [FakeRequest(num_prompt_tokens=5000)])
        assert turn.budget_tokens == pytest.approx(2 + 1243, abs=2)

    def test_a_token_in_flight_is_not_waited_for_again(self) -> None:
        """Asynchronous: token 1 is on its way, so token 2 is the next one."""
        turn = turn_of([decode(Due(0.02, 0.01), num_output_placeholders=1)], [FakeRequest(num_prompt_tokens=5000)])
        assert turn.budget_tokens == pytest.approx(1 + 1746, abs=2)

    def test_one_whose_last_token_is_in_flight_takes_no_part(self) -> None:
        ending = decode(outputs=4, num_output_placeholders=1, max_tokens=5)
        turn = turn_of([ending, decode()], [], Orders(chunk_tokens=10))
        assert turn.budget_tokens == 11
        assert ending in turn.running

    def test_an_urgent_prompt_hides_the_one_that_is_served(self) -> None:
        serving = FakeRequest(num_prompt_tokens=5000, num_computed_tokens=900, is_prefill_chunk=True)
        promise(serving, Due(50.0, 0.1))
        urgent = FakeRequest(num_prompt_tokens=200, tiergate_due=Due(0.1, 0.1))
        turn = turn_of([decode(Due(0.015, 0.01)), serving], [urgent])
        assert turn.left_out == {serving}
        assert turn.budget_tokens == 1 + 200
        assert turn.running_cap == 64 - 1
        assert serving in turn.running

    def test_short_memory_hides_nobody(self) -> None:
        """vLLM has to see whom it may preempt."""
        loose = [decode(Due(5.0, 1.0)) for _ in range(60)]
        tight = decode(Due(0.0, 0.0085))
        assert turn_of([*loose, tight], [], free_blocks=1000).skipped > 0
        short = turn_of([*loose, tight], [], free_blocks=10)
        assert (short.skipped, short.left_out) == (0, frozenset())

    def test_queued_prompts_that_must_be_late_are_passed_by(self) -> None:
        late = FakeRequest("late", num_prompt_tokens=100, tiergate_due=Due(0.001, 0.1))
        good = FakeRequest("good", num_prompt_tokens=100, tiergate_due=Due(1.0, 0.1))
        queue = DeadlineQueue([late, good])
        pilot().turn(Situation([], [], queue, 2048, 64), 0.0)
        assert list(queue) == [good, late]

    def test_a_prompt_that_another_engine_computed_asks_for_one_token(self) -> None:
        tight = decode(Due(0.005, 0.006))  # leaves room for a few tokens
        prompt = FakeRequest(num_prompt_tokens=2000, kv_transfer_params={"do_remote_prefill": True})
        assert turn_of([tight], [prompt]).budget_tokens == 1 + 1

    def test_a_step_is_never_planned_empty(self) -> None:
        turn = turn_of([], [FakeRequest(num_prompt_tokens=100, tiergate_due=Due(1.0, 0.1))])
        assert turn.budget_tokens >= 100
        assert turn_of([decode()], []).budget_tokens >= 1

    def test_orders_lapse(self) -> None:
        flown = pilot(Orders(Mode.DRIVEN, STEP_TIME, lapse_s=2.0))
        assert (flown.mode(1.9), flown.by_deadline(1.9), flown.commands(1.9)) == (Mode.DRIVEN, True, True)
        assert (flown.mode(2.1), flown.by_deadline(2.1), flown.commands(2.1)) == (Mode.STOCK, False, False)

    def test_nobody_spoke(self) -> None:
        flown = Pilot(FactsRing("run"))
        assert (flown.mode(9.0), flown.commands(9.0), flown.watching(9.0)) == (Mode.STOCK, False, False)


class TestCalm:
    """Steps of decodes that all have time need no plan."""

    def flown(self, running: list[FakeRequest], queued: list[FakeRequest], orders: Orders = DRIVEN) -> Pilot:
        made = pilot(orders)
        made.turn(Situation(running, [], DeadlineQueue(queued), 2048, 64), 0.0)
        return made

    def test_until_the_first_has_no_more_time_than_a_step_takes(self) -> None:
        made = self.flown([decode(Due(0.0, 0.05)), decode()], [])  # due at 50 ms; a step takes 5.14 ms
        assert made.nothing_to_weigh(2, 0.04)
        assert made.nothing_to_weigh(1, 0.04)
        assert not made.nothing_to_weigh(2, 0.046)
        assert not made.nothing_to_weigh(3, 0.0)

    @pytest.mark.parametrize(
        ("running", "queued"),
        [([decode()], [FakeRequest()]), ([decode(), FakeRequest(is_prefill_chunk=True)], [])],
        ids=["somebody waits", "a prompt is served"],
    )
    def test_not_where_prompts_are(self, running: list[FakeRequest], queued: list[FakeRequest]) -> None:
        assert not self.flown(running, queued).nothing_to_weigh(len(running), 0.0)

    def test_not_before_a_plan_nor_behind_other_orders(self) -> None:
        assert not pilot().nothing_to_weigh(1, 0.0)
        made = self.flown([decode()], [])
        assert made.nothing_to_weigh(1, 0.0)
        made.order(DRIVEN, 0.0)
        assert not made.nothing_to_weigh(1, 0.0)

    def test_contexts_grow(self) -> None:
        slow = Orders(Mode.DRIVEN, RooflineStepTime(c0_s=0.005, per_kv_s=1e-6), Rules())
        made = self.flown([decode(Due(0.0, 0.0056))], [], slow)  # 5.1 ms with 101 tokens of context
        calm = [made.nothing_to_weigh(1, 0.0) for _ in range(1000)]
        assert calm == sorted(calm, reverse=True)
        assert 490 <= sum(calm) <= 510


class TestDrift:
    def after(self, ratios: list[float]) -> Drift:
        drift = Drift()
        for ratio in ratios:
            drift.note(ratio * 0.01, 0.01)
        return drift

    @given(st.lists(st.floats(0.0, 100.0), max_size=200))
    def test_the_profile_is_the_least_and_one_step_is_not_believed(self, ratios: list[float]) -> None:
        assert 1.0 <= self.after(ratios).factor <= MOST

    @given(st.floats(NEWS, MOST))
    def test_what_lasts_is_believed_as_long_as_it_lasts(self, ratio: float) -> None:
        slow = [ratio] * 100
        assert self.after(slow).factor == pytest.approx(ratio, rel=NEWS - 1.0)
        assert self.after(slow + [0.9] * 100).factor == 1.0

    def test_small_changes_are_no_news(self) -> None:
        drift = self.after([])
        assert not any(drift.note(0.0105, 0.01) for _ in range(100))
        assert [drift.note(0.02, 0.01) for _ in range(10)].count(True) < 7
        assert not drift.note(1.0, 0.0), "nothing was predicted"

    def test_an_engine_that_became_slower_gets_smaller_chunks_until_it_is_told_of(self) -> None:
        def chunk(of: Pilot) -> int:
            tight = decode(Due(1.0, 0.02), outputs=2)
            prompt = FakeRequest("p", 2000)
            queue = DeadlineQueue([prompt])
            return of.turn(Situation([tight], [], queue, 2048, 64), 1.0 - 0.02).budget_tokens

        flown = pilot()
        before = chunk(flown)
        for number in range(50):
            output = FakeOutput({"d": 1})
            flown.scheduled(output, {"d": decode()}, (1, 0), 0.02 * number)
            flown.came_back(output, 0.02 * number + 0.0101)
        assert chunk(flown) < 0.7 * before
        flown.order(DRIVEN, 2.0)
        assert chunk(flown) < 0.7 * before, "the same profile again is no news"
        flown.order(Orders(Mode.DRIVEN, RooflineStepTime(c0_s=0.0101), Rules()), 2.0)
        assert flown._drift.factor == 1.0


def test_a_builds_mark_is_no_other_version() -> None:
    assert plain_version("0.32.0+cpu") == "0.32.0"
