"""`tiergate profile`: measure a live engine and write its latency profile; list and show profiles."""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from adapters.contract import Adapter, Capabilities, UpstreamError
from adapters.registry import KINDS, AdapterOptions, detect, make
from profiles import Limits, Profile, ProfileError, load, shipped
from profiles.format import FitError, Provenance, Regime, dump
from profiles.measure import Measured, MeasureError, Sweep, measure, profile_of
from tiergate.commands import CommandFailed, UsageError
from tiergate.probe_connection import HttpConnection

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

_DESCRIPTION = """\
Measure a live engine: sweeps prompt length, concurrency and context, and prompts arriving among streams; fits the
step-time formula and writes a profile with provenance and its own cross-validated error. The engine must be idle
otherwise, and so should the machine this runs on.

`tiergate profile list` lists the profiles that come with Tiergate; `tiergate profile show NAME` prints one.
"""
_UNKNOWN_MODEL_TOKENS = 4096


def add_parser(subparsers: Subparsers) -> None:
    """Add `profile` and its options."""
    parser = subparsers.add_parser(
        "profile",
        help="measure a live engine and write its latency profile",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(func=run)
    parser.add_argument("action", nargs="?", choices=("list", "show"), help="instead of measuring")
    parser.add_argument("name", nargs="?", metavar="NAME|FILE", help="the profile to show")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--url", help="the engine's base URL, such as http://127.0.0.1:8000")
    what.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="default: %(default)s")
    what.add_argument("--model", help="default: the first model that the engine lists")
    what.add_argument("--api-key", help="sent as a bearer token")
    what.add_argument("--max-seconds", type=float, default=120.0, metavar="S", help="default: %(default)s")
    what.add_argument(
        "--max-seqs", type=int, metavar="N", help="most streams at once; default: 64 or the engine's"
    )
    what.add_argument(
        "--chunk-tokens",
        type=int,
        metavar="N",
        help="the engine's token budget of a step (--max-num-batched-tokens); default: its own, else 2048",
    )
    what.add_argument("--max-model-len", type=int, metavar="N", help="default: the engine's, else 4096")
    what.add_argument("--seed", type=int, default=0, help="of the random prompts")
    out = parser.add_argument_group("what to write")
    out.add_argument("--out", type=Path, metavar="FILE", help="the profile")
    out.add_argument("--profile-name", metavar="NAME", help="default: the file's name")
    out.add_argument("--hardware", default="unknown", help="goes into the profile")


def run(args: argparse.Namespace) -> int:
    """List, show or measure. Raises UsageError and CommandFailed."""
    try:
        if args.action == "list":
            return _list()
        if args.action == "show":
            if args.name is None:
                raise UsageError("`tiergate profile show` needs the name or the file of a profile")
            return _show(load(args.name))
        if args.url is None or args.out is None:
            raise UsageError(
                "measuring needs --url and --out; `tiergate profile list` and `show NAME` need neither"
            )
        return _measure(args)
    except (ProfileError, UpstreamError, MeasureError) as error:
        raise CommandFailed(str(error)) from error


def _list() -> int:
    table = Table(box=None)
    table.add_column("name", no_wrap=True)
    for column in ("hardware", "decode only", "with prefill"):
        table.add_column(column, overflow="fold")
    for name in shipped():
        file = load(name).file
        table.add_row(name, file.hardware, _regime(file.regimes.decode), _regime(file.regimes.mixed))
    console = Console()
    console.print(table)
    console.print("Errors are those of steps held out of the fit; `composed`: of sums of measured kernels.")
    return 0


def _show(profile: Profile) -> int:
    file, console = profile.file, Console()
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("name", file.name)
    table.add_row("model", file.model)
    table.add_row("hardware", file.hardware)
    table.add_row("engine", file.engine)
    for key, value in file.provenance.model_dump().items():
        table.add_row(key, value)
    for key, value in file.limits.model_dump(exclude_none=True).items():
        table.add_row(key, f"{value}")
    table.add_row("decode only", _regime(file.regimes.decode))
    table.add_row("with prefill", _regime(file.regimes.mixed))
    console.print(table)
    steps = Table("step", "predicted", title="what a step takes", title_justify="left")
    step_time = profile.step_time
    for seqs in (1, 8, 32, 64, 128):
        steps.add_row(
            f"decodes of 1,000 tokens: {seqs}", f"{step_time.decode_seconds(seqs, 1000 * seqs) * 1e3:.1f} ms"
        )
    for tokens in (256, 2048):
        alone = step_time.seconds_of(tokens, 1, 0, tokens * tokens / 2, 0, 0)
        beside = step_time.seconds_of(tokens, 1, 0, tokens * tokens / 2, 32, 32_000)
        steps.add_row(f"a prompt of {tokens}", f"{alone * 1e3:.1f} ms")
        steps.add_row(f"a prompt of {tokens} beside 32 decodes", f"{beside * 1e3:.1f} ms")
    console.print(steps)
    return 0


