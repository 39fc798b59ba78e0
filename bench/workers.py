"""What N worker processes carry, how evenly, and what a rolling restart costs: `python -m bench.workers`.

Everything runs on this machine: EMULATED engines, a real Redis, `tiergate serve --workers N` and the load. So the
first table also says whose CPU it was: where all cores are busy, the machine is the limit and not the gateway, and
requests per CPU second of the workers say what more cores would carry.

The second part opens new connections at a steady rate while every worker is replaced, and counts what went wrong:
connections refused or reset, answers that are not whole, statuses other than 200. Exit code 1 when there is any.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from deploy.server_process import ServerProcess, free_port
from loadgen.http import HttpError, HttpPool
from tests.servers import DataServer, Kind

PROFILE = "h100-llama-3.1-8b-fp8"
MODEL = "bench"
ENGINES = 2
WARM_S = 1.0
FULL = 0.9  # of a core
FEWEST_ROLLING = 2  # workers
TICKS = os.sysconf("SC_CLK_TCK")
# Generous promises: what is measured is the work of keeping them, not refusals.
TIERS = [{"name": "fast", "ttft_ms": 10_000, "tpot_ms": 100}, {"name": "chat", "ttft_ms": 20_000, "tpot_ms": 500}]
MEMORY = "memory, no supervisor"


@dataclass(slots=True)
class Answer:
    """A sink that counts (`loadgen.http.Sink`)."""

    errors: tuple[type[Exception], ...] = ()
    status: int = 0
    events: int = 0
    first_s: float = 0.0
    tail: bytes = b""

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status

    def on_body(self, data: bytes) -> None:
        if not self.events:
            self.first_s = time.perf_counter()
        self.events += data.count(b"data: ")
        self.tail = (self.tail + data)[-32:]

    @property
    def whole(self) -> bool:
        return self.status == 200 and self.tail.endswith(b"data: [DONE]\n\n")


@dataclass(slots=True)
class Load:
    """What the clients saw."""

    done: int = 0
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running `tiergate serve`, its workers if it has any, and what runs beside it."""

    process: ServerProcess
    url: str
    beside: Mapping[str, int]  # process ids by role

    def workers(self) -> list[int]:
        """Process ids of the workers; the process itself where it serves alone."""
        return _children(self.process.pid) or [self.process.pid]


