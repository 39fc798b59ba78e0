"""Fitting the roofline formula to observed steps.

Least squares on relative residuals (softened for outliers) with all coefficients non-negative; the error that is
reported is that of k-fold cross-validation, so no observation judges a fit it took part in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from profiles.format import FitError
from tiergate_engine.step import Step, StepTime
from tiergate_engine.steptime import RAMP_TOKENS, RooflineStepTime

Floats: TypeAlias = NDArray[np.float64]

_MAX_SHARPNESS = 8.0  # a sharper bend than this is not to be told from noise
_OUTLIER = 0.1  # relative residuals beyond this count linearly, not squared
_LINEAR = ("per_token_s", "per_seq_s", "per_kv_s", "mixed_kv_s", "per_context_s", "per_attention_s")


@dataclass(frozen=True, slots=True)
class Observation:
    """One step and how long it took. `weight` says how many equal observations it stands for."""

    step: Step
    seconds: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted formula and its cross-validated errors (None: too few observations of that regime)."""

    step_time: RooflineStepTime
    decode_error: FitError | None
    mixed_error: FitError | None


def fit_roofline(observations: Sequence[Observation]) -> RooflineStepTime:
    """The formula that fits the observations best, in relative terms.

    The linear model (no smooth maximum) is solved exactly by NNLS and is the starting point; the bent one is kept
    only when it fits better. A column without any spread gets coefficient zero.

    Raises:
        ValueError: fewer than two observations, or a time that is not positive.
    """
    if len(observations) < 2:
        raise ValueError(f"{len(observations)} observations cannot fix a formula: measure more steps")
    columns, seconds, weights = _matrix(observations)
    if not np.all(np.isfinite(seconds)) or float(seconds.min()) <= 0.0:
        raise ValueError("an observed step time is not a positive finite number")
    straight = _fit_straight(columns, seconds, weights)
    bent = _fit_bent(columns, seconds, weights, straight)
    return min((straight, bent), key=lambda model: _cost(model, columns, seconds, weights))


def fit(observations: Sequence[Observation], folds: int = 5, seed: int = 0) -> Fit:
    """`fit_roofline`, and its error by cross-validation in `folds` parts. Raises ValueError as it does."""
    return Fit(fit_roofline(observations), *cross_validate(fit_roofline, observations, folds, seed))


def cross_validate(
    fitter: Callable[[Sequence[Observation]], StepTime],
    observations: Sequence[Observation],
    folds: int = 5,
    seed: int = 0,
) -> tuple[FitError | None, FitError | None]:
    """The errors of decode-only and of mixed steps, each predicted by a fit that had not seen it."""
    parts = np.random.default_rng(seed).permutation(len(observations)) % folds
    errors: dict[bool, list[float]] = {False: [], True: []}
    for part in range(folds):
        known = [item for item, own in zip(observations, parts, strict=True) if own != part]
        held_out = [item for item, own in zip(observations, parts, strict=True) if own == part]
        if len(known) < 2 or not held_out:
            continue
        model = fitter(known)
        for item in held_out:
            errors[item.step.prefill_tokens > 0].append(abs(model.seconds(item.step) / item.seconds - 1.0))
    return summarise(errors[False], folds), summarise(errors[True], folds)


def summarise(errors: Sequence[float], folds: int) -> FitError | None:
    """Relative errors as the profile format keeps them; None for fewer than five."""
    if len(errors) < 5:
        return None
    p50, p90 = np.percentile(errors, [50, 90])
    return FitError(
        mape=round(float(np.mean(errors)), 5),
        p50=round(float(p50), 5),
        p90=round(float(p90), 5),
        observations=len(errors),
        folds=folds,
    )


