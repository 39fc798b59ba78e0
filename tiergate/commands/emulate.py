"""`tiergate emulate`: emulated engines in one process, one port each. No model runs; it says so everywhere."""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from adapters.emulated import EmulatedEngine, EmulatedSettings, Faults, serving
from adapters.emulated.journal import Journal
from adapters.emulated.profiled import Overrides, settings_of
from adapters.emulated.settings import EMULATES_VERSION
from profiles import Profile, ProfileError, load
from tiergate.commands import CommandFailed, UsageError

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

_DEFAULT_PROFILE = "h100-llama-3.1-8b-fp8"  # quick enough for the default tiers of `tiergate serve`

_DESCRIPTION = f"""\
Run EMULATED engines: HTTP servers with the routes, metrics and errors of vLLM {EMULATES_VERSION}, around a model
of an engine's scheduler. No language model runs: step times come from a latency profile, and answers are words
from a list. Every response carries `x-tiergate-emulated: 1`.

A prompt counts one token per whitespace-separated word (and one per chat message); token-id lists count exactly.
Answers are as long as max_tokens with ignore_eos; else a seeded draw capped by max_tokens; or exactly
`vllm_xargs: {{"emulated_output_tokens": N}}`.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `emulate` and its options."""
    parser = subparsers.add_parser(
        "emulate",
        help="run an emulated engine: vLLM's routes, times from a profile, no model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(func=run)
    parser.add_argument(
        "--profile", default=_DEFAULT_PROFILE, metavar="NAME|FILE", help="latency profile (default: %(default)s)"
    )
    parser.add_argument("--model", metavar="NAME", help="served model name (default: the profile's model)")
    where = parser.add_argument_group("where it listens")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    where.add_argument("--port", type=int, metavar="P", help="first port (default: 8000); 0 takes any free port")
    where.add_argument("--count", type=_positive, metavar="N", help="engines on ports P, P+1, ... (default: 1)")
    where.add_argument("--ports", type=_ports, metavar="P,P,...", help="one engine on each of these ports")
    where.add_argument(
        "--keep-alive-s", type=float, default=5.0, metavar="S", help="idle connections (default: 5)"
    )
    where.add_argument("--grace-s", type=float, default=1.0, metavar="S", help="finish open requests (default: 1)")
    limits = parser.add_argument_group("the engine's limits (default: the profile's)")
    limits.add_argument("--max-num-seqs", type=_positive, metavar="N", help="most sequences in a step")
    limits.add_argument("--max-num-batched-tokens", type=_positive, metavar="N", help="most tokens in a step")
    limits.add_argument("--kv-tokens", type=_positive, metavar="N", help="KV cache capacity in tokens")
    limits.add_argument("--max-model-len", type=_positive, metavar="N", help="longest prompt plus answer")
    limits.add_argument("--max-num-queued-reqs", type=int, metavar="N", help="longest queue; more get 503")
    limits.add_argument("--scheduling-policy", choices=("fcfs", "priority"), default="fcfs")
    limits.add_argument("--enable-prefix-caching", action="store_true", help="reuse the KV of equal prefixes")
    parser.add_argument(
        "--journal", type=Path, metavar="FILE", help="append what becomes of every sequence, for tests; one engine"
    )
    times = parser.add_argument_group("times and chance")
    times.add_argument("--host-step-ms", type=float, default=0.0, metavar="MS", help="more host time per step")
    times.add_argument("--noise", type=float, default=0.0, metavar="SIGMA", help="log-normal noise on step times")
    times.add_argument("--seed", type=int, default=0, help="settles lengths, texts and noise (default: 0)")
    faults = parser.add_argument_group("faults on purpose, for tests")
    faults.add_argument("--fail-after-tokens", type=_positive, metavar="N", help="cut every stream after N tokens")
    faults.add_argument("--stall-after-tokens", type=_positive, metavar="N", help="fall silent after N tokens")
    faults.add_argument("--refuse-every", type=_positive, metavar="N", help="refuse every N-th request with 503")
    faults.add_argument(
        "--refuse-in-stream", action="store_true", help="refuse streams with 200 and an error event, as vLLM may"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises UsageError and CommandFailed."""
    ports = _listen_on(args)
    if not 0.0 <= args.grace_s < math.inf:
        raise UsageError(f"--grace-s must be a number of at least 0, not {args.grace_s}")
    try:
        profile = load(args.profile)
        settings = settings_of(profile, _overrides(args))
    except ProfileError as error:
        raise CommandFailed(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        with _journal(args.journal, len(ports)) as journal:
            engines = [
                # Each engine has a seed of its own, so that they do not answer, or jitter, in step.
                EmulatedEngine(replace(settings, seed=settings.seed + index), profile.step_time, journal)
                for index in range(len(ports))
            ]
            uvloop.run(_serve(engines, profile, args.host, ports, args.grace_s))
    except OSError as error:
        raise CommandFailed(str(error)) from error
    return 0


def _journal(path: Path | None, engines: int) -> AbstractContextManager[Journal | None]:
    if path is None:
        return nullcontext()
    if engines > 1:
        raise UsageError("--journal counts for one engine: start each engine by itself")
    return closing(Journal(path))


async def _serve(
    engines: Sequence[EmulatedEngine], profile: Profile, host: str, ports: Sequence[int], grace_s: float
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with serving(engines, host, ports, grace_s) as served:
        for one in served:
            print(_announcement(one.engine.settings, profile, one.url), flush=True)
        await stop.wait()
    for one in served:
        print(_summary(one.engine, one.url), file=sys.stderr)
    lag = engines[0].lag
    if lag is not None:
        p99_ms, worst_ms = lag.lateness.quantile(0.99) * 1e3, lag.worst_s * 1e3
        print(f"event loop late by P99 <= {p99_ms:g} ms, worst {worst_ms:.1f} ms", file=sys.stderr)


def _announcement(settings: EmulatedSettings, profile: Profile, url: str) -> str:
    engine = settings.engine
    return (
        f"EMULATED engine (no model runs) on {url}: {settings.model} with profile {profile.name} "
        f"({profile.file.hardware}), {engine.max_running_seqs} sequences, "
        f"{engine.max_batched_tokens} tokens a step, {engine.kv_tokens} KV tokens, "
        f"context {engine.max_model_tokens}, {'priority' if engine.priority_scheduling else 'fcfs'}"
    )


def _summary(engine: EmulatedEngine, url: str) -> str:
    stats = engine.driver.stats
    late = stats.lateness
    return (
        f"{url} (emulated): {late.count} steps, {stats.generation_tokens} tokens; steps late by "
        f"P50 <= {late.quantile(0.5) * 1e3:g} ms, P99 <= {late.quantile(0.99) * 1e3:g} ms, "
        f"worst {stats.worst_lateness_s * 1e3:.1f} ms; {stats.resyncs} resyncs"
    )


def _listen_on(args: argparse.Namespace) -> list[int]:
    if args.ports is not None:
        if args.port is not None or args.count is not None:
            raise UsageError("--ports says it all: leave --port and --count out")
        ports: list[int] = args.ports
        return ports
    first = 8000 if args.port is None else args.port
    count = args.count or 1
    if not 0 <= first <= 65_536 - count:
        raise UsageError(f"--port {first} with --count {count} is outside 0 to 65535")
    return [first + index if first else 0 for index in range(count)]


def _overrides(args: argparse.Namespace) -> Overrides:
    return Overrides(
        model=args.model,
        kv_tokens=args.kv_tokens,
        max_model_tokens=args.max_model_len,
        max_running_seqs=args.max_num_seqs,
        max_batched_tokens=args.max_num_batched_tokens,
        max_queued_seqs=args.max_num_queued_reqs,
        priority_scheduling=args.scheduling_policy == "priority",
        prefix_caching=args.enable_prefix_caching,
        host_step_s=args.host_step_ms / 1e3,
        seed=args.seed,
        noise_sigma=args.noise,
        keep_alive_s=args.keep_alive_s,
        faults=Faults(
            cut_after_tokens=args.fail_after_tokens,
            stall_after_tokens=args.stall_after_tokens,
            refuse_every=args.refuse_every,
            refuse_in_stream=args.refuse_in_stream,
        ),
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _ports(text: str) -> list[int]:
    try:
        ports = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be port numbers with commas between them, not {text!r}") from None
    if any(not 0 <= port <= 65_535 for port in ports):
        raise argparse.ArgumentTypeError("ports are 0 to 65535")
    return ports
