"""Chunks that have steps of their own: predictions and promises against the steps of the fake SGLang's engine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import profiles
from scheduling.backends import Backend, EngineLimits
from scheduling.feasible import residents_keep_pace, slack_room_tokens
from scheduling.ledger import Ledger
from scheduling.lengths import FixedLength
from scheduling.predict import Prefill, expected_tpot_s, first_token_floor_s, walk_prefill
from scheduling.requests import Request
from scheduling.residents import Resident
from scheduling.tiers import Slo
from tests.adapters.fake_sglang import SglangModel
from tests.scheduling.play import STEP_TIME, cost_of, request
from tiergate_engine.model import EngineConfig, SequenceSpec
from tiergate_engine.step import Step, StepTime

PROFILE = profiles.load("rtxpro6000-qwen3-32b-bf16")
LOOSE = Slo(60.0, 1.0)


class Pair:
    """An engine that computes prompts apart from decodes, and a ledger that is told of each of its steps."""

    def __init__(
        self, interval: int, step_time: StepTime = STEP_TIME, chunk: int = 512, margin: float = 1.0
    ) -> None:
        limits = EngineLimits(256, chunk, 400_000, 40_000)
        self.ledger = Ledger(Backend("a", step_time, limits=limits, margin=margin, prefill_interval=interval))
        config = EngineConfig(400_000, 40_000, max_running_seqs=256, max_batched_tokens=chunk)
        self.engine = SglangModel(config, step_time)
        self.engine.interval = interval
        self.now_s = 0.0
        self.ends_s: float | None = None
        self.steps: list[Step] = []
        self.late: list[tuple[str, int, float]] = []  # by how much, whose token
        self._asked: dict[str, Request] = {}

    def ask(self, prompt_tokens: int, slo: Slo = LOOSE) -> Request:
        name = f"r{len(self._asked)}"
        return request(name, prompt_tokens=prompt_tokens, slo=slo, arrival_s=self.now_s)

    def walk(self, asked: Request) -> Prefill:
        return walk_prefill(self.ledger, asked, self.now_s, math.inf)

    def submit(self, asked: Request) -> str:
        resident = Resident(asked.request_id, asked, cost_of(asked), FixedLength(2000.0), self.now_s, guest=False)
        resident.expected_first_s = self.now_s + self.walk(asked).service_s
        self.ledger.place(resident, self.now_s)
        self._asked[asked.request_id] = asked
        self.engine.submit(SequenceSpec(asked.request_id, asked.prompt_tokens, 5000), self.now_s)
        if self.ends_s is None:
            self._begin()
        return asked.request_id

    def _deadline_s(self, name: str, index: int) -> float:
        asked = self._asked[name]
        return asked.slo.deadline_s(asked.arrival_s, index)

    def _begin(self) -> None:
        planned = self.engine.next_step(self.now_s)
        self.ends_s = planned.ends_s if planned else None
        if planned:
            self.steps.append(planned.step)

    def step(self) -> set[str]:
        """To the end of the step in flight; who got a token."""
        assert self.ends_s is not None
        self.now_s = self.ends_s
        emitted = self.engine.finish_step(self.now_s)
        progress = []
        for token in emitted:
            late_s = self.now_s - self._deadline_s(token.sequence_id, token.index)
            if late_s > 1e-9:
                self.late.append((token.sequence_id, token.index, late_s))
            if token.index == 0:
                self.ledger.first_token(token.sequence_id, self.now_s)
            else:
                progress.append((token.sequence_id, token.index + 1))
        if progress:
            self.ledger.progressed(progress, self.now_s)
            self.ledger.last_step_s = self.now_s
        self._begin()
        return {token.sequence_id for token in emitted}

    def until(self, name: str) -> None:
        while name not in self.step():
            pass

    def warm(self, count: int, prompt_tokens: int, slo: Slo = LOOSE, steps: int = 1) -> None:
        """So many decode, and have made `steps` tokens since."""
        names = {self.submit(self.ask(prompt_tokens, slo)) for _ in range(count)}
        while names:
            names -= self.step()
        for _ in range(steps):
            self.step()


@pytest.mark.parametrize("interval", [0, 1, 3])
@pytest.mark.parametrize(
    ("decodes", "prompts"),
    [
        *((decodes, [tokens]) for decodes in (0, 1, 20) for tokens in (10, 400, 1500, 9000)),
        *((decodes, several) for decodes in (1, 20) for several in ([700, 1200], [2000, 2000, 500])),
    ],
)
def test_ttft_is_that_of_the_engine(interval: int, decodes: int, prompts: list[int]) -> None:
    """At a step's end, the last of several that come at once: within 3 % and one step, because whether the step in
    flight has a part of those ahead is not seen from outside."""
    pair = Pair(interval, PROFILE.step_time)
    pair.warm(decodes, 700, steps=5 if decodes else 0)
    begin_s = pair.now_s
    for tokens in prompts:
        asked = pair.ask(tokens)
        predicted_s = pair.walk(asked).service_s
        name = pair.submit(asked)
    assert pair.ends_s is not None
    flight_s = pair.ends_s - begin_s if decodes or len(prompts) > 1 else 0.0
    pair.until(name)
    took_s = pair.now_s - begin_s
    assert abs(predicted_s - took_s) <= 0.03 * took_s + flight_s


def test_the_engine_makes_no_decode_wait_where_chunks_are_said_to_be_apart() -> None:
    """What this file's engine does: chunks and decodes never share a step, and `interval` lie between chunks."""
    for interval in (0, 2):
        pair = Pair(interval)
        pair.warm(2, 10, steps=3)
        first = len(pair.steps)
        pair.until(pair.submit(pair.ask(2_000)))
        assert not [step for step in pair.steps if step.prefill_tokens and step.decode_seqs]
        kinds = "".join("c" if step.prefill_tokens else "d" for step in pair.steps[first:])
        assert kinds.startswith("c" + ("d" * interval + "c") * 3)


