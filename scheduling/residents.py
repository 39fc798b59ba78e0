"""One request on a backend, as the backend's ledger follows it."""

from __future__ import annotations

import math

from scheduling.lengths import LengthModel
from scheduling.load import Cost
from scheduling.requests import Request

RECOUNT_TOKENS = 8
"""What a resident has left is asked of the length model again after so many tokens, and counted down between."""


class Resident:
    """One request on a backend, from the moment its place was asked for until its lease ends."""

    __slots__ = (
        "asked",
        "cost",
        "drawn_kv_tokens",
        "drawn_remaining_tokens",
        "due_s",
        "expected_first_s",
        "first_due_s",
        "first_token",
        "generated_tokens",
        "guest",
        "kv_tokens",
        "lease_id",
        "lengths",
        "lost",
        "number",
        "prefill_tokens",
        "recount_at_tokens",
        "remaining_tokens",
        "request",
        "seen_s",
        "sequences",
        "tpot_s",
    )

    def __init__(
        self, lease_id: str, request: Request, cost: Cost, lengths: LengthModel, placed_s: float, *, guest: bool
    ) -> None:
        self.lease_id = lease_id
        self.request = request
        self.cost = cost
        self.lengths = lengths
        self.asked = False  # the store has not answered yet
        self.number = 0  # its lease's in `scheduling.stored`
        self.seen_s = placed_s
        self.guest = guest
        self.first_token = False
        self.lost = False
        self.generated_tokens = 0
        self.expected_first_s = math.inf
        self.prefill_tokens = cost.prefill_tokens
        self.tpot_s = math.inf if request.slo.tpot_s is None else request.slo.tpot_s
        self.kv_tokens = request.prompt_tokens * request.sequences
        self.remaining_tokens = expected_output_tokens(request, lengths)
        self.sequences = request.sequences
        self.first_due_s = request.slo.deadline_s(request.arrival_s, 0)
        self.due_s = self.first_due_s  # of its next token
        self.recount_at_tokens = 0
        self.drawn_kv_tokens = float(self.kv_tokens)  # as the growth curve has it
        self.drawn_remaining_tokens = self.remaining_tokens

    def advance(self, generated_tokens: int, seen_s: float) -> None:
        """Its streams were at `generated_tokens` (per sequence) at `seen_s`."""
        new_tokens = generated_tokens - self.generated_tokens
        self.seen_s = seen_s
        if not new_tokens:
            return
        self.generated_tokens = generated_tokens
        self.kv_tokens += new_tokens * self.sequences
        self.due_s = self.first_due_s + generated_tokens * self.tpot_s
        remaining_tokens = self.remaining_tokens - new_tokens
        if generated_tokens >= self.recount_at_tokens or remaining_tokens < RECOUNT_TOKENS:
            remaining_tokens = expected_output_tokens(self.request, self.lengths, generated_tokens)
            self.recount_at_tokens = generated_tokens + RECOUNT_TOKENS
        self.remaining_tokens = remaining_tokens

    def guess_progress(self, step_s: float, now_s: float) -> None:
        """One that is not streamed shows nothing: it is taken to make a token every `step_s` seconds."""
        tokens = 1 + int((now_s - self.expected_first_s) / step_s) if step_s > 0 else 1
        self.advance(min(tokens, self.request.max_output_tokens or tokens), now_s)

    @property
    def slack_s(self) -> float:
        """Seconds its next token may still take: from when it was last seen, since when it moved on with its
        neighbours; for one whose prompt is queued, from when its first token is expected."""
        return self.due_s - (self.seen_s if self.first_token else max(self.expected_first_s, self.seen_s))


def expected_output_tokens(request: Request, lengths: LengthModel, generated_tokens: int = 0) -> float:
    """Tokens still to come: the client's hint, else what was learned; never beyond `max_output_tokens`."""
    hint = request.expected_output_tokens
    if hint is not None and hint > generated_tokens:
        expected = float(hint - generated_tokens)
    else:
        expected = lengths.remaining(generated_tokens)
    if request.max_output_tokens is not None:
        expected = min(expected, request.max_output_tokens - generated_tokens)
    return max(expected, 1.0)
