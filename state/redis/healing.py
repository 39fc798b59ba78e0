"""How long a store that forgot something may count too little."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from state.redis.codec import Picture


class Healing:
    """From when the store was found to have forgotten something until every replica that was known before was
    heard again, or one lease time has passed: by then each has told what it carries, or is given up."""

    def __init__(self, clock: Callable[[], float], lease_s: float) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._missing: frozenset[str] = frozenset()
        self._began_s = 0.0

    @property
    def under_way(self) -> bool:
        return bool(self._missing)

    def begin(self, others: Iterable[str]) -> None:
        """The store forgot something; these were there before. One that is under way goes on."""
        if not self._missing:
            self._missing = frozenset(others)
            self._began_s = self._clock()

    def look(self, picture: Picture) -> None:
        """See who was heard since."""
        since_s = self._clock() - self._began_s
        if since_s >= self._lease_s:
            self._missing = frozenset()
            return
        heard = {name for name, silent_s in picture.silent_s.items() if silent_s < since_s}
        self._missing -= heard
