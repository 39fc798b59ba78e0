"""Chaos for as long as you like: `python -m bench.chaos --minutes 10`.

Rounds of the run that the tests make (tests/chaos): real Redis, emulated engines, gateways, mixed-tier load, and
kill -9, SIGSTOP and vanishing clients among them; each round with a seed of its own, every second one with a Redis
that keeps its writes, and harsher from round to round. A round that fails can be repeated alone, with what its row
tells: `--seed N --rounds 1 --harshness H --store kept`. What is printed is counted by the clients, by the engines'
own journals, and in the store itself.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from tests.chaos.faults import Harm
from tests.chaos.load import Shape
from tests.chaos.run import Plan, Report, run, tell
from tests.chaos.stand import Size

_HARSHNESS = (1.0, 1.5, 2.0, 3.0)
_COLUMNS = (
    ("seed", 7),
    ("harsh", 5),
    ("store", 7),
    ("requests", 8),
    ("finished", 8),
    ("refused", 7),
    ("failed", 6),
    ("vanished", 8),
    ("kills", 5),
    ("stops", 5),
    ("peak", 7),
    ("zero after", 10),
    ("problems", 8),
)


def plan_of(number: int, seed: int, args: argparse.Namespace) -> Plan:
    """One round."""
    harshness = args.harshness or _HARSHNESS[number % len(_HARSHNESS)]
    persistent = number % 2 == 1 if args.store is None else args.store == "kept"
    size = Size(args.gateways, args.engines, args.cap, args.lease_s, persistent)
    shape = Shape(rate_rps=args.rate)
    most_down = min(1 + args.gateways // 2 + args.engines // 3, args.gateways + args.engines - 2)
    return Plan(
        seed,
        args.round_s,
        size=size,
        shape=shape,
        harshness=harshness,
        longest_stop_leases=args.stop_leases,
        most_down=max(most_down, 1),
    )


def row(report: Report) -> list[str]:
    """A round as cells of the table."""
    plan, ends = report.plan, report.ends()
    kills = sum(window.fault.harm is Harm.KILL for window in report.evidence.windows)
    peak = max((peak.sequences for peak in report.calm_peaks.values()), default=0)
    return [
        str(plan.seed),
        f"{plan.harshness:g}",
        "kept" if plan.size.persistent else "emptied",
        str(len(report.evidence.clients)),
        *(str(ends.get(end, 0)) for end in ("finished", "refused", "failed", "vanished")),
        str(kills),
        str(len(report.evidence.windows) - kills),
        f"{peak} of {plan.size.cap}",
        "-" if report.settled is None else f"{report.settled.seconds:.2f} s",
        str(len(report.problems)),
    ]


def line(cells: list[str]) -> str:
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def main() -> int:
    """Rounds until the time is up; 1 when any of them had a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, help="at most so many")
    parser.add_argument("--round-s", type=float, default=60.0, help="of a round's load; default: %(default)s")
    parser.add_argument("--seed", type=int, help="of the first round; default: drawn")
    parser.add_argument("--harshness", type=float, help="how many times as many faults; default: by round")
    parser.add_argument("--store", choices=("kept", "emptied"), help="what a killed Redis comes back with")
    parser.add_argument("--gateways", type=int, default=3)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--cap", type=int, default=6, help="sequences on an engine; default: %(default)s")
    parser.add_argument("--lease-s", type=float, default=2.0)
    parser.add_argument(
        "--stop-leases", type=float, default=3.0, help="longest SIGSTOP of a gateway, in lease times"
    )
    parser.add_argument("--rate", type=float, default=14.0, help="requests/s besides bursts; default: %(default)s")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave logs and journals of bad rounds there")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if args.seed is None else args.seed
    until_s = time.monotonic() + args.minutes * 60.0
    print(f"first seed {seed}; engines are emulated; every request is counted by its client and by the engines")
    print(line([name for name, _ in _COLUMNS]), flush=True)
    bad = number = 0
    while time.monotonic() < until_s and number != args.rounds:
        bad += not _round(plan_of(number, seed + number, args), args.keep)
        number += 1
    print(f"{number} rounds, {bad} with problems")
    return 1 if bad else 0


def _round(plan: Plan, keep: Path | None) -> bool:
    """Whether all was well."""
    with tempfile.TemporaryDirectory() as folder:
        report = uvloop.run(run(plan, Path(folder)))
        print(line(row(report)), flush=True)
        if not report.problems:
            return True
        print(tell(report), flush=True)
        if keep is not None:
            shutil.copytree(folder, keep / f"seed-{plan.seed}", dirs_exist_ok=True)
        return False


if __name__ == "__main__":
    sys.exit(main())
