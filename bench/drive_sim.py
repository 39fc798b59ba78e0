"""What driving engines is worth, simulated: `python -m bench.drive_sim --out DIR`.

The rate that a router keeps at 90 % attainment on simulated H200 engines, and its attainment around that rate,
with engines

* as they are started (stock, at the static token budget that does best of those tried),
* paced (chunks at the host's pace, PolyServe §4.7),
* driven (chunks from slack, prompts by deadline, loose decodes skipping, late prompts relegated), and
* driven without one of these at a time.

`polyserve_co` counts on the pace of the engines that are driven, as it does live; one line has it look at the
residents' slack instead. A router without tiers (`minimal`) shows the mechanisms where admission keeps less away
from the engines.

With `--controlled` the engines are driven by the live controller instead, on virtual time: its decisions twice a
second, as much of them as the engines take (docs/design.md, "Driving engines"), beside stock and driven ones.

All variants get the same requests, by seed, and are run at two rates around where `driven` misses 90 %; those
whose own crossing lies elsewhere are run there too. Results are kept in DIR: interrupt it at any time, the same
command goes on. `--report` prints what is there. Tables come trace by trace and are written to DIR.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from bench.compiled import NotBuilt, build
from bench.drive_tables import DRIVEN, STOCK, Compared, summary_text, trace_text
from simulator.campaign.address import Addresser
from simulator.campaign.beside import Beside
from simulator.campaign.goodput import MAIN, Search, SearchSettings, Subject
from simulator.campaign.knobs import KnobSweep, Searched
from simulator.campaign.plan import Plan
from simulator.campaign.progress import ConsoleProgress
from simulator.campaign.run import Pool, run_plans
from simulator.campaign.scale import Scale, scale_of
from simulator.campaign.store import Store
from simulator.campaign.table import CHUNK_KNOB, HIGHEST, TRACES, fleet, quick
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender, Knob, Workload

BUDGETS: tuple[Knob, ...] = (512, 1024, 2048, 0)
"""Static token budgets of a step; 0: the engine's own, 8192 here."""
MECHANISMS = ("chunk_from_slack", "deadline_order", "skip_loose", "relegate_late")
ALL: Mapping[str, Knob] = dict.fromkeys(MECHANISMS, True)
POLYSERVE, MINIMAL = "polyserve_co", "minimal"
ROUTERS = (POLYSERVE, MINIMAL)
LESS = "driven without "
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Variant:
    """How a router's engines are run, in words and in knobs. `swept`: at the best of the static budgets."""

    name: str
    router: str
    knobs: Mapping[str, Knob]
    swept: bool = False

    @property
    def contender(self) -> Contender:
        return Contender(self.router, tuple(sorted(self.knobs.items())))


def controlled(router: str) -> tuple[Variant, ...]:
    """What is compared where the controller drives: each rung of its ladder, and what it is to be held against."""
    return (
        *[one for one in variants(router) if one.name in (STOCK, "paced", DRIVEN)],
        Variant("controlled: driven", router, {"controlled": "driven"}),
        Variant("controlled: chunk budget", router, {"controlled": "chunk_budget"}),
        Variant("controlled: running cap", router, {"controlled": "running_cap"}, swept=True),
        Variant("controlled: prefill pacing", router, {"controlled": "prefill_pacing"}, swept=True),
    )


def brief(router: str) -> tuple[Variant, ...]:
    """All but the ablation."""
    return tuple([one for one in variants(router) if not one.name.startswith(LESS)])


def variants(router: str) -> tuple[Variant, ...]:
    """All that are compared with one router."""
    if router == MINIMAL:
        every: Mapping[str, Knob] = {**ALL, CHUNK_KNOB: 2048}
        some = [Variant(STOCK, router, {}, swept=True), Variant(DRIVEN, router, every)]
    else:
        every = ALL
        some = [
            Variant(STOCK, router, {"driven": False}, swept=True),
            Variant("paced", router, {}),
            Variant(DRIVEN, router, every),
            Variant("driven, policy looks at slack", router, {**every, "driven": False}),
        ]
    less = [Variant(f"{LESS}{name}", router, {**every, name: False}) for name in MECHANISMS]
    return (*some, *less)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run.

    Attributes:
        backends: engines of the fleet.
        seeds: of every variant; the first of them finds the best static budget, the first two where to begin.
    """

    backends: int
    seeds: tuple[int, ...]


def compared(workload: Workload, router: str, every: Sequence[Variant], size: Size) -> tuple[Compared, ...]:
    """The plans of a router's variants on one trace; one of them is `DRIVEN`."""
    spec = fleet(size.backends, caching=workload.prefixes)
    scale = scale_of(workload, spec)
    settings = _settings(scale, size)

    def search(variant: Variant, seeds: tuple[int, ...], tolerance: float) -> Search:
        subject = Subject(workload, spec, variant.contender, scale.optimal_rps)
        return Search(subject, replace(settings, seeds=seeds, tolerance=tolerance))

    leader = search(next(one for one in every if one.name == DRIVEN), size.seeds[:2], 0.25)
    found = []
    for variant in every:
        sweep = KnobSweep(search(variant, size.seeds[:1], 0.1), CHUNK_KNOB, BUDGETS) if variant.swept else None
        searched = Searched(search(variant, size.seeds, 0.1), sweep)
        found.append(Compared(variant.name, router, scale, Beside(leader, searched)))
    return tuple(found)


