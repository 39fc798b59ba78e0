"""`tiergate replay`: a recorded engine log through the engine model, and how far apart the two are."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from profiles.catalogue import load
from profiles.format import Profile, ProfileError, build
from simulator.fit_log import fit_step_time
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
from tiergate_engine.contract import EngineConfig
from tiergate_engine.step import StepTime

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

DEFAULT_LOG = "vllm-rtxpro6000-llama-3.1-8b"


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "replay",
        help="run a recorded engine log through the engine model and print the error",
        description="Replays a real engine's log through the engine model on a virtual clock. Host time, which a "
        "kernel profile does not contain, is fitted on the log's first requests (with --fit-profile all of the "
        "step time is); the error is printed for those and, what counts, for the others.",
    )
    parser.add_argument(
        "log",
        nargs="?",
        default=DEFAULT_LOG,
        help=f"a log's name ({', '.join(shipped_logs())}) or the path of its JSON file; default %(default)s",
    )
    parser.add_argument("--profile", help="latency profile, by name or path; default: the one the log names")
    parser.add_argument(
        "--fit-profile",
        action="store_true",
        help="fit the step time to the log alone, in place of a profile; for logs of machines without one",
    )
    parser.add_argument(
        "--fit-requests",
        type=int,
        metavar="N",
        help="fit on the first N requests and judge on the rest; default: half of them",
    )
    parser.add_argument("--fit-last", action="store_true", help="fit on the last requests and judge on the first")
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
        profile = _profile(log, args)
    except (ReplayError, ProfileError) as error:
        raise CommandFailed(str(error)) from error
    count = len(log.requests)
    fitted = count // 2 if args.fit_requests is None else args.fit_requests
    if not 0 < fitted < count:
        raise UsageError(f"--fit-requests must lie between 1 and {count - 1} for this log, not {fitted}")
    parts = [slice(0, fitted), slice(fitted, count)]
    if args.fit_last:
        parts = [slice(count - fitted, count), slice(0, count - fitted)]
    try:
        config, step_time, about = _fitted(log, profile, HostTime(args.host_time), parts[0])
        replayed = replay(log.requests, config, step_time, log.engines)
    except ReplayError as error:
        raise CommandFailed(str(error)) from error
    print(_head(log))
    print(about)
    print(
        f"{replayed.steps} steps, {replayed.preemptions} preemptions, "
        f"{replayed.makespan_s:.1f} s of engine time (log: {max(r.last_token_s for r in log.requests):.1f} s)"
    )
    for title, part in (("fitted on", parts[0]), ("judged on", parts[1]), ("all", slice(0, count))):
        print(f"\n{title}, requests {part.start + 1}-{part.stop}:\n" + _table(compare(log, replayed, part)))
    return 0


def _profile(log: EngineLog, args: argparse.Namespace) -> Profile | None:
    """The profile to replay with; None to fit one."""
    if args.fit_profile:
        if args.profile:
            raise UsageError("--fit-profile and --profile exclude each other")
        return None
    name = args.profile or log.profile
    if name is None:
        raise UsageError(
            f"no profile of {log.model} on {log.hardware} exists: "
            "fit one with --fit-profile or name one with --profile"
        )
    return load(name)


def _fitted(
    log: EngineLog, profile: Profile | None, host_time: HostTime, part: slice
) -> tuple[EngineConfig, StepTime, str]:
    """What was fitted on `part` of the log, and a sentence about it."""
    where = f"fitted on requests {part.start + 1}-{part.stop}"
    if profile is None:
        step_time = fit_step_time(log, part).step_time
        about = (
            f"step time fitted from the log ({where}), no profile: {step_time.weights_s * 1e3:.2f} ms fixed, "
            f"{step_time.per_token_s * 1e6:.1f} us a token, {step_time.per_seq_s * 1e6:.1f} us a decode, "
            f"{step_time.per_kv_s * 1e9:.1f} ns a KV token, sharpness {step_time.sharpness:g}"
        )
        return log.config, step_time, about
    kernels = kernel_time(profile)
    config = fit_host_time(log, kernels, host_time, part)
    about = (
        f"profile {profile.name}, {profile.file.provenance.origin}, {profile.file.provenance.licence}\n"
        f"host time, {where}: "
        f"{config.host_step_s * 1e3:.3f} ms a step, {config.host_seq_s * 1e6:.1f} us a sequence"
    )
    return config, kernels, about


def kernel_time(profile: Profile) -> StepTime:
    """A profile's step time without its host time, which the replay fits itself."""
    coefficients = profile.file.coefficients.model_copy(update={"host_step_s": 0.0, "host_seq_s": 0.0})
    return build(profile.file.model_copy(update={"coefficients": coefficients}), profile.name)


def _head(log: EngineLog) -> str:
    engines = f", {log.engines} engines in step" if log.engines > 1 else ""
    return (
        f"log {log.name}: {log.model} on {log.hardware}, {log.engine}{engines}, {len(log.requests)} requests\n"
        f"  from {log.origin}, {log.licence}"
    )


def _table(fidelity: Fidelity) -> str:
    lines = [f"{'':8}{'log ms':>12}{'model ms':>12}{'error':>9}"]
    for title, rows in (("TTFT", fidelity.ttft), ("TPOT", fidelity.tpot)):
        lines += [_row(title, row) for row in rows]
    lines.append(f"TPOT by request: mean error {fidelity.tpot_request_error:.1%}")
    return "\n".join(lines)


def _row(title: str, row: Comparison) -> str:
    return f"{title} {row.name:<4}{row.logged_s * 1e3:>11.1f}{row.replayed_s * 1e3:>12.1f}{row.error:>+9.1%}"
