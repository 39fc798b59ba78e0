"""Measuring a live engine: from streamed completions to a profile with its own error.

Three kinds of probe tell steps apart from the outside:

* *prefill*: one prompt on an idle engine. Its time to first token is one step, plus what every answer costs
  (HTTP, tokenizing), which the shortest prompt shows and which is taken off.
* *decode*: n equal streams at once. The median gap between their tokens is a step of n decodes.
* *mixed*: n streams, and one prompt that arrives among them. The widest gap it tears into their tokens is the
  step that carried it, as long as it fits one step.

Probes go round in rounds, each point once a round, until the time is up; a point's time is the median of its
rounds. The formula is fitted to the points. No clock here: the connection tells the time.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol

from profiles.fit import Fit, Observation, fit
from profiles.format import Coefficients, Limits, Profile, ProfileFile, Provenance, Regime, Regimes, Source, build
from tiergate_engine.step import Step

_MOST_ROUNDS = 5
_FEWEST_POINTS = 8
_MOST_KV = 48_000  # more takes long to prefill and tells little more: step times are nearly straight in KV
_BUNCHED = 0.5  # a median gap below this part of the mean one says that tokens came in bunches
_SETTLED = 2  # gaps left out at both ends of a decode probe, where streams join and leave


class MeasureError(Exception):
    """The engine could not be measured; the message says what was missing."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One streamed completion as its client saw it, on the connection's clock.

    `prompt_tokens` is what the engine counted, where it said so.
    """

    sent_s: float
    token_s: tuple[float, ...]
    prompt_tokens: int


class Connection(Protocol):
    """What measuring needs of an engine."""

    def now_s(self) -> float:
        """The clock that `Completion` speaks of."""
        ...

    async def complete(self, prompt_tokens: int, output_tokens: int) -> Completion:
        """Stream one completion of a prompt that was never sent before (no prefix may be cached).

        Raises:
            MeasureError: the engine refused or broke off.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is probed. `chunk_tokens` is the engine's token budget of a step: longer prompts would be cut."""

    max_seconds: float = 120.0
    chunk_tokens: int = 2048
    max_model_tokens: int = 4096
    max_seqs: int = 64
    kv_tokens: int | None = None
    output_tokens: int = 24

    def __post_init__(self) -> None:
        if not 0.0 < self.max_seconds < math.inf:
            raise ValueError(f"max_seconds is {self.max_seconds}: give the measurement some time")
        if self.max_model_tokens < 64 + self.output_tokens:
            raise ValueError(f"max_model_tokens is {self.max_model_tokens}: too short to measure anything")

    @property
    def longest_prompt(self) -> int:
        return self.max_model_tokens - 2 * self.output_tokens - 16


@dataclass(frozen=True, slots=True)
class _Point:
    """One thing to probe: a prompt of `chunk` tokens among `seqs` streams of `context` tokens each."""

    chunk: int
    seqs: int
    context: int


