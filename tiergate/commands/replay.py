"""`tiergate replay`: a recorded engine log through the engine model, and how far apart the two are."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from profiles.catalogue import load
from profiles.format import Profile, ProfileError, build
from simulator.replay import (
    Comparison,
    EngineLog,
    Fidelity,
    HostTime,
    ReplayError,
    compare,
    fit_host_time,
    load_log,
    replay,
    shipped_logs,
)
from tiergate.commands import CommandFailed, UsageError
from tiergate_engine.step import StepTime

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

DEFAULT_LOG = "vllm-rtxpro6000-llama-3.1-8b"


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "replay",
        help="run a recorded engine log through the engine model and print the error",
        description="Replays a real engine's log through the engine model on a virtual clock. Host time, which a "
        "kernel profile does not contain, is fitted on the log's first requests; the error is printed for those "
        "and, what counts, for the others.",
    )
    parser.add_argument(
        "log",
        nargs="?",
        default=DEFAULT_LOG,
        help=f"a log's name ({', '.join(shipped_logs())}) or the path of its JSON file; default %(default)s",
    )
    parser.add_argument("--profile", help="latency profile, by name or path; default: the one the log names")
    parser.add_argument(
        "--fit-requests",
        type=int,
        metavar="N",
        help="fit host time on the first N requests and judge on the rest; default: half of them",
    )
    parser.add_argument(
        "--host-time",
        choices=[kind.value for kind in HostTime],
        default=HostTime.STEP.value,
        help="what the fitted host time is proportional to; default %(default)s",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    try:
        log = load_log(args.log)
        profile = load(args.profile or log.profile)
    except (ReplayError, ProfileError) as error:
        raise CommandFailed(str(error)) from error
    count = len(log.requests)
    fitted = count // 2 if args.fit_requests is None else args.fit_requests
    if not 0 < fitted < count:
        raise UsageError(f"--fit-requests must lie between 1 and {count - 1} for this log, not {fitted}")
    step_time = kernel_time(profile)
    try:
        config = fit_host_time(log, step_time, HostTime(args.host_time), slice(0, fitted))
        replayed = replay(log.requests, config, step_time)
    except ReplayError as error:
        raise CommandFailed(str(error)) from error
    print(_head(log, profile))
    print(
        f"host time, fitted on requests 1-{fitted}: {config.host_step_s * 1e3:.3f} ms a step, "
        f"{config.host_seq_s * 1e6:.1f} us a sequence"
    )
    print(
        f"{replayed.steps} steps, {replayed.preemptions} preemptions, "
        f"{replayed.makespan_s:.1f} s of engine time (log: {max(r.last_token_s for r in log.requests):.1f} s)"
    )
    print(f"\nfitted on, requests 1-{fitted}:\n" + _table(compare(log, replayed, slice(0, fitted))))
    print(f"\njudged on, requests {fitted + 1}-{count}:\n" + _table(compare(log, replayed, slice(fitted, count))))
    return 0


def kernel_time(profile: Profile) -> StepTime:
    """A profile's step time without its host time, which the replay fits itself."""
    coefficients = profile.file.coefficients.model_copy(update={"host_step_s": 0.0, "host_seq_s": 0.0})
    return build(profile.file.model_copy(update={"coefficients": coefficients}), profile.name)


def _head(log: EngineLog, profile: Profile) -> str:
    return (
        f"log {log.name}: {log.model} on {log.hardware}, {log.engine}, {len(log.requests)} requests\n"
        f"  from {log.origin}, {log.licence}\n"
        f"profile {profile.name}, {profile.file.provenance.origin}, {profile.file.provenance.licence}"
    )


def _table(fidelity: Fidelity) -> str:
    lines = [f"{'':8}{'log ms':>12}{'model ms':>12}{'error':>9}"]
    for title, rows in (("TTFT", fidelity.ttft), ("TPOT", fidelity.tpot)):
        lines += [_row(title, row) for row in rows]
    lines.append(f"TPOT by request: mean error {fidelity.tpot_request_error:.1%}")
    return "\n".join(lines)


def _row(title: str, row: Comparison) -> str:
    return f"{title} {row.name:<4}{row.logged_s * 1e3:>11.1f}{row.replayed_s * 1e3:>12.1f}{row.error:>+9.1%}"
