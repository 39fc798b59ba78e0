"""Replicas of the fleet's policy without a gateway around them, for tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from gateway.config import Settings, TierSettings
from gateway.policy import FleetPolicy
from gateway.shared import Begun, PolicySource, SharedPolicy, begin
from gateway.telemetry import Telemetry
from state.documents import Documents

_TIERS = (TierSettings(name="only", ttft_ms=3000, tpot_ms=80),)


def file_of(**more: object) -> Settings:
    """A configuration file with one backend."""
    return Settings.model_validate({"backends": ["http://a:1"]} | more)


def only_tier(policy: FleetPolicy) -> FleetPolicy:
    """The same policy with one tier, `only`."""
    return policy.model_copy(update={"tiers": _TIERS, "default_tier": "only"})


class Replica:
    """One replica's policy without a gateway around it: remembers what was put in force."""

    def __init__(self, documents: Documents, begun: Begun, source: PolicySource) -> None:
        self.documents = documents
        self.numbers = Telemetry()
        self.applied: list[Settings] = []
        self.shared = SharedPolicy(source, begun, self._apply, self.numbers)

    async def _apply(self, settings: Settings, version: int) -> None:
        self.applied.append(settings)

    @property
    def version(self) -> int:
        return self.numbers.policy_version

    @property
    def tiers(self) -> list[str]:
        return [tier.name for tier in self.shared.policy.tiers]


@contextlib.asynccontextmanager
async def replica(
    documents: Documents, file: Settings | None = None, source: PolicySource | None = None
) -> AsyncIterator[Replica]:
    """A replica that has begun, and follows the store."""
    own = file or file_of()
    source = source or PolicySource(documents, replica="test")
    made = Replica(documents, await begin(own, source), source)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(made.shared.run())
        try:
            yield made
        finally:
            task.cancel()
