"""An engine on the virtual clock: streams judged by stretches of step ends, against every token written down."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.tiers import Slo
from simulator.agenda import Agenda
from simulator.engines import SimEngine, StreamTimes
from tiergate_engine.model import EngineConfig, EngineModel, SequenceSpec
from tiergate_engine.steptime import RooflineStepTime

STEP_TIME = RooflineStepTime(c0_s=0.01, per_token_s=1e-5, per_kv_s=1e-7)
SLO = Slo(0.1, 0.012)


class Listener:
    """Closes every stream that ends."""

    def __init__(self) -> None:
        self.engine: SimEngine | None = None
        self.first: list[str] = []
        self.times: dict[str, StreamTimes] = {}

    def first_token(self, lease_id: str) -> None:
        self.first.append(lease_id)

    def finished(self, lease_id: str, tokens: int) -> None:
        assert self.engine is not None
        self.times[lease_id] = self.engine.close(lease_id, 0.0, SLO)
        assert self.times[lease_id].tokens == tokens


def by_hand(config: EngineConfig, specs: list[SequenceSpec]) -> dict[str, list[float]]:
    """The time of every token, all sequences submitted at the start."""
    model, now_s = EngineModel(config, STEP_TIME), 0.0
    for spec in specs:
        model.submit(spec, now_s)
    times: dict[str, list[float]] = {spec.sequence_id: [] for spec in specs}
    while (planned := model.next_step(now_s)) is not None:
        now_s += planned.duration_s
        for token in model.finish_step(now_s):
            times[token.sequence_id].append(now_s)
    return times


def simulated(config: EngineConfig, specs: list[SequenceSpec]) -> tuple[Listener, SimEngine, Agenda]:
    agenda, listener = Agenda(), Listener()
    listener.engine = engine = SimEngine("e", lambda: EngineModel(config, STEP_TIME), agenda, listener)
    # the first sequence starts the engine: all are there before its first step
    engine._stepping = True
    for spec in specs:
        engine.submit(spec)
    engine._stepping = False
    engine._step()
    while agenda.run_next():
        pass
    return listener, engine, agenda


people = st.lists(st.tuples(st.integers(1, 120), st.integers(1, 60)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(people, st.sampled_from([160, 320, 100_000]), st.sampled_from([16, 64, 2048]))
def test_a_stream_is_judged_as_if_every_token_were_written_down(
    sizes: list[tuple[int, int]], kv_tokens: int, budget: int
) -> None:
    """Preemption (little KV) and starved decodes (a budget below their number) included."""
    specs = [
        SequenceSpec(f"s{index}", min(prompt, kv_tokens // 3), min(output, kv_tokens // 3))
        for index, (prompt, output) in enumerate(sizes)
    ]
    config = EngineConfig(kv_tokens, 10_000, max_batched_tokens=budget)
    expected = by_hand(config, specs)
    listener, engine, _ = simulated(config, specs)
    assert set(listener.times) == set(expected)
    assert set(listener.first) == set(expected)
    for name, times in expected.items():
        judged = listener.times[name]
        assert judged.tokens == len(times)
        assert judged.first_s == pytest.approx(times[0])
        assert judged.last_s == pytest.approx(times[-1])
        slack_s = min(SLO.deadline_s(0.0, index) - time_s for index, time_s in enumerate(times))
        assert judged.slack_s == pytest.approx(slack_s)
    assert not engine.streams


def test_busy_time_is_the_time_in_steps() -> None:
    specs = [SequenceSpec("a", 10, 5)]
    _, engine, agenda = simulated(EngineConfig(1000, 1000), specs)
    assert engine.busy_s == pytest.approx(agenda.now_s)


def test_a_crash_empties_it_and_it_can_be_used_again() -> None:
    agenda, listener = Agenda(), Listener()
    listener.engine = engine = SimEngine(
        "e", lambda: EngineModel(EngineConfig(1000, 1000), STEP_TIME), agenda, listener
    )
    engine.submit(SequenceSpec("a", 10, 50))
    engine.submit(SequenceSpec("b", 10, 50))
    for _ in range(5):
        agenda.run_next()
    assert [stream.lease_id for stream in engine.crash()] == ["a", "b"]
    assert not engine.streams
    engine.submit(SequenceSpec("c", 10, 3))
    while agenda.run_next():
        pass
    assert list(listener.times) == ["c"]
    assert engine.model.idle


def test_time_does_not_go_back() -> None:
    agenda = Agenda()
    agenda.at(1.0, lambda: None)
    assert agenda.run_next()
    with pytest.raises(ValueError, match="before now"):
        agenda.at(0.5, lambda: None)
    assert not agenda.run_next()