def main() -> int:
    """Measure and print."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    parser.add_argument("--clients", type=int, default=64, help="each with a connection of its own")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--workers", type=int, nargs="*", default=[*range(1, cores + 1)], metavar="N")
    parser.add_argument("--rate", type=float, default=200.0, help="new connections/s in the rolling restart")
    parser.add_argument("--kind", choices=[kind.value for kind in Kind], default="redis")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="tiergate-workers-") as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return _measure(args, Path(folder), runner)


def _measure(args: argparse.Namespace, folder: Path, runner: asyncio.Runner) -> int:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; {args.clients} clients,")
    print(f"answers of {args.tokens} tokens from {ENGINES} emulated engines; CPU in cores, over the whole run\n")
    print(
        "| workers | requests/s | tokens/s | TTFT p50, p99 ms | CPU workers | engines | store | load | busy "
        "| requests/s per worker core | requests by worker | limit |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|---|")
    for workers in [0, *args.workers]:
        with _serving(folder, workers, args.kind) as gateway:
            print(runner.run(_row(gateway, workers, args)), flush=True)
    most = max(args.workers, default=0)
    if most < FEWEST_ROLLING:
        print("\nno rolling restart: one process alone has nobody to take its place")
        return 0
    with _serving(folder, most, args.kind) as gateway:
        return runner.run(_rolling(gateway, args))


# --- throughput ------------------------------------------------------------------------------------------------


async def _row(gateway: Gateway, workers: int, args: argparse.Namespace) -> str:
    body = _body(args.tokens)
    await _closed_loop(gateway.url, args.clients, WARM_S, body)
    before, counted = _cpu_s(gateway), await _by_worker(gateway.url)
    began_s, idle_s = time.perf_counter(), _idle_s()
    load = await _closed_loop(gateway.url, args.clients, args.seconds, body)
    took_s = time.perf_counter() - began_s
    used = {role: (after - before[role]) / took_s for role, after in _cpu_s(gateway).items()}
    busy = 1.0 - (_idle_s() - idle_s) / took_s / (os.cpu_count() or 1)
    after = await _by_worker(gateway.url)
    shares = [after[name] - counted.get(name, 0.0) for name in sorted(after)]
    ttft_ms = [1e3 * value for value in load.ttft_s]
    cells = [
        MEMORY if not workers else str(workers),
        f"{load.done / took_s:,.0f}",
        f"{load.tokens / took_s:,.0f}",
        f"{statistics.median(ttft_ms):.1f}, {statistics.quantiles(ttft_ms, n=100)[98]:.1f}",
        *(f"{used[role]:.2f}" for role in ("workers", "engines", "store", "load")),
        f"{busy:.0%}",
        f"{load.done / took_s / max(used['workers'], 1e-9):,.0f}",
        ", ".join(f"{share:.0f}" for share in shares) or "-",
        _limit(used, workers, busy),
    ]
    wrong = f" wrong: {dict(load.wrong)}" if load.wrong else ""
    return f"| {' | '.join(cells)} |{wrong}"


def _limit(used: Mapping[str, float], workers: int, busy: float) -> str:
    """What could not do more. Each role but the workers is one process, which has one core at most."""
    full = [role for role in ("engines", "store", "load") if used[role] > FULL]
    if used["workers"] > FULL * max(workers, 1):
        full.append("workers")
    if full:
        return f"a core each of: {', '.join(full)}"
    return "all cores of the machine" if busy > FULL else "none: clients wait for answers"


async def _closed_loop(url: str, clients: int, seconds: float, body: bytes) -> Load:
    """Clients that ask again as soon as they are answered."""
    load = Load()
    until_s = time.perf_counter() + seconds

    async def client() -> None:
        pool = HttpPool(f"{url}/v1/chat/completions", 5.0)
        while time.perf_counter() < until_s:
            sent_s = time.perf_counter()
            answer = Answer()
            try:
                await pool.post({"content-type": "application/json"}, body, answer)
            except (HttpError, OSError) as error:
                load.wrong[type(error).__name__] += 1
                continue
            if not answer.whole:
                load.wrong[str(answer.status)] += 1
                continue
            load.done += 1
            load.tokens += answer.events - 2  # the role, and [DONE]
            load.ttft_s.append(answer.first_s - sent_s)
        await pool.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(client())
    return load


# --- a rolling restart -----------------------------------------------------------------------------------------


async def _rolling(gateway: Gateway, args: argparse.Namespace) -> int:
    """New connections at a rate while every worker is replaced, beside streams that were open before."""
    old = set(gateway.workers())
    load, long = Load(), Load()
    short_body, long_body = _body(2), _body(400)
    stop = asyncio.Event()
    began_s = time.perf_counter()

    async def arrivals(tasks: asyncio.TaskGroup) -> int:
        for number in itertools.count():
            late_s = began_s + number / args.rate - time.perf_counter()
            if late_s > 0:
                await asyncio.sleep(late_s)
            if stop.is_set():
                return number
            tasks.create_task(_once(gateway.url, short_body, load))
        raise AssertionError

    async with asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(_once(gateway.url, long_body, long))
        arriving = tasks.create_task(arrivals(tasks))
        await asyncio.sleep(1.0)
        gateway.process.signal(signal.SIGUSR2)
        turned_s = time.perf_counter()
        while old & set(gateway.workers()):  # noqa: ASYNC110 - they are other processes
            await asyncio.sleep(0.1)
        took_s = time.perf_counter() - turned_s
        await asyncio.sleep(1.0)
        stop.set()
    wrong = load.wrong + long.wrong
    print(f"\nrolling restart of {len(old)} workers under {args.rate:g} new connections/s: {took_s:.1f} s,")
    print(f"{arriving.result():,} connections, {load.done:,} whole answers; ", end="")
    print(f"{long.done} of 20 streams of 400 tokens whole")
    print(f"resets, refusals and broken answers: {sum(wrong.values())} {dict(wrong) or ''}")
    ttft_ms = [1e3 * value for value in load.ttft_s]
    print(
        f"TTFT p50 {statistics.median(ttft_ms):.1f} ms, p99 {statistics.quantiles(ttft_ms, n=100)[98]:.1f} ms, ",
        end="",
    )
    print(f"worst {max(ttft_ms):.1f} ms")
    return 1 if wrong else 0


async def _once(url: str, body: bytes, load: Load) -> None:
    """One request on a connection of its own."""
    pool = HttpPool(f"{url}/v1/chat/completions", 10.0)
    answer, sent_s = Answer(), time.perf_counter()
    try:
        await pool.post({"content-type": "application/json", "connection": "close"}, body, answer)
    except (HttpError, OSError, TimeoutError) as error:
        load.wrong[f"{type(error).__name__}: {error}"] += 1
        return
    finally:
        await pool.close()
    if not answer.whole:
        load.wrong[f"status {answer.status}"] += 1
        return
    load.done += 1
    load.ttft_s.append(answer.first_s - sent_s)


# --- what runs -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _serving(folder: Path, workers: int, kind: str) -> Iterator[Gateway]:
    """A gateway with so many workers, or without a supervisor and a store (0), in front of emulated engines."""
    ports = [free_port() for _ in range(ENGINES)]
    python = (sys.executable, "-m", "tiergate")
    emulate = [*python, "emulate", "--profile", PROFILE, "--model", MODEL, "--max-num-seqs", "512"]
    emulate += ["--ports", ",".join(map(str, ports))]
    config = folder / "gateway.json"
    port = free_port()
    backends = [{"url": f"http://127.0.0.1:{one}", "name": f"e{one}", "profile": PROFILE} for one in ports]
    settings = {"port": port, "tiers": TIERS, "default_tier": "chat", "backends": backends, "log_requests": False}
    serve = [*python, "serve", "--config", str(config)]
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(DataServer(Kind(kind), folder / f"store-{port}")) if workers else None
        if store is not None:
            serve += ["--workers", str(workers), "--store", store.url]
        config.write_bytes(orjson.dumps(settings))
        engines = ServerProcess(emulate, f"http://127.0.0.1:{ports[0]}/health", folder / f"engines-{port}.log")
        stack.enter_context(engines)
        gateway = ServerProcess(serve, f"http://127.0.0.1:{port}/readyz", folder / f"gateway-{port}.log")
        stack.enter_context(gateway)
        beside = {"engines": engines.pid, "load": os.getpid()}
        if store is not None:
            beside["store"] = store.pid
        yield Gateway(gateway, f"http://127.0.0.1:{port}", beside)


def _body(tokens: int) -> bytes:
    return orjson.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "a few words that stand for a prompt"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
    )


def _children(pid: int) -> list[int]:
    """Worker processes of a supervisor."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"workers.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _cpu_s(gateway: Gateway) -> dict[str, float]:
    """CPU seconds so far, by role."""
    used = {role: _of(pid) for role, pid in gateway.beside.items()}
    return {"store": 0.0, **used, "workers": sum(_of(pid) for pid in gateway.workers())}


def _of(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS


def _idle_s() -> float:
    """Seconds that the cores were idle so far, waiting for disks included."""
    words = Path("/proc/stat").read_text().split(maxsplit=6)
    return (int(words[4]) + int(words[5])) / TICKS


async def _by_worker(url: str) -> dict[str, float]:
    """Requests so far, by worker; empty without a supervisor."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    return {
        sample.labels["worker"]: sample.value
        for metric in text_string_to_metric_families(text)
        for sample in metric.samples
        if sample.name == "tiergate_worker_requests_total"
    }


if __name__ == "__main__":
    sys.exit(main())
