"""The dispatcher: a pure state machine for a fleet. Events in, actions out; shells carry actions out.

The ladder for each request (PolyServe §4.2-4.4): its own tier, highest load first -> lazy promotion -> a backend
from the pool -> hold, by deadline -> an honest refusal (or, where its tier says so, whatever is left).

1. A placement counts in the ledger from the moment it is asked of the store, so two decisions of one replica
   never count on the same room.
2. A held request is looked at again only where something got better: on the backend that changed. So that no
   wait is without end, the first of each queue are also looked at once in a while.
3. A request ends once: Ended, Refuse or Cancelled. A lease that was asked for ends once: Release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from scheduling import events as ev
from scheduling.decisions import Refusal, RefusalKind
from scheduling.desk import RELEGATED, Counts, Desk, Kind, kind_of
from scheduling.feasible import Ask
from scheduling.fleet import Fleet, is_open
from scheduling.ladder import Ladder
from scheduling.ledger import Ledger
from scheduling.lengths import FixedLength, LengthModel
from scheduling.load import LoadVector
from scheduling.options import Options
from scheduling.placing import Look
from scheduling.policies.protocol import Policy
from scheduling.predict import prefill_left_tokens
from scheduling.refusing import at_once, may_retry, note_length, within_reach
from scheduling.requests import Request
from scheduling.residents import expected_output_tokens
from scheduling.rivals import Waiting
from scheduling.tickets import Phase, Ticket, waiting_of
from scheduling.tiers import TierSet

_DEFAULT_LENGTH = FixedLength()


class Dispatcher:
    """See the module. One per replica and fleet; not thread-safe; `now_s` never goes back."""

    def __init__(self, tiers: TierSet, policy: Policy, options: Options | None = None) -> None:
        self.policy = policy
        self.options = options or Options()
        self.fleet = Fleet(tiers, self.options.demand_window_s)
        self._desk = Desk()
        self._lengths: dict[tuple[str, str], LengthModel] = {}
        self._ladder = Ladder(self.fleet, self._desk, policy, self.options)
        self._elastic = self._ladder.elastic
        self._blocked: set[str] = set()
        self._next_handback_s = math.inf  # set when the first backend comes
        self._next_round_s = math.inf
        self._next_look_s = math.inf
        self._deal_from_s = math.inf  # when somebody may be without a tier though the policy has no pool
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
            ev.OthersHold: self._others_hold,
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
        held = self.counts.held
        self._handlers[type(event)](event, now_s, out)
        if not held and self.counts.held:
            self._next_look_s = now_s + self.options.look_again_s
        return out

    def next_wake_s(self) -> float | None:
        """When TimePassed is wanted next, if nothing else happens; None: not at all."""
        at_s = min(self._desk.next_alarm_s(), self._desk.next_yielded_s())
        if self.policy.uses_tiers and len(self.fleet):
            at_s = min(at_s, self._next_handback_s, self._next_round_s, self._deal_from_s)
        if self.counts.held:
            rests = [self.fleet[name].blocked_until_s for name in self._blocked]
            at_s = min(at_s, self._next_look_s, *rests)
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

    # --- publishing ----------------------------------------------------------------------------------------

    @property
    def backends(self) -> list[str]:
        """The names of all."""
        return [ledger.backend.name for ledger in self.fleet]

    def begin_publish(self, backend: str, now_s: float) -> LoadVector | None:
        """What is to be published of a backend; None when there is nothing new, or a lease there has been asked
        for and not answered. The shell asks only when the store has answered for every lease that ended there."""
        ledger = self.fleet[backend]
        return ledger.begin_publish(prefill_left_tokens(ledger, now_s))

    def settle_publish(self, backend: str, taken: bool | None) -> None:
        """The store took it, refused it, or (None) nobody knows. From `begin_publish` until then limits hold for
        either."""
        ledger = self.fleet.get(backend)
        if ledger is not None:
            ledger.settle_publish(taken)

    def doubt_published(self) -> None:
        """Whether the store still has what it took is not known: publish it again, news or not."""
        for ledger in self.fleet:
            ledger.doubt_published()

    def first_held(self) -> tuple[Waiting, ...]:
        """The held request that is due first, of each model and tier; without those that have no deadline."""
        firsts = [ticket for tier in self.tiers.tiers for ticket in self._desk.firsts(tier.name)]
        return tuple([waiting_of(ticket) for ticket in firsts if math.isfinite(ticket.ask.ttft_due_s)])

    # --- requests ------------------------------------------------------------------------------------------

    def _arrived(self, event: ev.Arrived, now_s: float, out: list[ev.Action]) -> None:
        request = event.request
        tiers = self.tiers
        # the tiers may have changed since the shell classified it
        tier = tiers[request.tier if request.tier in tiers else tiers.default]
        lengths = self._lengths_of(request)
        ask = Ask(
            request,
            expected_output_tokens(request, lengths),
            math.inf if request.slo.tpot_s is None else request.slo.tpot_s,
            request.slo.deadline_s(request.arrival_s, 0),
        )
        ticket = Ticket(request, tier, ask, lengths)
        note_length(ticket, self.fleet)
        self._desk.arrive(ticket)
        self.fleet.note_demand(tier.name, now_s)
        if self.policy.uses_tiers:
            self._elastic.note_demand(ticket)
            self._deal(now_s, out)
        refusal = at_once(ticket, self.fleet)
        if refusal is not None:
            self._ladder.refuse(ticket, refusal, now_s, out)
        elif not self.options.overtaking and self._desk.waits_before(ticket, self.policy.held_key(request)):
            self._ladder.wait(ticket, Look(None, (), 0, {}, "others of its tier wait before it"), now_s, out)
        else:
            self._ladder.place_or_hold(ticket, now_s, out)

    # --- the store's answers -------------------------------------------------------------------------------

    def _reserved(self, event: ev.Reserved, now_s: float, out: list[ev.Action]) -> None:
        ticket = self._desk.of_lease(event.lease_id)
        if ticket is None:
            out.append(ev.Release(event.lease_id, event.backend))
            return
        if ticket.phase is not Phase.RESERVING:
            return  # the same answer again
        if event.backend in self.fleet:
            self.fleet[event.backend].granted(event.lease_id)
        if ticket.gone:
            self._end(ticket, ev.EndKind.CANCELLED, now_s, out)
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
        for name, told in event.foreign.items():
            known = self.fleet.get(name)
            foreign = told
            if known is not None and told.decodes and not (told.slack or told.queued_slack):
                foreign = replace(told, slack=known.foreign.slack, queued_slack=known.foreign.queued_slack)
            self._set_foreign(name, foreign, now_s)
        ticket = self._desk.of_lease(event.lease_id)
        if ticket is None or ticket.phase is not Phase.RESERVING:
            return
        ledger = self._leave(ticket, now_s, out, released=False)
        if ticket.gone:
            self._desk.end(ticket, ev.EndKind.CANCELLED)
            self._offer(ledger, now_s, out)
            return
        ticket.store_refusals += 1
        if ticket.store_refusals <= self.options.max_store_refusals:
            self._ladder.place_or_hold(ticket, now_s, out)
        else:
            ticket.store_refusals = 0
            self._ladder.wait(ticket, Look(None, (), 0, {}), now_s, out)

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
        if not event.retryable:
            self._desk.end(ticket, ev.EndKind.FAILED)
        else:
            if ledger is not None and event.at_fault:
                self._rest(ledger, now_s)
            ticket.excluded |= {name} if name else frozenset()
            ticket.cause = event.cause
            if may_retry(ticket, self.fleet, self.options.max_attempts):
                self._ladder.place_or_hold(ticket, now_s, out)
            else:
                self._fail(ticket, now_s, out)
        self._offer(ledger, now_s, out)

    def _fail(self, ticket: Ticket, now_s: float, out: list[ev.Action]) -> None:
        """There is no other backend to try."""
        names = ", ".join(sorted(ticket.excluded))
        message = f"failed before the first token: {names}; the last: {ticket.cause}"
        self._ladder.refuse(ticket, Refusal(RefusalKind.FAILED, message, 1.0), now_s, out)

    def _has_hope(self, ticket: Ticket, now_s: float) -> bool:
        retries = may_retry(ticket, self.fleet, self.options.max_attempts)
        return retries and within_reach(ticket, self.policy, self.fleet, now_s)

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
        self._offer(ledger, now_s, out)

    def _progressed(self, event: ev.Progressed, now_s: float, out: list[ev.Action]) -> None:
        ledger = self.fleet.get(event.backend)
        if ledger is None:
            return
        if event.step_s is not None:
            ledger.step_s = event.step_s
        if event.last_step_age_s is not None:
            ledger.last_step_s = now_s - event.last_step_age_s
        ledger.progressed(event.progress, now_s)
        self.fleet.reorder(ledger)
        self._offer(ledger, now_s, out)

    def _ended(self, event: ev.Ended, now_s: float, out: list[ev.Action]) -> None:
        ticket = self._desk.of_lease(event.lease_id)
        if ticket is not None:
            self._end(ticket, event.kind, now_s, out)

    def _end(self, ticket: Ticket, kind: ev.EndKind, now_s: float, out: list[ev.Action]) -> None:
        """It leaves for good, and its place is offered to those who wait."""
        ledger = self._leave(ticket, now_s, out, released=True)
        self._desk.end(ticket, kind)
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
            self._end(ticket, ev.EndKind.CANCELLED, now_s, out)

    # --- held requests -------------------------------------------------------------------------------------

    def _offer(self, ledger: Ledger | None, now_s: float, out: list[ev.Action]) -> None:
        """A backend got better: try the heads of the queues on it, tight to loose, then the relegated. One of the
        pool is claimed first."""
        if ledger is None or not self.counts.held or not is_open(ledger) or now_s < ledger.blocked_until_s:
            return
        if self.policy.uses_tiers and ledger.tier not in self.tiers:
            self._claim_for_heads(now_s, out)
            return
        for name in [*(tier.name for tier in self.tiers.tiers), RELEGATED]:
            failed: set[Kind] = set()
            while ticket := self._desk.head(name, failed):
                if not self._ladder.try_on(ticket, ledger, now_s, out):
                    failed.add(kind_of(ticket))
            if self.options.scan_held > 1:
                for ticket in self._desk.behind(name, self.options.scan_held - 1):
                    self._ladder.try_on(ticket, ledger, now_s, out)

    def _offer_all(self, now_s: float, out: list[ev.Action]) -> None:
        for ledger in list(self.fleet):
            self._offer(ledger, now_s, out)

    def _time_passed(self, event: ev.TimePassed, now_s: float, out: list[ev.Action]) -> None:
        for ticket in self._desk.due(now_s):
            found = self._ladder.look_over(ticket, now_s)
            if found.choice is not None:
                self._ladder.reserve(ticket, found.choice, found, now_s, out)
            else:
                self._desk.unhold(ticket)
                self._ladder.give_up_promise(ticket, found, now_s, out)
        for ticket in self._desk.yielded(now_s):
            found = self._ladder.look_over(ticket, now_s)
            if found.choice is not None:
                self._ladder.reserve(ticket, found.choice, found, now_s, out)
        for name in [name for name in self._blocked if self.fleet[name].blocked_until_s <= now_s]:
            self._blocked.discard(name)
            self._offer(self.fleet[name], now_s, out)
        if self.counts.held and now_s >= self._next_look_s:
            self._next_look_s = now_s + self.options.look_again_s
            self._look_again(now_s, out)
        if not self.policy.uses_tiers:
            return
        self._deal(now_s, out)
        if now_s >= self._next_handback_s:
            self._next_handback_s = now_s + self.options.handback_period_s
            out.extend(self._elastic.tails())
        if now_s >= self._next_round_s:
            self._next_round_s = now_s + self.options.rebalance_period_s
            self._want_deal(now_s)
            out.extend(self._elastic.rebalance())

    def _look_again(self, now_s: float, out: list[ev.Action]) -> None:
        """Look over the fleet for the first of every queue."""
        for name in [*(tier.name for tier in self.tiers.tiers), RELEGATED]:
            failed: set[Kind] = set()
            while ticket := self._desk.head(name, failed):
                found = self._ladder.look_over(ticket, now_s)
                if found.choice is not None and not self._ladder.yields(ticket, found.choice, now_s):
                    self._ladder.reserve(ticket, found.choice, found, now_s, out)
                elif found.choice is not None:
                    failed.add(kind_of(ticket))
                elif ticket.excluded and not self._has_hope(ticket, now_s):
                    self._fail(ticket, now_s, out)
                elif (refusal := at_once(ticket, self.fleet)) and refusal.kind is RefusalKind.TOO_LONG:
                    # the backends that took so long a prompt are gone, and nobody waits behind it for ever
                    self._ladder.refuse(ticket, refusal, now_s, out)
                else:
                    failed.add(kind_of(ticket))
        self._claim_for_heads(now_s, out)

    # --- tiers and the pool --------------------------------------------------------------------------------

    def _claimed(self, event: ev.Claimed, now_s: float, out: list[ev.Action]) -> None:
        self._elastic.settle(event.backend, event.tier, event.epoch, now_s)
        self._offer(self.fleet.get(event.backend), now_s, out)
        self._claim_for_heads(now_s, out)

    def _claim_refused(self, event: ev.ClaimRefused, now_s: float, out: list[ev.Action]) -> None:
        ledger = self.fleet.get(event.backend)
        asked_at = ledger.epoch if ledger is not None else -1
        self._elastic.settle(event.backend, event.tier, event.epoch, now_s)
        if ledger is not None:
            if ledger.epoch == asked_at:
                # nothing changed that would explain it: to ask again at once would be to ask for ever
                self._rest(ledger, now_s)
            self._offer(ledger, now_s, out)
        self._claim_for_heads(now_s, out)

    def _claim_for_heads(self, now_s: float, out: list[ev.Action]) -> None:
        """A backend for every tier that holds somebody whom a free one can help."""
        if not self.policy.uses_tiers or not self.counts.held:
            return
        for name in [*(tier.name for tier in self.tiers.tiers), RELEGATED]:
            failed: set[Kind] = set()
            while ticket := self._desk.head(name, failed):
                claim = self._ladder.claim_for(ticket, now_s)
                if claim is not None:
                    out.append(claim)
                    break
                failed.add(kind_of(ticket))

    def _want_deal(self, now_s: float) -> None:
        """Backends are dealt to tiers when time passes or a request comes, whichever is first: a shell that tells
        of its backends one by one has nobody yet who would carry actions out."""
        if self.policy.uses_tiers and not self.policy.uses_pool:
            self._deal_from_s = min(self._deal_from_s, now_s)

    def _deal(self, now_s: float, out: list[ev.Action]) -> None:
        if now_s >= self._deal_from_s:
            self._deal_from_s = math.inf
            out.extend(self._elastic.deal(now_s))

    def _handed_back(self, event: ev.HandedBack, now_s: float, out: list[ev.Action]) -> None:
        self._elastic.settle(event.backend, None, event.epoch, now_s)
        self._offer(self.fleet.get(event.backend), now_s, out)

    def _hand_back_refused(self, event: ev.HandBackRefused, now_s: float, out: list[ev.Action]) -> None:
        self._elastic.settle(event.backend, event.tier, event.epoch, now_s)

    # --- backends and policy -------------------------------------------------------------------------------

    def _backend_changed(self, event: ev.BackendChanged, now_s: float, out: list[ev.Action]) -> None:
        backend = event.backend
        if not len(self.fleet):
            self._next_handback_s = now_s + self.options.handback_period_s
            self._next_round_s = now_s + self.options.rebalance_period_s
        self._offer(self.fleet.put(backend, now_s), now_s, out)
        self._want_deal(now_s)

    def _backend_removed(self, event: ev.BackendRemoved, now_s: float, out: list[ev.Action]) -> None:
        self.fleet.remove(event.name, now_s)
        self._blocked.discard(event.name)
        self._claim_for_heads(now_s, out)

    def _membership_changed(self, event: ev.MembershipChanged, now_s: float, out: list[ev.Action]) -> None:
        ledger = self.fleet.get(event.backend)
        if ledger is not None and (ledger.tier, ledger.epoch) == (event.tier, event.epoch):
            return  # it came with news of something else
        self.fleet.set_membership(event.backend, event.tier, event.epoch, now_s)
        self._offer(ledger, now_s, out)
        self._want_deal(now_s)

    def _tiers_changed(self, event: ev.TiersChanged, now_s: float, out: list[ev.Action]) -> None:
        """Promises already given stand; requests of a tier that is gone go on as the default tier's."""
        tiers = event.tiers
        self.fleet.set_tiers(tiers)
        for ticket in self._desk.all():
            again = ticket.phase is Phase.HELD and not ticket.relegated and ticket.tier.name not in tiers
            if again:
                self._desk.unhold(ticket)
            ticket.tier = tiers[ticket.tier.name if ticket.tier.name in tiers else tiers.default]
            if again:
                self._ladder.place_or_hold(ticket, now_s, out)
        self._offer_all(now_s, out)
        self._want_deal(now_s)

    def _lengths_changed(self, event: ev.LengthsChanged, now_s: float, out: list[ev.Action]) -> None:
        self._lengths[event.model, event.tier] = event.lengths

    def _lengths_of(self, request: Request) -> LengthModel:
        return self._lengths.get((request.model, request.tier), _DEFAULT_LENGTH)

    def _load_published(self, event: ev.LoadPublished, now_s: float, out: list[ev.Action]) -> None:
        self._set_foreign(event.backend, event.foreign, now_s)
        self._offer(self.fleet.get(event.backend), now_s, out)

    def _others_hold(self, event: ev.OthersHold, now_s: float, out: list[ev.Action]) -> None:
        self._ladder.rivals.told(event.replica, event.waiting, now_s)

    def _set_foreign(self, name: str, foreign: LoadVector, now_s: float) -> None:
        ledger = self.fleet.get(name)
        if ledger is not None:
            ledger.set_foreign(foreign, self.fleet.tightest_of(foreign.residents), now_s)
            self.fleet.reorder(ledger)
