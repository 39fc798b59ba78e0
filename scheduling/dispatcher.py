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
from dataclasses import replace
from random import Random

from scheduling import events as ev
from scheduling.backends import BackendState
from scheduling.decisions import Decision, Outcome, Refusal, RefusalKind
from scheduling.desk import RELEGATED, Counts, Desk
from scheduling.elastic import Elastic
from scheduling.feasible import Ask
from scheduling.fleet import Fleet, is_open
from scheduling.ledger import Ledger, Resident, expected_output_tokens
from scheduling.lengths import FixedLength, LengthModel
from scheduling.load import LoadVector
from scheduling.options import Options
from scheduling.placing import Choice, Look, candidate_for, look, reason_for
from scheduling.policies.protocol import Policy, Stage
from scheduling.refusing import at_once, latest_start_s, retry_after_s, too_late
from scheduling.requests import Request
from scheduling.tickets import Phase, Ticket
from scheduling.tiers import OnMiss, TierSet

_DEFAULT_LENGTH = FixedLength()


class Dispatcher:
    """See the module. One per replica and fleet; not thread-safe; `now_s` never goes back."""

    def __init__(self, tiers: TierSet, policy: Policy, rng: Random, options: Options | None = None) -> None:
        self.policy = policy
        self.options = options or Options()
        self.fleet = Fleet(tiers, self.options.demand_window_s)
        self._rng = rng
        self._desk = Desk()
        self._lengths: dict[tuple[str, str], LengthModel] = {}
        self._elastic = Elastic(self.fleet, self.options.handback_checks)
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
    def counts(self) -> Counts:
        return self._desk.counts

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
        at_s = self._desk.next_alarm_s()
        if self.policy.uses_tiers and len(self.fleet):
            at_s = min(at_s, self._next_handback_s, self._next_round_s)
        if self.counts.held:
            at_s = min(at_s, *(self.fleet[name].blocked_until_s for name in self._blocked), math.inf)
        return at_s if math.isfinite(at_s) else None

    # --- looking in from outside ---------------------------------------------------------------------------

    def held_by_tier(self) -> Mapping[str, int]:
        return self._desk.held(self.tiers)

    def held_requests(self) -> list[Ticket]:
        """All held, queue by queue; for looking at."""
        return self._desk.waiting()

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
        self._desk.arrive(ticket)
        self.fleet.note_demand(tier.name, now_s)
        if self.policy.uses_tiers:
            self._elastic.note_demand(ticket)
        refusal = at_once(ticket, self.fleet)
        if refusal is not None:
            self._refuse(ticket, refusal, now_s, out)
        else:
            self._place_or_hold(ticket, now_s, out)

    def _place_or_hold(self, ticket: Ticket, now_s: float, out: list[ev.Action]) -> None:
        found = self._look(ticket, now_s)
        if found.choice is not None:
            self._reserve(ticket, found.choice, found, now_s, out)
            return
        if not ticket.relegated:
            until_s = latest_start_s(ticket, self.fleet, now_s)
            if until_s <= now_s:
                self._give_up_promise(ticket, found, now_s, out)
                return
            ticket.until_s = until_s
        if self.counts.held >= self.options.max_held:
            message = f"{self.counts.held} requests are held already"
            self._refuse(
                ticket, Refusal(RefusalKind.SATURATED, message, self._retry_after_s(ticket, now_s)), now_s, out
            )
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
        self._desk.hold(ticket, self.policy.held_key(ticket.request))
        out.append(ev.Hold(ticket.request.request_id, ticket.until_s, decision))
        if claim is not None:
            out.append(claim)

    def _give_up_promise(self, ticket: Ticket, found: Look, now_s: float, out: list[ev.Action]) -> None:
        """Its first token cannot be on time any more: refuse, or serve with what is left."""
        request = ticket.request
        if request.slo_stated and ticket.tier.on_miss is OnMiss.REFUSE:
            refusal = too_late(ticket, found, self._retry_after_s(ticket, now_s), now_s)
            self._refuse(ticket, refusal, now_s, out, found)
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
        candidate = candidate_for(choice, ticket.ask)
        guest = choice.outcome is Outcome.PROMOTED
        resident = Resident(lease_id, request, candidate.cost, self._lengths_of(request), now_s, guest=guest)
        resident.lost = ticket.relegated
        if choice.judged.prefill is not None:
            resident.expected_first_s = now_s + choice.judged.prefill.service_s
        ledger.place(resident, now_s)
        self.fleet.reorder(ledger)
        ticket.resident = resident
        outcome = Outcome.RELEGATED if ticket.relegated else choice.outcome
        decision = self._decide(ticket, outcome, reason_for(outcome, choice), ledger.backend.name, found, now_s)
        self._desk.lease(ticket, lease_id, ledger.backend.name)
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
        self._desk.refuse(ticket)
        out.append(ev.Refuse(ticket.request.request_id, refusal, decision))

    def _retry_after_s(self, ticket: Ticket, now_s: float) -> float:
        held = self._desk.queued(ticket.tier.name)
        return retry_after_s(ticket, self.policy, self.fleet, held, now_s)

    def _claim_for(self, ticket: Ticket, now_s: float) -> ev.Claim | None:
        return self._elastic.claim_for(ticket, now_s) if self.policy.uses_tiers else None

    # --- the store's answers -------------------------------------------------------------------------------

    def _reserved(self, event: ev.Reserved, now_s: float, out: list[ev.Action]) -> None:
        ticket = self._desk.of_lease(event.lease_id)
        if ticket is None or ticket.phase is not Phase.RESERVING:
            out.append(ev.Release(event.lease_id, event.backend))
            return
        if ticket.gone:
            self._leave(ticket, now_s, out, released=True)
            self._desk.end(ticket, ev.EndKind.CANCELLED)
            return
        assert ticket.decision is not None
        self._desk.opened(ticket)
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
        ticket = self._desk.of_lease(event.lease_id)
        if ticket is None:
            return
        self._leave(ticket, now_s, out, released=False)
        if ticket.gone:
            self._desk.end(ticket, ev.EndKind.CANCELLED)
            return
        ticket.store_refusals += 1
        if ticket.store_refusals <= self.options.max_store_refusals:
            self._place_or_hold(ticket, now_s, out)
        else:
            ticket.store_refusals = 0
            ticket.until_s = latest_start_s(ticket, self.fleet, now_s)
            self._hold(ticket, Look(None, (), 0, {}), now_s, out)

    def _leave(self, ticket: Ticket, now_s: float, out: list[ev.Action], *, released: bool) -> Ledger | None:
        """Take a ticket's resident off its backend; `released`: the store has to be told too."""
        leased = self._desk.unlease(ticket)
        if leased is None:
            return None
        lease_id, name = leased
        if released:
            out.append(ev.Release(lease_id, name))
        ledger = self.fleet.get(name)
        if ledger is not None and ledger.remove(lease_id, now_s) is not None:
            self.fleet.reorder(ledger)
        return ledger

    # --- the stream's life ---------------------------------------------------------------------------------

    def _open_failed(self, event: ev.OpenFailed, now_s: float, out: list[ev.Action]) -> None:
        ticket = self._desk.of_lease(event.lease_id)
        if ticket is None:
            return
        name = ticket.backend
        ledger = self._leave(ticket, now_s, out, released=True)
        if ticket.gone:
            self._desk.end(ticket, ev.EndKind.CANCELLED)
        elif not event.retryable:
            self._desk.end(ticket, ev.EndKind.FAILED)
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
        ticket = self._desk.of_lease(event.lease_id)
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
        ticket = self._desk.of_lease(event.lease_id)
        if ticket is None:
            return
        ledger = self._leave(ticket, now_s, out, released=True)
        self._desk.end(ticket, event.kind)
        if ledger is not None and self.counts.held:
            self._offer(ledger, now_s, out)

    def _cancelled(self, event: ev.Cancelled, now_s: float, out: list[ev.Action]) -> None:
        ticket = self._desk.of_request(event.request_id)
        if ticket is None:
            return
        if ticket.phase is Phase.HELD:
            self._desk.end(ticket, ev.EndKind.CANCELLED)
        elif ticket.phase is Phase.RESERVING:
            ticket.gone = True  # the store's answer is on its way; it ends the lease
        else:
            ledger = self._leave(ticket, now_s, out, released=True)
            self._desk.end(ticket, ev.EndKind.CANCELLED)
            if ledger is not None and self.counts.held:
                self._offer(ledger, now_s, out)

    # --- held requests -------------------------------------------------------------------------------------

    def _offer(self, ledger: Ledger, now_s: float, out: list[ev.Action]) -> None:
        """A backend got better: try the heads of the queues on it, tight to loose, then the relegated."""
        if not self.counts.held or not is_open(ledger) or now_s < ledger.blocked_until_s:
            return
        for name in [*(tier.name for tier in self.tiers.tiers), RELEGATED]:
            queue = self._desk.queue(name)
            while queue:
                ticket = queue.head()
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
        for ticket in self._desk.due(now_s):
            found = self._look(ticket, now_s)
            if found.choice is not None:
                self._reserve(ticket, found.choice, found, now_s, out)
            else:
                self._desk.unhold(ticket)
                self._give_up_promise(ticket, found, now_s, out)
        for name in [name for name in self._blocked if self.fleet[name].blocked_until_s <= now_s]:
            self._blocked.discard(name)
            self._offer(self.fleet[name], now_s, out)
        if not self.policy.uses_tiers:
            return
        if now_s >= self._next_handback_s:
            self._next_handback_s = now_s + self.options.handback_period_s
            out.extend(self._elastic.tails())
        if now_s >= self._next_round_s:
            self._next_round_s = now_s + self.options.rebalance_period_s
            claim = self._elastic.rebalance()
            if claim is not None:
                out.append(claim)

    # --- tiers and the pool --------------------------------------------------------------------------------

    def _claimed(self, event: ev.Claimed, now_s: float, out: list[ev.Action]) -> None:
        self._elastic.settle(event.backend, event.tier, event.epoch, now_s)
        ledger = self.fleet.get(event.backend)
        if ledger is None:
            return
        self._offer(ledger, now_s, out)
        self._claim_for_head(event.tier, now_s, out)

    def _claim_refused(self, event: ev.ClaimRefused, now_s: float, out: list[ev.Action]) -> None:
        wanted = self._elastic.settle(event.backend, event.tier, event.epoch, now_s)
        ledger = self.fleet.get(event.backend)
        if ledger is not None and ledger.tier is not None:
            self._offer(ledger, now_s, out)
        if wanted is not None:
            self._claim_for_head(wanted, now_s, out)

    def _claim_for_head(self, tier: str, now_s: float, out: list[ev.Action]) -> None:
        queue = self._desk.queue(tier)
        ticket = queue.head() if queue else None
        if ticket is not None:
            claim = self._claim_for(ticket, now_s)
            if claim is not None:
                out.append(claim)

    def _handed_back(self, event: ev.HandedBack, now_s: float, out: list[ev.Action]) -> None:
        self._elastic.settle(event.backend, None, event.epoch, now_s)
        for tier in self.tiers.tiers:
            self._claim_for_head(tier.name, now_s, out)

    def _hand_back_refused(self, event: ev.HandBackRefused, now_s: float, out: list[ev.Action]) -> None:
        self._elastic.settle(event.backend, event.tier, event.epoch, now_s)

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
        self.fleet.set_tiers(event.tiers)
        default = event.tiers[event.tiers.default]
        for name in self._desk.gone_tiers(event.tiers):
            queue = self._desk.queue(name)
            for ticket in queue.live() if queue else ():
                self._desk.unhold(ticket)
                ticket.tier = default
                self._place_or_hold(ticket, now_s, out)
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
