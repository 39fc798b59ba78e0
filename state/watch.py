"""One reader of what other replicas do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from state.contract import HeldEvent, StoreEvent


class Watch:
    """Keeps names only and looks a load up when it is asked for, so that events are never stale and a slow reader
    holds at most one per backend and one per replica."""

    __slots__ = ("__weakref__", "_changed", "_ended", "_held", "_look", "_pending")

    def __init__(self, look: Callable[[str], StoreEvent | None]) -> None:
        """`look` says how a backend stands; None when it is not known any more, which is not told."""
        self._look = look
        self._pending: dict[str, None] = {}
        self._held: dict[str, HeldEvent] = {}
        self._changed = asyncio.Event()
        self._ended = False

    def notice(self, backend: str) -> None:
        """Something about this backend has changed."""
        self._pending[backend] = None
        self._changed.set()

    def notice_held(self, event: HeldEvent) -> None:
        """Another replica holds this by now."""
        self._held[event.replica] = event
        self._changed.set()

    def end(self) -> None:
        """No events any more."""
        self._ended = True
        self._changed.set()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> StoreEvent | HeldEvent:
        while not self._ended:
            while self._held:
                return self._held.pop(next(iter(self._held)))
            while self._pending:
                backend = next(iter(self._pending))
                del self._pending[backend]
                event = self._look(backend)
                if event is not None:
                    return event
            self._changed.clear()
            await self._changed.wait()
        raise StopAsyncIteration
