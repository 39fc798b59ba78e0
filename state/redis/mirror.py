"""What a replica knows of all others without asking: memberships, their parts, what they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from scheduling.load import LoadVector
from state.contract import Held, HeldEvent, Membership
from state.redis.codec import News, Picture, TakenPart


@dataclass(slots=True)
class Changes:
    """What others did that is worth telling."""

    backends: dict[str, None] = field(default_factory=dict)
    held: list[HeldEvent] = field(default_factory=list)


class Hearing(Enum):
    """What to make of a message."""

    NEXT = "next"
    OLD = "old"  # from before the last picture
    MISSED = "missed"  # something came between, or another state began: a new picture is due


@dataclass(frozen=True, slots=True)
class _Told:
    load: LoadVector
    heard_s: float

    def aged(self, now_s: float) -> LoadVector:
        return replace(self.load, age_s=self.load.age_s + max(now_s - self.heard_s, 0.0))


class Mirror:
    """Fed by pictures and messages; asked by everybody. All plain memory."""

    def __init__(self, me: str, clock: Callable[[], float]) -> None:
        self._me = me
        self._clock = clock
        self.era = 0
        self.number = 0
        self.memberships: dict[str, Membership] = {}
        self.live: set[str] = set()
        self.orphans: set[str] = set()
        self._parts: dict[str, dict[str, _Told]] = {}
        self._held: dict[str, tuple[Held, ...]] = {}

    def foreign(self, backend: str) -> LoadVector:
        """What all other replicas carry there, dead ones that still count included."""
        now_s = self._clock()
        total = LoadVector()
        for told in self._parts.get(backend, {}).values():
            total += told.aged(now_s)
        return total

    def hear(self, news: News) -> Hearing:
        """Whether a message follows what is known."""
        if news.era != self.era:
            return Hearing.MISSED
        if news.number <= self.number:
            return Hearing.OLD
        return Hearing.NEXT if news.number == self.number + 1 else Hearing.MISSED

    def apply(self, news: News) -> Changes:
        """Take over a message that follows. Own doings change the mirror and are not told."""
        self.number = news.number
        changes = Changes()
        mine = news.sender == self._me
        for backend, membership in news.members.items():
            if self.settle(backend, membership) and not mine:
                changes.backends[backend] = None
        for part in news.parts:
            if self._take(part):
                changes.backends[part.backend] = None
        for backend in news.removed:
            self.forget(backend)
        for one in news.held:
            self._hold(one.replica, one.held, changes)
        self.live.update(news.joined)
        self.orphans.difference_update(news.joined)
        self.live.difference_update(news.orphaned, news.gone)
        self.orphans.update(news.orphaned)
        self.orphans.difference_update(news.gone)
        return changes

    def adopt(self, picture: Picture) -> Changes:
        """Take over the whole state; what differs from what was known is told."""
        now_s = self._clock()
        before = {name: (member, self._ageless(name)) for name, member in self.memberships.items()}
        self.era, self.number = picture.era, picture.number
        self.memberships = {backend: total.membership for backend, total in picture.totals.items()}
        self.live = set(picture.silent_s)
        self.orphans = set(picture.orphans)
        self._parts = {}
        for stored in picture.parts:
            part = stored.part
            if part.replica != self._me and _carries(part.load):
                self._parts.setdefault(part.backend, {})[part.replica] = _Told(part.load, now_s)
        changes = Changes()
        for backend, membership in self.memberships.items():
            if before.get(backend) != (membership, self._ageless(backend)):
                changes.backends[backend] = None
        holding = {one.replica: one.held for one in picture.held}
        for replica in [name for name in self._held if name not in holding]:
            self._hold(replica, (), changes)
        for replica, held in holding.items():
            self._hold(replica, held, changes)
        return changes

    def ahead_of(self, picture: Picture) -> bool:
        """Whether a membership is known here that the store has not given yet: it lost writes, if the picture is
        the newest. A backend that is merely missing was removed."""
        for backend, membership in self.memberships.items():
            total = picture.totals.get(backend)
            if membership.epoch > (picture.epoch if total is None else total.membership.epoch):
                return True
        return False

    def settle(self, backend: str, membership: Membership) -> bool:
        """A membership that was told somewhere. Whether it is news."""
        known = self.memberships.get(backend)
        if known is not None and known.epoch >= membership.epoch:
            return False
        self.memberships[backend] = membership
        return True

    def forget(self, backend: str) -> None:
        """It was removed."""
        self.memberships.pop(backend, None)
        self._parts.pop(backend, None)

    def _take(self, part: TakenPart) -> bool:
        news = self.settle(part.backend, part.membership)
        if part.replica == self._me:
            return news
        here = self._parts.setdefault(part.backend, {})
        known = here.get(part.replica)
        ageless = replace(part.load, age_s=0.0)
        if not _carries(part.load):
            here.pop(part.replica, None)
            return news or known is not None
        here[part.replica] = _Told(part.load, self._clock())
        return news or known is None or replace(known.load, age_s=0.0) != ageless

    def _hold(self, replica: str, held: tuple[Held, ...], changes: Changes) -> None:
        if replica == self._me or (not held and replica not in self._held):
            return
        if held:
            self._held[replica] = held
        else:
            del self._held[replica]
        changes.held.append(HeldEvent(replica, held))

    def _ageless(self, backend: str) -> Mapping[str, LoadVector]:
        told = self._parts.get(backend, {})
        return {replica: replace(one.load, age_s=0.0) for replica, one in told.items()}


def _carries(load: LoadVector) -> bool:
    return not load.idle or any(load.residents.values())
