"""A backend as the core knows it: what it is (static) and who is on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from tiergate_engine.step import Step, StepTime


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The engine's hard limits, probed or configured. None is unknown and limits nothing.

    Attributes:
        max_running_seqs: most sequences in one batch (vLLM `max_num_seqs`).
        max_batched_tokens: most tokens in one step: the chunk budget when none is driven.
        kv_tokens: KV capacity.
        max_model_tokens: longest prompt plus answer.
        block_tokens: KV block size.
        max_prompt_tokens: longest prompt, where that is less than the above allows.
        lease_tokens: KV for so many tokens of an answer is taken when its request is let in, and for as many again
            when they are made (TGI); None: KV grows as it is needed.
    """

    max_running_seqs: int | None = None
    max_batched_tokens: int | None = None
    kv_tokens: int | None = None
    max_model_tokens: int | None = None
    block_tokens: int = 16
    max_prompt_tokens: int | None = None
    lease_tokens: int | None = None

    @property
    def longest_prompt(self) -> int | None:
        """The most tokens of a prompt, to which at least one token of an answer is added."""
        known = [self.max_prompt_tokens, None if self.max_model_tokens is None else self.max_model_tokens - 1]
        return min([most for most in known if most is not None], default=None)

    def takes(self, prompt_tokens: int, output_tokens: int = 1) -> bool:
        """Whether a prompt, with an answer that may have so many tokens, is not too long."""
        if self.max_prompt_tokens is not None and prompt_tokens > self.max_prompt_tokens:
            return False
        return self.max_model_tokens is None or prompt_tokens + output_tokens <= self.max_model_tokens

    def held_tokens(self, prompt_tokens: int, output_tokens: float, most_output_tokens: int | None) -> int:
        """KV that a sequence holds when its answer has `output_tokens` of `most_output_tokens`, in leases."""
        lease = self.lease_tokens or 1
        leased = math.ceil(output_tokens / lease) * lease
        room = None if self.max_model_tokens is None else max(self.max_model_tokens - prompt_tokens, 1)
        return prompt_tokens + min([leased, *[most for most in (most_output_tokens, room) if most is not None]])


class BackendState(Enum):
    UP = "up"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Backend:
    """One engine endpoint. A new value replaces the old one whenever anything in it changes.

    Attributes:
        models: the model names it serves; empty means any.
        step_time: the current snapshot of its latency profile.
        margin: factor on predicted times, at least 1: 1 + the profile's p90 relative error.
        calibrated: False while its profile is only a prior; nothing is refused for a predicted miss then.
        dynamic_chunk: whether the engine obeys a chunk budget that keeps a step within the tier's pace.
        chunk_tokens: the most prompt tokens of a step, as it was set; None: all that its limits allow.
        pinned: in its tier for good: never returned to the pool, never relabelled.
        ahead_chunk_tokens: longer prompts are sent ahead in chunks of so many tokens, with a step without any
            behind each; None where prompts come whole.
        prefill_interval: chunks have steps of their own, in which no decode gets a token, and so many steps of
            decodes lie between two of them: with 0, decodes wait for the whole queue (SGLang without mixed
            chunks). None: chunks share their steps with decodes.
    """

    name: str
    step_time: StepTime
    models: frozenset[str] = field(default_factory=frozenset)
    limits: EngineLimits = EngineLimits()
    state: BackendState = BackendState.UP
    margin: float = 1.0
    calibrated: bool = True
    dynamic_chunk: bool = False
    chunk_tokens: int | None = field(default=None, kw_only=True)
    pinned: bool = False
    ahead_chunk_tokens: int | None = None
    prefill_interval: int | None = field(default=None, kw_only=True)

    def serves(self, model: str) -> bool:
        return not self.models or model in self.models

    def between_chunks_s(self, decodes: int, kv_tokens: int) -> float:
        """What steps of decodes take between two chunks; 0.0 where chunks share steps with them."""
        if not self.prefill_interval or not decodes:
            return 0.0
        return self.prefill_interval * self.step_time.decode_seconds(decodes, kv_tokens)

    def chunk_step_s(self, chunk: int, decodes: int, kv_tokens: int) -> float:
        """The least time from one chunk to the next, beside these decodes."""
        if self.prefill_interval is None:
            return self.step_time.seconds_of(chunk, 1, 0, 0.0, decodes, kv_tokens)
        alone_s = self.step_time.seconds_of(chunk, 1, 0, 0.0, 0, 0.0)
        return alone_s + self.between_chunks_s(decodes, kv_tokens)

    def chunk_within(self, decodes: Step, within_s: float, most: int) -> int:
        """The largest chunk of a prompt's beginning, up to `most`, with which decodes get a token in time."""
        if self.prefill_interval is None:
            return self.step_time.chunk_tokens(decodes, within_s, 0, most)
        left_s = within_s - self.step_time.seconds(decodes) if decodes.decode_seqs else within_s
        return self.step_time.chunk_tokens(Step(), left_s, 0, most) if left_s > 0.0 else 0
