"""Makes the profiles in profiles/shipped from public measurements, and prints their errors.

    python -m bench.make_profiles --data FOLDER

FOLDER holds the extracted tables (docs/profiles.md says where each comes from). Deterministic: the same data
give the same files.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from profiles.fit import Observation, cross_validate, fit
from profiles.format import (
    Coefficients,
    FitError,
    Limits,
    ProfileFile,
    Provenance,
    Regime,
    Regimes,
    Source,
    dump,
)
from profiles.tables import FittedTables, KernelRow, fit_tables
from tiergate_engine.step import Step, StepTime

LLAMA = "meta-llama/Llama-3.1-8B"
QWEN = "Qwen/Qwen3-32B"
DATE = "2024-2026, as published upstream"
COMMAND = "python -m bench.make_profiles"

LSS_ORIGIN = "casys-kaist/LLMServingSim @ 5daddb21, profiler/perf (vLLM 0.19)"
LSS_CONDITIONS = (
    "BF16, one GPU. Layer kernels timed inside vLLM 0.19, attention of mixed batches measured as such; layers "
    "summed to a step. Host time of 1 ms a step is added: it makes a replay of the vLLM log of the same source "
    "agree (one parameter, chosen on that log)."
)
AIC_ORIGIN = "ai-dynamo/aiconfigurator @ 095f58a5, operator tables"
AIC_CONDITIONS = (
    "One GPU. Kernels timed one by one and added up; elementwise kernels are analytic, and mixed steps are a sum "
    "of prefill and decode that nobody timed. Host time of 0.034 ms per decode is added, as measured for vLLM on "
    "H200; other engines and hosts differ. The error says how well the profile follows the sums, not the engine."
)


@dataclass(frozen=True, slots=True)
class Kernels:
    """One profile made of kernel tables."""

    name: str
    model: str
    hardware: str
    engine: str
    origin: str
    licence: str
    conditions: str
    limits: Limits
    mixed: Source
    host_step_s: float
    host_seq_s: float
    rows: Callable[[Path], Iterator[KernelRow]]


def _csv(path: Path) -> Iterator[dict[str, str]]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    yield from csv.DictReader(text.splitlines())


def _row(raw: dict[str, str]) -> KernelRow:
    return KernelRow(
        int(float(raw["prefill_tokens"])),
        int(float(raw["prefill_ctx"])),
        int(float(raw["n_decode"])),
        int(float(raw["kv_per_decode"])),
        float(raw["linear_ms"]) / 1e3,
        float(raw["attn_ms"]) / 1e3,
        float(raw["iter_ms"]) / 1e3,
    )


def _lss(file: str) -> Callable[[Path], Iterator[KernelRow]]:
    return lambda data: map(_row, _csv(data / f"lss_{file}_bf16_tp1_iter.csv.gz"))


def _aic(system: str, dtype: str) -> Callable[[Path], Iterator[KernelRow]]:
    def read(data: Path) -> Iterator[KernelRow]:
        for raw in _csv(data / "aic_llama31_8b_iter.csv.gz"):
            if raw["system"] == system and raw["dtype"] == dtype:
                yield _row(raw)

    return read


def _lss_profile(name: str, model: str, hardware: str, file: str, limits: Limits) -> Kernels:
    return Kernels(
        name, model, hardware, "vLLM 0.19", LSS_ORIGIN, "MIT", LSS_CONDITIONS, limits, Source.COMPOSED, 1e-3, 0.0,
        _lss(file),
    )  # fmt: skip


def _aic_profile(hardware: str, system: str, version: str, kv_tokens: int, fp8: bool) -> Kernels:
    short = hardware.split(maxsplit=1)[0].lower()
    return Kernels(
        f"{short}-llama-3.1-8b-{'fp8' if fp8 else 'bf16'}", LLAMA, hardware, f"vLLM {version} kernels", AIC_ORIGIN,
        "Apache-2.0", ("FP8 weights, BF16 KV. " if fp8 else "BF16. ") + AIC_CONDITIONS,
        Limits(kv_tokens=kv_tokens, max_running_seqs=256, max_batched_tokens=8192, max_model_tokens=131072),
        Source.COMPOSED, 0.0, 3.4e-5, _aic(system, "fp8" if fp8 else "bfloat16"),
    )  # fmt: skip


KERNELS: Sequence[Kernels] = (
    _lss_profile(
        "rtxpro6000-llama-3.1-8b-bf16", LLAMA, "NVIDIA RTX PRO 6000 96 GB", "rtxpro6000_llama_31_8b",
        Limits(kv_tokens=540_000, max_running_seqs=128, max_batched_tokens=2048, max_model_tokens=131_072),
    ),
    _lss_profile(
        "rtxpro6000-qwen3-32b-bf16", QWEN, "NVIDIA RTX PRO 6000 96 GB", "rtxpro6000_qwen3_32b",
        Limits(kv_tokens=80_000, max_running_seqs=128, max_batched_tokens=2048, max_model_tokens=40_960),
    ),
    _lss_profile(
        "rtx4090-llama-3.1-8b-bf16", LLAMA, "NVIDIA RTX 4090 24 GB", "rtx4090_llama_31_8b",
        Limits(kv_tokens=41_408, max_running_seqs=256, max_batched_tokens=2048, max_model_tokens=32_768),
    ),
    _aic_profile("A100 SXM 80 GB", "a100_sxm", "0.14", 430_000, fp8=False),
    _aic_profile("H100 SXM 80 GB", "h100_sxm", "0.24", 430_000, fp8=False),
    _aic_profile("H100 SXM 80 GB", "h100_sxm", "0.24", 470_000, fp8=True),
    _aic_profile("H200 SXM 141 GB", "h200_sxm", "0.24", 850_000, fp8=False),
    _aic_profile("L40S 48 GB", "l40s", "0.24", 200_000, fp8=False),
    _aic_profile("B200 SXM 180 GB", "b200_sxm", "0.24", 1_100_000, fp8=False),
)  # fmt: skip


def kernel_profile(spec: Kernels, data: Path) -> ProfileFile:
    """Tables and formula of one kernel-made profile, with cross-validated errors of the tables."""
    kv_limit = spec.limits.kv_tokens
    assert kv_limit is not None
    rows = [
        row
        for row in spec.rows(data)
        if row.seqs * row.kv_per_seq + row.context_tokens + row.chunk_tokens <= kv_limit
    ]
    by_step = {(row.step, row.total_s): row for row in rows}

    def refit(observations: Sequence[Observation]) -> StepTime:
        return fit_tables([by_step[item.step, item.seconds] for item in observations], kv_limit).step_time()

    fitted: FittedTables = fit_tables(rows, kv_limit)
    decode, mixed = cross_validate(refit, [Observation(row.step, row.total_s) for row in rows])
    coefficients = fitted.coefficients.model_copy(
        update={"host_step_s": spec.host_step_s, "host_seq_s": spec.host_seq_s}
    )
    return _file(
        spec.name, spec.model, spec.hardware, spec.engine,
        Provenance(
            origin=spec.origin, licence=spec.licence, date=DATE, command=COMMAND, conditions=spec.conditions
        ),
        spec.limits,
        Regimes(
            decode=Regime(source=Source.COMPOSED, error=decode), mixed=Regime(source=spec.mixed, error=mixed)
        ),
        coefficients,
    ).model_copy(update={"tables": fitted.tables})  # fmt: skip


def dynamo_profile(data: Path) -> ProfileFile:
    """H200 FP8: whole decode steps and idle TTFTs timed in an engine; a formula joins them."""
    prefix = "dynamo_h200_llama31_8b_fp8_vllm"
    decodes = [
        Observation(Step.decode(round(seqs), round(seqs * float(raw["context_len"]))), float(raw["itl_ms"]) / 1e3)
        for raw in _csv(data / f"{prefix}_decode.csv")
        if int(raw["n_decode_from_kv"]) <= 1024
        for seqs in [max(float(raw["n_decode_from_thpt"]), 1.0)]
    ]
    floor_s = min(item.seconds for item in decodes)
    ttfts = [
        Observation(Step.chunk(int(raw["isl"])), float(raw["ttft_ms"]) / 1e3)
        for raw in _csv(data / f"{prefix}_prefill.csv")
    ]
    straight = fit(ttfts).step_time
    # What a TTFT holds beyond a step (HTTP, tokenizing, the wait for the running step) is no part of the step.
    overhead_s = max(straight.linear_seconds(0) - floor_s, 0.0)
    steps = [*decodes, *(replace(item, seconds=item.seconds - overhead_s) for item in ttfts)]
    found = fit(steps)
    return _file(
        "h200-llama-3.1-8b-fp8", "nvidia/Llama-3.1-8B-Instruct-FP8", "H200 SXM 141 GB", "vLLM",
        Provenance(
            origin="ai-dynamo 1.6.1 wheel, planner test data H200_TP1P_TP1D",
            licence="Apache-2.0",
            date=DATE,
            command=COMMAND,
            conditions=f"FP8, one GPU. Token gaps of full batches and TTFTs of an idle engine, measured in vLLM. "
            f"{overhead_s * 1e3:.1f} ms of every TTFT is no step time and left out. Steps that mix decodes and "
            "prefill were not measured: the formula joins them.",
        ),
        Limits(kv_tokens=945_029, max_running_seqs=1024, max_batched_tokens=8192, max_model_tokens=131_072),
        Regimes(
            decode=Regime(source=Source.MEASURED, error=found.decode_error),
            mixed=Regime(source=Source.FORMULA, error=found.mixed_error),
        ),
        Coefficients.of(found.step_time),
    )  # fmt: skip


def _file(
    name: str,
    model: str,
    hardware: str,
    engine: str,
    provenance: Provenance,
    limits: Limits,
    regimes: Regimes,
    coefficients: Coefficients,
) -> ProfileFile:
    rounded = Coefficients(**{key: float(f"{value:.5g}") for key, value in coefficients.model_dump().items()})
    return ProfileFile(
        format=1,
        name=name,
        model=model,
        hardware=hardware,
        engine=engine,
        provenance=provenance,
        limits=limits,
        regimes=regimes,
        coefficients=rounded,
    )


def _percent(error: FitError | None) -> str:
    if error is None:
        return "-"
    return f"{error.mape:.1%} / {error.p50:.1%} / {error.p90:.1%} ({error.observations})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the extracted tables")
    parser.add_argument("--out", type=Path, default=Path("profiles/shipped"))
    parser.add_argument("--only", default="", help="only profiles whose name contains this")
    args = parser.parse_args()
    makers: list[Callable[[], ProfileFile]] = [
        *(lambda spec=spec: kernel_profile(spec, args.data) for spec in KERNELS if args.only in spec.name),
        *([lambda: dynamo_profile(args.data)] if args.only in "h200-llama-3.1-8b-fp8" else []),
    ]
    print("| profile | decode only: source, MAPE / p50 / p90 (steps) | with prefill: the same |")
    print("|---|---|---|")
    for make in makers:
        file = make()
        (args.out / f"{file.name}.json").write_text(dump(file))
        decode, mixed = file.regimes.decode, file.regimes.mixed
        print(
            f"| {file.name} | {decode.source}, {_percent(decode.error)} "
            f"| {mixed.source}, {_percent(mixed.error)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