def _regime(regime: Regime) -> str:
    return f"{regime.source} {_percent(regime.error)}"


def _percent(error: FitError | None) -> str:
    if error is None:
        return "(error unknown)"
    return f"p50 {error.p50:.1%} p90 {error.p90:.1%}"


def _measure(args: argparse.Namespace) -> int:
    out: Path = args.out
    name = args.profile_name or out.stem.lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise UsageError(
            f"{name!r} is no profile name (small letters, digits, '.', '_', '-'): give --profile-name"
        )
    if not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}")
    console = Console()
    measured, profile = uvloop.run(_probe(args, name, console))
    out.write_text(dump(profile.file))
    console.print(
        f"{len(measured.observations)} points in {measured.rounds} full rounds and {measured.seconds:.0f} s; "
        f"a TTFT has {measured.overhead_s * 1e3:.1f} ms on top of its steps"
    )
    _show(profile)
    console.print(f"written to {out}")
    return 0


async def _probe(args: argparse.Namespace, name: str, console: Console) -> tuple[Measured, Profile]:
    options = AdapterOptions(api_key=args.api_key)
    try:
        adapter = await detect(args.url, options) if args.kind == "auto" else make(args.kind, args.url, options)
    except ValueError as error:
        raise UsageError(f"--url: {error}") from error
    try:
        found = await adapter.probe()
        model = args.model or next(iter(found.models), None)
        if model is None:
            raise UsageError("the engine lists no model: give --model")
        sweep = _sweep(args, found)
        measured = await _with_bar(adapter, model, args.seed, sweep, console)
    finally:
        await adapter.close()
    limits = Limits(
        kv_tokens=found.kv_tokens,
        max_running_seqs=found.max_running_seqs,
        max_batched_tokens=found.max_batched_tokens or args.chunk_tokens,
        max_model_tokens=found.max_model_tokens,
        block_tokens=found.block_tokens or 16,
    )
    conditions = (
        f"seed {args.seed}, at most {sweep.max_seqs} streams, chunks of at most {sweep.chunk_tokens} tokens"
    )
    if found.emulated:
        conditions = f"EMULATED engine, no hardware was measured; {conditions}"
    provenance = Provenance(
        origin="measured over HTTP by tiergate profile",
        licence="the measurer's own",
        date=datetime.now(UTC).date().isoformat(),
        command=f"tiergate profile --max-seconds {args.max_seconds:g}",
        conditions=conditions,
    )
    engine = " ".join(filter(None, (found.engine, found.version, "(emulated)" if found.emulated else None)))
    profile = profile_of(
        measured,
        name=name,
        model=model,
        hardware=args.hardware,
        engine=engine,
        provenance=provenance,
        limits=limits,
    )
    return measured, profile


def _sweep(args: argparse.Namespace, found: Capabilities) -> Sweep:
    try:
        return Sweep(
            max_seconds=args.max_seconds,
            chunk_tokens=args.chunk_tokens or found.max_batched_tokens or 2048,
            max_model_tokens=min(args.max_model_len or found.max_model_tokens or _UNKNOWN_MODEL_TOKENS, 16_384),
            max_seqs=args.max_seqs or min(found.max_running_seqs or 64, 64),
            kv_tokens=found.kv_tokens,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


async def _with_bar(adapter: Adapter, model: str, seed: int, sweep: Sweep, console: Console) -> Measured:
    bar = Progress(
        TextColumn("measuring"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn(f"of at most about {sweep.max_seconds:g} s"),
        TextColumn("{task.description}"),
        console=console,
        auto_refresh=False,
    )
    with bar:
        task = bar.add_task("warming up", total=1.0)

        def told(share: float, what: str) -> None:
            bar.update(task, completed=min(share, 1.0), description=what)
            bar.refresh()

        return await measure(HttpConnection(adapter, model, seed), sweep, told)