@dataclass(frozen=True, slots=True)
class _Sample:
    """What one probe of a point showed. Token counts are the engine's own, where it told them."""

    seconds: float
    chunk: int
    context: int


Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a measurement found. `overhead_s` is what a TTFT has on top of its steps."""

    observations: tuple[Observation, ...]
    fit: Fit
    overhead_s: float
    seconds: float
    rounds: int


async def measure(connection: Connection, sweep: Sweep, progress: Progress | None = None) -> Measured:
    """Probe for at most about `sweep.max_seconds`, then fit. One probe may run a little over.

    Raises:
        MeasureError: the engine failed a probe, or the time was too short for the fewest points.
    """
    started_s = connection.now_s()
    deadline_s = started_s + sweep.max_seconds
    try:
        async with asyncio.timeout(2.0 * sweep.max_seconds + 10.0):
            await connection.complete(16, 4)  # warms caches and connections up; not counted
            samples, rounds = await _probe_all(connection, sweep, deadline_s, progress)
    except TimeoutError as error:
        raise MeasureError(
            f"the engine did not finish a probe within twice the time limit ({sweep.max_seconds:g} s)"
        ) from error
    times = {point: _middle(values) for point, values in samples.items()}
    overhead_s = _overhead(times)
    observations = tuple(_observations(times, overhead_s, sweep))
    if len(observations) < _FEWEST_POINTS:
        raise MeasureError(
            f"only {len(observations)} of at least {_FEWEST_POINTS} points were measured in "
            f"{sweep.max_seconds:g} s: allow more time"
        )
    return Measured(observations, fit(observations), overhead_s, connection.now_s() - started_s, rounds)


def profile_of(
    measured: Measured,
    *,
    name: str,
    model: str,
    hardware: str,
    engine: str,
    provenance: Provenance,
    limits: Limits,
) -> Profile:
    """The profile of a measurement."""
    found = measured.fit
    file = ProfileFile(
        format=1,
        name=name,
        model=model,
        hardware=hardware,
        engine=engine,
        provenance=provenance,
        limits=limits,
        regimes=Regimes(
            decode=Regime(source=Source.MEASURED, error=found.decode_error),
            mixed=Regime(source=Source.MEASURED, error=found.mixed_error),
        ),
        coefficients=Coefficients.of(found.step_time),
    )
    return Profile(file, build(file, name))


def _powers(low: int, high: int, factor: int) -> list[int]:
    values = []
    while low < high:
        values.append(low)
        low *= factor
    return [*values, high]


def _points(sweep: Sweep) -> list[_Point]:
    """Every point, the most telling first, so that a short measurement still spans the range."""
    longest = sweep.longest_prompt
    most = sweep.max_seqs
    room = min(0.9 * (sweep.kv_tokens or _MOST_KV), _MOST_KV)

    def fits(seqs: int, context: int, chunk: int = 0) -> bool:
        return context <= 64 or seqs * (context + 3 * sweep.output_tokens) + chunk <= room

    prefill = [_Point(c, 0, 0) for c in _powers(16, min(sweep.chunk_tokens, longest), 2)]
    decode = [
        _Point(0, n, c) for n in _powers(1, most, 2) for c in _powers(min(64, longest), longest, 8) if fits(n, c)
    ]
    chunks = _powers(16, min(sweep.chunk_tokens - most, longest), 4) if sweep.chunk_tokens > most + 16 else []
    mixed = [
        _Point(chunk, n, context)
        for n in _powers(min(2, most), most, 8)
        for chunk in chunks
        for context in {min(64, longest), min(1024, longest)}
        if fits(n, context, chunk)
    ]
    turns = [_outside_in(prefill), _outside_in(decode), _outside_in(mixed)]
    return [turn[i] for i in range(max(map(len, turns))) for turn in turns if i < len(turn)]


def _outside_in(points: Sequence[_Point]) -> list[_Point]:
    left, right = list(points[: (len(points) + 1) // 2]), list(reversed(points[(len(points) + 1) // 2 :]))
    order: list[_Point] = []
    for i in range(len(left)):
        order += left[i : i + 1] + right[i : i + 1]
    return order


async def _probe_all(
    connection: Connection, sweep: Sweep, deadline_s: float, progress: Progress | None
) -> tuple[dict[_Point, list[_Sample]], int]:
    points = _points(sweep)
    samples: dict[_Point, list[_Sample]] = defaultdict(list)
    started_s = connection.now_s()
    rounds = 0
    for _ in range(_MOST_ROUNDS):
        for point in points:
            now_s = connection.now_s()
            if now_s >= deadline_s:
                return samples, rounds
            if progress is not None:
                progress((now_s - started_s) / sweep.max_seconds, _describe(point))
            found = await _probe(connection, point, sweep)
            if found is not None:
                samples[point].append(found)
        rounds += 1
    return samples, rounds


def _describe(point: _Point) -> str:
    if not point.seqs:
        return f"prefill {point.chunk} tokens"
    streams = f"{point.seqs} streams at {point.context} tokens"
    return f"{streams}, prompt of {point.chunk}" if point.chunk else streams


async def _probe(connection: Connection, point: _Point, sweep: Sweep) -> _Sample | None:
    if not point.seqs:
        done = await connection.complete(point.chunk, 1)
        return _Sample(done.token_s[0] - done.sent_s, done.prompt_tokens, 0) if done.token_s else None
    async with _plain_errors(), asyncio.TaskGroup() as group:
        # With a prompt to come the streams must outlast its arrival.
        tokens = sweep.output_tokens * (3 if point.chunk else 1)
        tasks = [group.create_task(connection.complete(point.context, tokens)) for _ in range(point.seqs)]
        prompt = None
        if point.chunk:
            # The first short stream gives the others time to be queued; the second queues behind them all, so
            # that they decode when it has ended.
            await connection.complete(16, 1)
            await connection.complete(16, 4)
            prompt = await connection.complete(point.chunk, 1)
    streams = [task.result() for task in tasks]
    context = round(median(done.prompt_tokens for done in streams))
    if prompt is None:
        gap_s = _steady_gap(streams)
        return None if gap_s is None else _Sample(gap_s, 0, context)
    gap_s = _torn_gap(streams, prompt)
    return None if gap_s is None else _Sample(gap_s, prompt.prompt_tokens, context)


@asynccontextmanager
async def _plain_errors() -> AsyncIterator[None]:
    """Out of a group of failures, the first: one refused stream is what there is to say."""
    try:
        yield
    except* MeasureError as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def _middle(samples: Sequence[_Sample]) -> _Sample:
    return _Sample(
        median(sample.seconds for sample in samples),
        round(median(sample.chunk for sample in samples)),
        round(median(sample.context for sample in samples)),
    )


def _gaps(done: Completion) -> Iterator[tuple[float, float]]:
    return ((before, after) for before, after in pairwise(done.token_s))


def _steady_gap(streams: Sequence[Completion]) -> float | None:
    """The typical gap while every stream decodes: the median, which a pause of the machine does not move.

    Where tokens arrive in bunches, because this side was kept from reading, most gaps are next to nothing and the
    median means nothing either. It shows by being far below the mean, which bunches do not move.
    """
    if any(len(done.token_s) < 2 + 2 * _SETTLED for done in streams):
        return None
    begin_s = max(done.token_s[_SETTLED] for done in streams)
    end_s = min(done.token_s[-1] for done in streams)
    gaps = [b - a for done in streams for a, b in _gaps(done) if a >= begin_s and b <= end_s]
    if len(gaps) < 3:
        return None
    after = sum(begin_s < at_s <= end_s for done in streams for at_s in done.token_s)
    if not after:
        return None
    middle_s, mean_s = median(gaps), (end_s - begin_s) * len(streams) / after
    return middle_s if middle_s > _BUNCHED * mean_s else mean_s


def _torn_gap(streams: Sequence[Completion], prompt: Completion) -> float | None:
    """The widest gap of each stream while the prompt was being prefilled; the median over the streams."""
    if not prompt.token_s or not streams:
        return None
    first_s = prompt.token_s[0]
    widest = []
    for done in streams:
        # The step that carried it began after it was sent, and ended about when its first token showed.
        around = [b - a for a, b in _gaps(done) if prompt.sent_s <= a <= first_s]
        if not around or done.token_s[-1] < first_s:
            return None  # this stream ended before the prompt's step: the step held fewer decodes than planned
        widest.append(max(around))
    return median(widest)


def _overhead(times: dict[_Point, _Sample]) -> float:
    """What a TTFT has on top of its step: the shortest prompt's, less a step of one decode (nearly the same)."""
    prefills = {point.chunk: sample.seconds for point, sample in times.items() if not point.seqs}
    singles = [sample.seconds for point, sample in times.items() if point.seqs == 1 and not point.chunk]
    if not prefills or not singles:
        return 0.0
    return max(prefills[min(prefills)] - min(singles), 0.0)


def _observations(times: dict[_Point, _Sample], overhead_s: float, sweep: Sweep) -> Iterator[Observation]:
    for point, sample in times.items():
        seconds, step = sample.seconds, Step.chunk(sample.chunk) if point.chunk else Step()
        if point.seqs:
            # How far the streams are when a gap is seen: half through, or just begun when the prompt comes.
            done = 8 if point.chunk else sweep.output_tokens // 2
            step += Step.decode(point.seqs, point.seqs * (sample.context + done))
        else:
            seconds -= overhead_s
        if seconds > 0.0:
            yield Observation(step, seconds)
