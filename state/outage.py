"""In which mode a replica is, among how many it splits what is free, and when an outage is over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from state.book import Share
from state.contract import Mode


@dataclass(frozen=True, slots=True)
class Shelter:
    """How patient a replica is.

    Attributes:
        deadline_s: the longest that any call waits for the store.
        first_s: the same until the store has answered once, where that is more: who has never seen it knows of no
            others, and would take all the room there is.
        probe_s: how often a silent store is asked whether it answers.
        pulse_s: an answering store that nobody has asked for so long is asked for a sign of life.
        look_over_s: how often an answering store is asked how everything stands, and whether it lost anything.
        settle_s: how long the others are given, after the store's return, to tell what they carry.
        lease_s: the store's lease time.
        engine_s: an engine's own count is not used once it is older than this.
        least_replicas: replicas among which room is split at least, however few were ever seen.
    """

    deadline_s: float = 0.1
    first_s: float = 2.0
    probe_s: float = 0.2
    pulse_s: float = 1.0
    look_over_s: float = 5.0
    settle_s: float = 0.8
    lease_s: float = 10.0
    engine_s: float = 2.0
    least_replicas: int = 1


class Outage:
    """SHARED until the store falls silent, ALONE until it answers, HEALING until it counts for all. Pure."""

    def __init__(self, options: Shelter, on_mode: Callable[[Mode, str], None]) -> None:
        self._options = options
        self._on_mode = on_mode
        self.mode = Mode.SHARED
        self.peers = max(options.least_replicas, 1)
        self._seen: deque[tuple[float, int]] = deque()  # live replicas, and when
        self._cut_s = 0.0
        self._back_s = 0.0
        self._aged = False

    def count(self, replicas: int, now_s: float) -> None:
        """So many replicas are live. The most within a lease time count: one that just fell silent may go on."""
        seen = self._seen
        seen.append((now_s, replicas))
        while now_s - seen[0][0] > self._options.lease_s:
            seen.popleft()
        self.peers = max(self._options.least_replicas, 1, *(count for _, count in seen))

    def cut(self, why: str, heard_s: float) -> bool:
        """The store is silent; it answered last at `heard_s`. Whether it counted for all until now: then shares
        start from what was known."""
        if self.mode is Mode.ALONE:
            return False
        first = self.mode is Mode.SHARED
        if first:
            self._cut_s, self._aged = heard_s, False
        self._set(Mode.ALONE, why)
        return first

    def forgot(self, heard_s: float, now_s: float) -> None:
        """A store that counted for all answers, and has lost what it knew: the others may have told it anew."""
        self._cut_s, self._aged = heard_s, False
        self._back_s = now_s
        self._set(Mode.HEALING, "it has lost what it knew")

    def returned(self, now_s: float) -> None:
        """The store answers."""
        self._back_s = now_s
        self._set(Mode.HEALING, "the store answers")

    def over(self, mode: Mode, replicas: int, now_s: float) -> bool:
        """Whether a healing store counts for all again, by its own mode and count of live replicas: the others are
        back and have had time to tell what they carry, or will not come."""
        waited_s = now_s - self._back_s
        back = mode is Mode.SHARED and replicas >= self.peers and waited_s >= self._options.settle_s
        if not back and waited_s < self._options.lease_s:
            return False
        self._set(Mode.SHARED, "all replicas are back" if back else "one lease time has passed")
        self._seen.clear()
        self.count(replicas, now_s)
        return True

    def share(self, now_s: float) -> Share:
        """By what rule to admit."""
        engine_s = self._options.engine_s
        # docs/state.md, "Outages", has why a lease counts as recent for so long.
        return Share(self.peers, not self._old(now_s), engine_s * (self.peers + 1), engine_s)

    def aged(self, now_s: float) -> bool:
        """Whether what was known of the others has just ceased to count. Once per outage."""
        if self._aged or not self._old(now_s):
            return False
        self._aged = True
        return True

    def _old(self, now_s: float) -> bool:
        return now_s - self._cut_s >= self._options.lease_s

    def _set(self, mode: Mode, why: str) -> None:
        self.mode = mode
        self._on_mode(mode, why)
