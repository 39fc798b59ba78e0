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

TOLD_WITHIN_S = 0.1
"""Replicas tell how far their prompts are within this time, twice the period of publishing."""

AHEAD_EXCHANGE_S = 0.005
"""What one exchange with an engine takes beside its step: a prompt that is sent ahead has one for each chunk."""

MOST_PREFILL_SHARE = 0.75
"""Largest share of time that prompts are expected to take from decodes: beyond it no mean is meaningful."""


@dataclass(slots=True)
class Prefill:
    """The way to the first token, in seconds.

    ``wait_s``: until the step in flight ends; ``first_step_s`` and ``total_s``: the longest and all steps that
    carry prompt chunks, up to the newcomer's own last; ``steps``: how many; ``own_s`` and ``own_steps``: those of
    them behind the last prompt that is ahead; ``next_step_s``: the decode step after them, which brings its
    second token; ``held_s``: for how long prompts have kept decodes from their tokens. Where chunks have steps of
    their own, the sums have the steps of decodes between them, and ``steps`` and ``own_steps`` count the tokens of
    decodes, with the one behind the last chunk. Where chunks are smaller than the engine's budget also
    ``least_chunk_tokens``, the smallest full one on the way, and of a driven engine ``tokens``, all that have to
    be computed up to the newcomer's first token; else 0.
    """

    wait_s: float
    first_step_s: float
    total_s: float
    steps: int
    own_s: float
    own_steps: float
    next_step_s: float
    tokens: int = 0
    least_chunk_tokens: int = 0
    held_s: float = 0.0

    @property
    def service_s(self) -> float:
        return self.wait_s + self.total_s


def steady_step_s(ledger: Ledger, request: Request, peak_kv_tokens: int) -> float:
    """Step time once everybody here and the newcomer decode, at the KV peak (PolyServe §4.5).

    There is no prefill in it: chunks are a matter of slack, see `scheduling.feasible`.
    """
    return ledger.backend.step_time.decode_seconds(ledger.seqs + request.sequences, peak_kv_tokens)


def expected_tpot_s(ledger: Ledger, steady_s: float, now_s: float, pace_s: float) -> float:
    """The mean pace to expect: the steady step, stretched by the steps that carry other requests' prompts.

    With m chunk-bearing steps a second that take t_mix instead of t, time per output token is
    t / (1 - m (t_mix - t)). Prompts are expected to keep coming as they did lately. `pace_s` sets the chunk of an
    engine that is driven. Where chunks have steps of their own, each of these takes all of its time from decodes.
    """
    backend = ledger.backend
    if backend.prefill_interval is not None:
        chunk = ledger.full_chunk_tokens
        mixed_s = steady_s + backend.step_time.seconds_of(chunk, 1, 0, chunk * chunk / 2, 0, 0.0)
    elif backend.dynamic_chunk and pace_s < math.inf:
        chunk, mixed_s = ledger.chunk_within(pace_s / backend.margin)
    else:
        chunk = max((backend.limits.max_batched_tokens or DEFAULT_CHUNK_TOKENS) - ledger.seqs, 1)
        chunk = min(chunk, backend.ahead_chunk_tokens or chunk)
        mixed_s = backend.step_time.seconds_of(chunk, 1, 0, chunk * chunk / 2, ledger.seqs, ledger.kv_tokens)
    chunks_per_s = ledger.prefill_tokens_per_s(now_s) / chunk
    mixed_s = max(mixed_s, steady_s)
    busy = min(chunks_per_s * (mixed_s - steady_s), MOST_PREFILL_SHARE)
    return steady_s / (1.0 - busy)


def own_prompt_tokens(request: Request) -> int:
    """What an engine has to compute of a request's prompts: all but what its prefix cache has; at least one."""
    return max((request.prompt_tokens - request.cached_tokens) * request.sequences, 1)


