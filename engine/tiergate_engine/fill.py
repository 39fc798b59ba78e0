"""Who gets how many tokens in the next step.

Pure and small: it runs inside an engine's scheduler, once a step. Decodes come first, one token each; what is left
of the token budget goes to prefills, in an order. vLLM's stock scheduler walks its running sequences in order and
then its queue; since an unfinished prefill is always the last one running, that is the same as decodes first.

Options of the one function: prefills by remaining time to their deadline (earliest deadline first, relegated ones
last), and a time budget that sizes the chunk with the step-time profile (dynamic chunking, PolyServe §4.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import NamedTuple

from tiergate_engine.step import Step, StepTime


class Order(Enum):
    """Which prefill is served first."""

    GIVEN = "given"  # as the sequence lists them: the engine's own order
    DEADLINE = "deadline"  # least remaining time first; ties as given


class Prefill(NamedTuple):
    """A prompt that wants tokens. A tuple, since one is made of every queued prompt in every step.

    Attributes:
        tokens: still to be computed, at least 1.
        context_tokens: in KV already (chunks of earlier steps, or a prefix-cache hit).
        admitted: it runs already, so it needs no new slot.
        remaining_s: seconds left to the deadline of its first token; negative when late, infinite without one.
        relegated: its promise is given up: served after all others, whatever the order.
        revived_blocks: free blocks that a prefix-cache hit takes back into use when it is admitted now.
    """

    tokens: int
    context_tokens: int = 0
    admitted: bool = False
    remaining_s: float = math.inf
    relegated: bool = False
    revived_blocks: int = 0


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one step may hold. None limits nothing.

    Attributes:
        tokens: batched tokens of the whole step, decodes included.
        new_seqs: prompts that may be admitted.
        free_blocks: KV blocks that the prefills may take, after the decodes took theirs.
        block_tokens: KV block size.
        whole_prompt: admit a prompt only when all of it fits the free blocks, not just its first chunk
            (vLLM `scheduler_reserve_full_isl`).
        within_s: how long the step may take. Only prefills are cut to keep it; decodes always go.
    """

    tokens: int
    new_seqs: int | None = None
    free_blocks: int | None = None
    block_tokens: int = 16
    whole_prompt: bool = True
    within_s: float | None = None


_BY_DEADLINE = attrgetter("relegated", "remaining_s")
_BY_RELEGATION = attrgetter("relegated")


def fill(
    decodes: Step,
    prefills: Sequence[Prefill],
    limits: StepLimits,
    order: Order = Order.GIVEN,
    step_time: StepTime | None = None,
) -> list[int]:
    """The chunk of each prefill, aligned with `prefills`; 0 for one that gets nothing.

    `decodes` is what the step holds already. Prompts are admitted strictly in order: the first that does not fit
    (no slot, no KV blocks) ends admission, while running prefills behind it still get their chunks. A running
    prefill whose blocks are not free gets only what fits; making room for it is the caller's affair.
    Raises ValueError when a time budget is set without a step time.
    """
    if limits.within_s is not None and step_time is None:
        raise ValueError("step_time is needed when limits.within_s is set")
    chunks = [0] * len(prefills)
    left = limits.tokens - decodes.tokens
    slots = math.inf if limits.new_seqs is None else limits.new_seqs
    free = math.inf if limits.free_blocks is None else limits.free_blocks
    base = decodes
    admitting = True
    for index in ranked(prefills, order):
        if left <= 0:
            break
        prefill = prefills[index]
        if not prefill.admitted and not (admitting and slots > 0):
            continue
        chunk = _chunk(prefill, left, free, limits)
        if chunk and limits.within_s is not None and step_time is not None:
            chunk = step_time.chunk_tokens(base, limits.within_s, prefill.context_tokens, chunk)
            if chunk == 0:
                break
            base = base.with_chunk(chunk, prefill.context_tokens)
        if chunk == 0:
            admitting = admitting and prefill.admitted
            continue
        chunks[index] = chunk
        left -= chunk
        free -= new_blocks(prefill.context_tokens, chunk, limits.block_tokens)
        if not prefill.admitted:
            free -= prefill.revived_blocks
            slots -= 1
    return chunks


def new_blocks(context_tokens: int, tokens: int, block_tokens: int) -> int:
    """How many KV blocks `tokens` more tokens need behind `context_tokens`."""
    return -(-(context_tokens + tokens) // block_tokens) - -(-context_tokens // block_tokens)


def ranked(prefills: Sequence[Prefill], order: Order) -> Sequence[int]:
    """The indices of `prefills` as they are served: relegated ones last."""
    if len(prefills) < 2:
        return range(len(prefills))
    if order is Order.DEADLINE:
        keys = list(map(_BY_DEADLINE, prefills))
        return sorted(range(len(keys)), key=keys.__getitem__)
    if any(map(_BY_RELEGATION, prefills)):
        return sorted(range(len(prefills)), key=lambda index: prefills[index].relegated)
    return range(len(prefills))


def _chunk(prefill: Prefill, left: int, free: float, limits: StepLimits) -> int:
    """The most tokens the token budget and the free blocks allow it; 0 for a prompt that may not be admitted."""
    chunk = min(prefill.tokens, left)
    block = limits.block_tokens
    if prefill.admitted:
        if new_blocks(prefill.context_tokens, chunk, block) > free:
            room = int(free) * block + (-prefill.context_tokens) % block
            chunk = min(chunk, room)
        return chunk
    needed = prefill.tokens if limits.whole_prompt else chunk
    if prefill.revived_blocks + new_blocks(prefill.context_tokens, needed, block) > free:
        return 0
    return chunk
