"""What the gateway itself costs: `python -m bench.overhead --harness DIR`.

Runs Tiergate, with tiers, prediction and metrics on and the memory store, in the rounds of the head-to-head
harness (mock engines and a load generator in C; see the harness's own README) and prints CPU per request and per
streamed token, added time to first token and relay time. The harness is not in this repository: give its folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEER = "tiergate"


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--harness", type=Path, required=True, help="folder of the harness (run.py in it)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="py-aiohttp", help="other peers of the harness in the same rounds")
    parser.add_argument("--cells", default="rps,hi,open")
    parser.add_argument("--python", default="python3", help="interpreter that runs the harness (has its venvs)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tiergate-overhead-") as work:
        return _run(args, Path(work))


def _run(args: argparse.Namespace, work: Path) -> int:
    config = work / "gateway.yaml"
    # Generous promises: what is measured is the work of keeping them, not refusals on a mock without a profile.
    tiers = [
        {"name": "fast", "ttft_ms": 10_000, "tpot_ms": 100},
        {"name": "chat", "ttft_ms": 20_000, "tpot_ms": 500},
        {"name": "batch", "on_miss": "relegate"},
    ]
    config.write_text(
        json.dumps({"tiers": tiers, "default_tier": "chat", "log_requests": False}), encoding="utf-8"
    )
    entry = {
        "name": PEER,
        "cmd": [
            *(sys.executable, "-m", "tiergate", "serve", "--config", str(config), "--port", "{port}"),
            *("--backend", "{engine0}", "--backend", "{engine1}"),
        ],
        "cwd": str(ROOT),
        "env": {},
        "headers": [],
        "model": "mock-model",
        "version": "this checkout",
        "note": "polyserve, memory store, metrics on, request log off",
        "slow": False,
    }
    extra, out = work / "extra.json", work / "results.json"
    extra.write_text(json.dumps([entry]), encoding="utf-8")
    command = [args.python, str(args.harness / "run.py"), "--extra", str(extra), "--peers", args.peers]
    command += ["--rounds", str(args.rounds), "--cells", args.cells, "--out", str(out)]
    subprocess.run(command, check=True)
    print(table(json.loads(out.read_text(encoding="utf-8"))))
    return 0


def table(results: dict[str, Any]) -> str:
    """Medians over the rounds, as a markdown table."""
    conditions = results["conditions"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        runs.setdefault(run["peer"], []).append(run)
    machine = f"{conditions['cpu']}, {conditions['cores']} cores, kernel {conditions['kernel']}"
    lines = [
        f"{conditions['date']}; {machine}; proxy on one core; {conditions['rounds']} rounds, medians (min-max)",
        "",
        "| peer | CPU us/request | CPU us/token | added TTFT p50 us | added relay p50 us | streams right |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [_row(peer, of_peer) for peer, of_peer in runs.items() if peer != "direct"]
    return "\n".join(lines)


def _row(peer: str, runs: list[dict[str, Any]]) -> str:
    def over(cell: str, figure: Callable[[dict[str, Any], dict[str, Any]], float]) -> list[float]:
        cells = [run["cells"].get(cell, {}) for run in runs]
        return [figure(one, one["targets"][peer]) for one in cells if peer in one.get("targets", {})]

    def added(what: str) -> list[float]:
        return over("open", lambda one, mine: float(mine[what]["p50"] - one["targets"]["direct"][what]["p50"]))

    per_request = over("rps", lambda one, mine: 1e6 * one["cpu_s"]["proxy"] / mine["done_win"])
    per_token = over("hi", lambda one, mine: 1e6 * one["cpu_s"]["proxy"] / mine["tok_win"])
    targets = [
        one["targets"][peer] for run in runs for one in run["cells"].values() if peer in one.get("targets", {})
    ]
    right, started = sum(one["ok"] for one in targets), sum(one["started"] for one in targets)
    figures = [_spread(values) for values in (per_request, per_token, added("ttft_us"), added("relay_us"))]
    return f"| {peer} | {' | '.join(figures)} | {right:,} of {started:,} |"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


if __name__ == "__main__":
    sys.exit(main())
