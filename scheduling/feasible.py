"""Does a placement keep every promise: the newcomer's own, and every resident's?

The order of the checks is the order of their price. The first that fails names the verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scheduling.checks import ALL_CHECKS, Checks, KvGrowth
from scheduling.decisions import Verdict
from scheduling.ledger import DEFAULT_CHUNK_TOKENS, SLACK_RESERVE, Ledger
from scheduling.load import Limits
from scheduling.predict import Prefill, expected_tpot_s, steady_step_s, walk_prefill
from scheduling.requests import Request
from scheduling.reserved import own_kv_tokens, reserved_kv_tokens

_MANY_TOKENS = 2.0**40


@dataclass(slots=True)
class Judgement:
    """A verdict and the numbers it rests on; None where a cheaper check had decided already.

    ``tpot_s`` is the steady step, which promises are checked against; ``expected_tpot_s`` the pace to expect with
    other prompts in between.
    """

    verdict: Verdict
    ttft_s: float | None = None
    tpot_s: float | None = None
    peak_kv_tokens: int | None = None
    pace_s: float = math.inf
    prefill: Prefill | None = None
    expected_tpot_s: float | None = None

    @property
    def feasible(self) -> bool:
        return self.verdict is Verdict.FEASIBLE


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of a backend for one request.

    ``own_tpot_s`` and ``ttft_left_s`` are infinite when its own promise does not count (best effort, relegated).
    ``answer_tokens``: so long an answer a backend must have room for behind the prompt.
    """

    request: Request
    output_tokens: float
    own_tpot_s: float
    ttft_due_s: float
    answer_tokens: int = 1


def fits_hard_limits(ledger: Ledger, ask: Ask) -> Verdict | None:
    """The engine's own caps, which hold for every policy; None when it fits.

    More answers at once than the engine runs go to an idle one, which queues them itself.
    """
    limits = ledger.backend.limits
    request = ask.request
    cap = limits.max_running_seqs
    if cap is not None and ledger.seqs and ledger.seqs + request.sequences > cap:
        return Verdict.FULL
    if not limits.takes(request.prompt_tokens, ask.answer_tokens):
        return Verdict.TOO_LONG
    if limits.kv_tokens is not None and ledger.seqs and _reserved_with(ledger, ask) > limits.kv_tokens:
        return Verdict.MEMORY
    return None


def judge(ledger: Ledger, ask: Ask, host_tpot_s: float, now_s: float, checks: Checks = ALL_CHECKS) -> Judgement:
    """Every promise, in order: caps, memory, steady state, first token, second token, chunk or residents'
    slack."""
    backend = ledger.backend
    pace_s = min(ledger.binding_tpot_s(host_tpot_s), ask.own_tpot_s, ledger.tightest_tpot_s)
    enforced = backend.calibrated
    if enforced and ledger.floor_s * backend.margin > pace_s and checks.looks_ahead:
        return Judgement(Verdict.STEADY_STATE, tpot_s=ledger.floor_s, pace_s=pace_s)
    hard = fits_hard_limits(ledger, ask)
    if hard is not None:
        return Judgement(hard, pace_s=pace_s)

    request = ask.request
    peak = _kv_with(ledger, ask, checks.kv_growth)
    capacity = backend.limits.kv_tokens
    if capacity is not None and peak > capacity and ledger.seqs:
        return Judgement(Verdict.MEMORY, None, None, peak, pace_s)
    steady_s = steady_step_s(ledger, request, peak)
    if enforced and steady_s * backend.margin > pace_s:
        return Judgement(Verdict.STEADY_STATE, None, steady_s, peak, pace_s)

    prefill = walk_prefill(ledger, request, now_s, pace_s)
    ttft_s = now_s - request.arrival_s + prefill.service_s
    verdict = _wait_verdict(ledger, ask, prefill, now_s, checks) if enforced else Verdict.FEASIBLE
    expected_s = None
    if verdict is Verdict.FEASIBLE:
        # later placements keep this pace too, so prompts cannot stretch it beyond
        expected_s = min(expected_tpot_s(ledger, steady_s, now_s, pace_s), max(pace_s, steady_s))
    return Judgement(verdict, ttft_s, steady_s, peak, pace_s, prefill, expected_s)


def _reserved_with(ledger: Ledger, ask: Ask) -> int:
    """The KV that is taken ahead for everybody once the newcomer is there; 0 where none is."""
    limits = ledger.backend.limits
    if limits.lease_tokens is None:
        return 0
    own = own_kv_tokens(limits, ask.request, ask.output_tokens)
    return ledger.foreign.peak_kv_tokens + reserved_kv_tokens(limits, ledger.residents.values()) + own


def _kv_with(ledger: Ledger, ask: Ask, growth: KvGrowth) -> int:
    """The KV that everybody will need together once the newcomer is there."""
    request = ask.request
    seqs = request.sequences
    if growth is KvGrowth.PEAK:
        return ledger.peak_kv_with(request.prompt_tokens, ask.output_tokens, seqs)
    kv_tokens = ledger.kv_tokens + request.prompt_tokens * seqs
    if growth is KvGrowth.UPPER:
        kv_tokens += math.ceil((ledger.seqs + seqs) * ask.output_tokens)
    return kv_tokens