def _settings(scale: Scale, size: Size) -> SearchSettings:
    length = replace(quick(), instances=size.backends).length(scale)
    return SearchSettings(length, grid=(1.0, 1.25), highest=HIGHEST, most_rates=4, targets=(MAIN,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print. Exit status 1 when cells failed, 130 when interrupted."""
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be told to end is to be interrupted
    console = Console(stderr=True)
    if not (args.interpreted or args.report):
        _compile(console)
    store = Store(args.out / "cells")
    store.prepare()
    addresser = Addresser.of_this_code()
    size = Size(args.backends, tuple(range(1, args.seeds + 1)))
    known: dict[Cell, CellOutcome] = {}
    tables = args.out / ("controlled.txt" if args.controlled else "tables.txt")
    texts: list[str] = []
    every: list[Compared] = []
    failed = False
    for workload in _workloads(args.traces):
        listed = controlled if args.controlled else brief if args.brief else variants
        of_trace = [one for router in args.routers for one in compared(workload, router, listed(router), size)]
        plans: list[Plan] = [one.plan for one in of_trace]
        if args.report:
            known.update(stored_of(plans, store, addresser))
        else:
            try:
                with ConsoleProgress(console) as progress:
                    done = run_plans(plans, store, Pool(args.jobs), progress=progress, addresser=addresser)
            except KeyboardInterrupt:
                console.print("interrupted; the same command goes on from there")
                return INTERRUPTED
            known.update(done.outcomes)
            failed |= bool(done.failures)
        every += of_trace
        texts.append(trace_text(workload.trace, size.backends, of_trace, known))
        print(texts[-1], flush=True)
        tables.write_text("\n".join(texts), encoding="utf-8")
    texts.append(summary_text(every, known))
    print(texts[-1], flush=True)
    tables.write_text("\n".join(texts), encoding="utf-8")
    return 1 if failed else 0


def stored_of(plans: Sequence[Plan], store: Store, addresser: Addresser) -> dict[Cell, CellOutcome]:
    """What is stored of what the plans would run."""
    known: dict[Cell, CellOutcome] = {}
    for plan in plans:
        missing = False
        while not missing and (wanted := plan.wanted(known)):
            for cell in wanted:
                outcome = store.get(addresser.address(cell), cell)
                if outcome is None:
                    missing = True
                else:
                    known[cell] = replace(outcome, samples=())
    return known


def _workloads(names: Sequence[str]) -> Iterator[Workload]:
    for name in names:
        yield next(workload for workload in TRACES if workload.trace == name)


def _compile(console: Console) -> None:
    """Let the processes that run cells take the compiled core; they inherit the path."""
    try:
        with console.status("compiling the core, about a minute the first time"):
            sys.path.insert(0, str(build()))
    except NotBuilt as error:
        console.print(f"the core runs interpreted, at about twice the cost: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    traces = [workload.trace for workload in TRACES]
    parser.add_argument("--out", type=Path, required=True, help="folder of stored cells and of the tables")
    parser.add_argument("--traces", nargs="+", choices=traces, default=traces)
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    parser.add_argument("--controlled", action="store_true", help="engines driven by the live controller")
    parser.add_argument("--backends", type=int, default=6, help="engines of the fleet")
    parser.add_argument("--seeds", type=int, default=4, help="how many; three or more for an interval of use")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--brief", action="store_true", help="without the ablation")
    parser.add_argument("--report", action="store_true", help="run nothing; print what is stored")
    parser.add_argument("--interpreted", action="store_true", help="do not compile the core first")
    return parser


if __name__ == "__main__":
    sys.exit(main())