def first_token_floor_s(ledger: Ledger, prompt_tokens: int, now_s: float, within_s: float = math.inf) -> float:
    """A bound: no newcomer with so many prompt tokens has its first token sooner, whatever else happens.

    All steps but the last carry a full chunk, or on an engine driven to `within_s` the largest that keeps it,
    and the last takes no less than the decodes alone; what is queued ahead has lost at most a chunk for every
    step that can have ended since its head began. Where others queued too, ours may all be done (`_left_of_all`).
    """
    shared = ledger.backend.prefill_interval is None
    if within_s < math.inf and shared:
        chunk, chunk_s = ledger.chunk_within(within_s)
    else:
        chunk, chunk_s = ledger.full_chunk_tokens, ledger.chunk_step_s
    queued, foreign = ledger.queued_prefill_tokens, ledger.foreign.queued_prefill_tokens
    least_s = ledger.decode_step_s if shared else min(ledger.decode_step_s, ledger.alone_s)
    if queued and least_s > 0.0:
        begun_s = ledger.foreign_since_s + TOLD_WITHIN_S if foreign else ledger.prefill_since_s
        steps = int(max(now_s - begun_s, 0.0) / least_s) + (2 if foreign else 1)
        prompt_tokens += max((foreign or queued) - steps * chunk, 0)
    return (prompt_tokens - 1) // chunk * chunk_s + least_s


def walk_prefill(ledger: Ledger, request: Request, now_s: float, pace_s: float) -> Prefill:
    """Walk the steps until the newcomer's first token. `pace_s` sets the chunk of an engine that is driven."""
    backend = ledger.backend
    if backend.prefill_interval is not None:
        return _walk_apart(ledger, request, now_s, backend.prefill_interval)
    if backend.dynamic_chunk and pace_s < math.inf:
        return _walk_driven(ledger, request, now_s, pace_s / backend.margin)
    if backend.ahead_chunk_tokens is not None:
        return _walk_ahead(ledger, request, now_s)
    return _walk(ledger, request, now_s, ledger.full_chunk_tokens, 0.0)


def _prompt_chunk(ledger: Ledger) -> int:
    """Tokens of one prompt that a step may carry beside the decodes."""
    chunk = ledger.full_chunk_tokens
    return min(chunk, ledger.backend.ahead_chunk_tokens or chunk)


def ahead_gap_s(ledger: Ledger) -> float:
    """From the end of a step with a chunk that was sent ahead to the beginning of the next one: an exchange, and
    whole steps of the decodes that are here, at least one."""
    step_s = ledger.decode_step_s
    if not ledger.decodes or step_s <= 0.0:
        return AHEAD_EXCHANGE_S
    return math.ceil(AHEAD_EXCHANGE_S / step_s) * step_s


def _walk_ahead(ledger: Ledger, request: Request, now_s: float) -> Prefill:
    """The same where prompts are sent ahead in chunks: between two steps with a chunk there are steps without one.

    Those in the queue are taken to be sent ahead too. A prompt that is also needs an exchange for its token ids.
    """
    chunk = _prompt_chunk(ledger)
    gap_s = ahead_gap_s(ledger)
    walked = _walk(ledger, request, now_s, chunk, gap_s)
    own = own_prompt_tokens(request)
    asked_s = AHEAD_EXCHANGE_S if own > chunk else 0.0
    each = max(round(gap_s / ledger.decode_step_s), 1) if ledger.decodes and ledger.decode_step_s > 0.0 else 0
    between, own_between = walked.steps - 1, max(walked.own_steps - 1.0, 0.0)
    walked.wait_s += asked_s
    walked.total_s += between * gap_s
    walked.steps += between * each
    walked.own_s += own_between * gap_s
    walked.own_steps += own_between * each
    walked.least_chunk_tokens = chunk
    return walked


def _walk_apart(ledger: Ledger, request: Request, now_s: float, interval: int) -> Prefill:
    """The same where chunks have steps of their own, `interval` steps of decodes between two of them.

    With none between, decodes get one token on the way, behind the last chunk.
    """
    decodes = ledger.decodes + ledger.queued // 2  # those ahead begin to decode on the way
    gap_s = ledger.backend.between_chunks_s(decodes, ledger.decode_kv_tokens)
    walked = _walk(ledger, request, now_s, ledger.full_chunk_tokens, gap_s)
    between, own_between = walked.steps - 1, max(walked.own_steps - 1.0, 0.0)
    walked.total_s += between * gap_s
    walked.own_s += own_between * gap_s
    walked.steps = between * interval + 1
    walked.own_steps = own_between * interval + 1.0
    held_s = _held_s(ledger, now_s)
    walked.held_s = min(held_s, ledger.chunk_step_s) if interval else held_s
    if not ledger.queued:
        owed_s = ledger.prefill_since_s + gap_s - now_s  # by the last chunk
        walked.wait_s = max(walked.wait_s, owed_s)
    return walked


