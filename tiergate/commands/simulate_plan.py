"""`tiergate simulate plan`: how many backends a recorded day needs, by tier, and what each promise costs."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from rich.console import Console

from profiles.format import ProfileError
from simulator.build import kinds_of
from simulator.campaign.progress import ConsoleProgress
from simulator.campaign.run import CampaignResult, Failure, Pool, Silent
from simulator.campaign.store import Store
from simulator.campaign.workers import default_jobs
from simulator.planning.demand import PlanningError, WrongUse, demand_of
from simulator.planning.plan import make_plan
from simulator.planning.result import LEAST_MEASURED, Asked, CapacityPlan
from simulator.report.canvas import FiguresUnavailable, need_figures
from simulator.scenario import Arrivals, Contender, Engines, FleetSpec
from tiergate.commands import CommandFailed, UsageError
from tiergate.commands.bench import read_mix
from tiergate.simulate.options import MOST, Given, Options
from tiergate.simulate.plan_files import plan_json, write_files
from tiergate.simulate.plan_show import answer
from tiergate.simulate.scenario import contender
from workloads.mix import TierShare, WorkloadError
from workloads.traces import Trace, TraceError, named_trace

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

_COLUMNS = 80
_DEFAULT_PROFILE = "h200-llama-3.1-8b-bf16"
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DESCRIPTION = """\
Plans capacity from a recorded trace: how many backends the day needs, by tier, so that every tier keeps its
promise, what a fleet of fixed size and silos would take, and what each promise costs. Everything is simulated.
Exit code 0: there is a fleet for every window; 1: no fleet keeps a promise, or a run failed; 2: wrong usage.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `plan` and its options."""
    parser = subparsers.add_parser(
        "plan",
        help="how many backends a recorded day needs, by tier, and what each promise costs",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(func=run)
    parser.add_argument(
        "--trace",
        required=True,
        help="a file (Azure, BurstGPT, Mooncake, Qwen-Bailian, our CSV, the gateway's request log), or a shipped "
        "trace's name",
    )
    parser.add_argument(
        "--tiers",
        help="a YAML file (a list `tiers`, as in the gateway's configuration, with share), or \"name=share:"
        'ttft_ms/tpot_ms,..."; default: the tiers and promises of a request log',
    )
    parser.add_argument("--model", help="of a request log with several: plan for this one")
    parser.add_argument("--profile", metavar="NAME", help=f"default: {_DEFAULT_PROFILE}")
    parser.add_argument("--target", default="0.99", help="attainment of every tier; default: %(default)s")
    parser.add_argument("--policy", default="polyserve_co", metavar="NAME[:KNOB=VALUE,...]")
    parser.add_argument(
        "--window",
        help="such as 15m or 1h; default: by the trace, at most 24 windows; "
        "at least five times as long as a request stays",
    )
    parser.add_argument("--rate-factor", default="1", metavar="X", help="X times the recorded requests")
    parser.add_argument(
        "--arrivals",
        choices=[each.value for each in Arrivals],
        default=Arrivals.POISSON.value,
        help="inside a window: poisson, or trace for the recorded bursts",
    )
    parser.add_argument("--startup-s", default="0", metavar="S", help="until a backend from the pool serves")
    parser.add_argument("--price-per-hour", metavar="MONEY", help="of one backend")
    parser.add_argument("--seeds", default="3", metavar="N")
    parser.add_argument(
        "--requests",
        default=str(LEAST_MEASURED),
        metavar="N",
        help="measured in a run at least; default: %(default)s",
    )
    parser.add_argument("--quick", action="store_true", help="the day only: neither silos nor costs of promises")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes; default: one for each core")
    parser.add_argument("--store", type=Path, metavar="DIR", help="keep runs here; the same ones never run twice")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write plan.html and plan.json, keep runs there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Plan and show. Raises UsageError and CommandFailed."""
    began_s = perf_counter()
    console = Console(width=None if sys.stdout.isatty() else _COLUMNS)
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs: must be at least 1, not {args.jobs}")
    price = None if args.price_per_hour is None else _number(args.price_per_hour, "--price-per-hour")
    try:
        if args.out is not None:
            need_figures()
            args.out.mkdir(parents=True, exist_ok=True)
        asked = _asked(args)
        plan = _plan(asked, args)
        if args.json:
            sys.stdout.buffer.write(plan_json(plan, price))
        else:
            console.print(answer(plan, price), highlight=False)
        if args.out is not None:
            page, *_ = write_files(plan, price, args.out, _rerun(args))
            print(f"wrote {page} and {args.out / 'plan.html'}", file=sys.stderr)
    except WrongUse as error:
        raise UsageError(str(error)) from error
    except PlanningError as error:
        raise CommandFailed(str(error)) from error
    except FiguresUnavailable as error:
        raise CommandFailed(f"--out: {error}") from error
    except OSError as error:
        raise CommandFailed(str(error)) from error
    print(
        f"took {perf_counter() - began_s:.0f} s: {plan.cells} runs, {plan.requests:,} requests simulated",
        file=sys.stderr,
    )
    return 0 if plan.reached else 1


