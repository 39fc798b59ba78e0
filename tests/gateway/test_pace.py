"""Step times are learned from clean windows only."""

from __future__ import annotations

from typing import cast

import pytest

from gateway.dispatch import Shell
from gateway.pace import Pace, PrefillSample, StepSample
from gateway.ticket import Stage, Ticket
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
