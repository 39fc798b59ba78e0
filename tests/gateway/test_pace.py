"""Step times are learned from clean windows only."""

from __future__ import annotations

from typing import cast

import pytest

from gateway.dispatch import Shell
from gateway.pace import Pace, PrefillSample, StepSample
from gateway.ticket import Stage, Ticket
from scheduling.load import LoadVector
from scheduling.requests import Request
from scheduling.tiers import Slo


class _Learner:
    def __init__(self) -> None:
        self.steps: list[StepSample] = []
        self.prefills: list[PrefillSample] = []

    def learn_step(self, sample: StepSample) -> None:
        self.steps.append(sample)

    def learn_prefill(self, sample: PrefillSample) -> None:
        self.prefills.append(sample)


def _ticket(name: str, pace: Pace, now_s: float) -> Ticket:
    request = Request(name, "m", "chat", Slo(None, None), 100, now_s)
    ticket = Ticket(cast("Shell", None), request)  # the pace never reaches for the shell
    ticket.backend, ticket.lease_id = "b", name
    pace.opening(ticket)
    ticket.stage = Stage.OPENING
    ticket.opened_s = now_s
    return ticket


def _start(ticket: Ticket, pace: Pace, now_s: float) -> None:
    pace.opened(ticket)
    ticket.stage = Stage.RUNNING
    ticket.output_tokens = 1
    ticket.last_bytes_s = ticket.last_token_s = now_s
    pace.first_token(ticket)


def _decode(pace: Pace, tickets: list[Ticket], from_s: float, steps: int, step_s: float) -> float:
    now_s = from_s
    for _ in range(steps):
        now_s += step_s
        for ticket in tickets:
            if ticket.stage is Stage.RUNNING:
                ticket.output_tokens += 1
                ticket.last_token_s = now_s
        pace.look(tickets, now_s)
    return now_s


def test_a_clean_window_gives_the_step_time() -> None:
    pace, learner = Pace(), _Learner()
    pace.learner = learner
    tickets = [_ticket(name, pace, 1.0) for name in "ab"]
    for ticket in tickets:
        _start(ticket, pace, 1.1)
    _decode(pace, tickets, 1.1, 40, 0.02)
    assert len(learner.steps) >= 2
    for sample in learner.steps:
        assert sample.step_s == pytest.approx(0.02)
        assert sample.decode_seqs == 2
        assert sample.steps >= 12


def test_a_prefill_in_the_window_spoils_it() -> None:
    pace, learner = Pace(), _Learner()
    pace.learner = learner
    first = _ticket("a", pace, 1.0)
    _start(first, pace, 1.1)
    now_s = _decode(pace, [first], 1.1, 8, 0.02)
    for index in range(10):  # a newcomer every eight steps, whose prefill makes a step long
        other = _ticket(f"n{index}", pace, now_s)
        now_s = _decode(pace, [first, other], now_s, 1, 0.2)
        _start(other, pace, now_s)
        now_s = _decode(pace, [first, other], now_s, 8, 0.02)
    assert all(sample.step_s == pytest.approx(0.02) for sample in learner.steps)


def test_only_a_prompt_prefilled_alone_teaches_prefill() -> None:
    pace, learner = Pace(), _Learner()
    pace.learner = learner
    one, two = _ticket("a", pace, 1.0), _ticket("b", pace, 1.05)
    _start(one, pace, 1.2)
    _start(two, pace, 1.3)
    assert learner.prefills == []
    three = _ticket("c", pace, 2.0)
    _start(three, pace, 2.5)
    assert [(sample.seconds, sample.prompt_tokens) for sample in learner.prefills] == [(0.5, 100)]


def test_progress_is_per_sequence_and_only_of_what_moved() -> None:
    pace = Pace()
    one, two = _ticket("a", pace, 1.0), _ticket("b", pace, 1.0)
    _start(one, pace, 1.1)
    _start(two, pace, 1.1)
    pace.look([one, two], 1.1)
    one.output_tokens, one.last_token_s = 11, 1.6
    [event] = pace.look([one, two], 1.65)
    assert list(event.progress) == [("a", 11)]
    assert event.step_s == pytest.approx(0.05)
    assert event.last_step_age_s == pytest.approx(0.05)
    assert pace.look([one, two], 1.7) == []


def _other(decodes: int, queued_tokens: int = 0) -> LoadVector:
    return LoadVector(decodes, 1_000 * decodes, queued_tokens)


def _beside_others(pace: Pace) -> tuple[_Learner, Ticket]:
    """A stream on a backend where another replica has seven."""
    learner = _Learner()
    pace.learner = learner
    pace.others("b", _other(7), 0.5)
    ticket = _ticket("a", pace, 1.0)
    _start(ticket, pace, 1.1)
    return learner, ticket


def test_sequences_of_other_replicas_are_in_the_steps_that_are_learned() -> None:
    pace = Pace()
    learner, ticket = _beside_others(pace)
    _decode(pace, [ticket], 1.1, 60, 0.02)
    [prefill] = learner.prefills
    assert (prefill.decode_seqs, prefill.decode_kv_tokens) == (7, 7_000)
    assert learner.steps
    for sample in learner.steps:
        assert sample.step_s == pytest.approx(0.02)
        assert sample.decode_seqs == 8
        assert sample.decode_kv_tokens > 7_000


@pytest.mark.parametrize("told_after", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("news", [_other(7, queued_tokens=500), _other(8)])
def test_a_prompt_of_another_replica_spoils_a_window_even_if_it_is_told_late(
    news: LoadVector, told_after: float
) -> None:
    pace = Pace()
    learner, ticket = _beside_others(pace)
    now_s = _decode(pace, [ticket], 1.1, round(told_after / 0.02), 0.02)
    pace.others("b", news, now_s)
    pace.others("b", _other(8), now_s + 0.01)
    _decode(pace, [ticket], now_s + 0.02, 20, 0.02)
    assert learner.steps == []  # the first that ends behind the news is not settled yet
    _decode(pace, [ticket], now_s + 0.42, 20, 0.02)
    assert {sample.decode_seqs for sample in learner.steps} == {9}


def test_nothing_is_learned_while_another_replica_has_prompts_queued() -> None:
    pace = Pace()
    learner, ticket = _beside_others(pace)
    pace.others("b", _other(8, queued_tokens=5_000), 1.15)
    _decode(pace, [ticket], 1.2, 200, 0.02)
    assert learner.steps == []
    assert learner.prefills == []


def test_a_sequence_of_another_replica_that_ends_spoils_nothing() -> None:
    pace = Pace()
    learner, ticket = _beside_others(pace)
    now_s = _decode(pace, [ticket], 1.1, 10, 0.02)
    pace.others("b", _other(6), now_s)
    _decode(pace, [ticket], now_s, 20, 0.02)
    assert [sample.decode_seqs for sample in learner.steps] == [7]


def test_a_window_that_another_replica_spoilt_is_begun_again_at_once() -> None:
    pace = Pace()
    learner, ticket = _beside_others(pace)
    now_s = _decode(pace, [ticket], 1.1, 8, 0.02)
    pace.others("b", _other(8), now_s)
    _decode(pace, [ticket], now_s, 25, 0.02)  # a whole window, and the time until it is believed
    assert [sample.decode_seqs for sample in learner.steps] == [9]
