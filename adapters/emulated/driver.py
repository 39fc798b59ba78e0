"""Runs one `EngineModel` in real time: one task an engine, one timer a step, no task and no queue per token.

Steps follow an absolute schedule: a step starts where the one before it was due to end, not where the event loop
got round to it, so lateness of timers does not add up. How late a step's tokens go out is measured. When the
process falls further behind than `RESYNC_S`, the schedule starts again from the present, and that is counted.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from adapters.emulated.histograms import Histogram
from adapters.emulated.journal import Fate, Journal
from tiergate_engine.model import Emitted, EngineModel, PlannedStep, SequenceSpec

EARLY_S = 0.0005
"""A timer may ring this much early: event-loop timers count whole milliseconds."""

RESYNC_S = 0.5
"""Behind schedule by more than this, the lost time is given up instead of caught up."""

LATENESS_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
# The bounds of vLLM's histograms.
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class TokenSink(Protocol):
    """Where a sequence's tokens go. Called from inside the driver: it must return at once and never raise."""

    def token(self, index: int, *, finished: bool) -> None:
        """Token `index` (from zero) is out; `finished` with the last one."""
        ...


class StepWatch(Protocol):
    """Whoever sets knobs before a step, and hears of it when it ended."""

    def before(self, now_s: float) -> None: ...

    def after(self, planned: PlannedStep, seconds: float) -> None: ...


@dataclass(slots=True)
class _Route:
    sink: TokenSink
    prompt_tokens: int
    arrived_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0
    by_length: bool = True  # it ends because the client's limit is reached


class DriverStats:
    """What /metrics tells about the steps and tokens so far."""

    def __init__(self) -> None:
        self.ttft = Histogram(_TTFT_S)
        self.itl = Histogram(_ITL_S)
        self.time_per_token = Histogram(_ITL_S)
        self.e2e = Histogram(_LATENCY_S)
        self.step_tokens = Histogram(_ITERATION_TOKENS)
        self.lateness = Histogram(LATENESS_BOUNDS_S)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished_length = 0
        self.finished_stop = 0
        self.aborted = 0
        self.rejected = 0
        self.resyncs = 0
        self.busy_s = 0.0
        self.worst_lateness_s = 0.0


