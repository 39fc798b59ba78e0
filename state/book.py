"""What one replica knows of the fleet by itself: what it carries, what it was told of the others, and its share.

A share is what a replica may carry on a backend while nobody can be asked. docs/state.md ("Outages") derives what
all shares together come to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from scheduling.load import Cost, Limits, LoadVector, ReserveCandidate
from state.contract import BackendLoad, Membership, Publication
from state.parts import Part

_NOWHERE = Membership(None, 0)
_REMEMBERED_ENDINGS = 16_384


@dataclass(frozen=True, slots=True)
class Share:
    """By what rule a replica admits on its own.

    Attributes:
        replicas: among how many the room is split.
        known: whether the last knowledge of the others still counts; else a share is an equal part of the whole.
        recent_s: leases younger than this may be missing in an engine's own count.
        fresh_s: an engine's own count older than this says nothing.
    """

    replicas: int
    known: bool
    recent_s: float
    fresh_s: float


def allowance(limit: int, own: int, foreign: int, share: Share) -> int:
    """What a replica may carry of a `limit` on everybody's load, given its own and the others' load when it last
    knew: its own and an equal part of what was free; later an equal part of all.

    Rounded down, so the allowances of all replicas never sum to more than the largest limit any of them was given.
    """
    if share.known:
        return own + (limit - own - foreign) // share.replicas
    return limit // share.replicas


@dataclass(slots=True)
class Lease:
    """One request of this replica. `store_id`: by what name the store was asked for it, None when never; `told`:
    the store has it; `asking`: the store is being asked whether it may stand at all."""

    backend: str
    cost: Cost
    sequence: int
    granted_s: float
    store_id: str | None
    told: bool
    asking: bool = False


@dataclass(slots=True)
class _Known:
    """A backend's load when the store was last heard: own and foreign."""

    own: Limits
    foreign: Limits


@dataclass(slots=True)
class Site:
    """One backend as this replica knows it."""

    membership: Membership = _NOWHERE
    claimed: bool = False  # by this replica alone: the epoch is still the store's, the tier is not
    own: Part = field(default_factory=Part)
    shadow: Part | None = None  # what `own` becomes if the publication on its way is taken
    foreign: LoadVector = field(default_factory=LoadVector)
    foreign_s: float = 0.0
    leases: dict[str, Lease] = field(default_factory=dict)
    cut: _Known | None = None
    engine_sequences: int | None = None
    engine_s: float = 0.0

    def begin(self, cost: Cost) -> int:
        if self.shadow is not None:
            self.shadow.begin(cost)
        return self.own.begin(cost)

    def end(self, lease: Lease) -> None:
        if self.shadow is not None:
            self.shadow.end(lease.cost, lease.sequence)
        self.own.end(lease.cost, lease.sequence)

    def send(self, own: LoadVector) -> None:
        """A publication is on its way: the store may or may not take it."""
        part = self.own
        self.shadow = Part(leases=part.leases)
        self.shadow.publish(own, part.sequence)

    def settle(self, sequence: int, *, taken: bool) -> None:
        """What became of the publication on its way, which had this sequence."""
        if taken and self.shadow is not None:
            self.own = self.shadow
            self.own.sequence = max(self.own.sequence, sequence)
        self.shadow = None

    @property
    def nowhere(self) -> bool:
        """Whether nobody ever said where it belongs."""
        return self.membership is _NOWHERE

    @property
    def settled(self) -> bool:
        """Whether nothing that the store is being asked may change what is carried here."""
        return self.shadow is None and not any(lease.asking for lease in self.leases.values())

    def tightest_ms(self) -> float:
        return min((lease.cost.tpot_ms for lease in self.leases.values()), default=float("inf"))

    def recent_sequences(self, since_s: float) -> int:
        """Sequences of standing leases granted since then."""
        count = 0
        for lease in reversed(self.leases.values()):
            if lease.granted_s < since_s:
                break
            count += lease.cost.decodes
        return count

    def load(self, now_s: float) -> BackendLoad:
        foreign = replace(self.foreign, age_s=self.foreign.age_s + max(now_s - self.foreign_s, 0.0))
        return BackendLoad(self.membership, self.own.vector(0.0), foreign)


def _box(load: LoadVector) -> Limits:
    return Limits(load.decodes, load.peak_kv_tokens, load.queued_prefill_tokens)


