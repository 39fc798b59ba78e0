"""When a request's tokens are due, on the engine's own clock, and what is read of a request to know it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from tiergate_engine.control import Promise

_LONGEST_AGE_S = 60.0
"""Of a request on its way from vLLM's API server to its engine; beyond, the two clocks disagree."""


class Due(NamedTuple):
    """A promise on the engine's clock: token i is due at ``first_s + i * pace_s``; infinite without a promise."""

    first_s: float = math.inf
    pace_s: float = math.inf
    relegated: bool = False

    def token_s(self, index: int) -> float:
        """When token `index` is due."""
        if index == 0:
            return self.first_s
        return self.first_s + index * self.pace_s  # both infinite or finite, and an index of 0 is dealt with


NO_PROMISE = Due()


class EngineRequest(Protocol):
    """What is read of vLLM's request, and what `promise` writes to it: the first two numbers are those of its due
    time as a decode needs them, which binds nobody when its promise is given up or says nothing of a pace."""

    tiergate_due: Due
    tiergate_first_s: float
    tiergate_pace_s: float
    request_id: str
    priority: int
    arrival_time: float
    num_prompt_tokens: int
    max_tokens: int
    num_computed_tokens: int
    num_output_placeholders: int
    is_prefill_chunk: bool
    spec_token_ids: list[int]
    kv_transfer_params: dict[str, object] | None

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_output_tokens(self) -> int: ...


def due_of(xargs: Mapping[str, object] | None, age_s: float, now_s: float) -> Due:
    """The promise that a request brought along, `age_s` after it came to the server. Raises ControlError."""
    promise = Promise.from_xargs(xargs)
    if promise.ttft_s is None:
        return Due(relegated=True) if promise.relegated else NO_PROMISE
    came_s = now_s - min(max(age_s, 0.0), _LONGEST_AGE_S)
    return Due(came_s + promise.ttft_s, math.inf if promise.tpot_s is None else promise.tpot_s, promise.relegated)


def promise(request: EngineRequest, due: Due) -> None:
    """Note what a request was promised."""
    binds = not due.relegated and due.pace_s < math.inf
    request.tiergate_due = due
    request.tiergate_first_s, request.tiergate_pace_s = (due.first_s, due.pace_s) if binds else (math.inf, 0.0)


def next_due_s(request: EngineRequest) -> float:
    """When the next token that has not been scheduled is due."""
    return request.tiergate_due.token_s(request.num_output_tokens + request.num_output_placeholders)
