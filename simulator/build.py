"""From a fleet's description to its parts: engines with their step times, and gateway replicas that know them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

import profiles
from scheduling import events as ev
from scheduling.backends import Backend, EngineLimits
from scheduling.dispatcher import Dispatcher
from scheduling.tiers import TierSet
from simulator.reference import with_fixed_s
from simulator.scenario import FleetSpec
from simulator.setup import Setup
from simulator.workload import IdleEngine
from tiergate_engine.drive import Rules
from tiergate_engine.model import EngineConfig, EngineModel
from tiergate_engine.step import StepTime

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Kind:
    """One backend's engine. `limits` are those the engine was started with, whoever the contender is."""

    step_time: StepTime
    limits: EngineLimits


def kinds_of(fleet: FleetSpec) -> list[Kind]:
    """The engine of every backend, in order. Raises ProfileError for an unknown profile, ValueError for a fleet
    without engines or a fixed step part below the profile's own."""
    found: list[Kind] = []
    for engines in fleet.engines:
        profile = profiles.load(engines.profile)
        step_time = profile.step_time
        if engines.step_floor_s is not None:
            step_time = with_fixed_s(step_time, engines.step_floor_s)
        limits = EngineLimits(
            max_running_seqs=engines.max_running_seqs,
            max_batched_tokens=profile.limits.max_batched_tokens,
            kv_tokens=engines.kv_tokens or profile.limits.kv_tokens,
            max_model_tokens=profile.limits.max_model_tokens,
            block_tokens=BLOCK_TOKENS,
        )
        found += [Kind(step_time, limits)] * engines.count
    if not found:
        raise ValueError("fleet: it needs at least one backend")
    return found


def idle_ttft(kinds: list[Kind], fleet: FleetSpec) -> Callable[[int, float], float]:
    """The first token of a prompt on the idle engine of the fleet that is best at it: what may be promised
    (`simulator.workload.Achievable`)."""
    host_s = fleet.host_step_s + fleet.host_seq_s
    idle = [
        IdleEngine(kind.step_time, kind.limits.max_batched_tokens or 2048, host_s) for kind in dict.fromkeys(kinds)
    ]
    if len(idle) == 1:
        return idle[0]
    return lambda prompt_tokens, tpot_s: min(one(prompt_tokens, tpot_s) for one in idle)


def shortest_model_tokens(kinds: list[Kind]) -> int | None:
    """The longest request that every engine takes."""
    return min((kind.limits.max_model_tokens for kind in kinds if kind.limits.max_model_tokens), default=None)


def engine_makers(
    names: list[str], kinds: list[Kind], fleet: FleetSpec, setup: Setup
) -> Mapping[str, Callable[[], EngineModel]]:
    """A maker of each backend's engine: called again when it comes back after a crash."""

    drive = setup.drive
    if setup.means is not None:  # it is driven by orders; until they come it is stock
        drive = Rules() if setup.means.orders else None
    elif drive is not None:  # an engine knows its own host time
        drive = replace(drive, host_step_s=fleet.host_step_s, host_seq_s=fleet.host_seq_s)

    def maker(kind: Kind) -> Callable[[], EngineModel]:
        limits = _limits(kind, setup)
        config = EngineConfig(
            kv_tokens=limits.kv_tokens or 1_000_000,
            max_model_tokens=limits.max_model_tokens or 1_000_000,
            max_running_seqs=limits.max_running_seqs or 1024,
            max_batched_tokens=limits.max_batched_tokens or 2048,
            block_tokens=limits.block_tokens,
            host_step_s=fleet.host_step_s,
            host_seq_s=fleet.host_seq_s,
            prefix_caching=fleet.prefix_caching,
            drive=drive,
        )
        return lambda: EngineModel(config, kind.step_time)

    return {name: maker(kind) for name, kind in zip(names, kinds, strict=True)}


def dispatchers(
    names: list[str], kinds: list[Kind], fleet: FleetSpec, setup: Setup, tiers: TierSet, seed: int
) -> list[Dispatcher]:
    """One dispatcher a replica, each told of all backends."""
    made = []
    for replica in range(fleet.replicas):
        dispatcher = Dispatcher(tiers, setup.policy(Random(f"{seed}:policy:{replica}")), setup.options)
        for name, kind in zip(names, kinds, strict=True):
            backend = Backend(
                name,
                kind.step_time,
                limits=_limits(kind, setup),
                margin=setup.margin,
                dynamic_chunk=setup.driven,
            )
            dispatcher.handle(ev.BackendChanged(backend), 0.0)
        made.append(dispatcher)
    return made


def _limits(kind: Kind, setup: Setup) -> EngineLimits:
    limits = kind.limits
    most = limits.max_batched_tokens or math.inf
    budget = setup.chunk_tokens or limits.max_batched_tokens
    return EngineLimits(
        limits.max_running_seqs,
        None if budget is None else int(min(budget, most)),
        limits.kv_tokens,
        limits.max_model_tokens,
        limits.block_tokens,
    )
