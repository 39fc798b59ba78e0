"""One look over the fleet for one request: the first backend, in the policy's order, that passes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from scheduling.backends import BackendState
from scheduling.checks import ALL_CHECKS, Checks
from scheduling.decisions import Candidate, Outcome, Verdict
from scheduling.desk import RELEGATED
from scheduling.feasible import Ask, Judgement, fits_hard_limits, judge, limits_for
from scheduling.ledger import Ledger
from scheduling.load import Cost, ReserveCandidate
from scheduling.paced import Pacer
from scheduling.policies.protocol import Admission, Stage
from scheduling.predict import expected_tpot_s, first_token_floor_s, own_prompt_tokens, steady_step_s, walk_prefill
from scheduling.reserved import own_kv_tokens

RECORDED_CANDIDATES = 24
"""Candidates a decision names one by one; the rest are counted by verdict in its reason."""


@dataclass(slots=True)
class Choice:
    """Where a request goes, and what the choice rests on."""

    ledger: Ledger
    outcome: Outcome
    host_tpot_s: float
    judged: Judgement


@dataclass(slots=True)
class Look:
    """What a look over the fleet found. `choice` is None when nothing passed."""

    choice: Choice | None
    candidates: tuple[Candidate, ...]
    looked_at: int
    verdicts: dict[Verdict, int]
    cause: str = ""

    def why(self) -> str:
        """The verdicts, counted, most frequent first; or why nothing was looked at."""
        if self.cause:
            return self.cause
        counted = sorted(self.verdicts.items(), key=lambda item: (-item[1], item[0].value))
        return ", ".join(f"{count} {verdict.value}" for verdict, count in counted) or "no backend"


def look(
    stages: Iterable[Stage],
    ask: Ask,
    admission: Admission,
    now_s: float,
    excluded: frozenset[str] = frozenset(),
    checks: Checks = ALL_CHECKS,
    pacer: Pacer | None = None,
) -> Look:
    """Walk the stages and stop at the first backend that passes. `pacer`: prompts wait for their turn, too."""
    seen: list[tuple[Ledger, Verdict, Judgement | None]] = []
    every_promise = admission is Admission.EVERY_PROMISE
    model = ask.request.model
    up, feasible = BackendState.UP, Verdict.FEASIBLE
    own_s = ask.own_tpot_s
    prompt_tokens = own_prompt_tokens(ask.request)
    for stage in stages:
        host_s = stage.host_tpot_s
        for ledger in stage.ledgers:
            backend = ledger.backend
            if (
                backend.state is not up
                or now_s < ledger.blocked_until_s
                or (backend.models and model not in backend.models)
                or backend.name in excluded
            ):
                seen.append((ledger, Verdict.UNAVAILABLE, None))
                continue
            if pacer is not None and pacer.wait_s(ledger, ledger.binding_tpot_s(host_s), prompt_tokens, now_s):
                seen.append((ledger, Verdict.PREFILL_PACE, None))
                continue
            if every_promise:
                pace_s = min(ledger.binding_tpot_s(host_s), own_s)
                hopeless = _at_a_glance(ledger, ask, pace_s, prompt_tokens, now_s, checks)
                if hopeless is not None:
                    seen.append((ledger, hopeless, None))
                    continue
                judged = judge(ledger, ask, host_s, now_s, checks)
            else:
                judged = _judge_own(ledger, ask, host_s, now_s)
            seen.append((ledger, judged.verdict, judged))
            if judged.verdict is feasible:
                return _found(seen, Choice(ledger, stage.outcome, host_s, judged))
    return _found(seen, None)


def _at_a_glance(
    ledger: Ledger, ask: Ask, pace_s: float, prompt_tokens: int, now_s: float, checks: Checks
) -> Verdict | None:
    """A promise that breaks however the rest turns out, seen without a prediction; None when there is none.

    Even one more token of KV makes steps too slow; even the first chunk of the prompt makes a resident late; even
    the least that its prompt takes is too long; or the residents' KV peak, which the newcomer lives to see, has no
    room for its prompt.
    """
    backend = ledger.backend
    if backend.calibrated:
        margin = backend.margin
        if ledger.floor_s * margin > pace_s and checks.looks_ahead:
            return Verdict.STEADY_STATE
        driven = backend.dynamic_chunk
        if not driven and prompt_tokens > ledger.chunk_room_tokens and checks.resident_slack:
            return Verdict.RESIDENT_SLACK
        if checks.first_token:
            within_s = min(pace_s, ledger.tightest_tpot_s) / margin if driven else math.inf
            floor_s = first_token_floor_s(ledger, prompt_tokens, now_s, within_s)
            if now_s + floor_s * margin > ask.ttft_due_s:
                return Verdict.FIRST_TOKEN
    capacity = backend.limits.kv_tokens
    if (
        capacity is not None
        and ledger.peak_kv_tokens + ask.request.prompt_tokens * ask.request.sequences > capacity
        and ask.output_tokens >= ledger.peak_after_tokens
        and ledger.seqs
        and checks.looks_ahead
    ):
        return Verdict.MEMORY
    return None


def _judge_own(ledger: Ledger, ask: Ask, host_s: float, now_s: float) -> Judgement:
    """For a router that promises the first token only: hard caps, memory as it is, and the newcomer's own TTFT."""
    hard = fits_hard_limits(ledger, ask)
    if hard is not None:
        return Judgement(hard)
    request = ask.request
    peak = ledger.peak_kv_with(request.prompt_tokens, ask.output_tokens, request.sequences)
    steady_s = steady_step_s(ledger, request, peak)
    capacity = ledger.backend.limits.kv_tokens
    if capacity is not None and ledger.seqs and peak > capacity:
        return Judgement(Verdict.MEMORY, None, steady_s, peak)
    driven_s = min(ledger.binding_tpot_s(host_s), ask.own_tpot_s, ledger.tightest_tpot_s)
    prefill = walk_prefill(ledger, request, now_s, driven_s)
    ttft_s = now_s - request.arrival_s + prefill.service_s
    late = ledger.backend.calibrated and now_s + prefill.service_s * ledger.backend.margin > ask.ttft_due_s
    if late:
        return Judgement(Verdict.FIRST_TOKEN, ttft_s, steady_s, peak, math.inf, prefill)
    expected_s = expected_tpot_s(ledger, steady_s, now_s, driven_s)
    return Judgement(Verdict.FEASIBLE, ttft_s, steady_s, peak, math.inf, prefill, expected_s)


