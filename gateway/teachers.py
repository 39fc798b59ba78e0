"""Who teaches the gateway what its backends are: protocols that the composition root fills in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters.contract import Adapter, Capabilities
from gateway.config import BackendSettings
from gateway.pace import PrefillSample, StepSample
from scheduling.backends import EngineLimits
from scheduling.lengths import LengthModel
from tiergate_engine.step import Step, StepTime

Running = Mapping[tuple[str, str], Sequence[int]]  # tokens of each open stream, by (model, tier)


@dataclass(frozen=True, slots=True)
class Timing:
    """What is known of a backend's step times now. `margin` is a factor of at least 1 on predictions."""

    step_time: StepTime
    margin: float
    calibrated: bool
    version: int
    error: float | None = None


class StepLearner(Protocol):
    """One backend's step times: a profile or a prior, corrected by what was seen."""

    @property
    def limits(self) -> EngineLimits:
        """What the profile says of the engine's limits."""
        ...

    def observe(self, sample: StepSample) -> None: ...

    def observe_prefill(self, sample: PrefillSample) -> None: ...

    def observe_told(self, steps: Sequence[tuple[Step, float]], of: int) -> None:
        """Steps that the engine told, with their seconds, of so many that it made."""
        ...

    def timing(self) -> Timing: ...


class LengthLearner(Protocol):
    """Output lengths per model and tier."""

    def observe(self, model: str, tier: str, output_tokens: int, *, complete: bool) -> None: ...

    def changed(self, running: Running) -> list[tuple[str, str, LengthModel]]:
        """(model, tier, lengths) of every class that changed since the last call.

        `running` are the tokens that open streams have so far: long answers end last, so without them lengths
        would be those of the short ones.
        """
        ...


class BackendUnusable(Exception):
    """A backend cannot be used as it is configured; the message says why."""


class Teachers(Protocol):
    """Makes what a backend needs; filled in by the composition root."""

    async def connect(self, settings: BackendSettings) -> Adapter:
        """The adapter for an endpoint. Raises UpstreamError while nothing answers, or BackendUnusable."""
        ...

    async def steps(self, settings: BackendSettings, capabilities: Capabilities) -> StepLearner:
        """What is known of its step times. Raises BackendUnusable."""
        ...

    @property
    def lengths(self) -> LengthLearner: ...
