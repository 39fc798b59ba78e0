"""How fast the simulator is here: `python -m bench.sim_speed [--servers 20] [--requests 300000]`.

Simulates PolyServe's fleet (H200 and Llama-3.1-8B profile, Azure conversation lengths, the paper's tiers) under
`polyserve_co` at a rate close to what it can serve, in one process, and prints the CPU time and what came of the
requests. The core is compiled first where a C compiler is found; `--interpreted` leaves that out.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

from bench.compiled import ROOT, NotBuilt, build
from scheduling import ledger
from scheduling.tiers import Slo
from simulator.cell import run_cell
from simulator.scenario import Cell, Contender, Engines, FleetSpec, Workload
from workloads.mix import TierShare

RATE_PER_SERVER = 22.0
"""Requests a second and server: close to the most that still reaches 99 %."""
_EDGE = 0.05  # of the requests, before and after those that are measured


def cell(servers: int, requests: int) -> Cell:
    """What is run."""
    tiers = tuple(
        TierShare(f"t{tpot_ms}", Slo(1.0, tpot_ms / 1e3), share)
        for tpot_ms, share in ((20, 0.1), (30, 0.2), (50, 0.3), (100, 0.4))
    )
    edge = round(_EDGE * requests)
    return Cell(
        Workload("azure2023_conv", tiers, (0.3, 0.5, 1.0)),
        FleetSpec((Engines("h200-llama-3.1-8b-bf16", servers, None),)),
        Contender("polyserve_co", ()),
        RATE_PER_SERVER * servers,
        1,
        edge,
        requests - 2 * edge,
        edge,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print. Exit status 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--servers", type=int, default=20)
    parser.add_argument("--requests", type=int, default=300_000, help="warm-up and cool-down included")
    parser.add_argument("--interpreted", action="store_true", help="do not compile the core first")
    args = parser.parse_args(arguments)
    if not args.interpreted:
        try:
            return _again_compiled(args.servers, args.requests)
        except NotBuilt as error:
            print(f"the core runs interpreted, at about twice the cost: {error}")
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    outcome = run_cell(cell(args.servers, args.requests))
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    core = "interpreted" if str(ledger.__file__).endswith(".py") else "compiled"
    print(
        f"simulated {args.requests} requests on {args.servers} servers at {RATE_PER_SERVER * args.servers:.0f}/s, "
        f"core {core}: {cpu_s:.1f} s CPU in one process ({wall_s:.1f} s on the clock), "
        f"{cpu_s / args.requests * 1e6:.0f} us a request, "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB; "
        f"attainment {outcome.overall.attainment:.4f}"
    )
    return 0


def _again_compiled(servers: int, requests: int) -> int:
    """The same in a process that finds the compiled core first. Raises NotBuilt."""
    path = os.pathsep.join((str(build()), str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-P", "-m", "bench.sim_speed", "--interpreted"]  # -P: not this folder first
    command += ["--servers", str(servers), "--requests", str(requests)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