def _found(seen: list[tuple[Ledger, Verdict, Judgement | None]], choice: Choice | None) -> Look:
    each = [verdict for _, verdict, _ in seen]
    verdicts = {verdict: count for verdict in Verdict if (count := each.count(verdict))}
    named = seen
    if len(seen) > RECORDED_CANDIDATES:
        named = [*seen[: RECORDED_CANDIDATES - 1], seen[-1]]
    candidates = tuple(
        Candidate(
            ledger.backend.name,
            ledger.tier,
            verdict,
            judged.ttft_s if judged else None,
            (judged.expected_tpot_s or judged.tpot_s) if judged else ledger.floor_s,
            judged.peak_kv_tokens if judged else None,
            ledger.load,
        )
        for ledger, verdict, judged in named
    )
    return Look(choice, candidates, len(seen), verdicts)


def candidate_for(choice: Choice, ask: Ask) -> ReserveCandidate:
    """What the store is asked for: the newcomer's cost, and the limits within which the choice stays right."""
    request, ledger = ask.request, choice.ledger
    seqs = request.sequences
    cost = Cost(
        decodes=seqs,
        peak_kv_tokens=own_kv_tokens(ledger.backend.limits, request, ask.output_tokens),
        prefill_tokens=max(request.prompt_tokens - request.cached_tokens, 1) * seqs,
        # whose promise was given up binds nobody, so no replica is to count it to its tier
        tier=RELEGATED if ask.own_tpot_s == math.inf and request.slo.tpot_s is not None else request.tier,
        tpot_ms=ask.own_tpot_s * 1e3,
    )
    limits = limits_for(ledger, ask, choice.judged, resident_slack=choice.outcome is not Outcome.ROUTED)
    # A router without tiers looked at no resident's promise, so it assumes nothing about them. To the store a
    # lease keeps its pace when its promise is lost; of those that are ours it is known that they hold nobody back.
    tightest_ms = 0.0
    if choice.outcome is not Outcome.ROUTED:
        tightest_ms = min(choice.judged.pace_s * 1e3, ledger.stored.tightest_ms)
    return ReserveCandidate(ledger.backend.name, cost, limits, tightest_ms, ledger.epoch)


def reason_for(outcome: Outcome, choice: Choice) -> str:
    """The decision in words."""
    name = choice.ledger.backend.name
    if outcome is Outcome.OWN_TIER:
        return f"{name} is the highest-loaded backend of its tier that keeps every promise"
    if outcome is Outcome.PROMOTED:
        return f"its own tier is full; {name} of the tighter tier {choice.ledger.tier} keeps every promise"
    if outcome is Outcome.SHARED:
        return f"its tier has no backend; it lives on {name} of tier {choice.ledger.tier}, which keeps its pace"
    if outcome is Outcome.RELEGATED:
        return f"its own promise cannot be kept any more; {name} has room left"
    return f"{name} is next by the policy's order"
