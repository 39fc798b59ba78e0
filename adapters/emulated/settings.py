"""What one emulated engine is set to: its model's name, its limits, its chance and its faults."""

from __future__ import annotations

from dataclasses import dataclass, field

from tiergate_engine.model import EngineConfig

EMULATES_VERSION = "0.32.0"
"""The vLLM whose routes, metrics and errors are reproduced."""

VERSION = f"{EMULATES_VERSION}+tiergate.emulated"
FINGERPRINT = "tiergate-emulated"
OWNER = "tiergate-emulated"
EMULATED_HEADER = "x-tiergate-emulated"


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong on purpose. All off by default.

    Attributes:
        cut_after_tokens: close the connection of every stream after this many tokens.
        stall_after_tokens: fall silent after this many tokens of every stream, with the connection open.
        refuse_every: refuse every n-th generation as an engine with a full queue does.
        refuse_in_stream: refusals of streams come as 200 and an error event, as they do in vLLM when requests
            arrive together; otherwise as a plain 503.
    """

    cut_after_tokens: int | None = None
    stall_after_tokens: int | None = None
    refuse_every: int | None = None
    refuse_in_stream: bool = False


@dataclass(frozen=True, slots=True)
class EmulatedSettings:
    """One emulated engine.

    Attributes:
        model: the served model's name.
        engine: the limits of the engine model.
        profile: the profile's name, told in /version and /metrics.
        seed: settles lengths, texts and noise.
        noise_sigma: step times are multiplied by a log-normal of this sigma and mean 1; 0 is none.
        keep_alive_s: how long an idle connection is kept; vLLM's default is 5 s.
        max_body_bytes: a longer request body is refused with 413.
        plugin: it has Tiergate's plug-in, emulated as well: it takes orders, and promises with its requests.
    """

    model: str
    engine: EngineConfig
    profile: str = "custom"
    seed: int = 0
    noise_sigma: float = 0.0
    keep_alive_s: float = 5.0
    max_body_bytes: int = 64 * 2**20
    plugin: bool = False
    faults: Faults = field(default_factory=Faults)
