"""What a driven engine does in a step that a stock one does not: the slack on board sets the step's length.

A sequence's promise is the time its first token is due and a pace: token i is due at ``first_due + i * pace``
(PolyServe §2.3). A decode's *slack* is the time until its next token is due, so tokens that came early bank slack,
and a prompt's chunk may spend it. Pure and small: it runs inside an engine's scheduler, once a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tiergate_engine.fill import Order, Prefill, StepLimits, fill
from tiergate_engine.step import Step, StepTime


class Decode(NamedTuple):
    """A running sequence that wants its next token.

    Attributes:
        kv_tokens: the context it reads in this step, the token being computed included.
        slack_s: seconds until its next token is due; negative when it is late, infinite without a promise.
        pace_s: seconds promised per token; infinite without a promise.
    """

    kv_tokens: int
    slack_s: float = math.inf
    pace_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Rules:
    """How an engine is driven. The flags switch one mechanism each.

    Attributes:
        margin: predicted step times are multiplied by it, at least 1.
        host_step_s: host time of a step that the profile does not contain.
        host_seq_s: the same for each sequence in the step.
        chunk_from_slack: a step may last as long as the least slack on board; else as long as the tightest pace
            on board (PolyServe §4.7).
        deadline_order: prompts by the time their first token is due; else in the order given.
        skip: decodes with time to spare may be left out of a step when that makes a tight token on time.
        relegate: a prompt that can no longer be on time is served after those that can.
        floor_tokens: prompt tokens of a step without decodes, when no prompt would otherwise get any.

    Raises:
        ValueError: a number is out of range.
    """

    margin: float = 1.0
    host_step_s: float = 0.0
    host_seq_s: float = 0.0
    chunk_from_slack: bool = True
    deadline_order: bool = True
    skip: bool = True
    relegate: bool = True
    floor_tokens: int = 16

    def __post_init__(self) -> None:
        if not (math.isfinite(self.margin) and self.margin >= 1.0):
            raise ValueError(f"margin is {self.margin!r}: it is a finite number of at least 1")
        for name in ("host_step_s", "host_seq_s"):
            value: float = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} is {value!r}: it is a finite number of seconds, at least 0")
        if self.floor_tokens < 1:
            raise ValueError(f"floor_tokens is {self.floor_tokens}: it must be at least 1")


class StepPlan(NamedTuple):
    """What the next step should be.

    Attributes:
        within_s: how long the step may take; infinite when nobody on board has a promise.
        skipped: indices of the decodes that are left out of this step.
        order: indices of the prefills as they are served, relegated ones last.
        chunks: tokens of each prefill, aligned with the prefills given.
        tokens: the whole step's token budget: its decodes and its chunks.
    """

    within_s: float
    skipped: tuple[int, ...]
    order: tuple[int, ...]
    chunks: list[int]
    tokens: int


def plan_step(
    decodes: Sequence[Decode],
    prefills: Sequence[Prefill],
    limits: StepLimits,
    rules: Rules,
    step_time: StepTime,
) -> StepPlan:
    """Plan the next step. `limits` are the engine's own; a `within_s` in them holds beside the slack's.

    The step may last until the first token on board is due (`chunk_from_slack`), a decode that would be late even
    without any chunk binding it with its pace only. Decodes may be left out as long as they are still on time in
    the step behind this one. Chunks are what `fill` gives within that time.
    """
    base = Step.decode(len(decodes), sum(one.kv_tokens for one in decodes))
    decode_s = _seconds(base, rules, step_time)
    within_s = limits.within_s if limits.within_s is not None else math.inf
    for one in decodes:
        bound = one.slack_s if rules.chunk_from_slack and one.slack_s >= decode_s else one.pace_s
        within_s = min(within_s, bound)
    order = Order.DEADLINE if rules.deadline_order else Order.GIVEN
    inner_s = (within_s - _host_seconds(base.decode_seqs + 1, rules)) / rules.margin
    inner = StepLimits(
        limits.tokens,
        limits.new_seqs,
        limits.free_blocks,
        limits.block_tokens,
        limits.whole_prompt,
        None if within_s == math.inf else inner_s,
    )
    chunks = fill(base, prefills, inner, order, step_time)
    ranked = tuple(range(len(prefills)))
    return StepPlan(within_s, (), ranked, chunks, base.decode_seqs + sum(chunks))


def _host_seconds(seqs: int, rules: Rules) -> float:
    return rules.host_step_s + rules.host_seq_s * seqs


def _seconds(step: Step, rules: Rules, step_time: StepTime) -> float:
    return rules.margin * step_time.seconds(step) + _host_seconds(step.decode_seqs, rules)
