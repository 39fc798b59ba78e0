"""The driver on a virtual clock: exact token times, an absolute schedule, and nothing left behind."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from adapters.emulated.driver import RESYNC_S, EngineDriver
from tiergate_engine.model import EngineConfig, EngineFull, EngineModel, SequenceSpec
from tiergate_engine.steptime import RooflineStepTime

STEP_S = 0.010
Result = TypeVar("Result")


class _Jump(selectors.DefaultSelector):
    """Instead of waiting, moves the clock."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everything waits, and nothing will happen")
        self.now_s += timeout
        found: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while it would wait, and when a test says so."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s

    def lose(self, seconds: float) -> None:
        """As if something had kept the loop busy for this long."""
        self._jump.now_s += seconds


class Recorder:
    """Notes which tokens came, and when."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.times_s: list[float] = []
        self.indexes: list[int] = []
        self.finished = asyncio.Event()

    def token(self, index: int, *, finished: bool) -> None:
        self.indexes.append(index)
        self.times_s.append(self._loop.time())
        if finished:
            self.finished.set()


def _model(max_running_seqs: int = 256, max_queued_seqs: int | None = None) -> EngineModel:
    config = EngineConfig(
        kv_tokens=4096,
        max_model_tokens=1024,
        max_batched_tokens=64,
        max_running_seqs=max_running_seqs,
        max_queued_seqs=max_queued_seqs,
    )
    return EngineModel(config, RooflineStepTime(c0_s=STEP_S, per_token_s=1e-5))


def _run(
    body: Callable[[VirtualLoop, EngineDriver], Awaitable[Result]], model: EngineModel | None = None
) -> Result:
    async def main() -> Result:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        driver = EngineDriver(_model() if model is None else model)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(driver.run())
            result = await body(loop, driver)
            running.cancel()
        return result

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def _stepped(model: EngineModel, spec: SequenceSpec) -> list[float]:
    """The times at which the bare model emits the tokens of one sequence."""
    model.submit(spec, 0.0)
    now_s, times_s = 0.0, []
    while (planned := model.next_step(now_s)) is not None:
        now_s = planned.ends_s
        times_s += [now_s for _ in model.finish_step(now_s)]
    return times_s


def test_tokens_come_when_the_model_says() -> None:
    spec = SequenceSpec("a", prompt_tokens=150, output_tokens=20)  # three chunks of at most 64

    async def body(loop: VirtualLoop, driver: EngineDriver) -> Recorder:
        sink = Recorder(loop)
        driver.submit(spec, sink, by_length=True)
        await sink.finished.wait()
        return sink

    sink = _run(body)
    assert sink.indexes == list(range(20))
    assert sink.times_s == pytest.approx(_stepped(_model(), spec), abs=1e-9)


def test_a_busy_loop_delays_tokens_but_not_the_schedule() -> None:
    busy_s = 0.004

    async def keep_busy(loop: VirtualLoop) -> None:
        while True:  # at a pace of its own, so that it meets the ends of some steps
            await asyncio.sleep(STEP_S * 0.77)
            loop.lose(busy_s)

    async def body(loop: VirtualLoop, driver: EngineDriver) -> tuple[Recorder, EngineDriver]:
        sink = Recorder(loop)
        async with asyncio.TaskGroup() as tasks:
            busy = tasks.create_task(keep_busy(loop))
            driver.submit(SequenceSpec("a", 10, 101), sink, by_length=True)
            await sink.finished.wait()
            busy.cancel()
        return sink, driver

    sink, driver = _run(body)
    expected_s = _stepped(_model(), SequenceSpec("a", 10, 101))
    late_s = [came_s - due_s for came_s, due_s in zip(sink.times_s, expected_s, strict=True)]
    assert max(late_s) > busy_s / 2
    # Lateness that added up would be a hundred times as much at the end.
    assert max(late_s) < busy_s * 1.01
    assert driver.stats.lateness.count == 101
    assert driver.stats.resyncs == 0


def test_a_long_stall_starts_the_schedule_again() -> None:
    async def body(loop: VirtualLoop, driver: EngineDriver) -> tuple[Recorder, EngineDriver]:
        sink = Recorder(loop)
        driver.submit(SequenceSpec("a", 10, 50), sink, by_length=True)
        await asyncio.sleep(STEP_S * 5.5)
        loop.lose(4 * RESYNC_S)
        await sink.finished.wait()
        return sink, driver

    sink, driver = _run(body)
    assert driver.stats.resyncs == 1
    assert driver.stats.worst_lateness_s >= 3 * RESYNC_S
    gaps_s = [after - before for before, after in zip(sink.times_s, sink.times_s[1:], strict=False)]
    assert max(gaps_s) > 3 * RESYNC_S
    # No burst makes up for the lost time: all other gaps are a step.
    assert sum(gap_s > STEP_S * 0.99 for gap_s in gaps_s) == len(gaps_s)


def test_an_abort_silences_the_sink_and_frees_the_engine() -> None:
    async def body(loop: VirtualLoop, driver: EngineDriver) -> None:
        kept, dropped = Recorder(loop), Recorder(loop)
        driver.submit(SequenceSpec("kept", 10, 30), kept, by_length=True)
        driver.submit(SequenceSpec("dropped", 10, 30), dropped, by_length=True)
        await asyncio.sleep(STEP_S * 4.5)
        assert driver.abort("dropped")
        assert not driver.abort("dropped")
        before = len(dropped.indexes)
        await kept.finished.wait()
        await driver.drained()
        assert 0 < len(dropped.indexes) == before
        assert kept.indexes == list(range(30))
        assert (driver.model.running, driver.model.waiting, driver.model.kv_used_tokens) == (0, 0, 0)
        assert driver.open_sequences == 0
        assert driver.stats.aborted == 1

    _run(body)


def test_a_sequence_that_is_refused_leaves_nothing() -> None:
    async def body(loop: VirtualLoop, driver: EngineDriver) -> None:
        sink = Recorder(loop)
        driver.submit(SequenceSpec("runs", 10, 5), sink, by_length=True)
        await asyncio.sleep(STEP_S / 2)
        driver.submit(SequenceSpec("waits", 10, 5), Recorder(loop), by_length=True)
        with pytest.raises(EngineFull):
            driver.submit(SequenceSpec("too-many", 10, 5), Recorder(loop), by_length=True)
        assert driver.open_sequences == 2
        assert not driver.abort("too-many")
        await driver.drained()

    _run(body, _model(max_running_seqs=1, max_queued_seqs=1))


def test_statistics_add_up() -> None:
    async def body(loop: VirtualLoop, driver: EngineDriver) -> EngineDriver:
        for number, tokens in enumerate((1, 7, 30)):
            driver.submit(SequenceSpec(f"s{number}", 20, tokens), Recorder(loop), by_length=number == 2)
        await driver.drained()
        return driver

    stats = _run(body).stats
    assert stats.generation_tokens == 38
    assert stats.prompt_tokens == 60
    assert (stats.ttft.count, stats.itl.count, stats.e2e.count) == (3, 35, 3)
    assert (stats.finished_length, stats.finished_stop, stats.aborted) == (1, 2, 0)
    assert stats.itl.total == pytest.approx(sum(29 * [STEP_S]) + 6 * STEP_S, rel=0.01)


def test_noise_is_seeded_and_keeps_the_mean() -> None:
    def durations(seed: int) -> float:
        async def main() -> float:
            driver = EngineDriver(_model(), noise_sigma=0.2, seed=seed)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(driver.run())
                driver.submit(SequenceSpec("a", 10, 900), Recorder(loop), by_length=True)
                await driver.drained()
                running.cancel()
            return driver.stats.busy_s

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(main())

    assert durations(1) == durations(1)
    assert durations(1) != durations(2)
    assert durations(1) == pytest.approx(900 * STEP_S, rel=0.05)
