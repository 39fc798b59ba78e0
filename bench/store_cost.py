"""What the shared store costs: `python -m bench.store_cost [--kind redis|valkey] [--seconds S]`.

Starts a real server on loopback and prints three things. Racing reservations from several processes, and by how
much any limit was passed. What one reservation takes beside a bare PING, in turns. What one core of the server
carries: its own CPU seconds (INFO cpu, main thread) a reservation and a release, by candidates and replicas, and
what the upkeep of so many replicas takes of the core when every one has something to tell all the time.

Only the server's CPU time is taken for its capacity, so clients beside it on the machine do not count; latencies
do suffer when something else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from scheduling.load import Cost, Limits, LoadVector, ReserveCandidate
from state.contract import Granted, Publication
from state.redis.address import parse_url
from state.redis.connect import ConnectOptions, connect
from state.redis.line import Line
from state.redis.store import RedisStore, StoreOptions
from tests.servers import DataServer, Kind

CANDIDATES = (4, 8, 16)
REPLICAS = (1, 4, 16)
IN_FLIGHT = 8
ROUND = 250
TIERS = ("code", "chat", "agents", "batch")
UNLIMITED = Limits(10**6, 10**9, 10**9)
FULL = Limits(0, 10**9, 10**9)
CHAT = Cost(1, 900, 300, "chat", 50.0)
OPTIONS = StoreOptions(lease_s=60.0, timeout_s=30.0)


def main() -> int:
    """Measure and print. 1 when a limit was passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[kind.value for kind in Kind], default="redis")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each cell of the capacity table")
    parser.add_argument("--trips", type=int, default=5000, help="round trips of each sort that are timed")
    parser.add_argument("--racing", type=int, default=10_000, help="racing reservations")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument(
        "--racer", nargs=5, metavar=("URL", "NAME", "ATTEMPTS", "LIMIT", "START"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.racer:
        url, name, attempts, limit, start = args.racer
        return _on_loop(lambda: _racer(url, name, int(attempts), int(limit), float(start)))
    kind = Kind(args.kind)
    with tempfile.TemporaryDirectory(prefix="tg") as folder, DataServer(kind, Path(folder)) as server:
        return _on_loop(lambda: _all(server, args))


def _on_loop(work: Callable[[], Awaitable[int]]) -> int:
    async def run() -> int:
        return await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


async def _all(server: DataServer, args: argparse.Namespace) -> int:
    facts = await _info(server, "server")
    name = "valkey" if "valkey_version" in facts else "redis"
    version = facts.get("valkey_version", facts["redis_version"])
    print(f"{name} {version}, Python {platform.python_version()}, {_machine()}, loopback, no persistence\n")
    passed = await race(server, args.racing, args.processes)
    await round_trips(server, args.trips)
    await capacity(server, args.seconds)
    return 1 if passed else 0


def _machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0] if names else platform.machine()}"


@contextlib.asynccontextmanager
async def _store(server_url: str, fleet: str, replica: str, *, runs: bool = False) -> AsyncIterator[RedisStore]:
    connection = connect(parse_url(server_url), ConnectOptions(timeout_s=30.0))
    store = RedisStore(connection, fleet, replica, OPTIONS)
    async with asyncio.TaskGroup() as tasks:
        upkeep = tasks.create_task(store.run()) if runs else None
        if runs:
            await store.listening()
        try:
            yield store
        finally:
            await store.close()
            if upkeep is not None:
                upkeep.cancel()
            await connection.close()


async def _info(server: DataServer, section: str) -> dict[str, str]:
    """Lines of INFO, by name."""
    text = await asyncio.to_thread(_raw_info, server, section)
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def _raw_info(server: DataServer, section: str) -> str:
    with server.admin() as client:
        client.response_callbacks.clear()
        return str(client.execute_command("INFO", section))


async def _server_cpu_s(server: DataServer) -> float:
    facts = await _info(server, "cpu")
    return float(facts["used_cpu_user_main_thread"]) + float(facts["used_cpu_sys_main_thread"])


def _candidates(
    names: Sequence[str], epochs: dict[str, int], limits: Limits, last: Limits | None = None
) -> list[ReserveCandidate]:
    boxes = [limits] * (len(names) - 1) + [last or limits]
    return [ReserveCandidate(name, CHAT, box, 0.0, epochs[name]) for name, box in zip(names, boxes, strict=True)]


async def _backends(store: RedisStore, count: int) -> tuple[list[str], dict[str, int]]:
    names = [f"http://engine-{index}.internal:8000" for index in range(count)]
    return names, {name: (await store.add_backend(name, "chat")).epoch for name in names}


