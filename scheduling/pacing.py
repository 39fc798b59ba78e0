"""Prefill pacing: how many prompt tokens a second may be let into an engine whose chunks cannot be told.

An engine with a fixed token budget puts a chunk into every step while a prompt is there, and each such step is
longer than one of decodes only. Who decides when prompts come decides how many steps are long. With m chunks a
second that each take the decodes `extra_s` longer than a step without one, decodes get a token every

    TPOT = T_d / (1 - m * extra_s)        so    m <= (1 - T_d / TPOT) / extra_s

on average, with T_d the time of a step of decodes only. A chunk in a step with decodes (Sarathi-Serve; vLLM, TGI)
has ``C - B`` tokens, C the budget and B the decodes, and ``extra_s = T_mix - T_d``. Where a chunk has a step of
its own (SGLang without mixed chunks), it has C tokens and `extra_s` is all of that step.

This bounds the mean over many tokens, not each gap: a chunk is as long as the budget makes it. Gaps are bounded by
what is in prefill at once (`tokens_at_once`), because a chunk is no longer than the prompts there are; but one
prompt that is longer is cut by the budget only, and for a bound on its gaps the budget has to be small enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tiergate_engine.step import Step, StepTime


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """What one whole chunk costs the decodes that run.

    Attributes:
        chunk_tokens: prompt tokens of a whole chunk; 0 when the decodes leave no room for one.
        decode_step_s: a step of the decodes only.
        extra_s: how much longer the decodes wait for their next token when there is a chunk.
        alone: the chunk has a step of its own, in which no decode gets a token.
    """

    chunk_tokens: int
    decode_step_s: float
    extra_s: float
    alone: bool = False

    @classmethod
    def of(
        cls, step_time: StepTime, decodes: Step, budget_tokens: int, host_s: float = 0.0, *, alone: bool = False
    ) -> ChunkCost:
        """By a profile. `decodes` run meanwhile; `host_s` is what a step takes besides the model's time."""
        decode_s = step_time.seconds(decodes) + host_s if decodes.decode_seqs else 0.0
        tokens = max(budget_tokens if alone else budget_tokens - decodes.decode_seqs, 0)
        if not tokens:
            return cls(0, decode_s, 0.0, alone)
        if alone:
            return cls(tokens, decode_s, step_time.seconds(Step.chunk(tokens)) + host_s, alone)
        mixed_s = step_time.seconds(decodes + Step.chunk(tokens)) + host_s
        return cls(tokens, decode_s, max(mixed_s - decode_s, 0.0), alone)

    def rate_tokens_s(self, tpot_s: float) -> float:
        """Most prompt tokens a second with which decodes keep `tpot_s` on average.

        Infinite where no rate could break it, 0.0 where the decodes alone are slower or leave no room.
        """
        if tpot_s == math.inf:
            return math.inf
        if not self.chunk_tokens or self.decode_step_s >= tpot_s:
            return 0.0
        if self.extra_s == 0.0 or (not self.alone and self.decode_step_s + self.extra_s <= tpot_s):
            return math.inf
        return self.chunk_tokens * (1.0 - self.decode_step_s / tpot_s) / self.extra_s

    def tpot_s(self, rate_tokens_s: float) -> float:
        """The mean time per token that decodes get at this rate of prompts: the inverse of `rate_tokens_s`.

        Infinite beyond what the engine can compute.
        """
        if rate_tokens_s <= 0.0:
            return self.decode_step_s
        if not self.chunk_tokens:
            return math.inf
        chunks = rate_tokens_s / self.chunk_tokens
        if not self.alone and chunks * (self.decode_step_s + self.extra_s) > 1.0:
            return math.inf
        left = 1.0 - chunks * self.extra_s
        return self.decode_step_s / left if left > 0.0 else math.inf


def tokens_at_once(
    step_time: StepTime, decodes: Step, budget_tokens: int, tpot_s: float, *, alone: bool = False
) -> float:
    """Most prompt tokens that may be in prefill at once, so that a step with all of them keeps `tpot_s`.

    With steps of their own (`alone`) they and the decodes' step behind them keep it. 0 where the decodes alone are
    slower; infinite where a whole chunk keeps it, which then any number of prompts may make up.
    """
    decode_s = step_time.seconds(decodes) if decodes.decode_seqs else 0.0
    if tpot_s == math.inf:
        return math.inf
    if decode_s >= tpot_s:
        return 0
    if alone:
        return step_time.chunk_tokens(Step(), tpot_s - decode_s, 0, max(budget_tokens, 1))
    most = max(budget_tokens - decodes.decode_seqs, 1)
    tokens = step_time.chunk_tokens(decodes, tpot_s, 0, most)
    return math.inf if tokens >= most else tokens


class PrefillBucket:
    """Lets prompts in at a rate: a token bucket that may go into debt.

    A prompt goes in when the bucket holds its tokens, or is full. So one larger than the bucket need not wait for
    ever; what it takes beyond what is there has to run in again before the next one goes in. In any stretch of
    t seconds at one rate, the prompts before the last of it bring at most ``burst + rate * t`` tokens.
    """

    __slots__ = ("_at_s", "_burst", "_level", "_rate")

    def __init__(self, burst_tokens: float, rate_tokens_s: float, now_s: float) -> None:
        """Full. `burst_tokens`: what may go in at once, at least a chunk for an engine to work on."""
        if not burst_tokens > 0.0:
            raise ValueError(f"burst_tokens must be positive, not {burst_tokens}")
        self._burst = burst_tokens
        self._level = burst_tokens
        self._rate = _checked(rate_tokens_s)
        self._at_s = now_s

    @property
    def rate_tokens_s(self) -> float:
        return self._rate

    def set_rate(self, rate_tokens_s: float, now_s: float) -> None:
        """From now on; what has run in until now stays."""
        self._run(now_s)
        self._rate = _checked(rate_tokens_s)

    def wait_s(self, prompt_tokens: int, now_s: float) -> float:
        """How long until a prompt may go in: 0.0 if now, infinite at a rate of zero."""
        self._run(now_s)
        lacking = min(prompt_tokens, self._burst) - self._level
        if lacking <= 0.0 or self._rate == math.inf:
            return 0.0
        return lacking / self._rate if self._rate > 0.0 else math.inf

    def take(self, prompt_tokens: int, now_s: float) -> None:
        """A prompt has gone in, whether it was to wait or not: promises may come before the pace."""
        self._run(now_s)
        if self._rate < math.inf:
            self._level -= prompt_tokens

    def give_back(self, prompt_tokens: int, now_s: float) -> None:
        """A prompt that had gone in was not computed after all, or found in the cache."""
        self._run(now_s)
        self._level = min(self._level + prompt_tokens, self._burst)

    def _run(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        if passed_s <= 0.0:
            return
        self._at_s = now_s
        if self._rate == math.inf:
            self._level = self._burst
        else:
            self._level = min(self._level + self._rate * passed_s, self._burst)


def _checked(rate_tokens_s: float) -> float:
    if not rate_tokens_s >= 0.0:
        raise ValueError(f"rate_tokens_s must be at least 0, not {rate_tokens_s}")
    return rate_tokens_s
