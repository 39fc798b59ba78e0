"""Mean TTFT and TPOT of closed-loop benchmarks against the engine model with shipped profiles.

    python -m bench.closed_loop [--rows] [--slots-fewer N]

Which rows are used was decided before any error was looked at: one GPU, Llama-3.1-8B, a profile of that GPU and
precision in this repository, and not said to be wrong by whoever collected them (simulator/data/README.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from profiles.catalogue import load
from profiles.format import Profile
from simulator.closed_loop import ClosedLoopCheck, ClosedLoopRow, check, fit_host_seq, load_rows
from tiergate.commands.replay import kernel_time
from tiergate_engine.model import EngineConfig

_WORST = 5


def config_of(profile: Profile, clients: int, slots_fewer: int = 0) -> EngineConfig:
    """The profile's own limits; slots for all clients, or `slots_fewer` less than that."""
    limits = profile.limits
    assert limits.kv_tokens is not None
    assert limits.max_batched_tokens is not None
    assert limits.max_model_tokens is not None
    return EngineConfig(
        kv_tokens=limits.kv_tokens,
        max_model_tokens=limits.max_model_tokens,
        max_running_seqs=clients - slots_fewer,
        max_batched_tokens=limits.max_batched_tokens,
        block_tokens=limits.block_tokens,
    )


def as_shipped(rows: Sequence[ClosedLoopRow], slots_fewer: int = 0) -> list[ClosedLoopCheck]:
    """Each row under its profile as it is."""
    checks = []
    for row in rows:
        profile = load(row.profile)
        checks.append(check(row, config_of(profile, row.clients, slots_fewer), profile.step_time))
    return checks


def host_time_fitted(rows: Sequence[ClosedLoopRow]) -> tuple[float, list[ClosedLoopCheck]]:
    """Host time per sequence (s), fitted on every other row, and the checks of the others. Rows of one profile."""
    profile = load(rows[0].profile)
    kernels = kernel_time(profile)
    config = config_of(profile, max(row.clients for row in rows))
    fitted = fit_host_seq(rows[::2], config, kernels)
    return fitted.host_seq_s, [check(row, fitted, kernels) for row in rows[1::2]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.closed_loop", description=__doc__)
    parser.add_argument("--rows", action="store_true", help="print every row, not only the worst")
    parser.add_argument(
        "--slots-fewer",
        type=int,
        default=0,
        metavar="N",
        help="give the engine N slots fewer than there are clients",
    )
    args = parser.parse_args(argv)
    rows = load_rows()
    for engine, group in groupby(rows, key=lambda row: (row.system, row.engine, row.profile)):
        members = list(group)
        used = [row for row in members if row.excluded is None]
        print(f"\n{engine[0]}, {engine[1]}, profile {engine[2]}: {len(used)} of {len(members)} rows used")
        if not used:
            print(f"  left out: {members[0].excluded}")
            continue
        checks = as_shipped(used, args.slots_fewer)
        _summarise("profile as shipped", checks)
        if load(engine[2]).file.coefficients.host_seq_s > 0.0 and not args.slots_fewer:
            host_s, judged = host_time_fitted(used)
            _summarise(f"host {host_s * 1e6:.1f} us a sequence, fitted on odd rows, judged on even", judged)
        worst = sorted(checks, key=lambda item: -abs(item.tpot_error))
        print("  all rows:" if args.rows else f"  worst {_WORST} by TPOT:")
        for item in checks if args.rows else worst[:_WORST]:
            print("  " + _line(item))
    return 0


_ERRORS: tuple[tuple[str, Callable[[ClosedLoopCheck], float]], ...] = (
    ("TPOT", lambda item: item.tpot_error),
    ("request", lambda item: item.request_error),
    ("TTFT", lambda item: item.ttft_error),
)


def _summarise(title: str, checks: Sequence[ClosedLoopCheck]) -> None:
    print(f"  {title} ({len(checks)} rows)")
    for name, of in _ERRORS:
        errors = np.array([of(item) for item in checks])
        size = np.abs(errors)
        print(
            f"    {name:<8} MAPE {size.mean():>6.1%}   bias {errors.mean():>+7.1%}   "
            f"p90 {np.percentile(size, 90):>6.1%}   worst {size.max():>6.1%}"
        )


def _line(item: ClosedLoopCheck) -> str:
    row, model = item.row, item.model
    return (
        f"{row.prompt_tokens:>6}/{row.output_tokens:<5} x {row.clients:<4} "
        f"TPOT {row.tpot_s * 1e3:6.2f} -> {model.tpot_s * 1e3:6.2f} ms {item.tpot_error:>+7.1%}   "
        f"TTFT {row.ttft_s * 1e3:7.0f} -> {model.ttft_s * 1e3:5.0f} ms {item.ttft_error:>+7.1%} "
        f"(first wave {model.first_ttft_s * 1e3:.0f})"
    )


if __name__ == "__main__":
    raise SystemExit(main())
