"""A straight line under an engine's step times: what a step costs at least, as a sum over its sequences.

A *minorant* is a function f + a c + b n + k kv + g q of a step's prefill tokens c, decodes n, decode contexts
kv and chunk attention q that no step within the engine's limits takes less time than. Since it is a sum, the
time of any schedule is at least f for every step plus what every sequence adds, whoever shares the steps.

There are many; each is found by a linear programme: the greatest value over a few steps of interest, subject to
lying under the step time everywhere. "Everywhere" is first a grid that holds all corners of the profile's
tables (between corners a table minus a line is smallest at a corner), then random steps and steps near the
tightest ones, whose violations become constraints until there are none; what is left between them is shaved
off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from scheduling.backends import EngineLimits
from simulator.reference import MOST_BATCHED_TOKENS, MOST_SEQS
from tiergate_engine.step import Step, StepTime
from tiergate_engine.steptime import ScaledStepTime, ShiftedStepTime, TableStepTime

Floats = npt.NDArray[np.float64]

_SHAVE = 1e-3  # of every coefficient, for what hides between the checked steps
_RANDOM_STEPS = 5_000
_ROUNDS = 12
_NEAREST = 40  # steps around which the next round looks for violations
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Minorant:
    """No step takes less than `step_s` plus the other coefficients times what it holds. Seconds each.

    Attributes:
        step_s: for every step (f).
        prefill_token_s: for a prefill token (a).
        decode_s: for a decode (b).
        kv_token_s: for a token of context of a decode (k).
        pair_s: for a query-key pair of a chunk's attention (g).
        chunk_s: for every chunk: host time only.
    """

    step_s: float
    prefill_token_s: float
    decode_s: float
    kv_token_s: float
    pair_s: float
    chunk_s: float = 0.0

    def seconds(self, step: Step) -> float:
        """The least time of `step`."""
        return (
            self.step_s
            + self.prefill_token_s * step.prefill_tokens
            + self.decode_s * step.decode_seqs
            + self.kv_token_s * step.decode_kv_tokens
            + self.pair_s * step.prefill_attention
            + self.chunk_s * step.prefill_seqs
        )

    def with_host(self, host_step_s: float, host_seq_s: float) -> Minorant:
        """With an engine's host time per step and sequence on top (`EngineConfig`)."""
        return replace(
            self,
            step_s=self.step_s + host_step_s,
            decode_s=self.decode_s + host_seq_s,
            chunk_s=self.chunk_s + host_seq_s,
        )


@dataclass(frozen=True, slots=True)
class Range:
    """The steps that can happen: what the minorants must hold for.

    Attributes:
        prefill_tokens: most in one step.
        seqs: most decodes in one step.
        kv_tokens: most that the decodes' contexts can sum to.
        context_tokens: longest context of one sequence.
    """

    prefill_tokens: int
    seqs: int
    kv_tokens: int
    context_tokens: int

    @classmethod
    def of(cls, limits: EngineLimits, longest_tokens: int, *, prefix_caching: bool = False) -> Range:
        """The range of an engine that serves nothing longer than `longest_tokens`, prompt plus answer.

        Cached prefixes are held once and read by everyone who shares them, so their contexts may sum to more than
        the memory holds.
        """
        seqs = limits.max_running_seqs or MOST_SEQS
        held = seqs * longest_tokens
        memory = held if limits.kv_tokens is None or prefix_caching else limits.kv_tokens
        tokens = limits.max_batched_tokens or MOST_BATCHED_TOKENS
        return cls(tokens, seqs, min(held, memory), longest_tokens)


