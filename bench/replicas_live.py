"""Several gateway processes on Redis beside one on the memory store, live: `python -m bench.replicas_live`.

The load and the EMULATED engines of `tiergate demo`, one seed after the other: once through one gateway, and once
through `tiergate serve --workers N` on a real Redis, whose workers each decide alone and reserve in the store.
Everything shares this machine, so run it when nothing else does: the gateways' own milliseconds count here, and on
two cores more processes have less time each. `python -m bench.replicas` leaves that out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
import yaml

from tests.servers import DataServer, Kind
from tiergate.commands import CommandFailed
from tiergate.demo.fleet import MODEL, emulated_engines, settings
from tiergate.demo.outcome import BenchFile
from tiergate.demo.processes import ready, tail, tiergate
from tiergate.demo.run import bench_arguments
from tiergate.demo.sizes import EMULATED, Size
from tiergate.ports import free_ports

ONE = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=4, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--load", type=float, default=1.0, metavar="FACTOR", help="of the demo's rate")
    args = parser.parse_args(arguments)
    load = replace(EMULATED.load, rate_factor=EMULATED.load.rate_factor * args.load)
    size = replace(EMULATED, load=load, seeds=tuple(range(1, args.seeds + 1)))
    with tempfile.TemporaryDirectory(prefix="tiergate-replicas-") as work:
        asyncio.run(_measure(size, args.replicas, Path(work)))
    return 0


async def _measure(size: Size, replicas: int, work: Path) -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores; {size.backends} emulated engines; polyserve;")
    print(f"the demo's trace {size.load.rate_factor:g} times as fast\n")
    print(
        "| replicas | seed | offered | attained | goodput requests/s | attainment | by tier "
        "| TTFT error p50, p90 |"
    )
    print("|---|---|---:|---:|---:|---:|---|---|")
    goodput: dict[int, list[float]] = {ONE: [], replicas: []}
    async with aiohttp.ClientSession() as http:
        for seed in size.seeds:
            for count, attained in goodput.items():
                result = await _run(size, seed, count, http, work)
                overall = result.score.overall
                attained.append(overall.attained / result.score.measured_s)
                print(f"| {' | '.join(_cells(count, seed, result))} |", flush=True)
    ratios = [many / one for one, many in zip(goodput[ONE], goodput[replicas], strict=True)]
    print(
        f"\ngoodput of {replicas} replicas over one's, same requests: mean {statistics.mean(ratios):.3f}, "
        f"by seed {', '.join(f'{ratio:.3f}' for ratio in ratios)}"
    )


def _cells(count: int, seed: int, result: BenchFile) -> list[str]:
    overall, ttft = result.score.overall, result.predictions.ttft
    tiers = ", ".join(f"{one.tier} {one.attained / max(one.promised, 1):.1%}" for one in result.score.tiers)
    return [
        "1, memory" if count == ONE else f"{count}, Redis",
        str(seed),
        str(overall.offered),
        str(overall.attained),
        f"{overall.attained / result.score.measured_s:.2f}",
        f"{overall.attained / max(overall.promised, 1):.1%}",
        tiers,
        "-" if ttft.p50 is None or ttft.p90 is None else f"{ttft.p50:.0%}, {ttft.p90:.0%}",
    ]


async def _run(size: Size, seed: int, replicas: int, http: aiohttp.ClientSession, work: Path) -> BenchFile:
    name = f"{replicas}-{seed}"
    log, result = work / f"bench-{name}.log", work / f"bench-{name}.json"
    async with (
        emulated_engines(size, http, work, name) as engines,
        _front(size, engines, replicas, http, work, name) as url,
        tiergate(bench_arguments(size, seed, MODEL, url, result), log) as bench,
    ):
        if await bench.wait() != 0:
            raise CommandFailed(f"tiergate bench failed:\n{await asyncio.to_thread(tail, log)}")
    return await asyncio.to_thread(BenchFile.read, result)


@contextlib.asynccontextmanager
async def _front(
    size: Size, engines: Sequence[str], replicas: int, http: aiohttp.ClientSession, work: Path, name: str
) -> AsyncIterator[str]:
    """One gateway alone, or several workers behind one address and on one Redis: the base URL."""
    port = free_ports(1)[0]
    config, log = work / f"gateway-{name}.yaml", work / f"gateway-{name}.log"
    file = settings(size, "polyserve", engines, str(size.profile), port, "operator")
    await asyncio.to_thread(config.write_text, yaml.safe_dump(file))
    command = ["serve", "--config", str(config)]
    url = f"http://127.0.0.1:{port}"
    async with contextlib.AsyncExitStack() as stack:
        if replicas > ONE:
            store = await stack.enter_async_context(DataServer(Kind.REDIS, work / f"redis-{name}"))
            command += ["--workers", str(replicas), "--store", store.url]
        process = await stack.enter_async_context(tiergate(command, log))
        await ready(http, f"{url}/readyz", process, log)
        yield url


if __name__ == "__main__":
    sys.exit(main())
