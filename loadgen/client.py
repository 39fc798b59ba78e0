"""Sends a planned load on schedule, whatever the server does, and writes down what its clients see.

Open loop: every request has a task of its own that is started at its scheduled arrival; nothing a server does can
delay a later arrival, and every latency counts from the SCHEDULED arrival.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadgen.exchange import Exchange
from loadgen.http import HttpError, HttpPool
from loadgen.results import LoadResult, RequestResult, Timekeeping
from loadgen.sse import StreamBroken, StreamError
from loadgen.target import Target
from scheduling.scoring import TierCounter, judge
from workloads.plan import PlannedRequest

_TIMER_S = 0.001  # uvloop's timers are whole milliseconds, and may fire early by one
_LAG_PERIOD_S = 0.05


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Limits of a load.

    Attributes:
        drain_s: how long after the last measured arrival the measured requests may take to end; what has not ended
            by then is unfinished, hence missed.
        connect_s: time limit for a connection.
        request_s: time limit for one request; None waits until the drain ends.
        max_in_flight: beyond so many open requests one more is not sent but recorded as failed; nothing is
            delayed.
        progress_s: how often `progress` is called.
    """

    drain_s: float = 120.0
    connect_s: float = 10.0
    request_s: float | None = None
    max_in_flight: int = 20_000
    progress_s: float = 0.25


