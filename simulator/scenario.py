"""What one simulated run is, as plain values: they address its stored result.

A `Cell` is one run: a workload at a rate and seed, on a fleet, under a contender. Two cells that are equal give
the same bytes; everything a run depends on, but the code and the profile's numbers, stands in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from workloads.mix import TierShare


class Arrivals(StrEnum):
    """When requests come."""

    # At the cell's rate; lengths are drawn from the trace with replacement, but where prefixes are offered: those
    # keep the trace's order, which decides what is still cached.
    POISSON = "poisson"
    TRACE = "trace"  # as the trace has it, played faster or slower to meet the cell's rate


@dataclass(frozen=True, slots=True)
class Workload:
    """What is offered, but its rate.

    Attributes:
        trace: a shipped trace's name, a path, or `uniform:PROMPT_LOW-PROMPT_HIGH/OUTPUT_LOW-OUTPUT_HIGH` tokens.
        tiers: with shares; a request's TPOT is its tier's.
        ttft_s: TTFT promises, drawn evenly and independently of the tier; empty: the tier's own.
        invert_at: part of the measured requests after which the shares are those of the tiers in reverse order
            (PolyServe's burst test); None: never.
        prefixes: whether the trace's prefix blocks are offered to the engines' caches.
        own_tiers: every request keeps the tier and the promise that its trace has (the gateway's request log);
            shares and `ttft_s` are then for the reader only.
    """

    trace: str
    tiers: tuple[TierShare, ...]
    ttft_s: tuple[float, ...] = ()
    arrivals: Arrivals = Arrivals.POISSON
    invert_at: float | None = None
    prefixes: bool = False
    own_tiers: bool = False


class Form(StrEnum):
    """How a request's two phases share engines."""

    COLOCATED = "co"
    DISAGGREGATED = "pd"  # prefill on some, decode on others, KV sent between them


class FaultKind(StrEnum):
    DOWN = "down"  # loses everything it has; comes back empty
    SLOW = "slow"  # every step takes `factor` times as long


@dataclass(frozen=True, slots=True)
class Fault:
    """Something happens to one backend (its place in the fleet, from 0) for a while."""

    backend: int
    kind: FaultKind
    from_s: float
    for_s: float
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Engines:
    """Some backends of one kind.

    Attributes:
        profile: a shipped latency profile's name, or a path.
        count: how many.
        step_floor_s: the fixed part of a step, in place of the profile's own (docs/simulation.md); None keeps it.
        max_running_seqs: most sequences in one step; vLLM's default on large GPUs.
        kv_tokens: KV capacity; None: the profile's.
    """

    profile: str
    count: int
    step_floor_s: float | None = None
    max_running_seqs: int = 1024
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """The engines and the gateway replicas in front of them.

    Attributes:
        engines: one entry per kind of engine.
        prefill_backends: how many of a disaggregated fleet prefill; None: by the reference model's costs.
        transfer_bytes_per_s: bandwidth for a request's KV between prefill and decode.
        kv_bytes_per_token: size of one token's KV.
        replicas: gateway replicas; requests are dealt to them in turn.
        view_age_s: how old a replica's knowledge of the others' load is.
        startup_s: how long a backend taken from the pool takes until it serves; 0 as in PolyServe.
        prefix_caching: whether engines keep prefixes.
        host_step_s: host time of a step that neither the profile nor the predictor contains.
        host_seq_s: the same per sequence.
    """

    engines: tuple[Engines, ...]
    prefill_backends: int | None = None
    transfer_bytes_per_s: float = 50e9
    kv_bytes_per_token: int = 131_072
    replicas: int = 1
    view_age_s: float = 0.0
    startup_s: float = 0.0
    prefix_caching: bool = False
    host_step_s: float = 0.0
    host_seq_s: float = 0.0
    faults: tuple[Fault, ...] = ()

    @property
    def backends(self) -> int:
        return sum(kind.count for kind in self.engines)


Knob = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy with its knobs, sorted by name (`simulator.contenders` knows both)."""

    name: str
    knobs: tuple[tuple[str, Knob], ...] = ()

    @property
    def label(self) -> str:
        """As a table shows it: `co_chunk(chunk_tokens=512)`."""
        inside = ", ".join(f"{name}={value}" for name, value in self.knobs)
        return f"{self.name}({inside})" if inside else self.name


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. Requests come in three parts: warm-up, measured, cool-down; then the fleet drains.

    The same seed gives the same requests in the same order at every rate and for every contender (common random
    numbers): only the time between them is stretched.
    """

    workload: Workload
    fleet: FleetSpec
    contender: Contender
    rate_rps: float
    seed: int
    warmup_requests: int
    measured_requests: int
    cooldown_requests: int

    @property
    def requests(self) -> int:
        return self.warmup_requests + self.measured_requests + self.cooldown_requests
