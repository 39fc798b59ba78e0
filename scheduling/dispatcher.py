"""The dispatcher: a pure state machine for a fleet. Events in, actions out; shells carry actions out.

The ladder for each request (PolyServe §4.2-4.4): its own tier, highest load first -> lazy promotion -> a backend
from the pool -> hold, by deadline -> an honest refusal (or, where its tier says so, whatever is left).

1. A placement counts in the ledger from the moment it is asked of the store, so two decisions of one replica
   never count on the same room.
2. A held request is looked at again only where something got better: on the backend that changed.
3. A request ends once: Ended, Refuse or Cancelled. A lease that was asked for ends once: Release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

from scheduling import events as ev
from scheduling.backends import BackendState
from scheduling.decisions import Decision, Outcome, Refusal, RefusalKind
from scheduling.feasible import Ask, judge, limits_for
from scheduling.fleet import Fleet, is_open
from scheduling.held import Alarms, HeldQueue, Phase, Ticket
from scheduling.ledger import Ledger, Resident, expected_output_tokens
from scheduling.lengths import FixedLength, LengthModel
from scheduling.load import Cost, LoadVector, ReserveCandidate
from scheduling.placing import Choice, Look, look
from scheduling.policies.protocol import Policy, Stage
from scheduling.predict import walk_prefill
from scheduling.requests import Request
from scheduling.shares import Shares
from scheduling.tiers import OnMiss, Tier, TierSet


@dataclass(frozen=True, slots=True)
class Options:
    """The dispatcher's knobs.

    Attributes:
        handback_period_s: how often tails are looked at; a backend found empty in `handback_checks` of them in
            a row goes back to the pool (PolyServe §4.3; the period is not in the paper).
        rebalance_period_s: length of a round in which demand is measured for a fleet without a pool.
        demand_window_s: how long a tier counts as in demand after a request.
        max_attempts: backends tried for one request before its first byte.
        max_store_refusals: times a decision is made again after the store said no, before the request is held.
        max_held: held requests at most; beyond it the newcomer is refused.
        cooldown_s: a backend that failed before a first byte rests this long, doubling up to 32 times.
    """

    handback_period_s: float = 10.0
    handback_checks: int = 2
    rebalance_period_s: float = 10.0
    demand_window_s: float = 30.0
    max_attempts: int = 3
    max_store_refusals: int = 2
    max_held: int = 10_000
    cooldown_s: float = 0.25


@dataclass(slots=True)
class Counts:
    """Conservation: arrived = finished + failed + cancelled + refused + held + reserving + open."""

    arrived: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    held: int = 0
    reserving: int = 0
    open: int = 0

    @property
    def conserved(self) -> bool:
        ended = self.finished + self.failed + self.cancelled + self.refused
        return self.arrived == ended + self.held + self.reserving + self.open


_PHASE_COUNT = {Phase.HELD: "held", Phase.RESERVING: "reserving", Phase.OPEN: "open"}
_DEFAULT_LENGTH = FixedLength()


class Dispatcher:
    """See the module. One per replica and fleet; not thread-safe; `now_s` never goes back."""

    def __init__(self, tiers: TierSet, policy: Policy, rng: Random, options: Options | None = None) -> None:
        self.policy = policy
        self.options = options or Options()
        self.fleet = Fleet(tiers, self.options.demand_window_s)
        self.counts = Counts()
        self._rng = rng
        self._tickets: dict[str, Ticket] = {}
        self._leases: dict[str, Ticket] = {}
        self._held: dict[str, HeldQueue] = {}
        self._relegated = HeldQueue()
        self._alarms = Alarms()
        self._lengths: dict[tuple[str, str], LengthModel] = {}
        self._shares = Shares()
        self._blocked: set[str] = set()
        self._next_handback_s = math.inf  # set when the first backend comes
        self._next_round_s = math.inf
        self._handlers: dict[type, Callable[..., None]] = {
            ev.Arrived: self._arrived,
            ev.Reserved: self._reserved,
            ev.ReserveRefused: self._reserve_refused,
            ev.OpenFailed: self._open_failed,
            ev.FirstToken: self._first_token,
            ev.Progressed: self._progressed,
            ev.Ended: self._ended,
            ev.Cancelled: self._cancelled,
            ev.BackendChanged: self._backend_changed,
            ev.BackendRemoved: self._backend_removed,
            ev.MembershipChanged: self._membership_changed,
            ev.TiersChanged: self._tiers_changed,
            ev.LengthsChanged: self._lengths_changed,
            ev.Claimed: self._claimed,
            ev.ClaimRefused: self._claim_refused,
            ev.HandedBack: self._handed_back,
            ev.HandBackRefused: self._hand_back_refused,
            ev.LoadPublished: self._load_published,
            ev.TimePassed: self._time_passed,
        }

    @property
    def tiers(self) -> TierSet:
        return self.fleet.tiers

    def handle(self, event: ev.Event, now_s: float) -> list[ev.Action]:
        """What is to be done about an event."""
        out: list[ev.Action] = []
        self._handlers[type(event)](event, now_s, out)
        return out

    def next_wake_s(self) -> float | None:
        """When TimePassed is wanted next, if nothing else happens; None: not at all."""
        at_s = self._alarms.next_s()
        if self.policy.uses_tiers and len(self.fleet):
            at_s = min(at_s, self._next_handback_s, self._next_round_s)
        if self.counts.held:
            at_s = min(at_s, *(self.fleet[name].blocked_until_s for name in self._blocked), math.inf)
        return at_s if math.isfinite(at_s) else None

    # --- looking in from outside ---------------------------------------------------------------------------

    def held_by_tier(self) -> Mapping[str, int]:
        held = {tier.name: len(self._held[tier.name]) for tier in self.tiers.tiers if tier.name in self._held}
        if len(self._relegated):
            held["(relegated)"] = len(self._relegated)
        return held

    def held_requests(self) -> list[Ticket]:
        """All held, tier by tier; for looking at."""
        queues = [self._held[tier.name] for tier in self.tiers.tiers if tier.name in self._held]
        return [ticket for queue in [*queues, self._relegated] for ticket in queue.live()]

    def own_load(self, backend: str) -> LoadVector:
        """What this replica carries on a backend."""
        return self.fleet[backend].own_load()

    # --- requests ------------------------------------------------------------------------------------------

    def _arrived(self, event: ev.Arrived, now_s: float, out: list[ev.Action]) -> None:
        request = event.request
        tier = self.tiers[request.tier]
        lengths = self._lengths_of(request)
        ask = Ask(
            request,
            expected_output_tokens(request, lengths),
            math.inf if request.slo.tpot_s is None else request.slo.tpot_s,
            request.slo.deadline_s(request.arrival_s, 0),
        )
        ticket = Ticket(request, tier, ask)
        if request.request_id in self._tickets:
            raise AssertionError(f"request {request.request_id} arrived twice")
        self._tickets[request.request_id] = ticket
        self.counts.arrived += 1
        self.fleet.note_demand(tier.name, now_s)
        if not self._turn_away(ticket, now_s, out):
            self._place_or_hold(ticket, now_s, out)
        if self.policy.uses_tiers:
            self._note_share(ticket)

    def _turn_away(self, ticket: Ticket, now_s: float, out: list[ev.Action]) -> bool:
        """Refuse at once what no waiting can help."""
        request = ticket.request
        serving = [ledger for ledger in self.fleet.serving(request.model) if is_open(ledger)]
        if not serving:
            message = f"no backend is up for model {request.model!r}"
            self._refuse(ticket, Refusal(RefusalKind.NO_BACKEND, message, 1.0), now_s, out)
            return True
        longest = [ledger.backend.limits.max_model_tokens for ledger in serving]
        known = [tokens for tokens in longest if tokens is not None]
        if len(known) == len(longest) and request.prompt_tokens >= max(known):
            message = (
                f"the prompt has {request.prompt_tokens} tokens; the longest any backend takes is {max(known)}"
            )
            self._refuse(ticket, Refusal(RefusalKind.TOO_LONG, message), now_s, out)
            return True
        return False

    def _place_or_hold(self, ticket: Ticket, now_s: float, out: list[ev.Action]) -> None:
        found = self._look(ticket, now_s)
        if found.choice is not None:
            self._reserve(ticket, found.choice, found, now_s, out)
            return
        if not ticket.relegated:
            until_s = self._latest_start_s(ticket, now_s)
            if until_s <= now_s:
                self._give_up_promise(ticket, found, now_s, out)
                return
            ticket.until_s = until_s
        if self.counts.held >= self.options.max_held:
            message = f"{self.counts.held} requests are held already"
            self._refuse(ticket, Refusal(RefusalKind.SATURATED, message, self._retry_after_s(ticket)), now_s, out)
            return
        self._hold(ticket, found, now_s, out)

    def _look(self, ticket: Ticket, now_s: float) -> Look:
        policy, request = self.policy, ticket.request
        stages = policy.last_resort if ticket.relegated else policy.stages
        return look(
            stages(request, ticket.tier, self.fleet, now_s), ticket.ask, policy.admission, now_s, ticket.excluded
        )

    def _hold(self, ticket: Ticket, found: Look, now_s: float, out: list[ev.Action]) -> None:
        claim = self._claim_for(ticket, now_s)
        outcome = Outcome.CLAIMED if claim is not None else Outcome.HELD
        reason = f"nothing fits now: {found.why()}"
        if claim is not None:
            reason = f"{reason}; taking {claim.backend} for tier {claim.tier}"
        decision = self._decide(ticket, outcome, reason, None, found, now_s)
        self._move(ticket, Phase.HELD)
        queue = self._queue_of(ticket)
        queue.push(self.policy.held_key(ticket.request), ticket)
        self._alarms.set(ticket.until_s, ticket)
        out.append(ev.Hold(ticket.request.request_id, ticket.until_s, decision))
        if claim is not None:
            out.append(claim)

    def _queue_of(self, ticket: Ticket) -> HeldQueue:
        if ticket.relegated:
            return self._relegated
        return self._held.setdefault(ticket.tier.name, HeldQueue())

    def _latest_start_s(self, ticket: Ticket, now_s: float) -> float:
        """When it must start at the latest, on an idle backend, to make its first token."""
        due_s = ticket.ask.ttft_due_s
        if math.isinf(due_s):
            return math.inf
        service_s = min(
            (
                walk_prefill(Ledger(ledger.backend), ticket.request, now_s, math.inf).total_s
                * ledger.backend.margin
                for ledger in self._some_serving(ticket.request.model)
                if ledger.backend.calibrated
            ),
            default=0.0,
        )
        return due_s - service_s

    def _some_serving(self, model: str, most: int = 4) -> list[Ledger]:
        """A few open backends of a model: the fleet's engines are few kinds."""
        chosen: list[Ledger] = []
        for ledger in self.fleet.serving(model):
            if is_open(ledger):
                chosen.append(ledger)
                if len(chosen) == most:
                    break
        return chosen

    def _give_up_promise(self, ticket: Ticket, found: Look, now_s: float, out: list[ev.Action]) -> None:
        """Its first token cannot be on time any more: refuse, or serve with what is left."""
        request = ticket.request
        if request.slo_stated and ticket.tier.on_miss is OnMiss.REFUSE:
            waited_s = now_s - request.arrival_s
            hopeless = waited_s < 1e-3
            kind = RefusalKind.TOO_LATE if hopeless else RefusalKind.SATURATED
            retry_s = None if hopeless else self._retry_after_s(ticket)
            promise_ms = (request.slo.ttft_s or 0.0) * 1e3
            message = (
                f"the first token cannot come within {promise_ms:.0f} ms even from an idle backend"
                if hopeless
                else f"nothing became free within the {promise_ms:.0f} ms to the first token: {found.why()}"
            )
            self._refuse(ticket, Refusal(kind, message, retry_s), now_s, out, found)
            return
        ticket.relegated = True
        ticket.until_s = math.inf
        ticket.ask = replace(ticket.ask, own_tpot_s=math.inf, ttft_due_s=math.inf)
        again = self._look(ticket, now_s)
        if again.choice is not None:
            self._reserve(ticket, again.choice, again, now_s, out)
        else:
            self._hold(ticket, again, now_s, out)

    def _reserve(self, ticket: Ticket, choice: Choice, found: Look, now_s: float, out: list[ev.Action]) -> None:
        request = ticket.request
        ledger = choice.ledger
        ticket.attempts += 1
        lease_id = f"{request.request_id}#{ticket.attempts}"
        tpot_s = ticket.ask.own_tpot_s
        seqs = request.sequences
        cost = Cost(
            decodes=seqs,
            peak_kv_tokens=int((request.prompt_tokens + ticket.ask.output_tokens) * seqs),
            prefill_tokens=max(request.prompt_tokens - request.cached_tokens, 1) * seqs,
            tier=request.tier,
            tpot_ms=tpot_s * 1e3,
        )
        candidate = ReserveCandidate(
            ledger.backend.name,
            cost,
            limits_for(ledger, ticket.ask, choice.judged),
            choice.judged.pace_s * 1e3,
            ledger.epoch,
        )
        guest = choice.outcome is Outcome.PROMOTED
        resident = Resident(lease_id, request, cost, self._lengths_of(request), now_s, guest=guest)
        resident.lost = ticket.relegated
        if choice.judged.prefill is not None:
            resident.expected_first_s = now_s + choice.judged.prefill.service_s
        ledger.place(resident, now_s)
        self.fleet.reorder(ledger)
        ticket.lease_id = lease_id
        ticket.backend = ledger.backend.name
        ticket.resident = resident
        outcome = Outcome.RELEGATED if ticket.relegated else choice.outcome
        decision = self._decide(ticket, outcome, _reason(outcome, choice), ledger.backend.name, found, now_s)
        self._leases[lease_id] = ticket
        self._move(ticket, Phase.RESERVING)
        out.append(ev.Reserve(request.request_id, lease_id, (candidate,), decision))

    def _decide(
        self, ticket: Ticket, outcome: Outcome, reason: str, backend: str | None, found: Look | None, now_s: float
    ) -> Decision:
        decision = Decision(
            ticket.request.request_id,
            now_s,
            outcome,
            reason,
            backend,
            found.candidates if found else (),
            found.looked_at if found else 0,
        )
        ticket.decision = decision
        ticket.outcome = outcome
        return decision

    def _refuse(
        self, ticket: Ticket, refusal: Refusal, now_s: float, out: list[ev.Action], found: Look | None = None
    ) -> None:
        decision = self._decide(ticket, Outcome.REFUSED, refusal.message, None, found, now_s)
        self._finish(ticket)
        self.counts.refused += 1
        out.append(ev.Refuse(ticket.request.request_id, refusal, decision))

    def _retry_after_s(self, ticket: Ticket) -> float:
        """Predicted seconds until one more of its kind fits: the first end on a backend it may use, once for
        every request held before it there."""
        soonest_s = math.inf
        backends = 0
        for ledger in self._some_serving(ticket.request.model, most=16):
            if self.policy.stage_on(ticket.tier, ledger, self.fleet, 0.0) is None:
                continue
            backends += 1
            tokens = ledger.first_end_tokens()
            soonest_s = min(soonest_s, (tokens or 1.0) * ledger.floor_s)
        if math.isinf(soonest_s):
            return 1.0
        ahead = len(self._held.get(ticket.tier.name, ()))
        return soonest_s * (1 + ahead / backends)

    # --- the store's answers -------------------------------------------------------------------------------

    def _reserved(self, event: ev.Reserved, now_s: float, out: list[ev.Action]) -> None:
        ticket = self._leases.get(event.lease_id)
        if ticket is None or ticket.phase is not Phase.RESERVING:
            out.append(ev.Release(event.lease_id, event.backend))
            return
        if ticket.gone:
            self._leave(ticket, now_s, out, released=True)
            self._finish(ticket)
            self.counts.cancelled += 1
            return
        assert ticket.decision is not None
        self._move(ticket, Phase.OPEN)
        out.append(
            ev.Open(
                ticket.request.request_id,
                event.lease_id,
                event.backend,
                ticket.decision,
                ticket.ask.ttft_due_s - now_s,
            )
        )

    def _reserve_refused(self, event: ev.ReserveRefused, now_s: float, out: list[ev.Action]) -> None:
        for name, foreign in event.foreign.items():
            self._set_foreign(name, foreign, now_s)
        ticket = self._leases.get(event.lease_id)
        if ticket is None:
            return
        self._leave(ticket, now_s, out, released=False)
        if ticket.gone:
            self._finish(ticket)
            self.counts.cancelled += 1
            return
        ticket.store_refusals += 1
        if ticket.store_refusals <= self.options.max_store_refusals:
            self._place_or_hold(ticket, now_s, out)
        else:
            ticket.store_refusals = 0
            ticket.until_s = self._latest_start_s(ticket, now_s)
            self._hold(ticket, Look(None, (), 0, {}), now_s, out)

    def _leave(self, ticket: Ticket, now_s: float, out: list[ev.Action], *, released: bool) -> Ledger | None:
        """Take a ticket's resident off its backend; `released`: the store has to be told too."""
        lease_id, name = ticket.lease_id, ticket.backend
        if lease_id is None or name is None:
            return None
        self._leases.pop(lease_id, None)
        ticket.lease_id = ticket.backend = ticket.resident = None
        if released:
            out.append(ev.Release(lease_id, name))
        ledger = self.fleet.get(name)
        if ledger is not None and ledger.remove(lease_id, now_s) is not None:
            self.fleet.reorder(ledger)
        return ledger

    # --- the stream's life ---------------------------------------------------------------------------------

    def _open_failed(self, event: ev.OpenFailed, now_s: float, out: list[ev.Action]) -> None:
        ticket = self._leases.get(event.lease_id)
        if ticket is None:
            return
        name = ticket.backend
        ledger = self._leave(ticket, now_s, out, released=True)
        if ticket.gone:
            self._finish(ticket)
            self.counts.cancelled += 1
        elif not event.retryable:
            self._finish(ticket)
            self.counts.failed += 1
        else:
            if ledger is not None:
                self._rest(ledger, now_s)
            ticket.excluded |= {name} if name else frozenset()
            ticket.cause = event.cause
            if self._may_retry(ticket):
                self._place_or_hold(ticket, now_s, out)
            else:
                message = f"{ticket.attempts} backends failed before the first token; the last: {event.cause}"
                self._refuse(ticket, Refusal(RefusalKind.FAILED, message, 1.0), now_s, out)
        if ledger is not None:
            self._offer(ledger, now_s, out)

    def _may_retry(self, ticket: Ticket) -> bool:
        if ticket.attempts >= self.options.max_attempts:
            return False
        return any(
            is_open(ledger) and ledger.backend.name not in ticket.excluded
            for ledger in self.fleet.serving(ticket.request.model)
        )

    def _rest(self, ledger: Ledger, now_s: float) -> None:
        ledger.blocked_until_s = now_s + self.options.cooldown_s * 2.0 ** min(ledger.failures, 5)
        ledger.failures += 1
        self._blocked.add(ledger.backend.name)

    def _first_token(self, event: ev.FirstToken, now_s: float, out: list[ev.Action]) -> None:
        ticket = self._leases.get(event.lease_id)
        if ticket is None or ticket.backend is None:
            return
        ledger = self.fleet.get(ticket.backend)
        if ledger is None:
            return
        ledger.failures = 0
        ledger.first_token(event.lease_id, now_s)
        self.fleet.reorder(ledger)
        if self.counts.held:
            self._offer(ledger, now_s, out)

    def _progressed(self, event: ev.Progressed, now_s: float, out: list[ev.Action]) -> None:
        ledger = self.fleet.get(event.backend)
        if ledger is None:
            return
        residents = ledger.residents
        for progress in event.progress:
            resident = residents.get(progress.lease_id)
            if resident is not None and resident.first_token:
                resident.advance(progress.output_tokens, now_s)
        if event.step_s is not None:
            ledger.step_s = event.step_s
        if event.last_step_age_s is not None:
            ledger.last_step_s = now_s - event.last_step_age_s
        ledger.refresh(now_s)
        self.fleet.reorder(ledger)
        if self.counts.held:
            self._offer(ledger, now_s, out)

    def _ended(self, event: ev.Ended, now_s: float, out: list[ev.Action]) -> None:
        ticket = self._leases.get(event.lease_id)
        if ticket is None:
            return
        ledger = self._leave(ticket, now_s, out, released=True)
        self._finish(ticket)
        if event.kind is ev.EndKind.FINISHED:
            self.counts.finished += 1
        elif event.kind is ev.EndKind.FAILED:
            self.counts.failed += 1
        else:
            self.counts.cancelled += 1
        if ledger is not None and self.counts.held:
            self._offer(ledger, now_s, out)

    def _cancelled(self, event: ev.Cancelled, now_s: float, out: list[ev.Action]) -> None:
        ticket = self._tickets.get(event.request_id)
        if ticket is None:
            return
        if ticket.phase is Phase.HELD:
            self._finish(ticket)
            self.counts.cancelled += 1
        elif ticket.phase is Phase.RESERVING:
            ticket.gone = True  # the store's answer is on its way; it ends the lease
        else:
            ledger = self._leave(ticket, now_s, out, released=True)
            self._finish(ticket)
            self.counts.cancelled += 1
            if ledger is not None and self.counts.held:
                self._offer(ledger, now_s, out)

    def _move(self, ticket: Ticket, phase: Phase) -> None:
        before = _PHASE_COUNT.get(ticket.phase)
        if before is not None:
            setattr(self.counts, before, getattr(self.counts, before) - 1)
        if ticket.phase is Phase.HELD:
            self._queue_of(ticket).left()
        ticket.move(phase)
        after = _PHASE_COUNT.get(phase)
        if after is not None:
            setattr(self.counts, after, getattr(self.counts, after) + 1)

    def _finish(self, ticket: Ticket) -> None:
        self._move(ticket, Phase.DONE)
        del self._tickets[ticket.request.request_id]

    # --- held requests -------------------------------------------------------------------------------------

    def _offer(self, ledger: Ledger, now_s: float, out: list[ev.Action]) -> None:
        """A backend got better: try the heads of the queues on it, tight to loose, then the relegated."""
        if not self.counts.held or not is_open(ledger) or now_s < ledger.blocked_until_s:
            return
        for tier in self.tiers.tiers:
            queue = self._held.get(tier.name)
            while queue:
                ticket = queue.head()
                if ticket is None or not self._try_on(ticket, ledger, now_s, out):
                    break
        while len(self._relegated):
            ticket = self._relegated.head()
            if ticket is None or not self._try_on(ticket, ledger, now_s, out):
                break

    def _try_on(self, ticket: Ticket, ledger: Ledger, now_s: float, out: list[ev.Action]) -> bool:
        stage = self._stage_on(ticket, ledger, now_s)
        if stage is None:
            return False
        found = look((stage,), ticket.ask, self.policy.admission, now_s, ticket.excluded)
        if found.choice is None:
            return False
        self._reserve(ticket, found.choice, found, now_s, out)
        return True

    def _stage_on(self, ticket: Ticket, ledger: Ledger, now_s: float) -> Stage | None:
        if ticket.relegated and self.policy.uses_tiers:
            if ledger.tier is None:
                return None
            return Stage(Outcome.RELEGATED, (ledger,), self.fleet.host_tpot_s(ledger, now_s))
        return self.policy.stage_on(ticket.tier, ledger, self.fleet, now_s)

    def _offer_all(self, now_s: float, out: list[ev.Action]) -> None:
        for ledger in list(self.fleet):
            self._offer(ledger, now_s, out)

    def _time_passed(self, event: ev.TimePassed, now_s: float, out: list[ev.Action]) -> None:
        for ticket in self._alarms.due(now_s):
            found = self._look(ticket, now_s)
            if found.choice is not None:
                self._reserve(ticket, found.choice, found, now_s, out)
            else:
                self._unhold(ticket)
                self._give_up_promise(ticket, found, now_s, out)
        for name in [name for name in self._blocked if self.fleet[name].blocked_until_s <= now_s]:
            self._blocked.discard(name)
            self._offer(self.fleet[name], now_s, out)
        if not self.policy.uses_tiers:
            return
        if now_s >= self._next_handback_s:
            self._next_handback_s = now_s + self.options.handback_period_s
            self._look_at_tails(out)
        if now_s >= self._next_round_s:
            self._next_round_s = now_s + self.options.rebalance_period_s
            self._rebalance(out)

    def _unhold(self, ticket: Ticket) -> None:
        """Take a ticket out of its queue before its promise (and so its queue) changes."""
        self._queue_of(ticket).left()
        self.counts.held -= 1
        ticket.phase = Phase.NEW

    # --- tiers and the pool --------------------------------------------------------------------------------

    def _claim_for(self, ticket: Ticket, now_s: float) -> ev.Claim | None:
        """A backend for a tier that starts holding: from the pool, or, for a tier that has none at all, from
        the largest holder (PolyServe §4.3; small fleets: design §4)."""
        if not self.policy.uses_tiers:
            return None
        tier = ticket.tier
        if any(ledger.claiming_for == tier.name for ledger in self.fleet):
            return None
        for ledger in self.fleet.pool():
            if not is_open(ledger) or now_s < ledger.blocked_until_s or ledger.backend.name in ticket.excluded:
                continue
            if not ledger.backend.serves(ticket.request.model):
                continue
            judged = judge(ledger, ticket.ask, tier.host_tpot_s, now_s)
            if judged.feasible:
                return self._claim(ledger, tier, f"tier {tier.name} holds requests; {ledger.backend.name} is free")
        if self.fleet.tier_size(tier.name):
            return None
        taken = self.fleet.to_relabel(tier, ticket.request.model)
        if taken is None:
            return None
        return self._claim(taken, tier, f"tier {tier.name} has no backend; {taken.tier} holds the most")

    def _claim(self, ledger: Ledger, tier: Tier, reason: str) -> ev.Claim:
        ledger.claiming_for = tier.name
        return ev.Claim(ledger.backend.name, tier.name, ledger.epoch, reason)

    def _claimed(self, event: ev.Claimed, now_s: float, out: list[ev.Action]) -> None:
        self._settle(event.backend, event.tier, event.epoch, now_s)
        ledger = self.fleet.get(event.backend)
        if ledger is None:
            return
        self._offer(ledger, now_s, out)
        self._claim_for_head(event.tier, now_s, out)

    def _claim_refused(self, event: ev.ClaimRefused, now_s: float, out: list[ev.Action]) -> None:
        wanted = self._settle(event.backend, event.tier, event.epoch, now_s)
        ledger = self.fleet.get(event.backend)
        if ledger is not None and ledger.tier is not None:
            self._offer(ledger, now_s, out)
        if wanted is not None:
            self._claim_for_head(wanted, now_s, out)

    def _settle(self, backend: str, tier: str | None, epoch: int, now_s: float) -> str | None:
        """A claim was answered: what it was wanted for."""
        ledger = self.fleet.get(backend)
        if ledger is None:
            return None
        wanted, ledger.claiming_for = ledger.claiming_for, None
        self.fleet.set_membership(backend, tier, epoch, now_s)
        return wanted

    def _claim_for_head(self, tier: str, now_s: float, out: list[ev.Action]) -> None:
        queue = self._held.get(tier)
        ticket = queue.head() if queue else None
        if ticket is not None:
            claim = self._claim_for(ticket, now_s)
            if claim is not None:
                out.append(claim)

    def _handed_back(self, event: ev.HandedBack, now_s: float, out: list[ev.Action]) -> None:
        self._settle(event.backend, None, event.epoch, now_s)
        for tier in self.tiers.tiers:
            self._claim_for_head(tier.name, now_s, out)

    def _hand_back_refused(self, event: ev.HandBackRefused, now_s: float, out: list[ev.Action]) -> None:
        self._settle(event.backend, event.tier, event.epoch, now_s)

    def _look_at_tails(self, out: list[ev.Action]) -> None:
        """Return what has been empty at two looks in a row: the gradient empties the tail first."""
        for ledger in self.fleet:
            if ledger.tier is None or ledger.backend.pinned or ledger.claiming_for is not None:
                continue
            if not ledger.idle:
                ledger.empty_checks = 0
                continue
            ledger.empty_checks += 1
            if ledger.empty_checks >= self.options.handback_checks:
                ledger.empty_checks = 0
                out.append(ev.HandBack(ledger.backend.name, ledger.epoch))

    def _note_share(self, ticket: Ticket) -> None:
        """How much of a backend's time the request will take: its part of each step it lives through."""
        request = ticket.request
        for ledger in self._some_serving(request.model, most=1):
            step_time = ledger.backend.step_time
            prompt = request.prompt_tokens * request.sequences
            alone_s = step_time.decode_seconds(1, prompt)
            more_s = step_time.decode_seconds(33, 33 * prompt) - alone_s
            prefill_s = step_time.seconds_of(prompt, 1, 0, prompt * prompt / 2, 0, 0)
            pace_s = min(ticket.ask.own_tpot_s, 10 * alone_s)
            batch = max(min((pace_s - alone_s) / max(more_s / 32, 1e-9), 256.0), 1.0)
            decode_s = (
                ticket.ask.output_tokens * request.sequences * min(pace_s, alone_s + more_s / 32 * batch) / batch
            )
            self._shares.add(ticket.tier.name, prefill_s + decode_s)

    def _rebalance(self, out: list[ev.Action]) -> None:
        """Without a pool, labels follow demand; residents stay and drain under their own promises."""
        if self.fleet.pool():
            self._shares.close_round({}, ())
            return
        order = [tier.name for tier in self.tiers.tiers]
        move = self._shares.close_round({name: self.fleet.tier_size(name) for name in order}, order)
        if move is None:
            return
        for ledger in reversed(self.fleet.in_tier(move.giver)):
            if is_open(ledger) and not ledger.backend.pinned and ledger.claiming_for is None:
                out.append(
                    self._claim(ledger, self.tiers[move.taker], f"demand moved from {move.giver} to {move.taker}")
                )
                return

    # --- backends and policy -------------------------------------------------------------------------------

    def _backend_changed(self, event: ev.BackendChanged, now_s: float, out: list[ev.Action]) -> None:
        backend = event.backend
        if not len(self.fleet):
            self._next_handback_s = now_s + self.options.handback_period_s
            self._next_round_s = now_s + self.options.rebalance_period_s
        ledger = self.fleet.put(backend, now_s)
        if backend.state is BackendState.UP:
            self._offer(ledger, now_s, out)
            if ledger.tier is None:
                for tier in self.tiers.tiers:
                    self._claim_for_head(tier.name, now_s, out)

    def _backend_removed(self, event: ev.BackendRemoved, now_s: float, out: list[ev.Action]) -> None:
        self.fleet.remove(event.name, now_s)
        self._blocked.discard(event.name)

    def _membership_changed(self, event: ev.MembershipChanged, now_s: float, out: list[ev.Action]) -> None:
        self.fleet.set_membership(event.backend, event.tier, event.epoch, now_s)
        ledger = self.fleet.get(event.backend)
        if ledger is not None and ledger.tier is not None:
            self._offer(ledger, now_s, out)

    def _tiers_changed(self, event: ev.TiersChanged, now_s: float, out: list[ev.Action]) -> None:
        """Promises already given stand; held requests of a tier that is gone wait as the default tier's."""
        gone = [name for name in self._held if name not in event.tiers]
        self.fleet.set_tiers(event.tiers)
        for name in gone:
            default = event.tiers[event.tiers.default]
            for ticket in self._held[name].live():
                self._unhold(ticket)
                ticket.tier = default
                ticket.phase = Phase.NEW
                self._place_or_hold(ticket, now_s, out)
            del self._held[name]
        self._offer_all(now_s, out)

    def _lengths_changed(self, event: ev.LengthsChanged, now_s: float, out: list[ev.Action]) -> None:
        self._lengths[event.model, event.tier] = event.lengths

    def _lengths_of(self, request: Request) -> LengthModel:
        return self._lengths.get((request.model, request.tier), _DEFAULT_LENGTH)

    def _load_published(self, event: ev.LoadPublished, now_s: float, out: list[ev.Action]) -> None:
        self._set_foreign(event.backend, event.foreign, now_s)
        ledger = self.fleet.get(event.backend)
        if ledger is not None and self.counts.held:
            self._offer(ledger, now_s, out)

    def _set_foreign(self, name: str, foreign: LoadVector, now_s: float) -> None:
        ledger = self.fleet.get(name)
        if ledger is not None:
            ledger.foreign = foreign
            ledger.refresh(now_s)
            self.fleet.reorder(ledger)


def _reason(outcome: Outcome, choice: Choice) -> str:
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
