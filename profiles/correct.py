"""Learning online how far one backend's steps are from its profile: one factor per regime.

An observation is compared with what the profile predicts for the same step. The factor is the weighted median of
the ratios, newest first with a half-life in observations, and the profile itself counts as a few observations of
ratio one. A median does not move for outliers (a garbage collection, a stalled network), and needs no step size.
The error that is shown is prequential: every observation is judged by the factor from before it was seen.

What other replicas observed of the same backend counts like one's own, in bins half a percent wide
(`profiles.evidence`): the factor is the median of all ratios together.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles.evidence import UNIT, RegimeEvidence, StepEvidence, binned
from profiles.format import ProfileError
from tiergate_engine.step import Step, StepTime
from tiergate_engine.steptime import ScaledStepTime

CALIBRATED_STEPS = 200
"""Steps to have seen before a backend without a profile counts as calibrated."""

_KEPT = 256
_HALF_LIFE = 64.0  # observations
_PROFILE_WEIGHT = 4.0  # a profile counts as so many fresh observations
_WIDEST_LOG = math.log(50.0)  # a factor beyond 50 either way says that the observation is wrong
_ENOUGH_ERRORS = 20  # before that many, an error quantile is the profile's own
_UNKNOWN_ERROR = 0.5  # p90 of a prior that nobody has tested
_FACTOR_EVERY = 8  # observations between refreshes of the factor that judges
_TOLD_AT_ONCE = 4  # steps of a regime that are learned from, of those that an engine tells at once
RATIO_WIDTH = 0.005  # of the bins in which ratios are told to others, in logarithms: half a percent
ERROR_WIDTH = 0.002  # the same for errors


@dataclass(frozen=True, slots=True)
class RegimeCorrection:
    """What was learned of one regime. Errors are None before the first observation."""

    factor: float
    observations: int
    p50_error: float | None
    p90_error: float | None


@dataclass(frozen=True, slots=True)
class CorrectedProfile:
    """A snapshot of one backend's step times.

    Attributes:
        step_time: the profile times the learned factors.
        calibrated: False while it rests on a prior and fewer than `CALIBRATED_STEPS` steps.
        p90_error: the error to leave room for: the decodes' p90 lately, or the profile's while little is known.
            A TTFT is not judged here: it holds waiting and network besides steps; see `mixed` for its error.
        version: rises with every observation, so that a reader can tell a newer snapshot.
    """

    step_time: StepTime
    calibrated: bool
    p90_error: float
    version: int
    decode: RegimeCorrection
    mixed: RegimeCorrection


class _RegimeState(BaseModel):
    model_config = ConfigDict(extra="forbid")
    log_ratios: list[float] = Field(max_length=_KEPT)
    errors: list[float] = Field(max_length=_KEPT)
    observations: int = Field(ge=0)


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid")
    decode: _RegimeState
    mixed: _RegimeState
    steps: int = Field(ge=0)


class _Regime:
    """Ratios of one regime, oldest first."""

    def __init__(self) -> None:
        self.log_ratios: deque[float] = deque(maxlen=_KEPT)
        self.errors: deque[float] = deque(maxlen=_KEPT)
        self.observations = 0
        self._log_factor = 0.0
        self._heard_ratios: list[tuple[float, float]] = []
        self._heard_errors: list[tuple[float, float]] = []
        self._heard_observations = 0.0
        self._told: RegimeEvidence | None = None  # as long as nothing more was observed

    @property
    def knows(self) -> bool:
        """Whether anybody has observed anything."""
        return self.observations > 0 or self._heard_observations > 0

    def hear(self, others: RegimeEvidence) -> None:
        """What all others together have observed, in place of what was heard before."""
        self._heard_ratios = [(bin_ * RATIO_WIDTH, weight / UNIT) for bin_, weight in others.log_ratios.items()]
        self._heard_errors = [
            (math.expm1(bin_ * ERROR_WIDTH), weight / UNIT) for bin_, weight in others.errors.items()
        ]
        self._heard_observations = others.observations / UNIT

    def evidence(self) -> RegimeEvidence:
        """What was observed here."""
        if self._told is None:
            self._told = RegimeEvidence(
                log_ratios=binned(self._own_ratios(), RATIO_WIDTH),
                errors=binned(((math.log1p(error), 1.0) for error in self.errors), ERROR_WIDTH),
                observations=self.observations * UNIT,
            )
        return self._told

    def _own_ratios(self) -> list[tuple[float, float]]:
        """The log ratios with their weights."""
        weighted = []
        weight, decay = 1.0, 0.5 ** (1.0 / _HALF_LIFE)
        for value in reversed(self.log_ratios):
            weighted.append((value, weight))
            weight *= decay
        return weighted

    def observe(self, log_ratio: float, start_log: float) -> None:
        if self.observations % _FACTOR_EVERY == 0 or self.observations < _FACTOR_EVERY:
            self._log_factor = self.log_factor(start_log)
        self.errors.append(abs(math.expm1(log_ratio - self._log_factor)))
        self.log_ratios.append(log_ratio)
        self.observations += 1
        self._told = None

    def log_factor(self, start_log: float) -> float:
        """The weighted median of the log ratios, with the starting point among them."""
        weighted = [(start_log, _PROFILE_WEIGHT), *self._own_ratios(), *self._heard_ratios]
        weighted.sort()
        half = sum(item[1] for item in weighted) / 2.0
        total = 0.0
        for value, share in weighted:
            total += share
            if total >= half:
                return value
        return start_log

    def snapshot(self, start_log: float) -> RegimeCorrection:
        errors = sorted([*((error, 1.0) for error in self.errors), *self._heard_errors])
        return RegimeCorrection(
            math.exp(self.log_factor(start_log)),
            self.observations + round(self._heard_observations),
            _quantile(errors, 0.5),
            _quantile(errors, 0.9),
        )

    def state(self) -> _RegimeState:
        return _RegimeState(
            log_ratios=list(self.log_ratios), errors=list(self.errors), observations=self.observations
        )

    def restore(self, state: _RegimeState) -> None:
        self.log_ratios = deque(state.log_ratios, maxlen=_KEPT)
        self.errors = deque(state.errors, maxlen=_KEPT)
        self.observations = state.observations
        self._told = None
        self._log_factor = self.log_factor(0.0)


class Corrector:
    """Learns one backend's factors. Not thread-safe: one owner observes and takes snapshots.

    Args:
        base: the profile's step time, or a prior's.
        measured: whether `base` comes from a profile; False for a prior.
        p90_error: the profile's own p90 error, shown until enough was observed.
        chunk_tokens: the engine's token budget of one step; how `observe_prefill` cuts a prompt.
    """

    def __init__(
        self,
        base: StepTime,
        *,
        measured: bool = True,
        p90_error: float | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        self._base = base
        self._measured = measured
        self._p90_error = _UNKNOWN_ERROR if p90_error is None else p90_error
        self._chunk_tokens = chunk_tokens or 2048
        self._decode = _Regime()
        self._mixed = _Regime()
        self._steps = 0
        self._heard_steps = 0.0
        self._version = 0

    def observe(self, step: Step, seconds: float, steps: int = 1) -> None:
        """One step's duration, or the median of `steps` steps that held about the same.

        A duration that is not positive and finite is ignored, as is an empty step.
        """
        predicted_s = self._base.seconds(step)
        self._learn(self._mixed if step.prefill_tokens else self._decode, predicted_s, seconds, steps)

    def observe_decode(self, seqs: int, kv_tokens: int, seconds: float, steps: int = 1) -> None:
        """The median gap between tokens of one backend's streams, while `seqs` of them decode.

        `kv_tokens` is the sum of their contexts, `steps` how many gaps of one stream the median was taken over.
        """
        self._learn(self._decode, self._base.decode_seconds(seqs, kv_tokens), seconds, steps)

    def observe_prefill(
        self, prompt_tokens: int, decode_seqs: int, kv_tokens: int, seconds: float, steps: int | None = None
    ) -> None:
        """The time from sending a prompt to its first token, beside `decode_seqs` decodes.

        `prompt_tokens` includes the prompts that were queued before it. It is cut into `steps` even chunks, or as
        the engine's token budget cuts it; half a decode step is added for the step that was running.
        """
        if prompt_tokens <= 0:
            return
        room = max(self._chunk_tokens - decode_seqs, 1)
        count = steps or math.ceil(prompt_tokens / room)
        chunk = math.ceil(prompt_tokens / count)
        predicted_s = self._base.decode_seconds(decode_seqs, kv_tokens) / 2.0
        done = 0
        while done < prompt_tokens:
            tokens = min(chunk, prompt_tokens - done)
            area = tokens * (done + tokens / 2)
            predicted_s += self._base.seconds_of(tokens, 1, done, area, decode_seqs, kv_tokens)
            done += tokens
        self._learn(self._mixed, predicted_s, seconds, count)

    def observe_told(self, steps: Sequence[tuple[Step, float]], of: int | None = None) -> None:
        """Steps that the engine itself told, with their seconds; `of` counts those that it did not tell as well.

        At first all count, later some of each regime, evenly spaced: what is remembered then spans a while at any
        rate of steps. Single steps, not means, set the error.
        """
        each = max(of or 0, len(steps)) / max(len(steps), 1)
        for mixed, regime in ((False, self._decode), (True, self._mixed)):
            told = [one for one in steps if bool(one[0].prefill_tokens) is mixed]
            most = _TOLD_AT_ONCE if regime.observations >= _HALF_LIFE else len(told)
            looked = told[:: max(math.ceil(len(told) / max(most, 1)), 1)]
            for step, seconds in looked:
                self.observe(step, seconds, math.ceil(each * len(told) / len(looked)))

    def snapshot(self) -> CorrectedProfile:
        """What is known now. Immutable; later observations do not change it."""
        decode = self._decode.snapshot(0.0)
        # A slow machine is slow in both regimes: until mixed steps tell, they follow the decodes.
        mixed = self._mixed.snapshot(math.log(decode.factor))
        return CorrectedProfile(
            ScaledStepTime(self._base, decode.factor, mixed.factor),
            self._measured or self._steps + self._heard_steps >= CALIBRATED_STEPS,
            self._current_p90(decode),
            self._version,
            decode,
            mixed,
        )

    def to_json(self) -> str:
        """What was learned, for `restore` in another process or replica."""
        return _State(decode=self._decode.state(), mixed=self._mixed.state(), steps=self._steps).model_dump_json()

    def restore(self, text: str | bytes) -> None:
        """Replace what was learned by what `to_json` wrote. Raises ProfileError when it is not that."""
        try:
            state = _State.model_validate_json(text)
        except ValidationError as error:
            raise ProfileError(f"not a saved correction: {error.errors(include_url=False)[0]['msg']}") from error
        self._decode.restore(state.decode)
        self._mixed.restore(state.mixed)
        self._steps = state.steps
        self._version += 1

    @property
    def base(self) -> str:
        """Which profile the ratios are relative to."""
        decode_s = self._base.decode_seconds(8, 8_000)
        return f"{decode_s:.6e} {self._base.seconds_of(512, 1, 0, 512 * 256, 8, 8_000):.6e}"

    def evidence(self) -> StepEvidence:
        """What was observed here, for other replicas; nothing of what was heard from them."""
        return StepEvidence(
            base=self.base,
            decode=self._decode.evidence(),
            mixed=self._mixed.evidence(),
            steps=self._steps * UNIT,
        )

    def hear(self, others: Iterable[StepEvidence]) -> None:
        """What each other replica has observed, in place of what was heard before. What is relative to another
        profile is left out."""
        same = [other for other in others if other.base == self.base]
        together = same[0] if len(same) == 1 else StepEvidence.merge(self.base, same)
        self._decode.hear(together.decode)
        self._mixed.hear(together.mixed)
        self._heard_steps = together.steps / UNIT
        self._version += 1

    def _learn(self, regime: _Regime, predicted_s: float, seconds: float, steps: int) -> None:
        if not (math.isfinite(seconds) and seconds > 0.0 and predicted_s > 0.0):
            return
        log_ratio = min(max(math.log(seconds / predicted_s), -_WIDEST_LOG), _WIDEST_LOG)
        start_log = self._decode.log_factor(0.0) if regime is self._mixed and not regime.knows else 0.0
        regime.observe(log_ratio, start_log)
        self._steps += max(steps, 1)
        self._version += 1

    def _current_p90(self, decode: RegimeCorrection) -> float:
        if decode.p90_error is None or decode.observations < _ENOUGH_ERRORS:
            return self._p90_error
        return decode.p90_error


def _quantile(ordered: list[tuple[float, float]], share: float) -> float | None:
    """The value of (value, weight) below which lies this share of the weight; None without any."""
    beyond = share * sum(weight for _, weight in ordered)
    total = 0.0
    for value, weight in ordered:
        total += weight
        if total > beyond:
            return value
    return ordered[-1][0] if ordered else None