class EngineDriver:
    """One engine model on the event loop's clock. `run` is its only task; submit and abort at any time."""

    def __init__(
        self, model: EngineModel, noise_sigma: float = 0.0, seed: int = 0, journal: Journal | None = None
    ) -> None:
        self.model = model
        self.stats = DriverStats()
        self.watch: StepWatch | None = None
        self._journal = journal
        self._routes: dict[str, _Route] = {}
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._noise = random.Random(seed)
        self._sigma = noise_sigma
        self._floor_s = 0.0  # the model's time only goes forward: never tell it less than this
        self._due_s = math.inf  # when the step in flight ends; a late loop must not tell the model more than this

    @property
    def open_sequences(self) -> int:
        return len(self._routes)

    def submit(self, spec: SequenceSpec, sink: TokenSink, *, by_length: bool) -> None:
        """Queue a sequence whose tokens go to `sink`. Raises what `EngineModel.submit` raises."""
        arrived_s = asyncio.get_running_loop().time()
        self.model.submit(spec, self._model_time(arrived_s))
        self._routes[spec.sequence_id] = _Route(sink, spec.prompt_tokens, arrived_s, by_length=by_length)
        self._drained.clear()
        self._wake.set()
        if self._journal is not None:
            self._journal.note(Fate.SUBMITTED, spec.sequence_id, 0, len(self._routes))

    def abort(self, sequence_id: str) -> bool:
        """Drop a sequence; its sink hears nothing more. False when it is not here (any more)."""
        route = self._routes.pop(sequence_id, None)
        if route is None:
            return False
        if self._journal is not None:
            self._journal.note(Fate.ABORTED, sequence_id, route.tokens, len(self._routes))
        self.stats.aborted += 1
        self.model.abort(sequence_id, self._model_time(asyncio.get_running_loop().time()))
        self._wake.set()
        if not self._routes:
            self._drained.set()
        return True

    def abort_all(self, sequence_ids: Iterable[str]) -> None:
        """`abort` each that is still here."""
        for sequence_id in sequence_ids:
            self.abort(sequence_id)

    async def drained(self) -> None:
        """Wait until no sequence is left."""
        await self._drained.wait()

    async def run(self) -> None:
        """Drive steps until cancelled."""
        loop = asyncio.get_running_loop()
        model, stats = self.model, self.stats
        start_s = loop.time()
        while True:
            self._wake.clear()
            if self.watch is not None:
                self.watch.before(loop.time())
            planned = model.next_step(self._model_time(start_s))
            if planned is None:
                await self._wake.wait()
                start_s = loop.time()
                continue
            duration_s = planned.duration_s * self._noise_factor()
            self._due_s = planned.started_s + duration_s
            late_s = await self._sleep_until(self._due_s)
            start_s = self._floor_s = self._due_s
            self._due_s = math.inf
            stats.busy_s += duration_s
            if self.watch is not None:
                self.watch.after(planned, duration_s)
            stats.step_tokens.observe(planned.step.tokens)
            stats.lateness.observe(max(late_s, 0.0))
            stats.worst_lateness_s = max(stats.worst_lateness_s, late_s)
            self._deliver(model.finish_step(start_s), start_s)
            if late_s > RESYNC_S:
                stats.resyncs += 1
                start_s = loop.time()

    async def _sleep_until(self, due_s: float) -> float:
        """Sleep to the absolute time `due_s`; always yields. Returns how late it is."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(due_s - loop.time(), 0.0))
        # A timer counts from when the loop last looked at the clock, so it can ring a good millisecond early.
        while due_s - loop.time() > EARLY_S:  # noqa: ASYNC110 -- it waits for the clock, not for a condition
            await asyncio.sleep(due_s - loop.time())
        return loop.time() - due_s

    def _deliver(self, emitted: Iterable[Emitted], now_s: float) -> None:
        stats = self.stats
        routes = self._routes
        gap_s, gaps, tokens = 0.0, 0, 0
        for out in emitted:
            route = routes.get(out.sequence_id)
            if route is None:
                continue  # aborted by a sink earlier in this very loop
            tokens += 1
            route.tokens = out.index + 1
            if out.index:
                since_s = now_s - route.last_s
                if since_s != gap_s:
                    if gaps:
                        stats.itl.observe(gap_s, gaps)
                    gap_s, gaps = since_s, 0
                gaps += 1
            else:
                route.first_s = now_s
                stats.prompt_tokens += route.prompt_tokens
                stats.ttft.observe(max(now_s - route.arrived_s, 0.0))
            route.last_s = now_s
            if out.finished:
                self._finish(out, route, now_s)
            route.sink.token(out.index, finished=out.finished)
        if gaps:
            stats.itl.observe(gap_s, gaps)
        stats.generation_tokens += tokens

    def _finish(self, out: Emitted, route: _Route, now_s: float) -> None:
        del self._routes[out.sequence_id]
        if not self._routes:
            self._drained.set()
        if self._journal is not None:
            self._journal.note(Fate.FINISHED, out.sequence_id, route.tokens, len(self._routes))
        stats = self.stats
        if route.by_length:
            stats.finished_length += 1
        else:
            stats.finished_stop += 1
        stats.e2e.observe(max(now_s - route.arrived_s, 0.0))
        if out.index:
            stats.time_per_token.observe((now_s - route.first_s) / out.index)

    def _model_time(self, now_s: float) -> float:
        self._floor_s = max(self._floor_s, min(now_s, self._due_s))
        return self._floor_s

    def _noise_factor(self) -> float:
        if not self._sigma:
            return 1.0
        # The log-normal's mean is one, so that noise does not slow the engine down.
        return math.exp(self._noise.gauss(-0.5 * self._sigma**2, self._sigma))