@example(1, [(1487, 4), (1024, 0)], (1, 0.1, 0.05), 1, 1024)  # right behind a chunk, with nobody in the queue
@given(
    st.sampled_from([0, 1, 2, 5]),
    st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 6)), min_size=1, max_size=4),
    st.tuples(st.integers(1, 5), st.floats(0.1, 3.0), st.sampled_from([0.02, 0.05, 0.1])),
    st.integers(1, 40),
    st.sampled_from([256, 1024]),
)
def test_prompts_that_are_let_in_make_no_residents_token_late(
    interval: int,
    newcomers: list[tuple[int, int]],
    residents: tuple[int, float, float],
    steps: int,
    chunk: int,
) -> None:
    """Each comes when so many steps are over, mostly in the middle of the prompts before it."""
    count, ttft_s, tpot_s = residents
    pair = Pair(interval, chunk=chunk)
    pair.warm(count, 10, Slo(ttft_s, tpot_s), steps)
    assert not pair.late
    for prompt_tokens, later in newcomers:
        asked = pair.ask(prompt_tokens)
        if residents_keep_pace(pair.ledger, pair.walk(asked)):
            pair.submit(asked)
        for _ in range(later):
            pair.step()
    for _ in range(40 * (interval + 1)):
        pair.step()
    assert not pair.late


@given(st.sampled_from([0, 2]), st.integers(1, 30), st.integers(1, 6000))
def test_the_floor_is_below_what_is_predicted(interval: int, steps: int, prompt_tokens: int) -> None:
    pair = Pair(interval, PROFILE.step_time)
    pair.warm(3, 300, steps=steps)
    pair.submit(pair.ask(1_500))
    asked = pair.ask(prompt_tokens)
    floor_s = first_token_floor_s(pair.ledger, prompt_tokens, pair.now_s)
    assert floor_s <= pair.walk(asked).service_s + 1e-9


def _with_one(interval: int | None, generated: int) -> Ledger:
    """One decodes, with so many tokens at a moment when 20 ms a token would have brought it 25."""
    pair = Pair(0)
    pair.warm(1, 10, Slo(0.5, 0.02), generated)
    pair.ledger.renew(replace(pair.ledger.backend, prefill_interval=interval), pair.now_s)
    return pair.ledger


def test_with_chunks_apart_a_resident_needs_slack_for_the_whole_queue() -> None:
    """2,000 tokens in four chunks: 240 ms with no token, or one token for each chunk."""
    keeps = {}
    for interval in (None, 0, 1):
        ledger = _with_one(interval, 10)
        now_s = ledger.last_step_s or 0.0
        walked = walk_prefill(ledger, request("n", prompt_tokens=9_000, slo=LOOSE), now_s, math.inf)
        keeps[interval] = residents_keep_pace(ledger, walked), walked.steps
    assert keeps[None] == (False, 18)
    assert keeps[0] == (False, 1)
    assert keeps[1][1] == 18
    small = request("n", prompt_tokens=5_000, slo=LOOSE)
    for interval, expected in ((None, True), (0, False), (3, True)):
        ledger = _with_one(interval, 10)
        walked = walk_prefill(ledger, small, ledger.last_step_s or 0.0, math.inf)
        assert residents_keep_pace(ledger, walked) is expected, interval


def test_others_may_queue_less_where_decodes_wait_for_all_of_it() -> None:
    room = {}
    for interval in (None, 0, 5):
        ledger = _with_one(interval, 10)
        asked = request("n", prompt_tokens=500, slo=LOOSE)
        room[interval] = slack_room_tokens(
            ledger, walk_prefill(ledger, asked, ledger.last_step_s or 0.0, math.inf)
        )
    shared, waiting, between = room[None], room[0], room[5]
    assert 0 < waiting < shared
    assert waiting < between


def test_decodes_are_stretched_by_all_of_a_chunks_step() -> None:
    pair = Pair(0)
    pair.warm(4, 10)
    pair.submit(pair.ask(1_000))
    steady_s = STEP_TIME.decode_seconds(5, 2_000)
    chunks_per_s = pair.ledger.prefill_tokens_per_s(pair.now_s) / 512
    expected_s = steady_s / (1.0 - chunks_per_s * STEP_TIME.seconds(Step.chunk(512)))
    assert expected_tpot_s(pair.ledger, steady_s, pair.now_s, math.inf) == pytest.approx(expected_s)
