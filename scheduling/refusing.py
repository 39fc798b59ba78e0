"""When waiting cannot help any more, and when trying again can."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

from scheduling.backends import Backend
from scheduling.decisions import Refusal, RefusalKind
from scheduling.fleet import Fleet, is_open
from scheduling.ledger import Ledger
from scheduling.placing import Look
from scheduling.policies.protocol import Policy
from scheduling.predict import walk_prefill
from scheduling.tickets import Ticket

_FASTEST_LOOKED_AT = 4
_ENDS_LOOKED_AT = 16


def note_length(ticket: Ticket, fleet: Fleet) -> None:
    """Note which backends a request that has come is too long for, which differ where engines do.

    The answer counts as long as it may get, where any backend has room for that: engines refuse what may outgrow
    them. Where none has, the prompt alone counts, and the engine says what it makes of the rest.
    """
    request = ticket.request
    prompt_tokens, most = request.prompt_tokens, request.max_output_tokens or 1
    if not fleet.all_take(prompt_tokens, most):
        serving = [ledger.backend for ledger in fleet.serving(request.model) if is_open(ledger)]
        if not any(backend.limits.takes(prompt_tokens, most) for backend in serving):
            most = 1
        ticket.misfits = frozenset(
            [backend.name for backend in serving if not backend.limits.takes(prompt_tokens, most)]
        )
    if most > 1:
        ticket.ask = replace(ticket.ask, answer_tokens=most)


def at_once(ticket: Ticket, fleet: Fleet) -> Refusal | None:
    """The refusal of a request that no waiting can help; None when there is hope."""
    request, longest = ticket.request, -1
    for ledger in fleet.serving(request.model):
        if is_open(ledger):
            limits = ledger.backend.limits
            if limits.takes(request.prompt_tokens, ticket.ask.answer_tokens):
                return None
            longest = max(longest, limits.longest_prompt or 0)
    if longest < 0:
        return Refusal(RefusalKind.NO_BACKEND, f"no backend is up for model {request.model!r}", 1.0)
    answer = ticket.ask.answer_tokens
    behind = f" and its answer up to {answer}" if answer > 1 else ""
    message = f"the prompt has {request.prompt_tokens} tokens{behind}; no backend takes more than {longest}"
    return Refusal(RefusalKind.TOO_LONG, message)


def may_retry(ticket: Ticket, fleet: Fleet, max_attempts: int) -> bool:
    """Whether there is another backend to try for a request that backends have failed."""
    if len(ticket.excluded) >= max_attempts:
        return False
    return any(
        is_open(ledger) and ledger.backend.name not in ticket.excluded
        for ledger in fleet.serving(ticket.request.model)
    )


def within_reach(ticket: Ticket, policy: Policy, fleet: Fleet, now_s: float) -> bool:
    """Whether one that waits without a deadline can wait for anything: tiers that take no backends from a pool may
    offer it only those where it failed, and it would wait for ever."""
    if math.isfinite(ticket.until_s) or policy.uses_pool or not policy.uses_tiers:
        return True
    stages = policy.last_resort if ticket.relegated else policy.stages
    return any(
        is_open(ledger) and ledger.backend.name not in ticket.excluded
        for stage in stages(ticket.request, ticket.tier, fleet, now_s)
        for ledger in stage.ledgers
    )


def latest_start_s(ticket: Ticket, fleet: Fleet, now_s: float) -> float:
    """When a request must start at the latest, on an idle backend, to make its first token."""
    due_s = ticket.ask.ttft_due_s
    if math.isinf(due_s):
        return math.inf
    idle_s = [
        walk_prefill(Ledger(backend), ticket.request, now_s, ticket.ask.own_tpot_s).total_s * backend.margin
        for backend in _fastest(ticket, fleet)
        if backend.calibrated
    ]
    return due_s - min(idle_s, default=0.0)


def pace_unreachable(ticket: Ticket, fleet: Fleet) -> bool:
    """Whether no backend keeps the request's pace, not even for it alone."""
    fastest = _fastest(ticket, fleet)
    pace_s = ticket.ask.own_tpot_s
    return bool(fastest) and all(
        backend.calibrated and backend.step_time.decode_seconds(1, 0) * backend.margin > pace_s
        for backend in fastest
    )


def too_tight(ticket: Ticket) -> Refusal:
    """The refusal of a request whose pace no backend can keep."""
    pace_ms = ticket.ask.own_tpot_s * 1e3
    return Refusal(RefusalKind.TOO_LATE, f"no backend makes a token every {pace_ms:g} ms, not even when idle")


def _fastest(ticket: Ticket, fleet: Fleet) -> list[Backend]:
    """Those with the shortest steps among the backends that may serve it."""
    return [ledger.backend for ledger in islice(fleet.fastest(ticket.request.model), _FASTEST_LOOKED_AT)]


def too_late(ticket: Ticket, found: Look, retry_after_s: float, now_s: float) -> Refusal:
    """The refusal of a request whose first token cannot be on time any more."""
    request = ticket.request
    promise_ms = (request.slo.ttft_s or 0.0) * 1e3
    if now_s - request.arrival_s < 1e-3:
        message = f"the first token cannot come within {promise_ms:.0f} ms even from an idle backend"
        return Refusal(RefusalKind.TOO_LATE, message)
    message = f"nothing became free within the {promise_ms:.0f} ms to the first token: {found.why()}"
    return Refusal(RefusalKind.SATURATED, message, retry_after_s)


def retry_after_s(ticket: Ticket, policy: Policy, fleet: Fleet, held: int, now_s: float) -> float:
    """Predicted seconds until one more of its kind fits: the first end on a backend it may use, once for
    every `held` request before it there."""
    soonest_s = math.inf
    backends = 0
    usable = (ledger for ledger in fleet.serving(ticket.request.model) if is_open(ledger))
    for ledger in islice(usable, _ENDS_LOOKED_AT):
        if policy.stage_on(ticket.tier, ledger, fleet, now_s) is None:
            continue
        backends += 1
        tokens = ledger.first_end_tokens()
        soonest_s = min(soonest_s, (tokens or 1.0) * ledger.floor_s)
    return soonest_s * (1 + held / backends) if backends else 1.0