def _held_s(ledger: Ledger, now_s: float) -> float:
    """For how long decodes have been seen to get no token, if chunks that have steps of their own are why."""
    last_s = ledger.last_step_s
    if not ledger.queued and last_s is not None and last_s > ledger.prefill_since_s:
        return 0.0  # they got some since the last chunk
    decodes = [one for one in ledger.residents.values() if one.first_token and one.request.streamed]
    moved_s = [one.seen_s for one in decodes if one.generated_tokens > 1]
    return now_s - (max(moved_s) if moved_s else min([one.seen_s for one in decodes], default=now_s))


def _walk(ledger: Ledger, request: Request, now_s: float, chunk: int, gap_s: float) -> Prefill:
    """Steps with chunks of so many tokens. `gap_s` lies between two of them; it counts for those ahead only."""
    backend = ledger.backend
    seconds_of = backend.step_time.seconds_of
    decodes, kv_tokens = _beside(ledger)
    shared = backend.prefill_interval is None
    cached = request.cached_tokens
    own = own_prompt_tokens(request)
    ahead, wait_s = _ahead(ledger, chunk, now_s, gap_s)
    decodes += ledger.queued // 2 if shared else 0  # those ahead begin to decode on the way

    total_tokens = ahead + own
    steps = -(-total_tokens // chunk)
    last = total_tokens - (steps - 1) * chunk
    last_own = min(last, own)
    last_context = cached + own - last_own
    last_s = seconds_of(last, 1, last_context, last_own * (last_context + last_own / 2), decodes, kv_tokens)
    next_s = backend.step_time.decode_seconds(
        ledger.decodes + ledger.queued + request.sequences,
        ledger.decode_kv_tokens + request.prompt_tokens * request.sequences,
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


def _walk_driven(ledger: Ledger, request: Request, now_s: float, within_s: float) -> Prefill:
    """The same on an engine that shrinks chunks so that every step is done within a time (PolyServe §4.7).

    The chunk falls as those ahead begin to decode, as everybody's KV grows by a token a step, and with the
    prompt's own context. It falls almost in a straight line, so the newcomer's prompt takes the logarithmic mean
    of the chunks at its ends, and those ahead the chunk half way. Nobody is taken to leave on the way.
    """
    backend = ledger.backend
    seconds_of = backend.step_time.seconds_of
    decodes, kv_tokens = ledger.decodes, ledger.decode_kv_tokens
    cached = request.cached_tokens
    own = own_prompt_tokens(request)
    chunk, full_s = ledger.chunk_within(within_s)
    ahead, wait_s = _ahead(ledger, chunk, now_s)
    next_s = backend.step_time.decode_seconds(
        ledger.decodes + ledger.queued + request.sequences, kv_tokens + request.prompt_tokens * request.sequences
    )
    ahead_steps, least, least_s = 0.0, chunk, full_s
    if ledger.queued:
        # half of them decode on the way, and all by the time the newcomer's prompt is at its first chunk
        queued, queued_kv = ledger.queued, ledger.kv_tokens - kv_tokens
        context = ahead // (2 * queued)
        mean, _ = _chunk_near(ledger, chunk, within_s, context, decodes + queued // 2, kv_tokens + queued_kv // 2)
        ahead_steps = ahead / mean
        decodes += queued
        kv_tokens += queued_kv + int(ahead_steps * decodes)
        least, least_s = _chunk_near(ledger, chunk, within_s, cached, decodes, kv_tokens)
    first = least
    if own > first or cached:
        kv_tokens += int(own / first * decodes)
        context = cached + max(own - first, 0)
        least, least_s = _chunk_near(ledger, first, within_s, context, decodes, kv_tokens)
    own_steps = own / _log_mean(first, least)
    steps = max(math.ceil(ahead_steps + own_steps - 1e-9), 1)
    last = max(int((ahead_steps + own_steps - (steps - 1)) * least), 1)
    last_own = min(last, own)
    last_context = cached + own - last_own
    last_s = seconds_of(last, 1, last_context, last_own * (last_context + last_own / 2), decodes, kv_tokens)
    mean_s = (full_s + least_s) / 2
    if steps > 1:
        last_s = mean_s  # prompts that come later fill it up
    total_s = (steps - 1) * mean_s + last_s
    behind = max(own_steps, 1.0)
    first_step_s = max(full_s, least_s) if steps > 1 else last_s
    return Prefill(
        wait_s,
        first_step_s,
        total_s,
        steps,
        (behind - 1.0) * mean_s + last_s,
        behind,
        next_s,
        ahead + own,
        least,
    )


def _chunk_near(
    ledger: Ledger, most: int, within_s: float, context: int, decodes: int, kv_tokens: int
) -> tuple[int, float]:
    """The largest chunk up to `most` that keeps a step within a time, by two secants, and the step's time.

    At least one token. `most` is a chunk of the same engine in a lighter state, so it is near.
    """
    seconds_of = ledger.backend.step_time.seconds_of
    most_s = seconds_of(most, 1, context, most * (context + most / 2), decodes, kv_tokens)
    if most_s <= within_s or most <= 1:
        return most, most_s
    low = most // 2
    low_s = seconds_of(low, 1, context, low * (context + low / 2), decodes, kv_tokens)
    chunk = _crossing(low, low_s, most, most_s, within_s)
    if low < chunk:
        chunk_s = seconds_of(chunk, 1, context, chunk * (context + chunk / 2), decodes, kv_tokens)
        if chunk_s > within_s:
            chunk = _crossing(low, low_s, chunk, chunk_s, within_s)
    return chunk, within_s


def _crossing(low: int, low_s: float, high: int, high_s: float, within_s: float) -> int:
    """Where the straight line through two chunks' times is at a time; at least 1."""
    slope_s = (high_s - low_s) / (high - low)
    return max(high - math.ceil((high_s - within_s) / slope_s), 1) if slope_s > 0.0 else 1


def _log_mean(a: int, b: int) -> float:
    """The mean of what falls in a straight line from a to b, over its own progress."""
    return (a - b) / math.log(a / b) if a != b else float(a)


def _beside(ledger: Ledger) -> tuple[int, int]:
    """The decodes that share a step with a chunk, and their KV."""
    if ledger.backend.prefill_interval is not None:
        return 0, 0
    return ledger.decodes, ledger.decode_kv_tokens


def _ahead(ledger: Ledger, chunk: int, now_s: float, gap_s: float = 0.0) -> tuple[int, float]:
    """Prompt tokens before the newcomer's, and seconds until the step in flight ends, with the gap behind it.

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
    decodes, kv_tokens = _beside(ledger)
    step_s = step_time.seconds_of(head, 1, 0, head * head / 2, decodes, kv_tokens) + gap_s
    # the step in flight is counted as waiting, so its chunk is not ahead any more
    if ledger.foreign.queued_prefill_tokens:
        left = _left_of_all(ledger, head / step_s if step_s > 0 else math.inf, now_s) - head
        if ledger.last_step_s is None or step_s <= 0:
            return max(left, 0), step_s
        return max(left, 0), step_s - max(now_s - ledger.last_step_s, 0.0) % step_s
    since_s = now_s - ledger.prefill_since_s
    done_steps, into_s = divmod(max(since_s, 0.0), step_s) if step_s > 0 else (0.0, 0.0)
    done = (done_steps + 1) * head
    if done < queued:
        return int(queued - done), max(step_s - into_s, 0.0)
    return 0, max(step_s - into_s, 0.0) if done_steps * head < queued else step_s


def _left_of_all(ledger: Ledger, tokens_per_s: float, now_s: float) -> int:
    """Prompt tokens that are queued here by all replicas: ours by when their first tokens are expected, the
    others' as they told; they may have queued more since, so no progress is presumed before they should have told
    anew."""
    done = tokens_per_s * max(now_s - ledger.foreign_since_s - TOLD_WITHIN_S, 0.0)
    return prefill_left_tokens(ledger, now_s) + int(max(ledger.foreign.queued_prefill_tokens - done, 0.0))


def prefill_left_tokens(ledger: Ledger, now_s: float) -> int:
    """What the engine still has to compute of this replica's prompts, by when their first tokens are expected; of
    each that has no token yet a chunk at least."""
    queued = ledger.queued_prefill_tokens - ledger.foreign.queued_prefill_tokens
    if not queued or ledger.chunk_step_s <= 0:
        return queued
    chunk = _prompt_chunk(ledger)
    if chunk == ledger.full_chunk_tokens:
        tokens_per_s = chunk / ledger.chunk_step_s
    else:
        decodes, kv_tokens = ledger.decodes, ledger.decode_kv_tokens
        step_s = ledger.backend.step_time.seconds_of(chunk, 1, 0, 0.0, decodes, kv_tokens)
        tokens_per_s = chunk / (step_s + ahead_gap_s(ledger))
    return sum(
        [
            int(min(max((one.expected_first_s - now_s) * tokens_per_s, chunk), one.prefill_tokens))
            for one in ledger.residents.values()
            if not one.first_token and (one.request.streamed or now_s < one.expected_first_s)
        ]
    )
