"""From a latency profile and what the user overrides to the settings of an emulated engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from adapters.emulated.settings import EmulatedSettings, Faults
from profiles import Profile
from tiergate_engine.model import EngineConfig

_DEFAULT_RUNNING_SEQS = 256
_DEFAULT_BATCHED_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Overrides:
    """What is said on the command line; None takes the profile's limit.

    ``host_step_s`` is on top of the host time that the profile itself contains.
    """

    model: str | None = None
    kv_tokens: int | None = None
    max_model_tokens: int | None = None
    max_running_seqs: int | None = None
    max_batched_tokens: int | None = None
    max_queued_seqs: int | None = None
    priority_scheduling: bool = False
    prefix_caching: bool = False
    host_step_s: float = 0.0
    seed: int = 0
    noise_sigma: float = 0.0
    keep_alive_s: float = 5.0
    faults: Faults = field(default_factory=Faults)


def settings_of(profile: Profile, overrides: Overrides) -> EmulatedSettings:
    """Settings of an engine with this profile. Raises ValueError naming the option at fault."""
    limits = profile.limits
    kv_tokens = limits.kv_tokens if overrides.kv_tokens is None else overrides.kv_tokens
    if kv_tokens is None:
        raise ValueError(f"profile {profile.name} does not say its KV capacity: give --kv-tokens")
    if overrides.max_model_tokens is None:
        # A profile's model may be longer than what the KV cache of the machine it was taken on holds.
        max_model_tokens = min(limits.max_model_tokens or kv_tokens, kv_tokens)
    else:
        max_model_tokens = overrides.max_model_tokens
    if max_model_tokens > kv_tokens:
        raise ValueError(
            f"--max-model-len {max_model_tokens} does not fit the KV cache of {kv_tokens} tokens: "
            "lower it, or raise --kv-tokens"
        )
    if not 0.0 <= overrides.noise_sigma < math.inf:
        raise ValueError(f"--noise must be a number of at least 0, not {overrides.noise_sigma}")
    if not 0.0 <= overrides.keep_alive_s < math.inf:
        raise ValueError(f"--keep-alive-s must be a number of at least 0, not {overrides.keep_alive_s}")
    if overrides.max_queued_seqs is not None and overrides.max_queued_seqs < 0:
        raise ValueError(f"--max-num-queued-reqs must be at least 0, not {overrides.max_queued_seqs}")
    return EmulatedSettings(
        model=overrides.model or profile.model,
        engine=EngineConfig(
            kv_tokens=kv_tokens,
            max_model_tokens=max_model_tokens,
            max_running_seqs=overrides.max_running_seqs or limits.max_running_seqs or _DEFAULT_RUNNING_SEQS,
            max_batched_tokens=overrides.max_batched_tokens
            or limits.max_batched_tokens
            or _DEFAULT_BATCHED_TOKENS,
            block_tokens=limits.block_tokens,
            priority_scheduling=overrides.priority_scheduling,
            host_step_s=overrides.host_step_s,
            prefix_caching=overrides.prefix_caching,
            max_queued_seqs=overrides.max_queued_seqs,
        ),
        profile=profile.name,
        seed=overrides.seed,
        noise_sigma=overrides.noise_sigma,
        keep_alive_s=overrides.keep_alive_s,
        faults=overrides.faults,
    )