@dataclass(frozen=True, slots=True)
class TierProgress:
    """One tier so far; requests count when they end."""

    tier: str
    ended: int
    promised: int
    attained: int
    refused: int
    failed: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How a running load stands. `tiers` covers the measured requests only."""

    elapsed_s: float
    planned: int
    sent: int
    in_flight: int
    tokens: int
    worst_lateness_s: float
    tiers: tuple[TierProgress, ...]


ProgressCallback = Callable[[Progress], None]


async def run_load(
    target: Target,
    workload: Sequence[PlannedRequest],
    measured_s: float,
    options: LoadOptions = LoadOptions(),
    progress: ProgressCallback | None = None,
) -> LoadResult:
    """Offer a planned load and follow every measured request to its end.

    `measured_s` is the length of the window in which the measured requests arrive. Requests outside it
    (`PlannedRequest.measured` is False) are sent but dropped once all measured ones have ended.
    No server error raises; it is recorded. Cancellation closes every open request.
    """
    pool = HttpPool(target.url, options.connect_s)
    try:
        return await _Load(pool, target, workload, measured_s, options, progress).run()
    finally:
        await pool.close()


class _Load:
    """One running load."""

    def __init__(
        self,
        pool: HttpPool,
        target: Target,
        workload: Sequence[PlannedRequest],
        measured_s: float,
        options: LoadOptions,
        progress: ProgressCallback | None,
    ) -> None:
        self._pool = pool
        self._target = target
        self._workload = sorted(workload, key=lambda request: request.at_s)
        self._measured_s = measured_s
        self._options = options
        self._progress = progress
        self._results: list[RequestResult] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._measured_left = sum(request.measured for request in self._workload)
        self._settled = asyncio.Event()
        self._open: set[Exchange] = set()
        self._tokens = 0
        self._loop_lag_s: list[float] = []
        self._counters: dict[str, TierCounter] = {}
        self._sent = 0
        self._events = 0
        self._peak_in_flight = 0
        self._worst_lateness_s = 0.0
        self._start_s = 0.0

    def _now_s(self) -> float:
        # Not the loop's time: uvloop caches it, in whole milliseconds.
        return time.perf_counter() - self._start_s

    async def run(self) -> LoadResult:
        if not self._measured_left:
            self._settled.set()
        last_s = max((request.at_s for request in self._workload if request.measured), default=0.0)
        cpu_s = time.process_time()
        self._start_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(self._watch())
            sender = group.create_task(self._send_all(group))
            try:
                async with asyncio.timeout(last_s + self._options.drain_s):
                    await self._settled.wait()
            except TimeoutError:
                pass  # what is still open is recorded as unfinished below
            wall_s = self._now_s()
            watcher.cancel()
            sender.cancel()
            for task in self._tasks:
                task.cancel()
        self._add_unsent()
        if self._progress is not None:
            self._progress(self._standing())
        self._results.sort(key=lambda result: result.planned.at_s)
        return LoadResult(
            results=tuple(self._results),
            measured_s=self._measured_s,
            wall_s=wall_s,
            cpu_s=time.process_time() - cpu_s,
            events=self._events,
            peak_in_flight=self._peak_in_flight,
            timekeeping=Timekeeping.of((item.lateness_s for item in self._results), self._loop_lag_s),
        )

    async def _send_all(self, group: asyncio.TaskGroup) -> None:
        for request in self._workload:
            await asyncio.sleep(0)  # let the requests before this one go out, however late all of them are
            while (wait_s := request.at_s - self._now_s()) > 0:  # noqa: ASYNC110 - it waits for a time
                await asyncio.sleep(max(wait_s, _TIMER_S))
            self._sent += 1
            if len(self._tasks) >= self._options.max_in_flight:
                self._refuse_to_send(request)
                continue
            task = group.create_task(self._send(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._peak_in_flight = max(self._peak_in_flight, len(self._tasks))

    def _add_unsent(self) -> None:
        """A measured request that was due but never got its turn counts as unfinished, hence missed."""
        known = {result.planned.index for result in self._results}
        for request in self._workload:
            if request.measured and request.index not in known:
                self._record(Exchange(request, self._start_s, max(self._now_s() - request.at_s, 0.0)))

    def _refuse_to_send(self, request: PlannedRequest) -> None:
        exchange = Exchange(request, self._start_s, self._now_s() - request.at_s)
        exchange.fail("generator_limit", f"{self._options.max_in_flight} requests were open already")
        self._record(exchange)

    async def _send(self, request: PlannedRequest) -> None:
        exchange = Exchange(request, self._start_s, self._now_s() - request.at_s)
        self._worst_lateness_s = max(self._worst_lateness_s, exchange.lateness_s)
        self._open.add(exchange)
        try:
            await self._exchange(exchange)
        except StreamError as error:
            exchange.stopped(error)
        except StreamBroken as error:
            exchange.fail("stream_broken", str(error))
        except TimeoutError as error:
            exchange.fail("timeout", str(error))
        except (HttpError, OSError) as error:
            exchange.fail("connection", f"{type(error).__name__}: {error}")
        finally:
            self._open.discard(exchange)
            self._tokens += exchange.tokens
            exchange.ended_s = self._now_s()
            self._record(exchange)

    async def _exchange(self, exchange: Exchange) -> None:
        request = exchange.planned
        headers = self._target.headers_of(request)
        async with asyncio.timeout(self._options.request_s):
            await self._pool.post(headers, self._target.body_of(request), exchange)
        exchange.finish(self._now_s())

    def _record(self, exchange: Exchange) -> None:
        result = exchange.result()
        self._results.append(result)
        self._events += exchange.counter.events
        if not result.planned.measured:
            return
        counter = self._counters.setdefault(result.planned.tier, TierCounter())
        counter.add(result.record.end, judge(result.record))
        self._measured_left -= 1
        if not self._measured_left:
            self._settled.set()

    async def _watch(self) -> None:
        """Measure the event loop's lag, and tell how the load stands."""
        next_s = self._options.progress_s
        while True:
            before_s = self._now_s()
            await asyncio.sleep(_LAG_PERIOD_S)
            now_s = self._now_s()
            self._loop_lag_s.append(max(now_s - before_s - _LAG_PERIOD_S, 0.0))
            if self._progress is not None and now_s >= next_s:
                next_s = now_s + self._options.progress_s
                self._progress(self._standing())

    def _standing(self) -> Progress:
        return Progress(
            elapsed_s=self._now_s(),
            planned=len(self._workload),
            sent=self._sent,
            in_flight=len(self._tasks),
            tokens=self._tokens + sum(item.tokens for item in self._open),
            worst_lateness_s=self._worst_lateness_s,
            tiers=tuple(
                TierProgress(
                    tier, item.offered, item.promised, item.attained, item.refused, item.failed, item.output_tokens
                )
                for tier, item in self._counters.items()
            ),
        )
