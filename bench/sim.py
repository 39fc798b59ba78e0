"""The published simulation results: `python -m bench.sim --size quick --out DIR`.

Runs what is not stored in DIR yet, prints plain text tables with 95 % intervals and writes the report beside them.
Everything in it is simulated. Interrupt it at any time; the same command goes on where it was.

Sizes: `full` is the published table; its searches begin where the published ones ended (bench/sim_record.json),
which saves runs and changes no result; `--afresh` begins them all alike. `quick` has the same rows with shorter
runs and wider intervals: one rate for each seed, moved along the published curves; where the published curve no
longer holds, it searches anew, and takes longer.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.compiled import NotBuilt, build
from simulator.campaign import recorded
from simulator.campaign.address import Addresser
from simulator.campaign.plan import Plan
from simulator.campaign.progress import ConsoleProgress, duration
from simulator.campaign.results import Results, results, runs_of
from simulator.campaign.run import CampaignResult, Pool, run_plans
from simulator.campaign.store import Store
from simulator.campaign.study import study_of, with_samples
from simulator.campaign.table import Section, most_requests, size_named, table
from simulator.campaign.text import report_text
from simulator.campaign.workers import default_jobs
from simulator.report.files import need_report, write_report
from simulator.report.values import Run

RECORD = Path(__file__).with_name("sim_record.json")
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write. Exit status 1 when cells failed, 130 when interrupted."""
    args = _parser().parse_args(arguments)
    need_report()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be told to end is to be interrupted
    size = size_named(args.size)
    entries = table(size, Section(args.only) if args.only else None)
    if not args.afresh:
        record = recorded.read(RECORD)
        entries = tuple(recorded.begun(entry, record, guided=size.name == "quick") for entry in entries)
    console = Console(stderr=True)
    requests = most_requests(entries)
    console.print(f"{len(entries)} searches and trials, at most {requests / 1e6:.1f} million requests")
    if args.dry_run:
        return 0
    if not args.interpreted:
        _compile(console)
    store = Store(args.out / "cells")
    addresser = Addresser.of_this_code()
    plans: list[Plan] = [entry.confirm or entry.plan for entry in entries]
    try:
        with ConsoleProgress(console) as progress:
            done = run_plans(plans, store, Pool(args.jobs), progress=progress, addresser=addresser)
    except KeyboardInterrupt:
        console.print(
            f"interrupted; what has finished is in {store.folder}, and the same command goes on from there"
        )
        return INTERRUPTED
    found = results(entries, done.outcomes)
    text = report_text(found)
    print(text)
    (args.out / "tables.txt").write_text(text, encoding="utf-8")
    if args.record:
        recorded.write(RECORD, {**recorded.read(RECORD), **recorded.found_by(found.lines, done.outcomes)})
    console.print(f"report: {_report(args, found, done, store, addresser)}")
    spent_s = sum(outcome.timing.cpu_s for outcome in done.outcomes.values() if outcome.timing is not None)
    console.print(f"CPU time of all cells, stored ones included: {duration(spent_s)}")
    return 1 if done.failures else 0


def _compile(console: Console) -> None:
    """Let the processes that run cells take the compiled core; they inherit the path."""
    try:
        with console.status("compiling the core, about a minute the first time"):
            sys.path.insert(0, str(build()))
    except NotBuilt as error:
        console.print(f"the core runs interpreted, at about twice the cost: {error}")


def _report(
    args: argparse.Namespace, found: Results, done: CampaignResult, store: Store, addresser: Addresser
) -> Path:
    """Write JSON, parquet, figures and the page."""
    rerun = f"python -m bench.sim --size {args.size} --out DIR" + (f" --only {args.only}" if args.only else "")
    runs = [Run(cell, outcome) for cell, outcome in runs_of(found, done.outcomes).items()]
    study = study_of(found, runs, title=f"Tiergate, simulated ({args.size})", rerun=rerun)
    return write_report(with_samples(study, lambda cell: store.get(addresser.address(cell), cell)), args.out).page


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="quick", help="full or quick")
    parser.add_argument("--out", type=Path, required=True, help="folder of stored cells and of the report")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes (default: one a core)")
    parser.add_argument("--only", choices=[section.value for section in Section], help="one part of the results")
    parser.add_argument("--afresh", action="store_true", help="begin no search where the published ones ended")
    parser.add_argument("--record", action="store_true", help=f"write where searches ended to {RECORD.name}")
    parser.add_argument("--interpreted", action="store_true", help="do not compile the core first")
    parser.add_argument("--dry-run", action="store_true", help="say how much there is to run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
