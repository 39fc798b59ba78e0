"""What a newcomer will see on a backend: time to first token, steady pace, peak KV.

The prefill part is a forward walk over the engine's steps as it fills them (decodes first, then prompt chunks in
order, up to the step's token budget), as in PolyServe §4.6-4.7. Steps of one prompt differ only by the context
behind their chunk, and a step's time is close to linear in it, so the walk is summed from its ends instead of
step by step: at most five evaluations of the step-time model, whatever the prompt's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scheduling.ledger import DEFAULT_CHUNK_TOKENS, Ledger
from scheduling.requests import Request
from tiergate_engine.step import Step

MOST_PREFILL_SHARE = 0.75
"""Largest share of time that prompts are expected to take from decodes: beyond it no mean is meaningful."""


@dataclass(slots=True)
class Prefill:
    """The way to the first token, in seconds.

    ``wait_s``: until the step in flight ends; ``first_step_s`` and ``total_s``: the longest and all steps that
    carry prompt chunks, up to the newcomer's own last; ``steps``: how many; ``own_s`` and ``own_steps``: those of
    them behind the last prompt that is ahead; ``next_step_s``: the decode step after them, which brings its
    second token.
    """

    wait_s: float
    first_step_s: float
    total_s: float
    steps: int
    own_s: float
    own_steps: float
    next_step_s: float

    @property
    def service_s(self) -> float:
        return self.wait_s + self.total_s


def steady_step_s(ledger: Ledger, request: Request, peak_kv_tokens: int) -> float:
    """Step time once everybody here and the newcomer decode, at the KV peak (PolyServe §4.5).

    There is no prefill in it: chunks are a matter of slack, see `scheduling.feasible`.
    """
    return ledger.backend.step_time.decode_seconds(ledger.seqs + request.sequences, peak_kv_tokens)


def expected_tpot_s(ledger: Ledger, steady_s: float, now_s: float) -> float:
    """The mean pace to expect: the steady step, stretched by the steps that carry other requests' prompts.

    With m chunk-bearing steps a second that take t_mix instead of t, time per output token is
    t / (1 - m (t_mix - t)). Prompts are expected to keep coming as they did lately.
    """
    chunk = max((ledger.backend.limits.max_batched_tokens or DEFAULT_CHUNK_TOKENS) - ledger.seqs, 1)
    chunks_per_s = ledger.prefill_tokens_per_s(now_s) / chunk
    mixed_s = max(
        ledger.backend.step_time.seconds_of(chunk, 1, 0, chunk * chunk / 2, ledger.seqs, ledger.kv_tokens),
        steady_s,
    )
    busy = min(chunks_per_s * (mixed_s - steady_s), MOST_PREFILL_SHARE)
    return steady_s / (1.0 - busy)


def own_prompt_tokens(request: Request) -> int:
    """What an engine has to compute of a request's prompts: all but what its prefix cache has; at least one."""
    return max((request.prompt_tokens - request.cached_tokens) * request.sequences, 1)


def walk_prefill(ledger: Ledger, request: Request, now_s: float, pace_s: float) -> Prefill:
    """Walk the steps until the newcomer's first token. `pace_s` sets the chunk of an engine that is driven."""
    backend = ledger.backend
    seconds_of = backend.step_time.seconds_of
    decodes = ledger.decodes
    kv_tokens = ledger.decode_kv_tokens
    cached = request.cached_tokens
    own = own_prompt_tokens(request)
    chunk = _chunk_tokens(ledger, request, pace_s)
    ahead, wait_s = _ahead(ledger, chunk, now_s)
    decodes += ledger.queued // 2  # those ahead begin to decode on the way

    total_tokens = ahead + own
    steps = -(-total_tokens // chunk)
    last = total_tokens - (steps - 1) * chunk
    last_own = min(last, own)
    last_context = cached + own - last_own
    last_s = seconds_of(last, 1, last_context, last_own * (last_context + last_own / 2), decodes, kv_tokens)
    next_s = backend.step_time.decode_seconds(
        ledger.decodes + ledger.queued + request.sequences, kv_tokens + request.prompt_tokens * request.sequences
    )
    if steps == 1:
        return Prefill(wait_s, last_s, last_s, 1, last_s, 1.0, next_s)

    own_s = first_s = 0.0
    if own > last_own:
        half = chunk / 2
        begin_s = seconds_of(chunk, 1, cached, chunk * (cached + half), decodes, kv_tokens)
        end = max(last_context - chunk, cached)
        end_s = begin_s if end == cached else seconds_of(chunk, 1, end, chunk * (end + half), decodes, kv_tokens)
        own_s = (begin_s + end_s) / 2
        first_s = begin_s
    ahead_s = own_s
    if ahead:
        context = ahead // (2 * max(ledger.queued, 1))
        ahead_s = seconds_of(chunk, 1, context, chunk * context, decodes, kv_tokens)
        first_s = max(first_s, ahead_s)
    ahead_steps = min(ahead / chunk, steps - 1.0)
    own_steps = steps - 1 - ahead_steps
    behind_s = own_steps * (own_s or ahead_s) + last_s
    return Prefill(
        wait_s, max(first_s, last_s), ahead_steps * ahead_s + behind_s, steps, behind_s, own_steps + 1, next_s
    )


def _chunk_tokens(ledger: Ledger, request: Request, pace_s: float) -> int:
    """Prompt tokens per step. A driven engine shrinks chunks to the pace (dynamic chunking, PolyServe §4.7)."""
    backend = ledger.backend
    room = ledger.full_chunk_tokens
    if not backend.dynamic_chunk or math.isinf(pace_s):
        return room
    base = Step.decode(ledger.decodes, ledger.decode_kv_tokens)
    context = request.cached_tokens + request.prompt_tokens // 2
    return max(backend.step_time.chunk_tokens(base, pace_s / backend.margin, context, room), 1)


def _ahead(ledger: Ledger, chunk: int, now_s: float) -> tuple[int, float]:
    """Prompt tokens before the newcomer's, and seconds until the step in flight ends.

    The queue's own progress is not seen from outside: it is taken to have run since its head began. A phase
    that is unknown counts as a whole step, because this is for admission; and so does what other replicas queued,
    which is ahead in full until they say otherwise.
    """
    if not ledger.seqs:
        return 0, 0.0
    queued = ledger.queued_prefill_tokens
    step_time = ledger.backend.step_time
    if not queued:
        step_s = step_time.decode_seconds(ledger.decodes, ledger.decode_kv_tokens)
        if ledger.last_step_s is None:
            return 0, step_s
        # steps follow each other without a gap: the phase goes on from the last end that was seen
        return 0, step_s - max(now_s - ledger.last_step_s, 0.0) % step_s if step_s > 0 else 0.0
    head = min(chunk, queued)
    step_s = step_time.seconds_of(head, 1, 0, head * head / 2, ledger.decodes, ledger.decode_kv_tokens)
    own = queued - ledger.foreign.queued_prefill_tokens
    if own <= 0:
        return queued - head, step_s
    since_s = now_s - ledger.prefill_since_s
    done_steps, into_s = divmod(max(since_s, 0.0), step_s) if step_s > 0 else (0.0, 0.0)
    # the step in flight is counted as waiting, so its chunk is not ahead any more
    done = (done_steps + 1) * head
    if done < own:
        return int(queued - done), max(step_s - into_s, 0.0)
    return queued - own, max(step_s - into_s, 0.0) if done_steps * head < own else step_s