def _asked(args: argparse.Namespace) -> Asked:
    target = _number(args.target, "--target")
    if not 0.5 <= target < 1:
        raise UsageError(f"--target: is a part of the requests, from 0.5 to below 1, not {args.target}")
    seeds = _number(args.seeds, "--seeds")
    if seeds != int(seeds) or not 1 <= seeds <= 100:
        raise UsageError(f"--seeds: must be a whole number from 1 to 100, not {args.seeds}")
    measured = _number(args.requests, "--requests")
    if measured != int(measured):
        raise UsageError(f"--requests: must be a whole number, not {args.requests}")
    startup_s = _number(args.startup_s, "--startup-s", zero=True)
    fleet = FleetSpec((Engines(args.profile or _DEFAULT_PROFILE, 1),), startup_s=startup_s)
    try:
        kinds_of(fleet)
    except ProfileError as error:
        raise UsageError(f"--profile: {error}") from None
    policy: Contender = contender(args.policy, Options({"policy": Given((args.policy,), "--policy")}, {}))
    demand = demand_of(_trace(args), _tiers(args), fleet)
    return Asked(
        demand,
        fleet,
        policy,
        target,
        tuple(range(1, int(seeds) + 1)),
        None if args.window is None else _seconds(args.window),
        _number(args.rate_factor, "--rate-factor"),
        Arrivals(args.arrivals),
        measured=int(measured),
        silos=not args.quick,
        costs=not args.quick,
        default_profile=args.profile is None,
    )


def _trace(args: argparse.Namespace) -> Trace:
    """The trace, of one model. Raises UsageError."""
    try:
        trace = named_trace(args.trace)
    except TraceError as error:
        raise UsageError(f"--trace: {error}") from None
    models = Counter(row.model for row in trace.requests if row.model is not None)
    if args.model is None:
        if len(models) > 1:
            told = ", ".join(f"{name} ({count:,} requests)" for name, count in models.most_common())
            raise UsageError(f"--model: {args.trace} has several models, and a plan is for one: {told}")
        return trace
    if args.model not in models:
        known = ", ".join(models) or "none: only the gateway's request log does"
        raise UsageError(f"--model: {args.trace} has no requests for {args.model!r}; it has {known}")
    rows = tuple(row for row in trace.requests if row.model == args.model)
    start_s = rows[0].arrival_s
    # How many of these were guessed is not told row by row; in proportion is near enough for a note.
    guessed = round(trace.guessed * len(rows) / len(trace.requests))
    moved = tuple(replace(row, arrival_s=row.arrival_s - start_s) for row in rows)
    return replace(trace, requests=moved, guessed=guessed)


def _tiers(args: argparse.Namespace) -> tuple[TierShare, ...] | None:
    if args.tiers is None:
        return None
    if "=" not in args.tiers and args.tiers.endswith((".yaml", ".yml")) and not Path(args.tiers).is_file():
        raise UsageError(f"--tiers: there is no file {args.tiers}")
    try:
        return read_mix(args.tiers).shares
    except (WorkloadError, ValueError) as error:
        text = str(error).removeprefix("tiers: ")
        raise UsageError(f"--tiers: {text}") from None


def _number(text: str, where: str, *, zero: bool = False) -> float:
    """A finite number above zero, or zero where that is allowed. Raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{where}: must be a number, not {text!r}") from None
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise UsageError(f"{where}: must be {'at least' if zero else 'above'} 0, not {text}")
    if value > MOST:
        raise UsageError(f"{where}: must be at most {MOST:g}, not {text}")
    return value


def _seconds(text: str) -> float:
    """`15m`, `90`, `1.5h`. Raises UsageError."""
    match = _SPAN.fullmatch(text.strip())
    seconds = float(match.group(1)) * _SECONDS[match.group(2) or "s"] if match else 0.0
    if seconds < 1:
        raise UsageError(f"--window: must be a time of at least a second, such as 15m or 1h, not {text!r}")
    return seconds


class _Bar(ConsoleProgress):
    """A bar; why runs failed is said once, at the end."""

    def failed(self, failure: Failure) -> None:
        pass


def _plan(asked: Asked, args: argparse.Namespace) -> CapacityPlan:
    """Raises CommandFailed when a run failed."""
    console = Console(stderr=True)
    place = args.store or (None if args.out is None else args.out / "runs")
    with (
        nullcontext(place) if place else tempfile.TemporaryDirectory() as folder,
        nullcontext(Silent()) if args.quiet else _Bar(console) as progress,
    ):
        store, pool = Store(Path(folder)), Pool(jobs=args.jobs or default_jobs())
        store.prepare()
        plan, result = make_plan(asked, store, pool, progress)
    if plan is None:
        raise CommandFailed(_why(result))
    return plan


def _why(result: CampaignResult) -> str:
    first = result.failures[0]
    lines = first.error.strip().splitlines()
    why = lines[-1] if lines else "no reason is known"
    return (
        f"{len(result.failures)} runs failed; {first.cell.contender.label} with {first.cell.fleet.backends} "
        f"backends at {first.cell.rate_rps:.4g} requests/s, seed {first.cell.seed}: {why}"
    )


_RERUN = (
    "trace", "tiers", "model", "profile", "target", "policy", "window", "rate_factor", "arrivals", "startup_s",
    "price_per_hour", "seeds", "requests",
)  # fmt: skip


def _rerun(args: argparse.Namespace) -> str:
    """The command line that makes the same plan."""
    words = ["tiergate", "simulate", "plan"]
    for name in _RERUN:
        value: str | None = getattr(args, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", value]
    return shlex.join([*words, *(["--quick"] if args.quick else []), "--out", str(args.out)])