def _wait_verdict(ledger: Ledger, ask: Ask, prefill: Prefill, now_s: float, checks: Checks) -> Verdict:
    backend = ledger.backend
    margin = backend.margin
    first_s = now_s + prefill.service_s * margin
    if checks.first_token and first_s > ask.ttft_due_s:
        return Verdict.FIRST_TOKEN
    if checks.second_token and first_s + prefill.next_step_s * margin > ask.ttft_due_s + ask.own_tpot_s:
        return Verdict.SECOND_TOKEN
    if backend.dynamic_chunk:
        # its steps keep the pace of everybody on board, so no prompt makes a resident late
        asked = checks.chunk_kept and checks.first_token and ledger.seqs
        if asked and not _chunk_lasts(prefill, margin, ask.ttft_due_s - now_s):
            return Verdict.CHUNK
    elif checks.resident_slack and not residents_keep_pace(ledger, prefill):
        return Verdict.RESIDENT_SLACK
    return Verdict.FEASIBLE


def _chunk_lasts(prefill: Prefill, margin: float, left_s: float) -> bool:
    """Whether the least chunk on the way, were every step to carry no more, still makes the first token in time.

    PolyServe §4.7 admits only "if the predicted chunk size can be maintained throughout the prefill process" and
    else looks "for other lower-load machines". So it is not asked of an idle engine: no machine has a lower load,
    and a long prompt that even an idle one serves in smaller and smaller chunks would be refused for nothing.
    """
    if prefill.steps <= 1 or math.isinf(left_s):
        return True
    steps = math.floor((left_s - prefill.wait_s * margin) / (prefill.first_step_s * margin))
    return prefill.tokens <= steps * prefill.least_chunk_tokens


def residents_keep_pace(ledger: Ledger, prefill: Prefill) -> bool:
    """Whether the steps that carry the prompt make any resident's token late.

    Each of those steps gives every resident one token, due one pace after the other, behind the slack it has
    banked (DSLO). Lateness after j steps is convex in j, so its ends decide. A resident whose own prompt is
    ahead meets only the steps behind it. `SLACK_RESERVE` of a pace stays unspent, for what no model foresees.

    Where chunks have steps of their own, residents get their tokens in steps of decodes between them, and one in
    the step behind the last.
    """
    margin = ledger.backend.margin
    behind_s = _behind_s(ledger, prefill)
    begin_s = prefill.held_s + prefill.wait_s
    first_s = begin_s + (prefill.first_step_s + behind_s) * margin
    all_s = begin_s + (prefill.total_s + behind_s) * margin
    steps = prefill.steps
    for tpot_s, slack_s in ledger.slack_floor + ledger.foreign.slack:
        left_s = slack_s - SLACK_RESERVE * tpot_s
        if first_s > left_s + tpot_s or all_s > left_s + steps * tpot_s:
            return False
    queued = ledger.queued_slack_floor + ledger.foreign.queued_slack
    if queued:
        own_s = (prefill.own_s + behind_s) * margin
        for tpot_s, slack_s in queued:
            if own_s > slack_s + (prefill.own_steps - SLACK_RESERVE) * tpot_s:
                return False
    return True


def _behind_s(ledger: Ledger, prefill: Prefill) -> float:
    """The step of decodes behind a chunk that brings residents their token, where no chunk's own step does."""
    return 0.0 if ledger.backend.prefill_interval is None else prefill.next_step_s


def slack_room_tokens(ledger: Ledger, prefill: Prefill) -> int:
    """How many prompt tokens others may have queued, unknown to this decision, before the prompt makes any
    resident's token late after all (`residents_keep_pace`); at least 0.

    Within one step they only lengthen it. Beyond it every chunk of them is one more step, which gives each
    resident one token and one pace of time; as many as there are steps of decodes behind each, where chunks have
    steps of their own. The step in flight may carry one too.
    """
    cost = _ChunksCost.of(ledger)
    margin, whole_s = ledger.backend.margin, cost.whole_s
    behind_s = _behind_s(ledger, prefill)
    wait_s, first_s = max(prefill.wait_s, whole_s), (prefill.first_step_s + behind_s) * margin
    wait_s += prefill.held_s
    all_s = wait_s + (prefill.total_s + behind_s) * margin
    least = _MANY_TOKENS
    for tpot_s, slack_s in ledger.slack_floor + ledger.foreign.slack:
        left_s = slack_s - SLACK_RESERVE * tpot_s
        first_left_s = left_s + tpot_s - wait_s - first_s
        if first_left_s < whole_s - first_s:
            least = min(least, (first_left_s - cost.begin_s) / cost.each_s)
        least = min(least, cost.tokens_within(left_s + prefill.steps * tpot_s - all_s, tpot_s))
    own_s = (prefill.own_s + behind_s) * margin
    for tpot_s, slack_s in ledger.queued_slack_floor + ledger.foreign.queued_slack:
        left_s = slack_s + (prefill.own_steps - SLACK_RESERVE) * tpot_s - own_s
        least = min(least, cost.tokens_within(left_s, tpot_s))
    return max(int(least), 0)


