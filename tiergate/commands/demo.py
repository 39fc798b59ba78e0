"""`tiergate demo`: mixed-tier load on a small fleet, compared with round robin and least load."""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tiergate.commands import UsageError
from tiergate.demo.outcome import RunOutcome
from tiergate.demo.run import run_demo
from tiergate.demo.show import LiveView, comparison
from tiergate.demo.sizes import EMULATED, POLICIES, REAL, Size

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

_INTERRUPTED = 130
_MOST_LOAD = 2.0  # beyond it the machine, and not the policies, would be measured


def add_parser(subparsers: Subparsers) -> None:
    """Add `demo` and its options."""
    parser = subparsers.add_parser(
        "demo",
        help="show mixed-tier load on a small fleet, compared with round robin and least load",
        description="Starts engines and gateways on this machine, plays slices of a real trace through each "
        "policy, and prints the comparison. Nothing is left running.",
    )
    parser.add_argument(
        "--engine",
        choices=("emulated", "vllm"),
        default="emulated",
        help="emulated engines (default), or real vLLM on CPU (from a source checkout: make demo ENGINE=vllm)",
    )
    parser.add_argument("--policies", help=f"comma-separated (default: {','.join(POLICIES)})")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds (default: 3; vllm: 1)")
    parser.add_argument(
        "--load",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="play the trace so many times as fast (default: 1)",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and results there")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Returns 0 when every run finished, 130 when it was interrupted. Raises CommandFailed."""
    size = EMULATED if args.engine == "emulated" else REAL
    if args.seeds is not None:
        if args.seeds < 1:
            raise UsageError(f"--seeds must be at least 1, not {args.seeds}")
        size = replace(size, seeds=tuple(range(1, args.seeds + 1)))
    if not 0 < args.load <= _MOST_LOAD:
        raise UsageError(f"--load must be above 0 and at most {_MOST_LOAD:g}, not {args.load:g}")
    load = replace(size.load, rate_factor=size.load.rate_factor * args.load)
    size = replace(size, load=load)
    policies = POLICIES if args.policies is None else tuple(filter(None, args.policies.split(",")))
    console = Console()
    try:
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
            return _run_in(size, policies, args.keep, console)
        with tempfile.TemporaryDirectory(prefix="tiergate-demo-") as work:
            return _run_in(size, policies, Path(work), console)
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted; everything that was started has been stopped")
        return _INTERRUPTED


def _run_in(size: Size, policies: tuple[str, ...], work: Path, console: Console) -> int:
    console.print(_introduction(size, policies), highlight=False)
    with LiveView(size, console) as view:
        outcomes = asyncio.run(_main(size, policies, work, view))
    console.print(comparison(size, outcomes))
    return 0


async def _main(size: Size, policies: tuple[str, ...], work: Path, view: LiveView) -> list[RunOutcome]:
    """SIGTERM ends the demo as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    if size.engine == "emulated":
        return await run_demo(size, policies, None, work, view)
    # Real engines come from the source checkout, which an installed wheel does not have.
    from tiergate.demo.real import real_engines  # noqa: PLC0415

    async with real_engines(size, work, view.say) as engines:
        return await run_demo(size, policies, engines, work, view)


def _introduction(size: Size, policies: tuple[str, ...]) -> str:
    load = size.load
    minutes = len(policies) * -(-len(size.seeds) // size.side_by_side)
    minutes_text = f"about {minutes * (load.warmup_s + load.measured_s + load.cooldown_s + 12) / 60:.0f} minutes"
    tiers = ", ".join(f"{tier.name} {tier.tpot_ms:g} ms ({tier.share:.0%})" for tier in size.tiers)
    source = " ".join(load.source).replace("{from_s}", f"{load.slice_s:g} x seed")
    return (
        f"{size.backends} {size.engine} engines a fleet, {len(size.seeds)} seeds, policies {', '.join(policies)}; "
        f"{minutes_text}\n"
        f"tiers by time per output token: {tiers}\n"
        f"load: {source} --rate-factor {load.rate_factor:g}"
    )
