"""`tiergate simulate`: a fleet in a box that runs the gateway's own policies, and how they compare."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from simulator.campaign.address import Addresser
from simulator.campaign.progress import ConsoleProgress
from simulator.campaign.run import CampaignResult, Failure, Pool, Silent, run_cells
from simulator.campaign.store import Store
from simulator.campaign.workers import default_jobs
from simulator.report.canvas import FiguresUnavailable
from simulator.report.files import ParquetUnavailable, need_report, results_json, write_report
from simulator.report.summary import compare, profile_notes
from simulator.report.values import Mark, MarkKind, Run, Setting, Study
from simulator.report.verdict import verdicts
from tiergate.commands import CommandFailed, UsageError
from tiergate.simulate.notes import notes
from tiergate.simulate.options import Given, Options, flag, read_file
from tiergate.simulate.scenario import DEFAULT_TTFT_MS, DEFAULTS, OPTIONS, Scenario, ceiling_marks, read
from tiergate.simulate.show import answer, catalogue
from tiergate.simulate.tuning import settle, trials

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

_COLUMNS = 80
_BEFORE = (*OPTIONS, "scenario", "jobs", "store", "list", "out", "json", "quiet")
_PLAN = "tiergate.commands.simulate_plan"
_DESCRIPTION = """\
Runs the gateway's own policies on a simulated fleet: engines are models on a
virtual clock, their step times come from latency profiles. Without options:
PolyServe's tiers on eight H200, three policies, about twenty seconds.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `simulate`, its options and its subcommand."""
    parser = subparsers.add_parser(
        "simulate",
        help="run policies on a simulated fleet and compare them",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(func=run)
    _add_load(parser.add_argument_group("load"))
    _add_fleet(parser.add_argument_group("fleet"))
    _add_run(parser.add_argument_group("run"))
    _add_output(parser.add_argument_group("output"))
    # A subcommand's own --trace and --tiers take the place of these; without one, this parser's `run` is called.
    actions = parser.add_subparsers(dest="action", metavar="plan", title="instead of a scenario", action=_Instead)
    if importlib.util.find_spec(_PLAN) is not None:
        importlib.import_module(_PLAN).add_parser(actions)


class _Instead(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Subcommands that take no option from before their name: it would be dropped in silence."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        given = [
            flag(name) for name, value in vars(namespace).items() if name in _BEFORE and value not in (None, False)
        ]
        if given and values:
            parser.error(
                f"{', '.join(given)} before {values[0]!r} would be dropped: write it after the subcommand"
            )
        super().__call__(parser, namespace, values, option_string)


def _default(name: str) -> str:
    return f"default: {' '.join(DEFAULTS[name])}"


def _add_load(load: argparse._ArgumentGroup) -> None:
    load.add_argument(
        "--trace", help=f"a shipped trace, a file, or uniform:LOW-HIGH/LOW-HIGH tokens; {_default('trace')}"
    )
    load.add_argument(
        "--tiers",
        metavar="MIX",
        help='a YAML file, or "name=share:ttft_ms/tpot_ms,...", - for no promise; default: TPOT 20, 30, 50 and '
        "100 ms for 10, 20, 30 and 40 %%",
    )
    load.add_argument(
        "--ttft-ms",
        action="append",
        metavar="MS,MS",
        help=f"draw every request's TTFT from these; default: {DEFAULT_TTFT_MS} unless --tiers is given",
    )
    load.add_argument("--arrivals", help="poisson, or trace: as the trace has them")
    load.add_argument("--invert-at", metavar="PART", help="reverse the shares after this part of the run")
    load.add_argument("--prefixes", action="store_const", const="true", help="offer prefix blocks to the caches")
    load.add_argument("--rate", action="append", metavar="RPS", help="requests/s; repeat it, or use commas")
    load.add_argument(
        "--sweep", action="append", metavar="PARTS", help=f"rates as parts of the reference; {_default('sweep')}"
    )


def _add_fleet(fleet: argparse._ArgumentGroup) -> None:
    fleet.add_argument(
        "--profile", action="append", metavar="NAME[=COUNT]", help=f"repeat it to mix; {_default('profile')}"
    )
    fleet.add_argument("--backends", metavar="N", help=_default("backends"))
    fleet.add_argument("--t0-ms", metavar="MS", help="the fixed part of a step, in place of the profile's own")
    fleet.add_argument("--prefill-backends", metavar="N", help="of a disaggregated fleet; default: by cost")
    fleet.add_argument("--replicas", metavar="N", help="gateway replicas; default: 1")
    fleet.add_argument("--view-age-ms", metavar="MS", help="age of what replicas know of each other; default: 0")
    fleet.add_argument("--startup-s", metavar="S", help="until a backend from the pool serves; default: 0")
    fleet.add_argument("--host-step-ms", metavar="MS", help="host time of a step; default: 0")
    fleet.add_argument("--host-seq-us", metavar="US", help="host time of a sequence in a step; default: 0")
    fleet.add_argument(
        "--fault",
        action="append",
        metavar="WHAT",
        help="down:backend=3,from=20,for=10 or slow:backend=3,from=20,for=10,factor=2; backends count from 0, "
        "from is in seconds from the start of the run, warm-up included",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--scenario", type=Path, metavar="FILE", help="YAML with these options; flags come first")
    group.add_argument(
        "--policy",
        action="append",
        metavar="NAME[:KNOB=VALUE,...]",
        help=f"repeat it, or use commas; chunk_tokens=best tries 128 to 4096 in short runs; {_default('policy')}",
    )
    group.add_argument("--seeds", metavar="N", help=f"runs with other chance; {_default('seeds')}")
    group.add_argument("--requests", metavar="N", help=f"measured in a run; {_default('requests')}")
    group.add_argument("--warmup", metavar="N", help="requests before them; default: a quarter of them")
    group.add_argument("--cooldown", metavar="N", help="requests after them; default: a quarter of them")
    group.add_argument("--jobs", type=int, metavar="N", help="processes; default: one for each core")
    group.add_argument("--store", type=Path, metavar="DIR", help="keep runs here; those that are there do not run")


def _add_output(output: argparse._ArgumentGroup) -> None:
    output.add_argument("--list", action="store_true", help="show traces, profiles and policies with their knobs")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write report.html, JSON, parquet and figures (needs tiergate[figures,parquet])",
    )
    output.add_argument("--json", action="store_true", help="print JSON instead of tables")
    output.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Run a scenario and show what came of it. Raises UsageError and CommandFailed."""
    # Where nobody looks, rich assumes 80 columns; a person's narrower window wraps the names of policies.
    console = Console(width=None if sys.stdout.isatty() else _COLUMNS)
    if args.list:
        console.print(catalogue())
        return 0
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs: must be at least 1, not {args.jobs}")
    options = _options(args)
    try:
        if args.out is not None:
            need_report()
        scenario = read(options)
        if args.out is not None:
            _need_folder(args.out)
        runs, choices = _run(scenario, args)
    except (FiguresUnavailable, ParquetUnavailable) as error:
        raise CommandFailed(f"--out: {error}") from error
    except OSError as error:
        raise CommandFailed(str(error)) from error
    study = _study(scenario, runs, choices, args)
    if args.json:
        sys.stdout.buffer.write(results_json(study))
    else:
        for comparison in compare(runs):
            console.print(answer(comparison, scenario, study.findings), highlight=False)
    if args.out is not None:
        written = write_report(study, args.out)
        print(f"wrote {written.page} and {len(written.files) - 1} more files", file=sys.stderr)
    return 0


def _need_folder(folder: Path) -> None:
    """Raises CommandFailed where nothing could be written: told before the runs, not after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandFailed(f"--out: {folder}: {error.strerror or error}") from error


def _options(args: argparse.Namespace) -> Options:
    """What was given: flags before the scenario's file."""
    given = {} if args.scenario is None else read_file(args.scenario, OPTIONS)
    for name in OPTIONS:
        value: str | list[str] | None = getattr(args, name)
        if value is not None:
            given[name] = Given((value,) if isinstance(value, str) else tuple(value), flag(name))
    if args.rate and not args.sweep:
        given.pop("sweep", None)  # a flag takes the place of whatever the file says about rates
    if args.sweep and not args.rate:
        given.pop("rate", None)
    return Options(given, DEFAULTS)


class _Bar(ConsoleProgress):
    """A bar; why runs failed is said once, at the end."""

    def failed(self, failure: Failure) -> None:
        pass


def _run(scenario: Scenario, args: argparse.Namespace) -> tuple[tuple[Run, ...], tuple[str, ...]]:
    """All runs, whole: samples are read back from the store. And what was chosen by short runs before them.

    Raises CommandFailed when one of them failed.
    """
    console = Console(stderr=True)
    place = args.store or (None if args.out is None else args.out / "runs")
    with (
        nullcontext(place) if place else tempfile.TemporaryDirectory() as folder,
        nullcontext(Silent()) if args.quiet else _Bar(console) as progress,
    ):
        store, addresser = Store(Path(folder)), Addresser.of_this_code()
        store.prepare()
        pool = Pool(jobs=args.jobs or default_jobs())
        short = trials(scenario.cells)
        tried = _checked(run_cells(short, store, pool, progress=progress, addresser=addresser)) if short else None
        settled = settle(scenario.cells, {} if tried is None else tried.outcomes)
        result = _checked(run_cells(settled.cells, store, pool, progress=progress, addresser=addresser))
        runs = []
        for cell in settled.cells:
            outcome = store.get(addresser.address(cell), cell)
            runs.append(Run(cell, result.outcomes[cell] if outcome is None else outcome))
        return tuple(runs), settled.notes


def _checked(result: CampaignResult) -> CampaignResult:
    """Raises CommandFailed when a run failed."""
    if result.failures:
        first = result.failures[0]
        why = first.error.strip().splitlines()[-1] if first.error.strip() else "no reason is known"
        total = len(result.failures) + len(result.outcomes)
        raise CommandFailed(
            f"{len(result.failures)} of {total} runs failed; {first.cell.contender.label} at "
            f"{first.cell.rate_rps:.4g} requests/s, seed {first.cell.seed}: {why}"
        )
    return result


def _study(scenario: Scenario, runs: Sequence[Run], choices: tuple[str, ...], args: argparse.Namespace) -> Study:
    setting = Setting.of(runs[0].cell)
    (comparison,) = compare(runs)
    marks: list[Mark] = []
    if scenario.reference_rps is not None:
        marks.append(Mark(setting, MarkKind.REFERENCE, "tier-packed reference", scenario.reference_rps))
        if args.out is not None:
            marks += ceiling_marks(setting, scenario.form)
    return Study(
        title=f"Simulated: {setting.title}",
        runs=tuple(runs),
        findings=(*verdicts(comparison), *choices, *notes(comparison, scenario.residence_s)),
        marks=tuple(marks),
        profiles=profile_notes(runs),
        rerun=_rerun(args),
    )


def _rerun(args: argparse.Namespace) -> str:
    """The command line that makes the same report."""
    words = ["tiergate", "simulate"]
    if args.scenario is not None:
        words += ["--scenario", str(args.scenario)]
    for name in OPTIONS:
        value: str | list[str] | None = getattr(args, name)
        if name == "prefixes" and value:
            words.append(flag(name))
        elif value is not None:
            for text in (value,) if isinstance(value, str) else value:
                words += [flag(name), text]
    if args.out is not None:
        words += ["--out", str(args.out)]
    return shlex.join(words)
