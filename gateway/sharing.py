"""Tells the other replicas what was observed here, and hears what they observed, at a slow cadence.

Each source writes its own observations alone and reads everybody's, so nothing is counted twice, and a replica
that starts knows at once what the others know. What a source that is gone observed fades.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Protocol

from pydantic import ValidationError

from gateway.learning import Evidence, Heard
from state.contract import StoreUnavailable
from state.documents import Contribution, Documents

log = logging.getLogger("tiergate.policy")

SHARE_EVERY_S = 30.0
FRESH_S = 4 * SHARE_EVERY_S
"""Evidence that is younger counts in full."""
HALF_LIFE_S = 3_600.0
"""Evidence that is older than that counts half after each such time."""
_AGAIN_S = 1.0
_LEAVE_S = 0.5
_NOTHING = "{}"


class Sharer(Protocol):
    """What is shared (`gateway.learning.Learned`)."""

    @property
    def source(self) -> str: ...

    async def evidence(self) -> Evidence: ...

    async def hear(self, others: Heard) -> None: ...


class Sharing:
    """One replica's side of what the fleet has learned."""

    def __init__(self, documents: Documents, learned: Sharer, every_s: float = SHARE_EVERY_S) -> None:
        self._documents = documents
        self._learned = learned
        self._every_s = every_s
        self._told = _NOTHING
        self._unreadable: set[str] = set()

    async def run(self) -> None:
        """Share until cancelled: at once, then slowly. A store that does not answer is asked again soon."""
        while True:
            try:
                await self.once()
            except StoreUnavailable as error:
                log.debug("what was learned is not shared: %s", error)
                await asyncio.sleep(_AGAIN_S)
            else:
                await asyncio.sleep(self._every_s)

    async def once(self) -> None:
        """Hear the others, and tell what is new here. Raises StoreUnavailable."""
        found = await self._documents.contributions()
        own = self._learned.source
        others = {source: given for source, given in found.items() if source != own}
        # Elsewhere: dozens of sources are some megabytes, and streams must not wait for them.
        await self._learned.hear(await asyncio.to_thread(self._heard, others))
        await self._tell(forgotten=own not in found)

    async def leave(self) -> None:
        """Tell what was observed since the last time, before this replica ends. A store that does not answer at
        once is left without it."""
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                await self._tell()

    async def _tell(self, *, forgotten: bool = False) -> None:
        evidence = await self._learned.evidence()
        body = evidence.model_dump_json(exclude_defaults=True)
        # A store that forgot is told again; one that knows is left alone, so that its age is that of the evidence.
        if body != self._told or (forgotten and body != _NOTHING):
            await self._documents.contribute(self._learned.source, body)
            self._told = body

    def _heard(self, others: Mapping[str, Contribution]) -> Heard:
        read = [self._read(source, given) for source, given in others.items()]
        return Heard.of(evidence for evidence in read if evidence is not None)

    def _read(self, source: str, given: Contribution) -> Evidence | None:
        """Evidence by its age; None for what another version wrote in another form."""
        try:
            evidence = Evidence.model_validate_json(given.body)
        except ValidationError as error:
            if source not in self._unreadable:
                self._unreadable.add(source)
                log.warning("what %s learned cannot be read here: %s", source, error.errors()[0]["msg"])
            return None
        if given.age_s <= FRESH_S:
            return evidence
        return evidence.worth(0.5 ** ((given.age_s - FRESH_S) / HALF_LIFE_S))