class Minorants:
    """Minorants of one step time, tight where they are asked to be. Deterministic; costs some 100 ms."""

    def __init__(self, step_time: StepTime, steps: Range) -> None:
        self._step_time = step_time
        self._range = steps
        self._random = np.random.default_rng(20_240_601)
        self._points = np.vstack([_corners(step_time, steps), _random_steps(self._random, steps, _RANDOM_STEPS)])
        self._times_s = self._seconds(self._points)

    def tight_at(self, steps: Sequence[Step], *, fixed: bool = True) -> Minorant:
        """The minorant that comes nearest to the times of `steps`, all taken together.

        Without a `fixed` part all is charged to what steps hold: right where memory or slots limit a step, not
        deadlines. Raises ValueError when there are no steps.
        """
        if not steps:
            raise ValueError("steps: at least one is needed")
        wanted = np.array([_row(step) for step in steps], dtype=np.float64)
        weights = wanted / self._seconds(wanted)[:, None]
        # Coefficients are sought in units that make them all about one.
        units = 1.0 / np.maximum(weights.max(axis=0), 1e-30)
        units[weights.max(axis=0) == 0.0] = 0.0
        if not fixed:
            units[0] = 0.0
        objective = -(weights * units).sum(axis=0)
        near = self._wide(np.linspace(0, len(self._points) - 1, 400, dtype=np.int64))
        rows, times_s = self._points[near], self._times_s[near]
        found = np.zeros(5)
        for _ in range(_ROUNDS):
            found = units * _solve(objective, rows * units, times_s)
            ratio = (self._points @ found) / self._times_s
            fresh = self._around(self._points[np.argsort(ratio)[-_NEAREST:]])
            fresh_s = self._seconds(fresh)
            violated = (fresh @ found) / fresh_s > 1.0 + _TOLERANCE
            self._points = np.vstack([self._points, fresh[violated]])
            self._times_s = np.concatenate([self._times_s, fresh_s[violated]])
            ratio = (self._points @ found) / self._times_s
            worst = np.flatnonzero(ratio > 1.0 + _TOLERANCE)
            if not len(worst):
                break
            worst = worst[np.argsort(ratio[worst])[-200:]]
            rows = np.vstack([rows, self._points[worst]])
            times_s = np.concatenate([times_s, self._times_s[worst]])
        excess = float(((self._points @ found) / self._times_s).max())
        found *= (1.0 - _SHAVE) / max(excess, 1.0)
        return Minorant(*map(float, found))

    def _wide(self, some: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Some steps, and the extreme ones in every direction."""
        return np.unique(np.concatenate([some, self._points.argmax(axis=0), self._points.argmin(axis=0)]))

    def _seconds(self, points: Floats) -> Floats:
        seconds_of = self._step_time.seconds_of
        times = [seconds_of(int(c), 1 if c else 0, 0, area, int(n), kv) for _, c, n, kv, area in points.tolist()]
        return np.array(times, dtype=np.float64)

    def _around(self, points: Floats) -> Floats:
        """Random steps near the given ones, within the range."""
        spread = self._random.choice([0.01, 0.1, 0.5], size=(12 * len(points), 1))
        factors = np.exp(self._random.normal(size=(12 * len(points), 4)) * spread)
        moved = np.repeat(points, 12, axis=0)
        moved[:, 1:] *= np.where(self._random.random(factors.shape) < 0.5, factors, 1.0)
        return _legal(moved[:, 1], moved[:, 2], moved[:, 3], moved[:, 4], self._range)


def _row(step: Step) -> tuple[float, float, float, float, float]:
    return (
        1.0,
        float(step.prefill_tokens),
        float(step.decode_seqs),
        float(step.decode_kv_tokens),
        step.prefill_attention,
    )


def _solve(objective: Floats, rows: Floats, times_s: Floats) -> Floats:
    scaled = rows / times_s[:, None]
    result = linprog(objective, A_ub=scaled, b_ub=np.ones(len(scaled)), bounds=(0.0, None), method="highs")
    if result.status != 0:
        raise RuntimeError(f"no minorant was found: {result.message}")
    return np.asarray(result.x, dtype=np.float64)


def _legal(tokens: Floats, seqs: Floats, kv: Floats, area: Floats, steps: Range) -> Floats:
    """Rows of steps that can happen, nearest to what is given; without the empty ones."""
    c = np.clip(np.round(tokens), 0, steps.prefill_tokens)
    n = np.clip(np.round(seqs), 0, steps.seqs)
    most_kv = np.minimum(n * steps.context_tokens, steps.kv_tokens)
    kv = np.where(n > 0, np.clip(np.round(kv), np.minimum(n, most_kv), most_kv), 0.0)
    area = np.clip(area, c / 2, c * steps.context_tokens)
    rows = np.column_stack([np.ones(len(c)), c, n, kv, area])
    kept: Floats = np.unique(rows[c + n > 0], axis=0)
    return kept


def _random_steps(random: np.random.Generator, steps: Range, count: int) -> Floats:
    """Steps over the whole range, even over orders of magnitude; a share of each kind alone."""

    def spread(most: float) -> Floats:
        values: Floats = np.exp(random.random(count) * math.log(max(most, 1.0) + 1.0)) - 1.0
        return values

    tokens, seqs = spread(steps.prefill_tokens), spread(steps.seqs)
    kind = random.random(count)
    tokens[kind < 0.2] = 0.0
    seqs[kind > 0.8] = 0.0
    kv = seqs * spread(steps.context_tokens)
    area = tokens * np.maximum(spread(steps.context_tokens), tokens / 2 * (random.random(count) < 0.5))
    return _legal(tokens, seqs, kv, area, steps)


def _corners(step_time: StepTime, steps: Range) -> Floats:
    """All combinations of the tables' points and the range's ends."""
    tokens, seqs, kv, areas = _axes(step_time)
    totals = _within(tokens, steps.prefill_tokens + steps.seqs)
    decodes = _within([*seqs, *tokens], steps.seqs)
    contexts = _within(kv, steps.kv_tokens)
    chosen: list[tuple[float, float, float, float]] = []
    for n in [0.0, *decodes]:
        held = [0.0] if not n else [n, *contexts, n * steps.context_tokens]
        # The linear layers see all tokens: what is left of a corner there after the decodes is prefill.
        chunks = {0.0, 1.0, float(steps.prefill_tokens), *(total - n for total in totals if total > n)}
        for c, context in itertools.product(chunks, held):
            sizes = {0.0} if not c else {c / 2, c * c / 2, c * steps.context_tokens, *areas}
            chosen.extend((c, n, context, area) for area in sizes)
    values = np.array(chosen, dtype=np.float64)
    return _legal(values[:, 0], values[:, 1], values[:, 2], values[:, 3], steps)


def _axes(step_time: StepTime) -> tuple[list[float], list[float], list[float], list[float]]:
    """Where a step time may bend: batched tokens, decodes, their contexts, attention area."""
    while isinstance(step_time, ScaledStepTime | ShiftedStepTime):
        step_time = step_time.base
    powers = [float(2**i) for i in range(21)]
    if not isinstance(step_time, TableStepTime):
        return powers[:15], powers[:11], powers[6::2], powers[6::2]
    attention = step_time.attention
    return (
        list(step_time.tokens.axis),
        list(step_time.decode.row_axis),
        list(step_time.decode.column_axis),
        [] if attention is None else list(attention.axis),
    )


def _within(values: Sequence[float], most: float) -> list[float]:
    """The positive values up to `most`, and `most` itself."""
    return sorted({value for value in values if 0.0 < value < most} | {float(most)})