def _matrix(observations: Sequence[Observation]) -> tuple[Floats, Floats, Floats]:
    rows: list[tuple[float, ...]] = []
    for item in observations:
        step = item.step
        ramp = min(step.prefill_tokens / RAMP_TOKENS, 1.0)
        rows.append(
            (
                step.tokens,
                step.decode_seqs,
                step.decode_kv_tokens,
                step.decode_kv_tokens * ramp,
                step.prefill_context_tokens * ramp,
                step.prefill_attention,
            )
        )
    return (
        np.array(rows, dtype=np.float64),
        np.array([item.seconds for item in observations], dtype=np.float64),
        np.sqrt(np.array([item.weight for item in observations], dtype=np.float64)),
    )


def _fit_straight(columns: Floats, seconds: Floats, weights: Floats) -> RooflineStepTime:
    scaled = np.column_stack([np.ones(len(seconds)), columns]) * (weights / seconds)[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0.0] = 1.0
    solution, _ = nnls(scaled / norms, weights)
    values = solution / norms
    return RooflineStepTime(c0_s=float(values[0]), **dict(zip(_LINEAR, map(float, values[1:]), strict=True)))


def _predict(vector: Floats, columns: Floats) -> Floats:
    c0, weights, per_token = vector[0], vector[1], vector[2]
    s = vector[8]
    top = np.maximum(weights, per_token * columns[:, 0])
    bottom = np.minimum(weights, per_token * columns[:, 0])
    with np.errstate(invalid="ignore"):
        bend = np.where(top > 0.0, bottom / np.where(top > 0.0, top, 1.0), 0.0)
    roof = top * (1.0 + bend**s) ** (1.0 / s)
    result: Floats = c0 + roof + columns[:, 1:] @ vector[3:8]
    return result


def _fit_bent(columns: Floats, seconds: Floats, weights: Floats, straight: RooflineStepTime) -> RooflineStepTime:
    # In units where every coefficient's typical contribution is about one, the solver's steps are well scaled.
    floor = float(seconds.min())
    typical = np.maximum(np.abs(columns).max(axis=0), 1.0)
    units = np.concatenate([[floor, floor], float(np.median(seconds)) / typical, [1.0]])
    linear = np.array([getattr(straight, name) for name in _LINEAR])
    best: tuple[float, Floats] | None = None

    def residuals(x: Floats) -> Floats:
        result: Floats = (_predict(x * units, columns) / seconds - 1.0) * weights
        return result

    for share, bend in ((0.4, 2.0), (0.9, 3.0), (1.0, 2.0)):
        start = np.concatenate([[floor * (1.0 - share), floor * share], linear, [bend]]) / units
        lower = np.zeros(9)
        lower[8] = 1.0
        upper = np.full(9, np.inf)
        upper[8] = _MAX_SHARPNESS
        found = least_squares(
            residuals,
            np.clip(start, lower + 1e-6, upper),
            bounds=(lower, upper),
            loss="soft_l1",
            f_scale=_OUTLIER,
            max_nfev=300,
        )
        if best is None or found.cost < best[0]:
            best = (float(found.cost), np.asarray(found.x, dtype=np.float64))
    assert best is not None
    values = best[1] * units
    # What the solver leaves next to a bound is zero for every purpose, and so is what nothing was observed of.
    values = np.where(best[1] < 1e-7, 0.0, values)
    values[2:8][~columns.any(axis=0)] = 0.0
    return RooflineStepTime(
        c0_s=float(values[0]),
        weights_s=float(values[1]),
        sharpness=float(max(values[8], 1.0)),
        **dict(zip(_LINEAR, map(float, values[2:8]), strict=True)),
    )


def _cost(model: RooflineStepTime, columns: Floats, seconds: Floats, weights: Floats) -> float:
    vector = np.array(
        [model.c0_s, model.weights_s, *(getattr(model, name) for name in _LINEAR), model.sharpness],
        dtype=np.float64,
    )
    residuals = (_predict(vector, columns) / seconds - 1.0) * weights
    return float(np.sum(np.sqrt(1.0 + (residuals / _OUTLIER) ** 2) - 1.0)) * 2.0 * _OUTLIER**2
