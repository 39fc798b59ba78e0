"""What was decided, for whom, and why: with every candidate's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """Why a candidate was taken or passed over. The first promise that would break names it."""

    FEASIBLE = "feasible"
    FIRST_TOKEN = "first_token"  # its own TTFT would be missed
    SECOND_TOKEN = "second_token"  # TTFT + TPOT would be missed (wait-time-aware, PolyServe §4.6)
    STEADY_STATE = "steady_state"  # steps would become slower than the tightest promise on board
    CHUNK = "chunk"  # on a driven engine, its chunks would become too small to make the TTFT
    RESIDENT_SLACK = "resident_slack"  # a resident's token would be late while this prompt is prefilled
    PREFILL_PACE = "prefill_pace"  # prompts come faster than its decodes can bear; engines with a static budget
    MEMORY = "memory"  # KV would not hold everybody at the peak
    FULL = "full"  # the engine's own cap on running sequences
    TOO_LONG = "too_long"  # longer than the engine's model length
    UNAVAILABLE = "unavailable"  # down, draining, wrong model, or it failed this request before


class Outcome(Enum):
    """Which rung of the ladder the request stands on (PolyServe §4.3-4.4)."""

    OWN_TIER = "own_tier"
    PROMOTED = "promoted"  # on a tighter tier's backend, at the host's pace
    SHARED = "shared"  # on a looser neighbour's backend, which keeps the tighter pace
    CLAIMED = "claimed"  # waits for a backend that is being taken for its tier
    HELD = "held"
    RELEGATED = "relegated"  # its own promise is given up; it takes what is left
    ROUTED = "routed"  # a baseline placed it, with no promise looked at
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend that was looked at. A number that was not needed for the verdict is None.

    `load` is predicted steady step time over host TPOT, before the request joins.
    """

    backend: str
    tier: str | None
    verdict: Verdict
    ttft_s: float | None = None
    tpot_s: float | None = None
    peak_kv_tokens: int | None = None
    load: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    request_id: str
    at_s: float
    outcome: Outcome
    reason: str
    backend: str | None
    candidates: tuple[Candidate, ...]
    looked_at: int = 0  # how many backends in all; `candidates` names the first of them


class RefusalKind(Enum):
    """Why a request is turned away; the shell gives each its status."""

    TOO_LATE = "deadline_cannot_be_met"  # 429: not even an idle backend makes it from here
    SATURATED = "saturated"  # 429: nothing became free before its deadline
    TOO_LONG = "prompt_too_long"  # 400: longer than any backend takes
    NO_BACKEND = "no_backend"  # 503: nothing is up for its model
    FAILED = "upstream_failed"  # 502: every backend that was tried failed before the first byte


@dataclass(frozen=True, slots=True)
class Refusal:
    """`retry_after_s` is the predicted time until it fits; None when retrying cannot help."""

    kind: RefusalKind
    message: str
    retry_after_s: float | None = None