# --- racing --------------------------------------------------------------------------------------------------


async def race(server: DataServer, attempts: int, processes: int) -> int:
    """Several processes ask for more than there is. Prints, and returns by how much any limit was passed."""
    backends = 8
    limit = attempts * 7 // 10 // backends
    async with _store(server.url, "race", "looker") as looker:
        names, _ = await _backends(looker, backends)
        start_s = time.time() + 2.0
        command = [sys.executable, "-m", "bench.store_cost", "--racer", server.url]
        racers = [
            await asyncio.create_subprocess_exec(
                *command,
                *(f"racer{index}", str(attempts // processes), str(limit), str(start_s)),
                stdout=asyncio.subprocess.PIPE,
                stdin=asyncio.subprocess.PIPE,
            )
            for index in range(processes)
        ]
        granted, wall_s = 0, 0.0
        for racer in racers:
            assert racer.stdout is not None
            got, took_s = (await racer.stdout.readline()).split()
            granted, wall_s = granted + int(got), max(wall_s, float(took_s))
        carried = {name: load.foreign.decodes for name, load in (await looker.view()).items()}
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.close()
            await racer.wait()
    passed = max(granted - limit * backends, 0) + sum(max(carried[name] - limit, 0) for name in names)
    done = attempts // processes * processes
    print(
        f"{done} racing reservations from {processes} processes for {limit * backends} places on {backends} "
        f"backends: {granted} granted, {done - granted} denied, oversell = {passed} "
        f"({done / wall_s:.0f} a second)\n"
    )
    return passed


async def _racer(url: str, name: str, attempts: int, limit: int, start_s: float) -> int:
    """One of them. It keeps what it got until its input ends."""
    async with _store(url, "race", name) as store:
        view = await store.view()
        epochs = {backend: load.membership.epoch for backend, load in view.items()}
        numbers = itertools.count()
        granted = 0

        async def ask() -> None:
            nonlocal granted
            while (number := next(numbers)) < attempts:
                turn = number % len(epochs)
                names = sorted(epochs)[turn:] + sorted(epochs)[:turn]
                box = Limits(limit, 10**9, 10**9)
                answer = await store.reserve(f"{number}", _candidates(names, epochs, box))
                granted += isinstance(answer, Granted)

        await asyncio.sleep(max(start_s - time.time(), 0.0))
        began_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(IN_FLIGHT):
                tasks.create_task(ask())
        print(granted, time.perf_counter() - began_s, flush=True)
        await asyncio.to_thread(sys.stdin.read)
    return 0


# --- round trips ---------------------------------------------------------------------------------------------


async def round_trips(server: DataServer, trips: int) -> None:
    """PING, a reservation and a release in turns, one at a time. Prints percentiles."""
    connection = connect(parse_url(server.url), ConnectOptions(timeout_s=30.0))
    line = Line(connection)
    async with _store(server.url, "trips", "one") as store:
        names, epochs = await _backends(store, 8)
        asked = _candidates(names, epochs, UNLIMITED)
        times_s: dict[str, list[float]] = {}

        async def timed(what: str, call: Awaitable[object]) -> None:
            began_s = time.perf_counter()
            await call
            times_s.setdefault(what, []).append(time.perf_counter() - began_s)

        for number in range(trips):
            await timed("PING, as the store sends its commands", line.ask("key", 30.0, "PING"))
            await timed("PING by redis-py's client", connection.run("PING"))
            await timed("reserve, 8 candidates", store.reserve(f"{number}", asked))
            await timed("release", store.release(f"{number}"))
    await line.close()
    await connection.close()
    print(f"| round trip, one at a time ({trips} each) | P50 µs | P99 µs |\n|---|---|---|")
    for what, took_s in times_s.items():
        took_s.sort()
        p50_s, p99_s = took_s[len(took_s) // 2], took_s[len(took_s) * 99 // 100]
        print(f"| {what} | {p50_s * 1e6:.0f} | {p99_s * 1e6:.0f} |")
    print()


# --- capacity ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """Server CPU in µs a call, and the core's share that upkeep takes."""

    first_us: float
    last_us: float
    denied_us: float
    release_us: float
    upkeep: float

    @property
    def requests_per_s(self) -> float:
        """Requests that one core carries: a reservation and a release each, beside the upkeep."""
        return (1.0 - self.upkeep) * 1e6 / (self.first_us + self.release_us)


async def capacity(server: DataServer, seconds: float) -> None:
    """Prints the table of what one core of the server carries."""
    print(
        "| candidates | replicas | reserve, first fits µs | only the last fits µs | denied µs | release µs "
        "| upkeep, of a core | reservations/s | requests/s |\n|---|---|---|---|---|---|---|---|---|"
    )
    for candidates, replicas in itertools.product(CANDIDATES, REPLICAS):
        cell = await _cell(server, candidates, replicas, seconds)
        print(
            f"| {candidates} | {replicas} | {cell.first_us:.1f} | {cell.last_us:.1f} | {cell.denied_us:.1f} "
            f"| {cell.release_us:.1f} | {cell.upkeep:.1%} | {1e6 / cell.first_us:.0f} "
            f"| {cell.requests_per_s:.0f} |",
            flush=True,
        )
    print(
        "\nServer CPU time of its main thread a call, with "
        f"{IN_FLIGHT} calls in flight; reservations/s and requests/s are what fits into one second of it. Upkeep: "
        "every replica tells a change of all these backends every 20 ms, publishes each every 50 ms, and beats."
    )


async def _cell(server: DataServer, candidates: int, replicas: int, seconds: float) -> Cell:
    fleet = f"cell{candidates}x{replicas}"
    async with contextlib.AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(_store(server.url, fleet, f"r{index}")) for index in range(replicas)
        ]
        names, epochs = await _backends(stores[0], candidates)
        for store in stores:  # what a running fleet has: everybody carries something everywhere
            await store.publish([_publication(store, name) for name in names])
        first = _candidates(names, epochs, UNLIMITED)
        last = _candidates(names, epochs, FULL, UNLIMITED)
        none = _candidates(names, epochs, FULL)
        budget_s = seconds / 4.0
        numbers = itertools.count()  # a lease that ended is denied, so none is met twice
        first_us, release_us = await _pairs(server, stores, first, numbers, budget_s)
        last_us, _ = await _pairs(server, stores, last, numbers, budget_s)
        denied_us, _ = await _pairs(server, stores, none, numbers, budget_s)
    return Cell(first_us, last_us, denied_us, release_us, await _upkeep(server, fleet, replicas, names, budget_s))


def _publication(store: RedisStore, backend: str) -> Publication:
    residents = dict.fromkeys(TIERS, 3)
    load = LoadVector(12, 9000, 2000, residents, 0.0, ((0.05, 0.2), (0.1, 0.4)), ((0.05, 0.3),))
    return Publication(backend, load, store.sequence_of(backend) + 1)


async def _pairs(
    server: DataServer,
    stores: Sequence[RedisStore],
    asked: list[ReserveCandidate],
    numbers: Iterator[int],
    budget_s: float,
) -> tuple[float, float]:
    """Server CPU in µs of a reservation and of a release, over as many as fit into the time."""
    spent_s = {"reserve": 0.0, "release": 0.0}
    calls = 0
    until_s = time.perf_counter() + budget_s
    while time.perf_counter() < until_s:
        leases = list(itertools.islice(numbers, ROUND))
        for what in ("reserve", "release"):
            work = _work(stores, what, asked, iter(leases))
            before_s = await _server_cpu_s(server)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(IN_FLIGHT):
                    tasks.create_task(work())
            spent_s[what] += await _server_cpu_s(server) - before_s
        calls += ROUND
    return spent_s["reserve"] / calls * 1e6, spent_s["release"] / calls * 1e6


def _work(
    stores: Sequence[RedisStore], what: str, asked: list[ReserveCandidate], numbers: Iterator[int]
) -> Callable[[], Coroutine[None, None, None]]:
    """What each of those in flight does: take the next number, and do it on the replica that is due."""

    async def work() -> None:
        for number in numbers:
            store = stores[number % len(stores)]
            if what == "reserve":
                await store.reserve(f"{number}", asked)
            else:
                await store.release(f"{number}")

    return work


async def _upkeep(server: DataServer, fleet: str, replicas: int, names: list[str], budget_s: float) -> float:
    """Share of a core for replicas that have something to tell all the time, and listen."""
    async with contextlib.AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(_store(server.url, fleet, f"u{index}", runs=True))
            for index in range(replicas)
        ]
        before_s, began_s = await _server_cpu_s(server), time.perf_counter()
        while (passed_s := time.perf_counter() - began_s) < max(budget_s, 0.5):
            for number, store in enumerate(stores):
                if int(passed_s / 0.01) % 5 == number % 5:
                    await store.publish([_publication(store, name) for name in names])
                await store.announce(names)
            await asyncio.sleep(max(0.02 - (time.perf_counter() - began_s - passed_s), 0.0))
        return (await _server_cpu_s(server) - before_s) / (time.perf_counter() - began_s)


if __name__ == "__main__":
    raise SystemExit(main())