class Book:
    """Everything a replica knows. Pure: no clock, no I/O."""

    def __init__(self, caps: Callable[[str], int | None]) -> None:
        """`caps`: the most sequences a backend's engine runs at once, None when not known."""
        self._caps = caps
        self.sites: dict[str, Site] = {}
        self.leases: dict[str, Lease] = {}
        self._ended: set[str] = set()
        self._ended_order: deque[str] = deque()

    # --- leases ------------------------------------------------------------------------------------------------

    def has_ended(self, lease_id: str) -> bool:
        return lease_id in self._ended

    def begin(self, lease_id: str, candidate: ReserveCandidate, now_s: float, store_id: str | None) -> Lease:
        """Carry one lease more; with a `store_id` the store has it."""
        site = self.sites.setdefault(candidate.backend, Site())
        sequence = site.begin(candidate.cost)
        lease = Lease(candidate.backend, candidate.cost, sequence, now_s, store_id, store_id is not None)
        self.leases[lease_id] = site.leases[lease_id] = lease
        return lease

    def forget(self, lease_id: str) -> Lease | None:
        """Take a lease off, without remembering that it ended; None when it does not stand."""
        lease = self.leases.pop(lease_id, None)
        if lease is None:
            return None
        site = self.sites.get(lease.backend)
        if site is not None and site.leases.pop(lease_id, None) is not None:
            site.end(lease)
        return lease

    def end(self, lease_id: str) -> Lease | None:
        """End a lease for good, known or not."""
        if lease_id not in self._ended:
            self._ended.add(lease_id)
            self._ended_order.append(lease_id)
            if len(self._ended_order) > _REMEMBERED_ENDINGS:
                self._ended.discard(self._ended_order.popleft())
        return self.forget(lease_id)

    def untold(self) -> list[tuple[str, Lease]]:
        """Standing leases that the store does not have."""
        return [each for each in self.leases.items() if not (each[1].told or each[1].asking)]

    def short(self, loads: Mapping[str, BackendLoad]) -> list[tuple[str, Lease]]:
        """Leases that the store was told, on backends where it counts fewer of our sequences."""
        told = [each for each in self.leases.items() if each[1].told and not each[1].asking]
        sequences: dict[str, int] = {}
        for _, lease in told:
            sequences[lease.backend] = sequences.get(lease.backend, 0) + lease.cost.decodes
        short = {
            backend
            for backend, count in sequences.items()
            if backend in self.sites and (backend not in loads or loads[backend].own.decodes < count)
        }
        return [(lease_id, lease) for lease_id, lease in told if lease.backend in short]

    def lost(self, loads: Mapping[str, BackendLoad], before_s: float) -> frozenset[str]:
        """Backends where the store counts nothing of ours, though it was told of leases before then that stand."""
        return frozenset(
            lease.backend
            for lease in self.leases.values()
            if lease.told
            and lease.granted_s < before_s
            and lease.cost.decodes
            and lease.backend in self.sites
            and (lease.backend not in loads or loads[lease.backend].own.idle)
        )

    # --- what is heard -----------------------------------------------------------------------------------------

    def member(self, backend: str, membership: Membership) -> bool:
        """How a backend stands; whether that is new. An older epoch changes nothing."""
        site = self.sites.setdefault(backend, Site())
        newer = membership.epoch - site.membership.epoch
        if newer < 0 or membership == site.membership or (site.claimed and newer == 0):
            return False
        site.membership, site.claimed = membership, False
        return True

    def claim(self, backend: str, tier: str, expected_epoch: int) -> Membership | None:
        """Move a backend for this replica alone; the epoch stays, so that it holds only until the store is asked.
        None when it stands otherwise."""
        site = self.sites.get(backend)
        if site is None or site.membership.epoch != expected_epoch:
            return None
        site.membership, site.claimed = Membership(tier, expected_epoch), True
        return site.membership

    def restate(self, backend: str, membership: Membership) -> None:
        """A store that was away says how a backend stands: that holds, whatever was known."""
        site = self.sites.setdefault(backend, Site())
        site.membership, site.claimed = membership, False

    def told(self, backend: str, load: BackendLoad, now_s: float) -> None:
        """The store told how a backend stands."""
        self.member(backend, load.membership)
        self.foreign(backend, load.foreign, now_s)

    def foreign(self, backend: str, foreign: LoadVector, now_s: float) -> None:
        site = self.sites.get(backend)
        if site is None:
            return
        if not foreign.slack and foreign.decodes:  # a refusal may leave it out
            foreign = replace(foreign, slack=site.foreign.slack, queued_slack=site.foreign.queued_slack)
        site.foreign, site.foreign_s = foreign, now_s

    def drop(self, backend: str) -> None:
        """A backend was removed; leases on it may still end."""
        self.sites.pop(backend, None)

    def counted(self, backend: str, sequences: int, now_s: float) -> None:
        """An engine says how many sequences it has."""
        site = self.sites.get(backend)
        if site is not None:
            site.engine_sequences, site.engine_s = sequences, now_s

    def loads(self, now_s: float) -> dict[str, BackendLoad]:
        return {name: site.load(now_s) for name, site in self.sites.items()}

    # --- publications ------------------------------------------------------------------------------------------

    def accepts(self, one: Publication) -> bool:
        """Whether a publication is newer than what is here, and none is on its way already. One for a backend that
        was never heard of may be."""
        site = self.sites.get(one.backend)
        return site is None or (site.shadow is None and one.sequence > site.own.sequence)

    def send(self, one: Publication) -> None:
        """A publication is on its way."""
        self.sites.setdefault(one.backend, Site()).send(one.own)

    def settle(self, one: Publication, *, taken: bool) -> None:
        """What became of a publication. A backend that the store does not know either is nowhere."""
        site = self.sites.get(one.backend)
        if site is not None:
            site.settle(one.sequence, taken=taken)
            if site.nowhere and not taken:
                self.drop(one.backend)

    # --- alone -------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """From this moment nobody can be asked: shares count from here."""
        for site in self.sites.values():
            site.cut = _Known(_box(site.own.vector(0.0)), _box(site.foreign))

    def granted_late(self, backend: str, cost: Cost) -> None:
        """The store had granted this before it fell silent: it belongs to what was known."""
        site = self.sites.get(backend)
        if site is not None and site.cut is not None:
            own = site.cut.own
            site.cut.own = Limits(
                own.decodes + cost.decodes,
                own.peak_kv_tokens + cost.peak_kv_tokens,
                own.queued_prefill_tokens + cost.prefill_tokens,
            )

    def refusal(self, candidate: ReserveCandidate, share: Share, now_s: float) -> LoadVector | None:
        """None when the candidate is within this replica's share. Else what the others must be taken to carry
        there, so that whoever decides again sees the room that is left to this replica."""
        site = self.sites.get(candidate.backend)
        if site is None:
            return LoadVector()
        if site.membership.epoch != candidate.epoch or site.tightest_ms() < candidate.tightest_resident_ms:
            return site.load(now_s).foreign
        own = _box(site.own.vector(0.0))
        allowed = self._allowed(candidate, site, own, share, now_s)
        if _fits(candidate.cost, own, allowed) or self._may_begin(site, share, now_s):
            return None
        foreign, limits = site.load(now_s).foreign, candidate.limits
        return replace(
            foreign,
            decodes=max(foreign.decodes, limits.decodes - allowed.decodes),
            peak_kv_tokens=max(foreign.peak_kv_tokens, limits.peak_kv_tokens - allowed.peak_kv_tokens),
            queued_prefill_tokens=max(
                foreign.queued_prefill_tokens,
                limits.queued_prefill_tokens - allowed.queued_prefill_tokens if own.queued_prefill_tokens else 0,
            ),
        )

    def _allowed(self, candidate: ReserveCandidate, site: Site, own: Limits, share: Share, now_s: float) -> Limits:
        """What this replica may carry there by this candidate's limits."""
        limits = candidate.limits
        nothing = Limits(0, 0, 0)
        own_then, foreign_then = (nothing, nothing) if site.cut is None else (site.cut.own, site.cut.foreign)
        decodes = allowance(limits.decodes, own_then.decodes, foreign_then.decodes, share)
        more = self._guard(candidate.backend, site, share, now_s)
        return Limits(
            decodes if more is None else min(decodes, own.decodes + more),
            allowance(limits.peak_kv_tokens, own_then.peak_kv_tokens, foreign_then.peak_kv_tokens, share),
            allowance(
                limits.queued_prefill_tokens,
                own_then.queued_prefill_tokens,
                foreign_then.queued_prefill_tokens,
                share,
            ),
        )

    def _guard(self, backend: str, site: Site, share: Share, now_s: float) -> int | None:
        """How many sequences this replica may still add by the engine's own count; None when that says nothing."""
        cap = self._caps(backend)
        if cap is None or site.engine_sequences is None or now_s - site.engine_s > share.fresh_s:
            return None
        room = max(cap - site.engine_sequences, 0) // share.replicas
        return room - site.recent_sequences(now_s - share.recent_s)

    def _may_begin(self, site: Site, share: Share, now_s: float) -> bool:
        """Whether this replica may take one request though its share is less than that: it carries none there, the
        last knowledge is old, and the engine itself says that it is idle."""
        fresh = now_s - site.engine_s <= share.fresh_s
        return not share.known and not site.leases and site.engine_sequences == 0 and fresh


def _fits(cost: Cost, own: Limits, allowed: Limits) -> bool:
    prefill = own.queued_prefill_tokens
    return (
        own.decodes + cost.decodes <= allowed.decodes
        and own.peak_kv_tokens + cost.peak_kv_tokens <= allowed.peak_kv_tokens
        # Prefill passes within seconds, and a part of its room may be less than any prompt: one at a time may.
        and (not prefill or prefill + cost.prefill_tokens <= allowed.queued_prefill_tokens)
    )
