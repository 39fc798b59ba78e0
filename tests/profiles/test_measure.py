"""Measuring an engine whose step times are known, in virtual time: the fit must find them again."""

from __future__ import annotations

import math

import pytest

from profiles.format import Limits, Provenance, Source, dump, parse
from profiles.measure import Completion, MeasureError, Sweep, measure, profile_of
from tests.profiles.conftest import VirtualEngine
from tiergate_engine.model import EngineConfig
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime

TRUTH = RooflineStepTime(
    c0_s=0.004, weights_s=0.010, per_token_s=5e-5, sharpness=2.2, per_seq_s=4e-5, per_kv_s=1.5e-7,
    mixed_kv_s=1e-7, per_attention_s=2e-9,
)  # fmt: skip
CONFIG = EngineConfig(kv_tokens=200_000, max_model_tokens=4096, max_running_seqs=64, max_batched_tokens=2048)
SWEEP = Sweep(max_seconds=120.0, chunk_tokens=2048, max_model_tokens=4096, max_seqs=64, kv_tokens=200_000)


async def test_the_fit_finds_the_engines_step_times() -> None:
    async with VirtualEngine(TRUTH, CONFIG, overhead_s=0.006).running() as engine:
        measured = await measure(engine, SWEEP)
    assert measured.overhead_s == pytest.approx(0.006, abs=0.001)
    found = measured.fit.step_time
    for step in (
        Step.decode(1, 500),
        Step.decode(16, 16_000),
        Step.decode(60, 90_000),
        Step.chunk(64),
        Step.chunk(512),
        Step.chunk(2000),
        Step.chunk(512) + Step.decode(16, 16_000),
        Step.chunk(1500) + Step.decode(50, 60_000),
    ):
        assert found.seconds(step) == pytest.approx(TRUTH.seconds(step), rel=0.08), step
    for error in (measured.fit.decode_error, measured.fit.mixed_error):
        assert error is not None
        assert error.p50 < 0.05
        assert error.p90 < 0.15


class _Bunching:
    """A connection whose reader is kept from the socket: it sees tokens only every `period_s`."""

    def __init__(self, engine: VirtualEngine, period_s: float) -> None:
        self._engine = engine
        self._period_s = period_s

    def now_s(self) -> float:
        return self._engine.now_s()

    async def complete(self, prompt_tokens: int, output_tokens: int) -> Completion:
        done = await self._engine.complete(prompt_tokens, output_tokens)
        seen = tuple(math.ceil(at_s / self._period_s) * self._period_s for at_s in done.token_s)
        return Completion(done.sent_s, seen, done.prompt_tokens)


async def test_tokens_that_arrive_in_bunches_do_not_make_steps_look_quick() -> None:
    async with VirtualEngine(TRUTH, CONFIG).running() as engine:
        measured = await measure(_Bunching(engine, 0.05), SWEEP)
    found = measured.fit.step_time
    for step in (Step.decode(1, 500), Step.decode(16, 16_000), Step.decode(60, 90_000)):
        assert found.seconds(step) == pytest.approx(TRUTH.seconds(step), rel=0.35), step


async def test_time_is_kept_and_progress_told() -> None:
    told: list[tuple[float, str]] = []
    async with VirtualEngine(TRUTH, CONFIG).running() as engine:
        sweep = Sweep(max_seconds=10.0, max_model_tokens=4096, max_seqs=32)
        measured = await measure(engine, sweep, lambda share, what: told.append((share, what)))
    assert 10.0 <= measured.seconds < 20.0
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert 0.0 <= shares[0] < shares[-1] <= 1.0
    assert {what.split()[0] for _, what in told} >= {"prefill", "1", "32"}


async def test_too_little_time_is_an_error() -> None:
    async with VirtualEngine(TRUTH, CONFIG).running() as engine:
        with pytest.raises(MeasureError, match="allow more time"):
            await measure(engine, Sweep(max_seconds=0.05))


async def test_a_refused_stream_stops_the_measurement_with_its_reason() -> None:
    engine = VirtualEngine(TRUTH, CONFIG)
    engine.refuse_beyond = 600
    async with engine.running():
        with pytest.raises(MeasureError, match="refused a prompt of"):
            await measure(engine, SWEEP)


async def test_an_engine_without_tokens_cannot_be_measured() -> None:
    class Mute:
        def __init__(self) -> None:
            self._now_s = 0.0

        def now_s(self) -> float:
            self._now_s += 0.5
            return self._now_s

        async def complete(self, prompt_tokens: int, output_tokens: int) -> Completion:
            return Completion(self._now_s, (), prompt_tokens)

    with pytest.raises(MeasureError, match="only 0 of"):
        await measure(Mute(), Sweep(max_seconds=20.0))


async def test_the_profile_can_be_written_and_read_again() -> None:
    async with VirtualEngine(TRUTH, CONFIG).running() as engine:
        measured = await measure(engine, SWEEP)
    provenance = Provenance(
        origin="virtual engine", licence="Apache-2.0", date="2026-01-01", command="test", conditions="none"
    )
    limits = Limits(kv_tokens=200_000, max_running_seqs=64, max_batched_tokens=2048)
    profile = profile_of(
        measured, name="virtual", model="m", hardware="none", engine="model", provenance=provenance, limits=limits
    )
    again = parse(dump(profile.file), "virtual.json")
    assert again.file == profile.file
    assert again.file.regimes.decode.source is Source.MEASURED
    assert again.p90_error is not None
    step = Step.chunk(700) + Step.decode(20, 20_000)
    assert again.step_time.seconds(step) == measured.fit.step_time.seconds(step)


@pytest.mark.parametrize(
    ("arguments", "name"), [({"max_seconds": 0.0}, "max_seconds"), ({"max_model_tokens": 64}, "max_model")]
)
def test_impossible_sweeps_are_refused(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Sweep(**arguments)  # type: ignore[arg-type]  # wrong values are the point
