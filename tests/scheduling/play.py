"""A small language for playing events to a dispatcher and reading what it wants done.

Every action is told as one line, such as ``reserve r1#1 on a: own_tier``. The engines of this world are simple:
a step takes 10 ms, 1 ms for every decode and 0.1 ms for every prompt token, so a backend keeps 20 ms with ten
decodes, 50 ms with forty and 100 ms with ninety.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

from scheduling import events as ev
from scheduling.backends import Backend, BackendState, EngineLimits
from scheduling.dispatcher import Dispatcher
from scheduling.ledger import Ledger
from scheduling.lengths import FixedLength
from scheduling.load import Cost, LoadVector
from scheduling.options import Options
from scheduling.policies import Policy, make
from scheduling.requests import Request
from scheduling.tiers import OnMiss, Slo, Tier, TierSet
from tiergate_engine.steptime import RooflineStepTime

STEP_TIME = RooflineStepTime(c0_s=0.010, per_token_s=0.0001, per_seq_s=0.0009)
OUTPUT_TOKENS = 50.0
"""What the dispatcher expects of every answer."""

TIERS = TierSet(
    (
        Tier("fast", Slo(0.5, 0.020), 0),
        Tier("mid", Slo(1.0, 0.050), 1),
        Tier("slow", Slo(2.0, 0.100), 2),
        Tier("best", Slo(None, None), 3, OnMiss.RELEGATE),
    ),
    "mid",
)


def backend(name: str = "a", **changes: Any) -> Backend:
    """A backend of this world. `limits` may be given as keywords of `EngineLimits`."""
    limits = {key: changes.pop(key) for key in list(changes) if key in EngineLimits.__slots__}
    return Backend(name, changes.pop("step_time", STEP_TIME), limits=EngineLimits(**limits), **changes)


def request(request_id: str, tier: str = "fast", prompt_tokens: int = 100, **changes: Any) -> Request:
    values: dict[str, Any] = {"slo": TIERS[tier].slo if tier in TIERS else Slo(None, None), "arrival_s": 0.0}
    return Request(
        request_id=request_id,
        model=changes.pop("model", "m"),
        tier=tier,
        prompt_tokens=prompt_tokens,
        **{**values, **changes},
    )


def cost_of(asked: Request, output_tokens: float = OUTPUT_TOKENS) -> Cost:
    seqs = asked.sequences
    tpot_s = math.inf if asked.slo.tpot_s is None else asked.slo.tpot_s
    peak = int((asked.prompt_tokens + output_tokens) * seqs)
    return Cost(seqs, peak, asked.prompt_tokens * seqs, asked.tier, tpot_s * 1e3)


def told(action: ev.Action) -> str:
    """One line for one action."""
    match action:
        case ev.Reserve(_, lease_id, candidates, decision):
            return f"reserve {lease_id} on {candidates[0].backend}: {decision.outcome.value}"
        case ev.Open(_, lease_id, name):
            return f"open {lease_id} on {name}"
        case ev.Hold(request_id, until_s, decision):
            return f"hold {request_id} until {until_s:.2f}: {decision.outcome.value}"
        case ev.Refuse(request_id, refusal):
            return f"refuse {request_id}: {refusal.kind.value}"
        case ev.Release(lease_id, name):
            return f"release {lease_id} on {name}"
        case ev.Claim(name, tier, epoch):
            return f"claim {name} for {tier} at {epoch}"
        case ev.HandBack(name, epoch):
            return f"hand back {name} at {epoch}"


class Play:
    """A dispatcher, a clock, and what it asked for. Conservation is checked after every event."""

    def __init__(
        self,
        policy: str | Policy = "polyserve",
        tiers: TierSet = TIERS,
        options: Options | None = None,
        seed: int = 1,
    ) -> None:
        made = make(policy, Random(seed)) if isinstance(policy, str) else policy
        self.dispatcher = Dispatcher(tiers, made, options)
        self.now_s = 0.0
        self.last: list[ev.Action] = []
        self.log: list[str] = []
        self.releases: Counter[str] = Counter()
        for tier in tiers.tiers:
            self.tell(ev.LengthsChanged("m", tier.name, FixedLength(OUTPUT_TOKENS)))

    def ledger(self, name: str) -> Ledger:
        return self.dispatcher.fleet[name]

    def tell(self, event: ev.Event, now_s: float | None = None) -> list[str]:
        """What the dispatcher wants done about an event."""
        if now_s is not None:
            self.now_s = now_s
        self.last = self.dispatcher.handle(event, self.now_s)
        assert self.dispatcher.counts.conserved
        self.releases.update(action.lease_id for action in self.last if isinstance(action, ev.Release))
        lines = [told(action) for action in self.last]
        self.log += lines
        return lines

    # --- the fleet -----------------------------------------------------------------------------------------

    def add(self, name: str, tier: str | None = None, **changes: Any) -> list[str]:
        """A backend comes up, in a tier or in the pool."""
        lines = self.tell(ev.BackendChanged(backend(name, **changes)))
        return lines + self.tell(ev.MembershipChanged(name, tier, 1))

    def change(self, name: str, **changes: Any) -> list[str]:
        return self.tell(ev.BackendChanged(replace(self.ledger(name).backend, **changes)))

    def down(self, name: str) -> list[str]:
        return self.change(name, state=BackendState.DOWN)

    def claimed(self, name: str, tier: str, epoch: int) -> list[str]:
        return self.tell(ev.Claimed(name, tier, epoch))

    def foreign(self, name: str, decodes: int = 0, kv: int = 0, queued: int = 0) -> list[str]:
        """Other replicas carry this on a backend."""
        return self.tell(ev.LoadPublished(name, LoadVector(decodes, kv, queued)))

    # --- a request's life ----------------------------------------------------------------------------------

    def arrives(self, request_id: str, tier: str = "fast", prompt_tokens: int = 100, **changes: Any) -> list[str]:
        changes.setdefault("arrival_s", self.now_s)
        return self.tell(ev.Arrived(request(request_id, tier, prompt_tokens, **changes)))

    def granted(self, lease_id: str) -> list[str]:
        ticket = self.dispatcher._desk.of_lease(lease_id)
        name = ticket.backend if ticket is not None and ticket.backend is not None else "a"
        return self.tell(ev.Reserved(lease_id.partition("#")[0], lease_id, name))

    def denied(self, lease_id: str, **foreign: LoadVector) -> list[str]:
        return self.tell(ev.ReserveRefused(lease_id.partition("#")[0], lease_id, foreign))

    def failed(self, lease_id: str, retryable: bool = True) -> list[str]:
        return self.tell(ev.OpenFailed(lease_id.partition("#")[0], lease_id, retryable, "connection refused"))

    def first(self, lease_id: str) -> list[str]:
        return self.tell(ev.FirstToken(lease_id))

    def ended(self, lease_id: str, kind: ev.EndKind = ev.EndKind.FINISHED, tokens: int = 50) -> list[str]:
        return self.tell(ev.Ended(lease_id, kind, tokens))

    def cancelled(self, request_id: str) -> list[str]:
        return self.tell(ev.Cancelled(request_id))

    def wait(self, seconds: float) -> list[str]:
        return self.tell(ev.TimePassed(), self.now_s + seconds)

    def opens(self, request_id: str, tier: str = "fast", prompt_tokens: int = 100, **changes: Any) -> str:
        """A request that arrives, gets its place and its stream. Its lease."""
        lines = self.arrives(request_id, tier, prompt_tokens, **changes)
        assert lines[-1].startswith(f"reserve {request_id}#1"), lines
        self.granted(f"{request_id}#1")
        return f"{request_id}#1"

    def runs(self, request_id: str, tier: str = "fast", prompt_tokens: int = 100, **changes: Any) -> str:
        """The same, with its first token out."""
        lease_id = self.opens(request_id, tier, prompt_tokens, **changes)
        self.first(lease_id)
        return lease_id

    def crowd(self, count: int, tier: str, *, prefix: str = "x", every_s: float = 0.05) -> list[str]:
        """Many short-prompted requests one after the other, all running and up to date; their leases."""
        leases = []
        for index in range(count):
            leases.append(self.runs(f"{prefix}{index}", tier, 10))
            self.now_s += every_s
            self.progress(leases)
        return leases

    def progress(self, leases: list[str], tokens: int | None = None) -> list[str]:
        """All these streams are on pace: as many tokens as their promise asks for by now, and two more."""
        desk = self.dispatcher._desk
        by_backend: dict[str, list[ev.Progress]] = {}
        for lease_id in leases:
            ticket = desk.of_lease(lease_id)
            if ticket is None or ticket.backend is None:
                continue
            asked = ticket.request
            pace_s = asked.slo.tpot_s or 0.1
            late_s = self.now_s - asked.arrival_s - (asked.slo.ttft_s or 1.0)
            done = tokens if tokens is not None else max(int(late_s / pace_s) + 3, 1)
            by_backend.setdefault(ticket.backend, []).append(ev.Progress(lease_id, done))
        lines: list[str] = []
        for name, progress in by_backend.items():
            lines += self.tell(ev.Progressed(name, tuple(progress), None, 0.0))
        return lines
