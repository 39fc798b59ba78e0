"""What tiers can win by being apart, before any policy: `python -m bench.sim_reference`.

For every engine and trace: the fixed part t0 of a step, the batch and the cost of each tier on engines of its own,
the rate of a perfectly packed fleet, the rate of one mixed pool at the tightest pace, and the quotient of the two.
Numbers of the reference model (`simulator.reference`), not of a simulation. The tiers are PolyServe's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from profiles.catalogue import load
from scheduling.backends import EngineLimits
from simulator.reference import Lengths, Reference, TierNeed, fixed_s, reference, with_fixed_s
from simulator.scenario import Form
from workloads.traces import named_trace

H200 = "h200-llama-3.1-8b-bf16"
QWEN = "rtxpro6000-qwen3-32b-bf16"
PACES_S = (0.020, 0.030, 0.050, 0.100)
SHARES = (0.1, 0.2, 0.3, 0.4)
TRACES = (
    "azure2023_conv",
    "azure2023_code",
    "mooncake_conversation",
    "servegen_deepseekr1",
    "sharegpt_llama31_8b",
    "uniform:64-4096/16-1024",
)
FIXED_MS: tuple[float | None, ...] = (None, 5.0, 8.0, 12.0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--profile", action="append", help="a shipped profile or a path (default: H200 and Qwen3)")
    parser.add_argument("--trace", action="append", help="a trace by name (default: the published table's)")
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--form", choices=[form.value for form in Form], default=Form.COLOCATED.value)
    chosen = parser.parse_args(arguments)
    form = Form(chosen.form)
    print(
        f"{'profile':<28}{'t0 ms':>7}  {'trace':<24}{'batches':>20}{'cost ms':>30}"
        f"{'req/s':>9}{'pool':>9}{'gain':>7}{'closed':>8}{'prefill':>9}"
    )
    for name in chosen.profile or (H200, QWEN):
        profile = load(name)
        found = profile.limits
        limits = EngineLimits(
            found.max_running_seqs, found.max_batched_tokens, found.kv_tokens, found.max_model_tokens
        )
        own_s = fixed_s(profile.step_time)
        # A slower engine keeps slower paces: the tightest tier is one that its first sequence can meet.
        factor = 1.0 if profile.step_time.decode_seconds(1, 2048) < PACES_S[0] / 1.5 else 5.0
        for fixed_ms in FIXED_MS if factor == 1.0 else (None,):
            wanted_s = own_s if fixed_ms is None else fixed_ms / 1e3
            step_time = with_fixed_s(profile.step_time, wanted_s)
            for trace in chosen.trace or TRACES:
                needs = _needs(trace, factor, found.kv_tokens)
                _row(name, wanted_s, trace, reference(step_time, limits, needs, form), chosen.instances)
        if factor != 1.0:
            print(f"  {name}: paces times {factor:g}, since one sequence alone misses {PACES_S[0] * 1e3:g} ms")


def _needs(trace: str, factor: float, kv_tokens: int | None) -> list[TierNeed]:
    most = kv_tokens or 10**9
    rows = [(row.prompt_tokens, 0, row.output_tokens) for row in named_trace(trace).requests]
    lengths = Lengths.of(row for row in rows if sum(row) <= most)
    return [
        TierNeed(f"{pace_s * factor * 1e3:g} ms", share, pace_s * factor, lengths)
        for pace_s, share in zip(PACES_S, SHARES, strict=True)
    ]


def closed_form_gain(own_s: float, paces_s: Sequence[float], shares: Sequence[float]) -> float:
    """The gain where a step takes t0 plus something for every token: cost goes as TPOT / (TPOT - t0)."""
    costs = [pace_s / (pace_s - own_s) for pace_s in paces_s]
    return max(costs) * sum(shares) / sum(share * cost for share, cost in zip(shares, costs, strict=True))


def _row(name: str, own_s: float, trace: str, found: Reference, instances: int) -> None:
    batches = "/".join(str(tier.batch) for tier in found.tiers)
    costs = "/".join(f"{tier.cost_s * 1e3:.4g}" for tier in found.tiers)
    paces_s = [tier.tpot_s for tier in found.tiers]
    closed = closed_form_gain(own_s, paces_s, [tier.share for tier in found.tiers]) if min(paces_s) > own_s else 0
    print(
        f"{name:<28}{own_s * 1e3:>7.2f}  {trace:<24}{batches:>20}{costs:>30}"
        f"{found.optimal_rate(instances):>9.1f}{found.pool_rate(instances):>9.1f}"
        f"{found.separation_gain:>7.3f}{closed:>8.3f}{found.prefill_share:>9.2f}"
    )


if __name__ == "__main__":
    main()
