"""A backend as the core knows it: what it is (static) and who is on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tiergate_engine.step import StepTime


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The engine's hard limits, probed or configured. None is unknown and limits nothing.

    Attributes:
        max_running_seqs: most sequences in one batch (vLLM `max_num_seqs`).
        max_batched_tokens: most tokens in one step: the chunk budget when none is driven.
        kv_tokens: KV capacity.
        max_model_tokens: longest prompt plus answer.
        block_tokens: KV block size.
    """

    max_running_seqs: int | None = None
    max_batched_tokens: int | None = None
    kv_tokens: int | None = None
    max_model_tokens: int | None = None
    block_tokens: int = 16


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
        pinned: in its tier for good: never returned to the pool, never relabelled.
    """

    name: str
    step_time: StepTime
    models: frozenset[str] = field(default_factory=frozenset)
    limits: EngineLimits = EngineLimits()
    state: BackendState = BackendState.UP
    margin: float = 1.0
    calibrated: bool = True
    dynamic_chunk: bool = False
    pinned: bool = False

    def serves(self, model: str) -> bool:
        return not self.models or model in self.models
        ahead_chunk_tokens: longer prompts are sent ahead in chunks of so many tokens, with a step without any
            behind each; None where prompts come whole.
    ahead_chunk_tokens: int | None = None
