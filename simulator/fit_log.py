"""Fits a step-time formula to an engine's log alone, where no profile of the machine exists.

A log says when each request came and when its first and last token left, not what any step held. The engine model
supplies that: it is replayed, the steps it made stand for the engine's, and the formula's coefficients are moved
until the steps between a request's two tokens add up to the time the log says passed between them. With other
step times the model makes other steps, so the two alternate, and the replay that agrees best with the log is kept.

What comes out describes the machine as far as the log shows it: outside the batch sizes and contexts that occur
there it is the formula's guess.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from simulator.replay import CommonStep, EngineLog, Replayed, replay
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime

_Floats = npt.NDArray[np.float64]

_ROUNDS = 16
_OUTLIER = 0.1  # relative residuals beyond this count linearly, not squared
_SHARPNESSES = (1.0, 2.0, 4.0)  # of the roofline's bend: none, soft, sharp
_START = (0.02, 1e-4, 1e-5, 1e-7)  # weights, per token, per sequence, per KV token: a mid-sized GPU
_LEAST = 1e-3  # of a starting value: the solver wants to begin inside its bounds


@dataclass(frozen=True, slots=True)
class LogFit:
    """A step time fitted from a log, and how the fit went.

    Attributes:
        part: the requests it was fitted on, by order of arrival.
        error: root mean square of the relative errors of TTFT and TPOT over them, outliers softened.
    """

    step_time: RooflineStepTime
    part: slice
    error: float


def fit_step_time(log: EngineLog, part: slice) -> LogFit:
    """The step time under which replaying the log comes closest to TTFT and TPOT of the requests in `part`.

    Four coefficients: fixed (the weights of the roofline), per token, per decode, per KV token. Host time is in
    them. The roofline's bend is the one of three that fits `part` best. All requests are replayed, but times of
    those outside `part` are never looked at.
    """
    return min((_fit(log, part, sharpness) for sharpness in _SHARPNESSES), key=lambda fit: fit.error)


def _fit(log: EngineLog, part: slice, sharpness: float) -> LogFit:
    logged = _logged(log, part)
    coefficients = np.array(_START)
    best: LogFit | None = None
    for _ in range(_ROUNDS):
        step_time = _formula(coefficients, sharpness)
        steps: list[CommonStep] = []
        replayed = replay(log.requests, log.config, step_time, log.engines, steps.append)
        error = _size(_errors(logged, replayed, part))
        if best is None or error < best.error:
            best = LogFit(step_time, part, error)
        refined = _refine(coefficients, _Windows.of(log, replayed, steps, part), logged, sharpness)
        coefficients = (coefficients + refined) / 2.0  # undamped, the two chase each other
    assert best is not None
    return best


def _formula(coefficients: _Floats, sharpness: float) -> RooflineStepTime:
    weights_s, per_token_s, per_seq_s, per_kv_s = map(float, coefficients)
    return RooflineStepTime(
        weights_s=weights_s,
        per_token_s=per_token_s,
        per_seq_s=per_seq_s,
        per_kv_s=per_kv_s,
        sharpness=sharpness,
    )


@dataclass(frozen=True, slots=True)
class _Logged:
    ttft_s: _Floats
    answer_s: _Floats  # from the first to the last token


def _logged(log: EngineLog, part: slice) -> _Logged:
    requests = log.requests[part]
    return _Logged(
        np.array([request.first_token_s - request.arrival_s for request in requests]),
        np.array([request.last_token_s - request.first_token_s for request in requests]),
    )


def _errors(logged: _Logged, replayed: Replayed, part: slice) -> _Floats:
    ttft_s, answer_s = np.array(replayed.ttft_s[part]), np.array(replayed.answer_s[part])
    return np.concatenate([ttft_s / logged.ttft_s - 1.0, answer_s / logged.answer_s - 1.0])


def _size(errors: _Floats) -> float:
    softened = 2.0 * _OUTLIER**2 * (np.sqrt(1.0 + (errors / _OUTLIER) ** 2) - 1.0)
    return float(np.sqrt(np.mean(softened)))


@dataclass(frozen=True, slots=True)
class _Windows:
    """What a replay's steps held, and between which of them each request's tokens came.

    `tokens`, `seqs` and `kv` have an entry per step, the others one per request: its first token ends step `first`
    and its last one step `last`; step `began` is the first that began after it came, `before_s` later.
    """

    tokens: _Floats
    seqs: _Floats
    kv: _Floats
    before_s: _Floats
    began: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]

    @classmethod
    def of(cls, log: EngineLog, replayed: Replayed, steps: Sequence[CommonStep], part: slice) -> _Windows:
        held: list[Step] = [step.step for step in steps]
        ends_s = [step.ends_s for step in steps]
        arrivals_s = [request.arrival_s for request in log.requests[part]]
        firsts_s = [arrival + ttft for arrival, ttft in zip(arrivals_s, replayed.ttft_s[part], strict=True)]
        lasts_s = [first + answer for first, answer in zip(firsts_s, replayed.answer_s[part], strict=True)]
        # A nanosecond lets times that were subtracted and added again meet the step they came from.
        first = [bisect_left(ends_s, at_s - 1e-9) for at_s in firsts_s]
        last = [bisect_left(ends_s, at_s - 1e-9) for at_s in lasts_s]
        began = [min(bisect_left(ends_s, at_s), end) for at_s, end in zip(arrivals_s, first, strict=True)]
        before_s = [
            max(ends_s[index] - at_s, 0.0) if index < end else 0.0
            for index, at_s, end in zip(began, arrivals_s, first, strict=True)
        ]
        # The step in flight when a request came is paid for by `before_s`; the sums begin behind it.
        return cls(
            tokens=np.array([step.tokens for step in held], dtype=np.float64),
            seqs=np.array([step.decode_seqs for step in held], dtype=np.float64),
            kv=np.array([step.decode_kv_tokens for step in held], dtype=np.float64),
            before_s=np.array(before_s),
            began=np.array([index + 1 if index < end else index for index, end in zip(began, first, strict=True)]),
            first=np.array(first),
            last=np.array(last),
        )

    def predict(self, coefficients: _Floats, sharpness: float) -> tuple[_Floats, _Floats]:
        """TTFT and time from the first to the last token, were the steps as they are."""
        weights, per_token, per_seq, per_kv = coefficients
        roof = (weights**sharpness + (per_token * self.tokens) ** sharpness) ** (1.0 / sharpness)
        ends = np.concatenate([[0.0], np.cumsum(roof + per_seq * self.seqs + per_kv * self.kv)])
        ttft_s = self.before_s + ends[self.first + 1] - ends[self.began]
        return ttft_s, ends[self.last + 1] - ends[self.first + 1]


def _refine(coefficients: _Floats, windows: _Windows, logged: _Logged, sharpness: float) -> _Floats:
    """The coefficients that fit best if the steps stay as they are."""
    units = np.array(_START)

    def residuals(scaled: _Floats) -> _Floats:
        ttft_s, answer_s = windows.predict(scaled * units, sharpness)
        return np.concatenate([ttft_s / logged.ttft_s - 1.0, answer_s / logged.answer_s - 1.0])

    found = least_squares(
        residuals,
        np.maximum(coefficients / units, _LEAST),
        bounds=(0.0, np.inf),
        loss="soft_l1",
        f_scale=_OUTLIER,
        max_nfev=200,
    )
    result: _Floats = np.asarray(found.x, dtype=np.float64) * units
    return result
