"""What one engine is told and what it answers: settings, sequences, steps and tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tiergate_engine.drive import Rules
from tiergate_engine.step import Step

MIN_CHUNK_TOKENS = 16
"""The chunk of a prompt on an engine that has nothing else to do, when its pace allows none."""


class EngineFull(Exception):
    """The queue is at its cap; the sequence was not taken."""


class SequenceTooLong(ValueError):
    """Prompt plus answer are longer than the model or the KV cache takes."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine's settings, named after what they limit (vLLM's names in brackets).

    Attributes:
        kv_tokens: KV capacity; only whole blocks of it are used.
        max_model_tokens: longest prompt plus answer [max_model_len].
        max_running_seqs: most sequences in one step [max_num_seqs].
        max_batched_tokens: most tokens in one step [max_num_batched_tokens].
        block_tokens: KV block size.
        priority_scheduling: order by (priority, arrival), small first, instead of arrival.
        host_step_s: host time of a step that the step-time profile does not contain.
        host_seq_s: the same for each sequence in the step.
        prefix_caching: reuse the KV of given prefix blocks and of preempted sequences.
        whole_prompt: admit a prompt only when all of it fits the free blocks [scheduler_reserve_full_isl].
        max_queued_seqs: longest queue; None is unlimited [--max-num-queued-reqs].
        async_scheduling: the next step is filled while one runs [--async-scheduling, vLLM's default], so a
            sequence that comes during a step is not in the next one but in the one after it.
        drive: how a driven engine keeps its sequences' promises; None is a stock engine, which knows none. A
            driven one orders its queue by relegation and deadline, whatever `priority_scheduling` says.
    """

    kv_tokens: int
    max_model_tokens: int
    max_running_seqs: int = 256
    max_batched_tokens: int = 2048
    block_tokens: int = 16
    priority_scheduling: bool = False
    host_step_s: float = 0.0
    host_seq_s: float = 0.0
    prefix_caching: bool = False
    whole_prompt: bool = True
    max_queued_seqs: int | None = None
    async_scheduling: bool = False
    drive: Rules | None = None

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "max_model_tokens", "max_running_seqs", "max_batched_tokens", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.kv_tokens < self.block_tokens:
            raise ValueError(f"kv_tokens ({self.kv_tokens}) must hold at least one block of {self.block_tokens}")
        if not (self.host_step_s >= 0 and self.host_seq_s >= 0):
            raise ValueError("host_step_s and host_seq_s must not be negative")

    def host_seconds(self, seqs: int) -> float:
        """Host time of a step with so many sequences."""
        return self.host_step_s + self.host_seq_s * seqs


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence to generate.

    Attributes:
        output_tokens: how many tokens it will really produce; only the engine knows.
        priority: smaller is served earlier (with `EngineConfig.priority_scheduling`).
        prefix_blocks: ids of the prompt's leading blocks, `block_tokens` each; equal ids are equal content.
        received_tokens: leading prompt tokens whose KV another engine computed and sent (prefill/decode
            disaggregation): they take blocks but no time, until a preemption drops them.
        first_due_s: when its first token is due, on the clock of `now_s`; infinite without a promise.
        pace_s: seconds promised per token behind it; infinite without a promise.
        relegated: its promise is given up: its prompt is served after all others, and it holds nobody back.
    """

    sequence_id: str
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    prefix_blocks: tuple[int, ...] = ()
    received_tokens: int = 0
    first_due_s: float = math.inf
    pace_s: float = math.inf
    relegated: bool = False

    def __post_init__(self) -> None:
        if math.isnan(self.first_due_s) or not self.pace_s > 0.0:
            raise ValueError(
                f"first_due_s must be a time and pace_s positive, not {self.first_due_s} and {self.pace_s}"
            )
        if not 0 <= self.received_tokens <= self.prompt_tokens:
            raise ValueError(f"received_tokens must be within the prompt, not {self.received_tokens}")
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(
                f"prompt_tokens and output_tokens must be at least 1, "
                f"not {self.prompt_tokens} and {self.output_tokens}"
            )


def check_size(spec: SequenceSpec, config: EngineConfig, capacity_blocks: int) -> None:
    """Raise SequenceTooLong when the engine could never finish the sequence."""
    total = spec.prompt_tokens + spec.output_tokens
    if total > config.max_model_tokens:
        raise SequenceTooLong(
            f"prompt ({spec.prompt_tokens}) plus output ({spec.output_tokens}) tokens exceed "
            f"the model length of {config.max_model_tokens}"
        )
    if -(-(total - 1) // config.block_tokens) > capacity_blocks:
        kv_tokens = capacity_blocks * config.block_tokens
        raise SequenceTooLong(f"{total - 1} tokens exceed the KV cache of {kv_tokens}")


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step that is about to run: what it holds, and how long it takes, host time included."""

    step: Step
    started_s: float
    duration_s: float

    @property
    def ends_s(self) -> float:
        return self.started_s + self.duration_s


@dataclass(frozen=True, slots=True)
class Emitted:
    """A token came out: token `index` (from zero) of its sequence."""

    sequence_id: str
    index: int
    finished: bool
