"""What a demo serves, on what, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoTier:
    """A tier of the demo and its share of the requests."""

    name: str
    ttft_ms: float
    tpot_ms: float
    share: float


@dataclass(frozen=True, slots=True)
class Load:
    """The load of one run, in the words of `tiergate bench`.

    Attributes:
        source: arguments that name the trace or process and its lengths; `{from_s}` is replaced by `slice_s`
            times the seed's number, so that every seed plays another slice.
        rate_factor: how many times as fast the trace is played.
        slice_s: distance between the slices in the trace, in its own time.
        lengths: how the engine is told an answer's length (`tiergate bench --lengths`).
    """

    source: tuple[str, ...]
    rate_factor: float
    slice_s: float
    lengths: str
    warmup_s: float
    measured_s: float
    cooldown_s: float


@dataclass(frozen=True, slots=True)
class Size:
    """A demo.

    Attributes:
        engine: "emulated" or "vllm".
        profile: shipped latency profile of the emulated engines; None where one is measured first.
        backends: engines in one fleet.
        chunk_tokens: token budget of a step (`--max-num-batched-tokens`).
        seeds: one run each; `side_by_side` of them at a time, each with a fleet of its own.
    """

    engine: str
    profile: str | None
    backends: int
    chunk_tokens: int
    tiers: tuple[DemoTier, ...]
    load: Load
    seeds: tuple[int, ...]
    side_by_side: int

    @property
    def mix(self) -> str:
        """The tier mix, as `tiergate bench --tiers` reads it."""
        return ",".join(f"{tier.name}={tier.share:g}:{tier.ttft_ms:g}/{tier.tpot_ms:g}" for tier in self.tiers)


POLICIES = ("polyserve", "round_robin", "least_load")

EMULATED = Size(
    engine="emulated",
    profile="rtxpro6000-qwen3-32b-bf16",
    backends=4,
    chunk_tokens=512,
    # The step floor of this profile is about 49 ms: the paper's mix of tiers at paces where they matter.
    tiers=(
        DemoTier("voice", 1_500, 75, 0.1),
        DemoTier("chat", 2_000, 100, 0.2),
        DemoTier("summary", 3_000, 150, 0.3),
        DemoTier("batch", 5_000, 300, 0.4),
    ),
    # Answers are cut so that three fleets side by side stay below 4,000 tokens/s on two cores.
    load=Load(
        source=(
            *("--trace", "azure2023_conv", "--from", "{from_s}"),
            *("--max-prompt-tokens", "4000", "--max-output-tokens", "150"),
        ),
        rate_factor=1.7,
        slice_s=600.0,
        lengths="emulated",
        warmup_s=10.0,
        measured_s=32.0,
        cooldown_s=8.0,
    ),
    seeds=(1, 2, 3),
    side_by_side=3,
)

REAL = Size(
    engine="vllm",
    profile=None,
    backends=2,
    chunk_tokens=1024,
    tiers=(DemoTier("voice", 800, 30, 0.2), DemoTier("chat", 1_500, 60, 0.4), DemoTier("batch", 4_000, 200, 0.4)),
    load=Load(
        source=(
            *("--trace", "azure2023_conv", "--from", "{from_s}"),
            *("--max-prompt-tokens", "1500", "--max-output-tokens", "80", "--token-ids", "500"),
            *("--route", "completions"),
        ),
        rate_factor=1.0,
        slice_s=600.0,
        lengths="exact",
        warmup_s=8.0,
        measured_s=30.0,
        cooldown_s=4.0,
    ),
    seeds=(1,),
    side_by_side=1,
)
