"""The controller keeps paces by the profile, does not flap, and goes down its ladder."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles import load
from scheduling.backends import Backend, EngineLimits
from scheduling.control import Controller, chunk_budget, longest_queued, most_running, must_speak
from scheduling.knobs import ControlOptions, Knob, Means, Rung
from scheduling.ledger import Ledger
from scheduling.lengths import FixedLength
from scheduling.load import Cost
from scheduling.requests import Request
from scheduling.residents import Resident
from scheduling.tiers import Slo, Tier, TierSet
from tiergate_engine.control import EngineState, Mode, Orders, SchedulerKind
from tiergate_engine.step import Step
from tiergate_engine.steptime import ScaledStepTime

_OPTIONS = ControlOptions()
_STEP_TIME = load("h200-llama-3.1-8b-fp8").step_time
_LIMITS = EngineLimits(max_running_seqs=256, max_batched_tokens=4_096, kv_tokens=400_000)
_FAST, _CHAT = Tier("fast", Slo(0.5, 0.02), 0), Tier("chat", Slo(1.0, 0.05), 1)
_TIERS = TierSet((_FAST, _CHAT, Tier("batch", Slo(None, None), 2)), "chat")
_ORDERS = Means(orders=True, chunk_budget=True, running_cap=True)


def _ledger(
    decodes: int = 0, queued: int = 0, *, tokens: int = 1_000, tpot_s: float = 0.05, **more: object
) -> Ledger:
    known: dict[str, object] = {"name": "e", "step_time": _STEP_TIME, "limits": _LIMITS, "margin": 1.1}
    ledger = Ledger(Backend(**(known | more)))  # type: ignore[arg-type]  # fields by name, as the tests vary them
    for index in range(decodes + queued):
        request = Request(
            request_id=f"r{index}",
            tenant="t",
            model="m",
            tier="chat",
            slo=Slo(10.0, tpot_s),
            arrival_s=0.0,
            prompt_tokens=tokens,
        )
        cost = Cost(1, tokens + 100, tokens, "chat", tpot_s * 1e3)
        resident = Resident(f"l{index}", request, cost, FixedLength(), 0.0, guest=False)
        resident.expected_first_s = 0.1
        ledger.place(resident, 0.0)
        if index < decodes:
            ledger.first_token(f"l{index}", 0.1)
    return ledger


class TestTheChunkBudget:
    @settings(max_examples=40)
    @given(
        decodes=st.integers(0, 60),
        queued=st.integers(0, 3),
        tokens=st.integers(1, 6_000),
        pace_s=st.floats(0.005, 0.2),
        margin=st.floats(1.0, 1.5),
    )
    def test_it_keeps_the_pace_by_the_profile(
        self, decodes: int, queued: int, tokens: int, pace_s: float, margin: float
    ) -> None:
        ledger = _ledger(decodes, queued, tokens=tokens, margin=margin)
        chunk = chunk_budget(ledger, pace_s, _OPTIONS)
        at_most = _LIMITS.max_batched_tokens or 0
        tokens = at_most - max(decodes, 1) if chunk == math.inf else int(chunk)
        base = Step.decode(max(ledger.decodes, 1), max(ledger.decode_kv_tokens, 1))
        with_chunk = base + Step.chunk(tokens, longest_queued(ledger))
        assert tokens >= _OPTIONS.floor_tokens
        if chunk > _OPTIONS.floor_tokens:
            assert _STEP_TIME.seconds(with_chunk) * margin <= pace_s + 1e-9

    def test_it_is_near_the_largest(self) -> None:
        ledger = _ledger(20)
        chunk = chunk_budget(ledger, 0.03, _OPTIONS)
        base = Step.decode(ledger.decodes, ledger.decode_kv_tokens)
        best = _STEP_TIME.chunk_tokens(base, 0.03 / 1.1, 0, 4_000)
        assert 0.85 * best <= chunk <= best

    def test_a_chunk_in_a_step_of_its_own_leaves_time_for_the_decodes_step(self) -> None:
        ledger = _ledger(20)
        chunk = chunk_budget(ledger, 0.03, _OPTIONS, alone=True)
        decode_s = _STEP_TIME.decode_seconds(ledger.decodes, ledger.decode_kv_tokens)
        assert (_STEP_TIME.seconds(Step.chunk(int(chunk))) + decode_s) * 1.1 <= 0.03

    def test_an_engine_with_chunks_apart_is_always_told_one(self) -> None:
        """Only with a budget set are there steps of decodes between its chunks."""
        assert chunk_budget(_ledger(20), 10.0, _OPTIONS, alone=True) == _LIMITS.max_batched_tokens
        assert chunk_budget(_ledger(20), math.inf, _OPTIONS, alone=True) == math.inf

    def test_an_engine_whose_own_budget_keeps_the_pace_keeps_it(self) -> None:
        assert chunk_budget(_ledger(1), 10.0, _OPTIONS) == math.inf
        assert chunk_budget(_ledger(1), math.inf, _OPTIONS) == math.inf


@settings(max_examples=40)
@given(seqs=st.integers(0, 60), pace_s=st.floats(0.005, 0.2), kv=st.integers(10, 20_000))
def test_the_running_cap_keeps_the_pace(seqs: int, pace_s: float, kv: int) -> None:
    ledger = _ledger(seqs, tokens=kv)
    most = most_running(ledger, pace_s, _OPTIONS)
    each = ledger.peak_kv_tokens / ledger.seqs if seqs else _OPTIONS.kv_each_tokens
    count = 256 if most == math.inf else int(most)
    assert count >= 1
    if count > 1:
        assert _STEP_TIME.decode_seconds(count, count * each) * 1.1 <= pace_s + 1e-9


class TestAKnob:
    @given(st.lists(st.floats(100.0, 120.0), min_size=1, max_size=200))
    def test_noise_never_raises_it(self, wanted: list[float]) -> None:
        knob = Knob()
        values = [knob.follow(one, index * 0.5, _OPTIONS) for index, one in enumerate(wanted)]
        assert values == sorted(values, reverse=True)
        assert all(value <= one for value, one in zip(values, wanted, strict=True))

    @given(st.lists(st.one_of(st.floats(1.0, 1e4), st.just(math.inf)), min_size=1, max_size=200))
    def test_it_is_never_above_what_is_wanted_and_raised_seldom(self, wanted: list[float]) -> None:
        knob = Knob()
        raised_s = -math.inf
        before = math.inf
        for index, one in enumerate(wanted):
            now_s = index * 0.5
            value = knob.follow(one, now_s, _OPTIONS)
            assert value <= one
            if value > before:
                assert now_s - raised_s >= _OPTIONS.raise_after_s
                assert value >= before * (1.0 + _OPTIONS.raise_step)
                raised_s = now_s
            before = value

    def test_lowered_at_once_and_raised_when_it_has_stood(self) -> None:
        knob = Knob()
        assert knob.follow(100.0, 0.0, _OPTIONS) == 100.0
        assert [knob.follow(200.0, now_s, _OPTIONS) for now_s in (1.0, 2.0, 3.9)] == [100.0] * 3
        assert knob.follow(180.0, 4.0, _OPTIONS) == 180.0
        assert knob.follow(50.0, 4.1, _OPTIONS) == 50.0


class TestTheLadder:
    @pytest.mark.parametrize(
        ("means", "rung"),
        [
            (_ORDERS, Rung.DRIVEN),
            (replace(_ORDERS, orders=False), Rung.CHUNK_BUDGET),
            (Means(running_cap=True), Rung.RUNNING_CAP),
            (Means(admission=True), Rung.PREFILL_PACING),
            (Means(), Rung.UNSET),
        ],
    )
    def test_each_backend_gets_the_strongest_that_it_takes(self, means: Means, rung: Rung) -> None:
        setting = Controller().decide(_ledger(20), means, 0.05, _TIERS, 0.0)
        assert setting.rung is rung
        assert setting.reason

    def test_a_cap_where_the_decodes_alone_leave_no_time(self) -> None:
        setting = Controller().decide(_ledger(250, tokens=1_500), Means(admission=True), 0.02, _TIERS, 0.0)
        assert setting.rung is Rung.CONCURRENCY_CAP
        assert 1 <= (setting.concurrency or 0) < 250

    def test_a_looser_tier_where_not_even_one_decode_keeps_the_pace(self) -> None:
        slow = ScaledStepTime(_STEP_TIME, 8.0, 8.0)
        setting = Controller().decide(_ledger(step_time=slow), Means(chunk_budget=True), 0.02, _TIERS, 0.0)
        assert (setting.rung, setting.tier) == (Rung.LOOSER_TIER, "chat")

    def test_nothing_is_set_by_step_times_that_nobody_knows(self) -> None:
        setting = Controller().decide(_ledger(5, calibrated=False), _ORDERS, 0.05, _TIERS, 0.0)
        assert setting.rung is Rung.UNSET

    def test_an_engine_that_takes_no_orders_any_more_is_set_from_outside(self) -> None:
        controller = Controller()
        ledger = _ledger(30)
        assert controller.decide(ledger, _ORDERS, 0.05, _TIERS, 0.0).orders(1.0).mode is Mode.DRIVEN
        setting = controller.decide(ledger, replace(_ORDERS, orders=False), 0.02, _TIERS, 0.5)
        orders = setting.orders(1.0)
        assert (orders.mode, orders.chunk_tokens, orders.lapse_s) == (Mode.STOCK, setting.chunk_tokens, 1.0)
        assert [one.rung for one in controller.decisions("e")] == [Rung.DRIVEN, Rung.CHUNK_BUDGET]


class TestDecisions:
    def test_the_same_as_long_as_nothing_changes(self) -> None:
        controller = Controller()
        ledger = _ledger(10)
        first = controller.decide(ledger, Means(chunk_budget=True), 0.03, _TIERS, 0.0)
        assert controller.decide(ledger, Means(chunk_budget=True), 0.03, _TIERS, 0.5) is first
        assert controller.decisions("e") == (first,)
        controller.forget("e")
        assert controller.decisions("e") == ()

    def test_the_tightest_on_board_decides(self) -> None:
        loose = Controller().decide(_ledger(10), Means(chunk_budget=True), 0.05, _TIERS, 0.0)
        tight = Controller().decide(_ledger(10, tpot_s=0.02), Means(chunk_budget=True), 0.05, _TIERS, 0.0)
        assert (tight.chunk_tokens or 0) < (loose.chunk_tokens or 0)

    def test_a_profile_is_told_anew_when_steps_got_slower_and_later_when_faster(self) -> None:
        controller = Controller()
        ledger = _ledger(3)

        def told(factor: float, now_s: float) -> bool:
            ledger.renew(replace(ledger.backend, step_time=ScaledStepTime(_STEP_TIME, factor, factor)), now_s)
            before = controller.decisions("e")
            controller.decide(ledger, _ORDERS, 0.05, _TIERS, now_s)
            return controller.decisions("e") != before

        assert told(1.0, 0.0)
        assert not told(1.03, 0.5)
        assert told(1.1, 1.0)
        assert not told(0.9, 1.5)
        assert not told(1.1, 2.0)
        assert not told(0.9, 2.5)
        assert told(0.9, 2.5 + _OPTIONS.raise_after_s)

    @given(st.lists(st.floats(0.97, 1.03), min_size=1, max_size=60))
    def test_noise_in_a_profile_is_not_told(self, factors: list[float]) -> None:
        controller = Controller()
        ledger = _ledger(3)
        for index, factor in enumerate([1.0, *factors]):
            ledger.renew(
                replace(ledger.backend, step_time=ScaledStepTime(_STEP_TIME, factor, factor)), index * 0.5
            )
            controller.decide(ledger, _ORDERS, 0.05, _TIERS, index * 0.5)
        assert len(controller.decisions("e")) == 1


class TestSpeaking:
    ours = Orders(chunk_tokens=128, lapse_s=30.0)

    def _state(self, digest: str | None, age_s: float | None) -> EngineState:
        kind = SchedulerKind.SYNC
        return EngineState("a", "vllm", "1", True, kind, Mode.STOCK, digest, age_s, 0, 0, 0, 0.0, 1, 1, 1)

    @pytest.mark.parametrize(
        ("digest", "age_s", "own", "speaks"),
        [
            (None, None, None, True),  # nobody has spoken, or it was started anew
            ("ours", 1.0, "ours", False),
            ("ours", _OPTIONS.refresh_s, "ours", True),  # or they lapse
            ("before", 1.0, "before", True),  # what we say has changed
            ("others", 1.0, "before", False),  # another gateway drives it
            ("others", _OPTIONS.yield_s, "before", True),  # and is gone
        ],
    )
    def test_when(self, digest: str | None, age_s: float | None, own: str | None, speaks: bool) -> None:
        digest = self.ours.digest if digest == "ours" else digest
        assert must_speak(self._state(digest, age_s), self.ours, own, _OPTIONS) is speaks

    def test_what_does_not_lapse_is_not_said_again(self) -> None:
        assert not must_speak(self._state(Orders().digest, 1e6), Orders(), None, _OPTIONS)

    @given(st.lists(st.sampled_from("ab"), min_size=40, max_size=80))
    def test_two_gateways_that_differ_agree_on_one(self, turns: list[str]) -> None:
        orders = {"a": Orders(chunk_tokens=100, lapse_s=30.0), "b": Orders(chunk_tokens=101, lapse_s=30.0)}
        given = dict.fromkeys("ab", "")
        digest: str | None = None
        given_s, spoke = 0.0, list[tuple[int, str]]()
        for index, who in enumerate([*turns, *"ab" * 20]):
            now_s = index * 0.25
            if must_speak(self._state(digest, now_s - given_s), orders[who], given[who], _OPTIONS):
                digest = given[who] = orders[who].digest
                given_s = now_s
                spoke.append((index, who))
        assert len({who for index, who in spoke if index >= len(turns)}) == 1
