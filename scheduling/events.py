"""What happens to a dispatcher (past participle) and what it asks of its shell (imperative).

The life of a request: Arrived -> Reserve -> Reserved -> Open -> FirstToken -> (Progressed)* -> Ended.
On the way it may be Held (the shell only waits), Refused (the shell answers), or retried: OpenFailed gives the
place back and the dispatcher reserves another. Every request ends by exactly one of: Ended, Refuse, Cancelled.
Every lease that was Reserved ends by exactly one Release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from scheduling.backends import Backend
from scheduling.decisions import Decision, Refusal
from scheduling.lengths import LengthModel
from scheduling.load import LoadVector, ReserveCandidate
from scheduling.requests import Request
from scheduling.rivals import Waiting
from scheduling.tiers import TierSet

# --- events: what happened ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BackendChanged:
    """A backend appeared, or something about it (profile, limits, state) is new."""

    backend: Backend


@dataclass(frozen=True, slots=True)
class BackendRemoved:
    name: str


@dataclass(frozen=True, slots=True)
class MembershipChanged:
    """The store says which tier a backend is in now (None: the pool) and at which epoch."""

    backend: str
    tier: str | None
    epoch: int


@dataclass(frozen=True, slots=True)
class TiersChanged:
    tiers: TierSet


@dataclass(frozen=True, slots=True)
class LengthsChanged:
    """New length statistics for a (model, tier)."""

    model: str
    tier: str
    lengths: LengthModel


@dataclass(frozen=True, slots=True)
class Arrived:
    request: Request


@dataclass(frozen=True, slots=True)
class Reserved:
    """The store granted the place."""

    request_id: str
    lease_id: str
    backend: str


@dataclass(frozen=True, slots=True)
class ReserveRefused:
    """No candidate fits any more; the store's fresh vectors of all replicas but this one come with it."""

    request_id: str
    lease_id: str
    foreign: Mapping[str, LoadVector]


@dataclass(frozen=True, slots=True)
class OpenFailed:
    """The backend failed before the client's first byte. `retryable`: another backend may be tried.

    `at_fault`: it may fail the next request too, so it rests; one that only lacks what was asked does not.
    """

    request_id: str
    lease_id: str
    retryable: bool
    cause: str
    at_fault: bool = True


@dataclass(frozen=True, slots=True)
class FirstToken:
    lease_id: str


class Progress(NamedTuple):
    """A tuple, since one is made for every stream every few tens of milliseconds."""

    lease_id: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Progressed:
    """Where a backend's streams are now, read off the shell's counters every few tens of milliseconds.

    `progress` names each stream that moved on, with its tokens so far. `step_s` is the median gap between tokens
    lately; `last_step_age_s` how long ago the last step ended.
    """

    backend: str
    progress: Sequence[tuple[str, int]]
    step_s: float | None = None
    last_step_age_s: float | None = None


class EndKind(Enum):
    FINISHED = "finished"
    FAILED = "failed"  # the engine broke off
    CANCELLED = "cancelled"  # the client went away


@dataclass(frozen=True, slots=True)
class Ended:
    lease_id: str
    kind: EndKind
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client went away before its stream was opened."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Claimed:
    backend: str
    tier: str
    epoch: int


@dataclass(frozen=True, slots=True)
class ClaimRefused:
    """Another replica was first: this is how the backend stands now."""

    backend: str
    tier: str | None
    epoch: int


@dataclass(frozen=True, slots=True)
class HandedBack:
    backend: str
    epoch: int


@dataclass(frozen=True, slots=True)
class HandBackRefused:
    backend: str
    tier: str | None
    epoch: int


@dataclass(frozen=True, slots=True)
class LoadPublished:
    """What all other replicas together carry on a backend."""

    backend: str
    foreign: LoadVector


@dataclass(frozen=True, slots=True)
class OthersHold:
    """Another replica holds these, the first of each model and tier; nobody when it is empty."""

    replica: str
    waiting: tuple[Waiting, ...]


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing happened but time: held requests fall due, tails are looked at."""


Event = (
    BackendChanged
    | BackendRemoved
    | MembershipChanged
    | TiersChanged
    | LengthsChanged
    | Arrived
    | Reserved
    | ReserveRefused
    | OpenFailed
    | FirstToken
    | Progressed
    | Ended
    | Cancelled
    | Claimed
    | ClaimRefused
    | HandedBack
    | HandBackRefused
    | LoadPublished
    | OthersHold
    | TimePassed
)

# --- actions: what the shell is to do ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserve:
    """Ask the store for the first candidate that still fits; answer with Reserved or ReserveRefused."""

    request_id: str
    lease_id: str
    candidates: tuple[ReserveCandidate, ...]
    decision: Decision


@dataclass(frozen=True, slots=True)
class Open:
    """Open the stream; answer with FirstToken, OpenFailed or Ended."""

    request_id: str
    lease_id: str
    backend: str
    decision: Decision
    priority: float  # remaining seconds to the first token's deadline: smaller is more urgent; inf without


@dataclass(frozen=True, slots=True)
class Hold:
    """Nothing fits now; the request waits in the dispatcher until `until_s` at the latest."""

    request_id: str
    until_s: float
    decision: Decision


@dataclass(frozen=True, slots=True)
class Refuse:
    request_id: str
    refusal: Refusal
    decision: Decision


@dataclass(frozen=True, slots=True)
class Release:
    """Give the lease's load back to the store. Exactly once a lease."""

    lease_id: str
    backend: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Compare-and-set a backend into a tier; answer with Claimed or ClaimRefused."""

    backend: str
    tier: str
    expected_epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class HandBack:
    """Compare-and-set an emptied backend into the pool; answer with HandedBack or HandBackRefused."""

    backend: str
    expected_epoch: int


Action = Reserve | Open | Hold | Refuse | Release | Claim | HandBack