@dataclass(frozen=True, slots=True)
class _ChunksCost:
    """What more prompt tokens cost a resident: a whole chunk `whole_s`, which brings it `paces` tokens; part of
    one at most `begin_s` and `each_s` a token."""

    chunk: int
    whole_s: float
    begin_s: float
    each_s: float
    paces: int

    @classmethod
    def of(cls, ledger: Ledger) -> _ChunksCost:
        backend, chunk = ledger.backend, ledger.full_chunk_tokens
        whole_s = ledger.chunk_step_s * backend.margin
        if backend.prefill_interval is None:
            each_s = max(whole_s - ledger.decode_step_s * backend.margin, 1e-9) / chunk
            return cls(chunk, whole_s, 0.0, each_s, 1)
        # what is left over may need a chunk more, and that its decodes
        one_s = backend.chunk_step_s(1, ledger.decodes, ledger.decode_kv_tokens) * backend.margin
        return cls(chunk, whole_s, one_s, max(whole_s - one_s, 1e-9) / chunk, backend.prefill_interval)

    def tokens_within(self, left_s: float, tpot_s: float) -> float:
        """The prompt tokens that steps may carry in addition until whoever has `left_s` left is late."""
        gained_s = self.paces * tpot_s
        if left_s == math.inf or (self.whole_s <= gained_s and left_s >= self.begin_s + self.chunk * self.each_s):
            return _MANY_TOKENS
        steps = int(left_s / (self.whole_s - gained_s)) if self.whole_s > gained_s else 0
        left_s -= steps * (self.whole_s - gained_s)
        return steps * self.chunk + min((left_s - self.begin_s) / self.each_s, self.chunk)


def limits_for(ledger: Ledger, ask: Ask, judged: Judgement, *, resident_slack: bool) -> Limits:
    """The box of loads around this placement in which its promises still hold, in the store's sums.

    Of prompts there may be so many more that nobody's first token is late, nor (`resident_slack`) any token of
    those on board: what other replicas queued since they told of it spends the same slack.

    The corner is found along the direction "more requests like this one": as many as keep the steady step
    within the pace by the slope measured there, halved when one evaluation at the corner disagrees.
    """
    request = ask.request
    seqs = request.sequences
    kv_each = max(own_kv_tokens(ledger.backend.limits, request, ask.output_tokens), 1)
    base_decodes = ledger.stored.decodes + ledger.foreign.decodes + seqs
    base_kv = ledger.stored.kv_tokens + ledger.foreign.peak_kv_tokens + kv_each
    base_prefill = ledger.stored.prefill_tokens + ledger.foreign.queued_prefill_tokens
    base_prefill += (request.prompt_tokens - request.cached_tokens) * seqs
    more = _room(ledger, judged, kv_each, seqs, _reserved_with(ledger, ask))
    prefill = judged.prefill
    chunk = ledger.backend.limits.max_batched_tokens or DEFAULT_CHUNK_TOKENS
    if prefill is not None and prefill.least_chunk_tokens:
        chunk = min(chunk, prefill.least_chunk_tokens)
    prefill_room = chunk
    if prefill is not None and math.isfinite(ask.ttft_due_s) and judged.ttft_s is not None:
        left_s = max(ask.ttft_due_s - request.arrival_s - judged.ttft_s, 0.0)
        between_s = ledger.backend.between_chunks_s(ledger.decodes, ledger.decode_kv_tokens)
        prefill_room = int(left_s / max(prefill.first_step_s + between_s, 1e-6)) * chunk
    if prefill is not None and resident_slack and not ledger.backend.dynamic_chunk:
        prefill_room = min(prefill_room, slack_room_tokens(ledger, prefill))
    return Limits(base_decodes + more * seqs, base_kv + more * kv_each, base_prefill + prefill_room)


def _room(ledger: Ledger, judged: Judgement, kv_each: int, seqs: int, reserved_tokens: int) -> int:
    backend = ledger.backend
    limits = backend.limits
    peak = judged.peak_kv_tokens or ledger.peak_kv_tokens
    most = 64
    if limits.max_running_seqs is not None:
        most = min(most, (limits.max_running_seqs - ledger.seqs - seqs) // seqs)
    if limits.kv_tokens is not None:
        most = min(most, max(limits.kv_tokens - max(peak, reserved_tokens), 0) // kv_each)
    if most <= 0:
        return 0
    if not backend.calibrated or math.isinf(judged.pace_s) or judged.tpot_s is None:
        return most
    within_s = judged.pace_s / backend.margin
    at = ledger.seqs + seqs
    decode_seconds = backend.step_time.decode_seconds
    slope_s = decode_seconds(at + seqs, peak + kv_each) - judged.tpot_s
    if slope_s > 0:
        most = min(most, int((within_s - judged.tpot_s) / slope_s))
    while most > 0 and decode_seconds(at + most * seqs, peak + most * kv_each) > within_s:
        most //= 2
    return max(most, 0)
