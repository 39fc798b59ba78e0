"""A request on its way through the dispatcher: its ticket, and the phases it may pass."""

from __future__ import annotations

import math
from enum import Enum

from scheduling.decisions import Decision
from scheduling.feasible import Ask
from scheduling.lengths import LengthModel
from scheduling.requests import Request
from scheduling.rivals import Waiting
from scheduling.tiers import Tier


class Phase(Enum):
    """Where a request is. Illegal moves are bugs, and raise."""

    NEW = "new"
    HELD = "held"
    RESERVING = "reserving"
    OPEN = "open"
    DONE = "done"


_MOVES = {
    Phase.NEW: {Phase.HELD, Phase.RESERVING, Phase.DONE},
    Phase.HELD: {Phase.NEW, Phase.RESERVING, Phase.DONE},
    Phase.RESERVING: {Phase.HELD, Phase.RESERVING, Phase.OPEN, Phase.DONE},  # RESERVING again: the store said no
    Phase.OPEN: {Phase.HELD, Phase.RESERVING, Phase.DONE},  # back: it failed before the first byte
    Phase.DONE: set[Phase](),
}


class Ticket:
    """One request on its way. Lives until it is answered, refused or gone."""

    __slots__ = (
        "ask",
        "attempts",
        "backend",
        "cause",
        "decision",
        "excluded",
        "gone",
        "held_number",
        "lease_id",
        "lengths",
        "misfits",
        "phase",
        "relegated",
        "request",
        "store_refusals",
        "tier",
        "until_s",
        "yields_until_s",
    )

    def __init__(self, request: Request, tier: Tier, ask: Ask, lengths: LengthModel) -> None:
        self.request = request
        self.tier = tier
        self.ask = ask
        self.lengths = lengths
        self.phase = Phase.NEW
        self.attempts = 0
        self.store_refusals = 0
        self.excluded: frozenset[str] = frozenset()
        self.misfits: frozenset[str] = frozenset()  # backends it is too long for, as they were when it came
        self.lease_id: str | None = None
        self.backend: str | None = None
        self.decision: Decision | None = None
        self.relegated = False
        self.gone = False
        self.held_number = -1  # which wait this is; older queue entries of the same ticket are stale
        self.until_s = math.inf
        self.yields_until_s: float | None = None  # when it has let others go first for long enough
        self.cause = ""

    def move(self, phase: Phase) -> None:
        if phase not in _MOVES[self.phase]:
            raise AssertionError(f"request {self.request.request_id}: {self.phase.value} -> {phase.value}")
        self.phase = phase


def waiting_of(ticket: Ticket) -> Waiting:
    """What other replicas are told of one that is held."""
    request = ticket.request
    kv_tokens = int((request.prompt_tokens + ticket.ask.output_tokens) * request.sequences)
    return Waiting(request.model, ticket.tier.name, ticket.ask.ttft_due_s, request.sequences, kv_tokens)
