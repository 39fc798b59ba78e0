"""Which tier a backend works for: taken from the pool, relabelled, handed back.

PolyServe §4.3: a tier that begins to hold takes a backend; a tail that stays empty is returned. Fleets without
a pool follow demand instead (`scheduling.shares`), and a tier in demand that has no backend takes one from the
largest holder; only newcomers obey a new label, residents drain under their own promises. A policy that uses no
pool gets every backend dealt to some tier as it comes, evenly, and then the same shares by demand.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain

from scheduling import events as ev
from scheduling.feasible import judge
from scheduling.fleet import Fleet, can_keep, is_open
from scheduling.ledger import Ledger
from scheduling.options import Options
from scheduling.policies.protocol import Policy
from scheduling.shares import Move, Shares
from scheduling.tickets import Ticket
from scheduling.tiers import Tier


class _Demand:
    """A tier's requests of one round, as sums."""

    __slots__ = ("model", "output_tokens", "prompt_tokens", "seqs", "tpot_s")

    def __init__(self, model: str) -> None:
        self.model = model
        self.seqs = self.prompt_tokens = 0
        self.output_tokens = 0.0
        self.tpot_s = math.inf


class Elastic:
    """Proposes claims and hand-backs; the store decides, `settle` takes the answer."""

    def __init__(self, fleet: Fleet, policy: Policy, options: Options) -> None:
        self._fleet = fleet
        self._options = options
        self._uses_pool = policy.uses_pool
        self._checks = policy.checks
        self._shares = Shares()
        self._demand: dict[str, _Demand] = {}  # of the round, by tier

    def claim_for(self, ticket: Ticket, now_s: float) -> ev.Claim | None:
        """A backend for a tier that starts holding: from the pool, else one that stands empty in another tier and
        was not handed back yet, or, for a tier that has none at all, from the largest holder. One claim a tier at
        a time."""
        fleet, tier = self._fleet, ticket.tier
        if any(ledger.claiming_for == tier.name for ledger in fleet):
            return None
        free = chain(fleet.pool(), fleet.empty_beside(tier.name)) if self._uses_pool else ()
        for ledger in free:
            if not is_open(ledger) or now_s < ledger.blocked_until_s or ledger.backend.name in ticket.excluded:
                continue
            if not ledger.backend.serves(ticket.request.model):
                continue
            if judge(ledger, ticket.ask, tier.host_tpot_s, now_s, self._checks).feasible:
                return _claim(ledger, tier, f"tier {tier.name} holds requests; {ledger.backend.name} is free")
        if fleet.tier_size(tier.name):
            return None
        taken = fleet.to_relabel(tier, ticket.request.model)
        if taken is None or now_s < taken.blocked_until_s:
            return None
        return _claim(taken, tier, f"tier {tier.name} has no backend; {taken.tier} holds the most")

    def settle(self, backend: str, tier: str | None, epoch: int, now_s: float) -> str | None:
        """The store answered a claim or a hand-back: the tier it was wanted for, if any."""
        ledger = self._fleet.get(backend)
        if ledger is None:
            return None
        wanted, ledger.claiming_for = ledger.claiming_for, None
        self._fleet.set_membership(backend, tier, epoch, now_s)
        return wanted

    def tails(self) -> list[ev.HandBack]:
        """What has been empty at several looks in a row: the gradient empties the tail first."""
        back: list[ev.HandBack] = []
        if not self._uses_pool:
            return back
        for ledger in self._fleet:
            if ledger.tier is None or ledger.backend.pinned or ledger.claiming_for is not None:
                continue
            if not ledger.idle:
                ledger.empty_checks = 0
                continue
            ledger.empty_checks += 1
            if ledger.empty_checks >= self._options.handback_checks:
                ledger.empty_checks = 0
                back.append(ev.HandBack(ledger.backend.name, ledger.epoch))
        return back

    def note_demand(self, ticket: Ticket) -> None:
        """A request of the tier came. What it will take of a backend's time is reckoned when the round ends."""
        request = ticket.request
        demand = self._demand.get(ticket.tier.name)
        if demand is None:
            demand = self._demand[ticket.tier.name] = _Demand(request.model)
        demand.seqs += request.sequences
        demand.prompt_tokens += request.prompt_tokens * request.sequences
        demand.output_tokens += ticket.ask.output_tokens * request.sequences
        demand.tpot_s = min(demand.tpot_s, ticket.ask.own_tpot_s)

    def _reckon(self, demand: _Demand) -> float:
        """Backend-seconds that a round's requests of a tier take.

        Their prefill, and their part of each step they live through: `t / B` a token, where B sequences share a
        step of their pace t (the cost model of PolyServe §5.4), for a request of mean length.
        """
        for ledger in self._fleet.serving(demand.model):
            if not is_open(ledger):
                continue
            step_time = ledger.backend.step_time
            prompt = demand.prompt_tokens // demand.seqs
            alone_s = step_time.decode_seconds(1, prompt)
            each_s = (step_time.decode_seconds(33, 33 * prompt) - alone_s) / 32
            pace_s = min(demand.tpot_s, 10 * alone_s)
            batch = max(min((pace_s - alone_s) / max(each_s, 1e-9), 256.0), 1.0)
            step_s = min(pace_s, alone_s + each_s * batch)
            prefill_s = step_time.seconds_of(prompt, 1, 0, prompt * prompt / 2, 0, 0)
            return demand.seqs * prefill_s + demand.output_tokens * step_s / batch
        return 0.0

    def deal(self, now_s: float) -> list[ev.Claim]:
        """A tier for every backend that has none, where the policy uses no pool: the one with the fewest."""
        if self._uses_pool:
            return []
        tiers = self._fleet.tiers.tiers
        dealt: list[ev.Claim] = []
        for ledger in self._fleet.pool():
            if now_s < ledger.blocked_until_s:
                continue
            held = Counter(other.claiming_for or other.tier for other in self._fleet)
            fit = [tier for tier in tiers if can_keep(ledger, tier)] or tiers
            tier = min(fit, key=lambda tier: (held[tier.name], tier.rank))
            dealt.append(_claim(ledger, tier, f"{ledger.backend.name} has no tier; {tier.name} has the fewest"))
        return dealt

    def rebalance(self) -> list[ev.Claim]:
        """End a round of demand; without a pool, the relabelling that is due."""
        fleet = self._fleet
        for name, demand in self._demand.items():
            self._shares.add(name, self._reckon(demand))
        self._demand.clear()
        if fleet.pool():
            self._shares.close_round({}, ())
            return []
        order = [tier.name for tier in fleet.tiers.tiers]
        held = {name: fleet.tier_size(name) for name in order}
        claims: list[ev.Claim] = []
        move = self._shares.close_round(held, order)
        while move is not None and len(claims) < self._options.moves_per_round:
            claim = self._relabel(move)
            if claim is None:
                break
            claims.append(claim)
            held[move.giver] -= 1
            held[move.taker] += 1
            move = self._shares.next_move(held, order)
        return claims

    def _relabel(self, move: Move) -> ev.Claim | None:
        """The emptiest backend of the giver that may leave it."""
        taker = self._fleet.tiers[move.taker]
        for ledger in reversed(self._fleet.in_tier(move.giver)):
            if not (is_open(ledger) and can_keep(ledger, taker)):
                continue
            if not ledger.backend.pinned and ledger.claiming_for is None:
                return _claim(ledger, taker, f"demand moved from {move.giver} to {move.taker}")
        return None


def _claim(ledger: Ledger, tier: Tier, reason: str) -> ev.Claim:
    ledger.claiming_for = tier.name
    return ev.Claim(ledger.backend.name, tier.name, ledger.epoch, reason)
