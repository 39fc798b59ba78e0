"""How one request finds its place, or learns that there is none.

The rungs (PolyServe §4.2-4.4): what the policy's stages offer -> a claim for its tier -> hold, by deadline -> an
honest refusal, or whatever is left where its tier says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from scheduling import events as ev
from scheduling.decisions import Decision, Outcome, Refusal, RefusalKind
from scheduling.desk import Desk
from scheduling.elastic import Elastic
from scheduling.fleet import Fleet, is_open
from scheduling.ledger import Ledger
from scheduling.options import Options
from scheduling.paced import Pacer
from scheduling.placing import Choice, Look, candidate_for, look, reason_for
from scheduling.policies.protocol import Admission, Policy, Stage
from scheduling.predict import own_prompt_tokens
from scheduling.refusing import latest_start_s, pace_unreachable, retry_after_s, too_late, too_tight
from scheduling.residents import Resident
from scheduling.rivals import Rivals
from scheduling.tickets import Phase, Ticket
from scheduling.tiers import OnMiss


class Ladder:
    """Takes a ticket to its next phase; the actions that follow are appended to `out`."""

    def __init__(self, fleet: Fleet, desk: Desk, policy: Policy, options: Options) -> None:
        self._fleet = fleet
        self._desk = desk
        self._policy = policy
        self._options = options
        self._elastic = Elastic(fleet, policy, options)
        self._pacer = Pacer() if options.paces_prefill else None
        self.rivals = Rivals()

    @property
    def elastic(self) -> Elastic:
        return self._elastic

    def place_or_hold(self, ticket: Ticket, now_s: float, out: list[ev.Action]) -> None:
        found = self.look_over(ticket, now_s)
        if found.choice is None:
            self.wait(ticket, found, now_s, out)
        elif self.yields(ticket, found.choice, now_s):
            self._hold_back(ticket, found.choice, found, now_s, out)
        else:
            self.reserve(ticket, found.choice, found, now_s, out)

    def yields(self, ticket: Ticket, choice: Choice, now_s: float) -> bool:
        """Whether it leaves the place it found to an earlier request of another replica, for now."""
        yield_s = self._options.yield_s
        until_s = ticket.yields_until_s
        if not yield_s or ticket.relegated or (until_s is not None and now_s >= until_s):
            return False
        request, ledger = ticket.request, choice.ledger
        rival = self.rivals.before(
            request.model, ticket.tier.name, ticket.ask.ttft_due_s, ledger, choice.judged.pace_s, now_s
        )
        if rival is None:
            return False
        if until_s is None:
            if latest_start_s(ticket, self._fleet, now_s) < now_s + 2 * yield_s:
                return False
            ticket.yields_until_s = now_s + yield_s
            if ticket.phase is Phase.HELD:
                self._desk.yields(ticket)
        return True

    def _hold_back(self, ticket: Ticket, choice: Choice, found: Look, now_s: float, out: list[ev.Action]) -> None:
        """It fits, and waits all the same: see `scheduling.rivals`."""
        ticket.until_s = latest_start_s(ticket, self._fleet, now_s)
        reason = f"{choice.ledger.backend.name} has room, which another replica's earlier request may take first"
        decision = self._decide(ticket, Outcome.HELD, reason, None, found, now_s)
        self._desk.hold(ticket, self._policy.held_key(ticket.request))
        self._desk.yields(ticket)
        out.append(ev.Hold(ticket.request.request_id, ticket.until_s, decision))

    def wait(self, ticket: Ticket, found: Look, now_s: float, out: list[ev.Action]) -> None:
        """Nothing was found: hold it as long as its promise can still be kept."""
        if not ticket.relegated:
            until_s = latest_start_s(ticket, self._fleet, now_s)
            if until_s <= now_s or self._too_tight(ticket):
                self.give_up_promise(ticket, found, now_s, out)
                return
            ticket.until_s = until_s
        if self._desk.counts.held >= self._options.max_held:
            message = f"{self._desk.counts.held} requests are held already"
            self.refuse(
                ticket, Refusal(RefusalKind.SATURATED, message, self._retry_after_s(ticket, now_s)), now_s, out
            )
            return
        self.hold(ticket, found, now_s, out)

    def look_over(self, ticket: Ticket, now_s: float) -> Look:
        policy, request = self._policy, ticket.request
        stages = policy.last_resort if ticket.relegated else policy.stages
        offered: Iterable[Stage] = stages(request, ticket.tier, self._fleet, now_s)
        if ticket.misfits and policy.uses_tiers and not ticket.relegated:
            offered = chain(offered, self._looser_homes(ticket))
        return look(
            offered,
            ticket.ask,
            policy.admission,
            now_s,
            ticket.excluded,
            policy.checks,
            self._pacer,
        )

    def _looser_homes(self, ticket: Ticket) -> Iterator[Stage]:
        """Backends of looser tiers, for one that is too long for all of its own: it lives there like the requests
        of a tier without a backend, whose pace is kept as well."""
        if self._is_homeless(ticket):
            for looser in self._fleet.tiers.tiers[ticket.tier.rank + 1 :]:
                yield Stage(Outcome.SHARED, self._fleet.walk_tier(looser.name), ticket.tier.host_tpot_s)

    def _is_homeless(self, ticket: Ticket) -> bool:
        """Whether its tier has backends, and it is too long for each of them."""
        own = [ledger.backend.name for ledger in self._fleet.walk_tier(ticket.tier.name) if is_open(ledger)]
        return bool(own) and ticket.misfits.issuperset(own)

    def hold(self, ticket: Ticket, found: Look, now_s: float, out: list[ev.Action]) -> None:
        claim = self.claim_for(ticket, now_s)
        outcome = Outcome.CLAIMED if claim is not None else Outcome.HELD
        reason = f"nothing fits now: {found.why()}"
        if claim is not None:
            reason = f"{reason}; taking {claim.backend} for tier {claim.tier}"
        decision = self._decide(ticket, outcome, reason, None, found, now_s)
        self._desk.hold(ticket, self._policy.held_key(ticket.request))
        out.append(ev.Hold(ticket.request.request_id, ticket.until_s, decision))
        if claim is not None:
            out.append(claim)

    def give_up_promise(self, ticket: Ticket, found: Look, now_s: float, out: list[ev.Action]) -> None:
        """Its first token cannot be on time any more: refuse, or serve with what is left."""
        request = ticket.request
        if not self._options.refuses and not self._too_tight(ticket):
            self._serve_late(ticket, now_s, out)
            return
        if request.slo_stated and ticket.tier.on_miss is OnMiss.REFUSE:
            if self._too_tight(ticket):
                refusal = too_tight(ticket)
            else:
                refusal = too_late(ticket, found, self._retry_after_s(ticket, now_s), now_s)
            self.refuse(ticket, refusal, now_s, out, found)
            return
        ticket.relegated = True
        ticket.until_s = math.inf
        ticket.ask = replace(ticket.ask, own_tpot_s=math.inf, ttft_due_s=math.inf)
        again = self.look_over(ticket, now_s)
        if again.choice is not None:
            self.reserve(ticket, again.choice, again, now_s, out)
        else:
            self.hold(ticket, again, now_s, out)

    def _serve_late(self, ticket: Ticket, now_s: float, out: list[ev.Action]) -> None:
        """It keeps its place in its tier's queue, and its pace; only its first token is late (PolyServe has no
        refusal)."""
        ticket.until_s = math.inf
        ticket.ask = replace(ticket.ask, ttft_due_s=math.inf)
        again = self.look_over(ticket, now_s)
        if again.choice is not None:
            self.reserve(ticket, again.choice, again, now_s, out)
        else:
            self.wait(ticket, again, now_s, out)

    def _too_tight(self, ticket: Ticket) -> bool:
        return self._policy.admission is Admission.EVERY_PROMISE and pace_unreachable(ticket, self._fleet)

    def reserve(self, ticket: Ticket, choice: Choice, found: Look, now_s: float, out: list[ev.Action]) -> None:
        request = ticket.request
        ledger = choice.ledger
        ticket.attempts += 1
        lease_id = f"{request.request_id}#{ticket.attempts}"
        candidate = candidate_for(choice, ticket.ask)
        guest = choice.outcome is Outcome.PROMOTED
        resident = Resident(lease_id, request, candidate.cost, ticket.lengths, now_s, guest=guest)
        resident.lost = ticket.relegated or ticket.ask.ttft_due_s > resident.due_s  # late: it gave up its promise
        if choice.judged.prefill is not None:
            resident.expected_first_s = now_s + choice.judged.prefill.service_s
        if self._pacer is not None:
            self._pacer.took(ledger, own_prompt_tokens(request), now_s)
        ledger.place(resident, now_s)
        self._fleet.reorder(ledger)
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
        return decision

    def refuse(
        self, ticket: Ticket, refusal: Refusal, now_s: float, out: list[ev.Action], found: Look | None = None
    ) -> None:
        decision = self._decide(ticket, Outcome.REFUSED, refusal.message, None, found, now_s)
        self._desk.refuse(ticket)
        out.append(ev.Refuse(ticket.request.request_id, refusal, decision))

    def _retry_after_s(self, ticket: Ticket, now_s: float) -> float:
        held = self._desk.queued(ticket.tier.name)
        return retry_after_s(ticket, self._policy, self._fleet, held, now_s)

    def claim_for(self, ticket: Ticket, now_s: float) -> ev.Claim | None:
        """A backend for one that is held; none for one that found a place and lets others go first."""
        if not self._policy.uses_tiers or now_s < (ticket.yields_until_s or 0.0):
            return None
        return self._elastic.claim_for(ticket, now_s)

    def try_on(self, ticket: Ticket, ledger: Ledger, now_s: float, out: list[ev.Action]) -> bool:
        stage = self._stage_on(ticket, ledger, now_s)
        if stage is None:
            return False
        policy = self._policy
        found = look((stage,), ticket.ask, policy.admission, now_s, ticket.excluded, policy.checks, self._pacer)
        if found.choice is None or self.yields(ticket, found.choice, now_s):
            return False
        self.reserve(ticket, found.choice, found, now_s, out)
        return True

    def _stage_on(self, ticket: Ticket, ledger: Ledger, now_s: float) -> Stage | None:
        if ticket.relegated and self._policy.admission is Admission.EVERY_PROMISE:
            if ledger.tier is None:
                return None
            return Stage(Outcome.RELEGATED, (ledger,), self._fleet.host_tpot_s(ledger, now_s))
        stage = self._policy.stage_on(ticket.tier, ledger, self._fleet, now_s)
        if stage is not None or not ticket.misfits or not self._policy.uses_tiers:
            return stage
        if ledger.tier is None or ledger.tier not in self._fleet.tiers:
            return None
        if self._fleet.tiers[ledger.tier].rank <= ticket.tier.rank or not self._is_homeless(ticket):
            return None
        return Stage(Outcome.SHARED, (ledger,), ticket.tier.host_tpot_s)
