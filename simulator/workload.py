"""What a cell offers its fleet: requests from a trace, with tiers and promises, lazily and seeded.

Every property of a request (lengths, tier, TTFT, gap) is drawn from a random stream of its own, by the request's
place in the run. So request i is the same at every rate and for every contender (common random numbers, Law and
Kelton, "Simulation Modeling and Analysis", §11.2): a rate stretches the gaps and does nothing else.

PolyServe assigns a promise "only if achievable on an idle server" (§5, with chunking): TTFT is drawn among the
promises an idle engine keeps for that prompt. A request for which there is none is left out and another drawn for
its place, so the shares of the tiers stay as asked.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from scheduling.requests import Request
from scheduling.tiers import Slo, Tier, TierSet
from simulator.requests import SimRequest
from simulator.scenario import Arrivals, Cell, Workload
from tiergate_engine.step import Step, StepTime
from workloads.mix import TierShare, WorkloadError
from workloads.traces import Trace, TraceRequest, named_trace, spread_ticks

Achievable = Callable[[int, float], float]
"""(prompt tokens, TPOT in seconds, infinity for none) -> TTFT in seconds on an idle engine; infinity where even an
idle engine misses the TPOT. It must depend on the fleet only, or contenders would get different requests."""

MODEL = "sim"
"""The name of the one model that a simulated fleet serves."""

_MOST_TRIES = 2_000  # rows in a row whose promise cannot be kept, before the workload is called impossible


def tier_set(workload: Workload) -> TierSet:
    """A workload's tiers for the dispatcher, tight to loose; the loosest is the default.

    Raises WorkloadError when there is none or two have one name.
    """
    names = [share.name for share in workload.tiers]
    if not names or len(set(names)) != len(names):
        raise WorkloadError(f"tiers: at least one is needed and names must differ, got {names}")
    ordered = sorted(workload.tiers, key=_pace_s)
    tiers = tuple(Tier(share.name, share.slo, rank) for rank, share in enumerate(ordered))
    return TierSet(tiers, tiers[-1].name)


def _pace_s(share: TierShare) -> float:
    return math.inf if share.slo.tpot_s is None else share.slo.tpot_s


@dataclass(slots=True)
class IdleEngine:
    """What an idle engine promises: an `Achievable` from a step time, exact and cheap.

    A prompt is prefilled alone, in the largest chunks whose step keeps the pace. All chunks but the last are the
    same for every prompt, so their ends are walked once per pace and looked up after that.

    Attributes:
        step_time: without host time.
        budget_tokens: most tokens of a step.
        host_s: host time of a step with one sequence.
    """

    step_time: StepTime
    budget_tokens: int
    host_s: float = 0.0
    _walks: dict[float, tuple[list[int], list[float]]] = field(default_factory=dict)

    def __call__(self, prompt_tokens: int, tpot_s: float) -> float:
        """Seconds from arrival to the first token; infinity when the pace is missed."""
        if self.step_time.decode_seconds(1, prompt_tokens + 1) + self.host_s > tpot_s:
            return math.inf
        ends, times_s = self._walks.setdefault(tpot_s, ([0], [0.0]))
        while ends[-1] < prompt_tokens:
            done = ends[-1]
            chunk = self.budget_tokens
            if tpot_s != math.inf:
                chunk = self.step_time.chunk_tokens(Step(), tpot_s - self.host_s, done, self.budget_tokens)
            if chunk <= 0:
                return math.inf
            ends.append(done + chunk)
            times_s.append(times_s[-1] + self._chunk_s(chunk, done))
        place = bisect_left(ends, prompt_tokens) - 1
        return times_s[place] + self._chunk_s(prompt_tokens - ends[place], ends[place])

    def _chunk_s(self, tokens: int, context_tokens: int) -> float:
        area = tokens * (context_tokens + tokens / 2)
        return self.step_time.seconds_of(tokens, 1, context_tokens, area, 0, 0.0) + self.host_s


def always_achievable(_prompt_tokens: int, _tpot_s: float) -> float:
    """An `Achievable` that leaves nothing out."""
    return 0.0


@dataclass(frozen=True, slots=True)
class _Promises:
    """One tier's promises by TTFT, tight to loose."""

    name: str
    pace_s: float
    ttft_s: tuple[float, ...]  # infinity: none promised
    slos: tuple[Slo, ...]

    @classmethod
    def of(cls, share: TierShare, ttft_s: tuple[float, ...]) -> _Promises:
        promised: list[float | None] = [*sorted(ttft_s)] if ttft_s else [share.slo.ttft_s]
        return cls(
            share.name,
            _pace_s(share),
            tuple(math.inf if ttft is None else ttft for ttft in promised),
            tuple(Slo(ttft, share.slo.tpot_s) for ttft in promised),
        )

    @classmethod
    def of_row(cls, row: TraceRequest) -> _Promises:
        """What a row of the gateway's log was promised. Raises WorkloadError when it does not say."""
        if row.tier is None or row.slo is None:
            raise WorkloadError("own_tiers: the trace has requests without a tier; take the gateway's own log")
        return cls.of(TierShare(row.tier, row.slo, 1.0), ())

    def draw(self, row: TraceRequest, achievable: Achievable, chance: float) -> Slo | None:
        """One of the achievable promises, evenly by `chance` in [0, 1); None when there is none."""
        idle_s = achievable(row.prompt_tokens, self.pace_s)
        if idle_s == math.inf:
            return None
        first = bisect_left(self.ttft_s, idle_s)
        kept = len(self.ttft_s) - first
        return self.slos[first + int(chance * kept)] if kept else None


class Offered:
    """A cell's requests in order of arrival: iterate once, lazily. Costs some microseconds a request.

    Attributes:
        trace: where the lengths come from.
        left_out: part of the drawn requests whose promise no idle engine keeps, so far.
    """

    def __init__(
        self,
        cell: Cell,
        achievable: Achievable,
        trace: Trace,
        *,
        block_tokens: int = 16,
        max_tokens: int | None = None,
    ) -> None:
        _check(cell, trace, block_tokens)
        self.trace = trace
        self._cell = cell
        self._achievable = achievable
        self._block_tokens = block_tokens
        self._max_tokens = max_tokens
        self._drawn = 0
        self._missed = 0

    @property
    def left_out(self) -> float:
        return self._missed / self._drawn if self._drawn else 0.0

    @property
    def mean_output_tokens(self) -> float:
        """Of the whole trace."""
        return sum(row.output_tokens for row in self.trace.requests) / len(self.trace.requests)

    def __iter__(self) -> Iterator[SimRequest]:
        cell, workload = self._cell, self._cell.workload
        self._drawn = self._missed = 0
        trace = self.trace
        if workload.arrivals is Arrivals.TRACE:
            trace = spread_ticks(trace, _stream(cell, "ticks"))
        start = _stream(cell, "start").randrange(len(trace.requests))
        rows = self._rows(trace, start)
        units = _trace_units(trace, start) if workload.arrivals is Arrivals.TRACE else _poisson_units(cell)
        tiers = self._tiers()
        ttft_chance = _stream(cell, "ttft").random
        measured_end = cell.warmup_requests + cell.measured_requests
        for index in range(cell.requests):
            lap, row = next(rows)
            promises = _Promises.of_row(row) if workload.own_tiers else next(tiers)
            slo, row, replaced = self._promise(index, promises, row, ttft_chance())
            if replaced:
                lap = -1 - index  # another row in its place: its blocks are nobody else's
            request = Request(
                f"r{index}", MODEL, promises.name, slo, row.prompt_tokens, next(units) / cell.rate_rps
            )
            yield SimRequest(
                request,
                row.output_tokens,
                self._blocks(row, lap) if workload.prefixes else (),
                self._block_tokens,
                cell.warmup_requests <= index < measured_end,
            )

    def _promise(
        self, index: int, promises: _Promises, row: TraceRequest, chance: float
    ) -> tuple[Slo, TraceRequest, bool]:
        """The promise of the request at `index`, with another row when no promise can be kept for its own."""
        slo = self._try(promises, row, chance)
        if slo is not None:
            return slo, row, False
        spare = _stream(self._cell, f"spare:{index}")
        own = self._cell.workload.own_tiers
        rows = [each for each in self.trace.requests if each.tier == row.tier] if own else self.trace.requests
        for _ in range(_MOST_TRIES):
            row = spare.choice(rows)
            slo = self._try(_Promises.of_row(row) if own else promises, row, chance)
            if slo is not None:
                return slo, row, True
        raise WorkloadError(
            f"tiers: not one of {_MOST_TRIES} requests of {self.trace.name} can be served by an idle engine at "
            f"the promise of {promises.name}: loosen it, or take a faster profile"
        )

    def _try(self, promises: _Promises, row: TraceRequest, chance: float) -> Slo | None:
        self._drawn += 1
        fits = self._max_tokens is None or row.prompt_tokens + row.output_tokens <= self._max_tokens
        slo = promises.draw(row, self._achievable, chance) if fits else None
        self._missed += slo is None
        return slo

    def _tiers(self) -> Iterator[_Promises]:
        """A tier for each request; by the shares, from the inversion on by the shares in reverse order."""
        cell, workload = self._cell, self._cell.workload
        every = [_Promises.of(share, workload.ttft_s) for share in workload.tiers]
        weights = [share.share for share in workload.tiers]
        chance = _stream(cell, "tiers").random
        turn = cell.requests
        if workload.invert_at is not None:
            turn = cell.warmup_requests + round(workload.invert_at * cell.measured_requests)
        for end, parts in ((turn, weights), (cell.requests - turn, weights[::-1])):
            bounds = list(itertools.accumulate(parts))
            total, last = bounds[-1], len(bounds) - 1
            for _ in range(end):
                yield every[min(bisect_right(bounds, chance() * total), last)]

    def _rows(self, trace: Trace, start: int) -> Iterator[tuple[int, TraceRequest]]:
        """Rows with the lap they belong to: drawn with replacement, or in the trace's order.

        Requests that share prefixes must keep their order, or the sharing would not be the trace's; a trace that
        is played again has other text, or every prompt would be found in the cache.
        """
        rows, workload = trace.requests, self._cell.workload
        if workload.arrivals is Arrivals.POISSON and not workload.prefixes:
            chance, count = _stream(self._cell, "lengths").random, len(rows)
            while True:
                yield 0, rows[int(chance() * count)]
        for lap in itertools.count():
            for place in range(start if lap == 0 else 0, len(rows)):
                yield lap, rows[place]

    def _blocks(self, row: TraceRequest, lap: int) -> tuple[int, ...]:
        """A row's prefix blocks as blocks of the engine: each of the trace's is so many of the engine's."""
        each = (self.trace.block_tokens or self._block_tokens) // self._block_tokens
        first = lap << 40  # ids of one lap are far below this
        starts = [first + block * each for block in row.prefix_blocks]
        ids = itertools.chain.from_iterable([range(at, at + each) for at in starts])
        return tuple(itertools.islice(ids, row.prompt_tokens // self._block_tokens))


def offered(
    cell: Cell,
    achievable: Achievable = always_achievable,
    *,
    trace: Trace | None = None,
    block_tokens: int = 16,
    max_tokens: int | None = None,
) -> Offered:
    """What `cell` offers.

    Args:
        achievable: what an idle engine of the fleet can promise (`IdleEngine`).
        trace: the cell's trace, when the caller has it already; else it is loaded.
        block_tokens: the engines' KV block.
        max_tokens: longest prompt and answer an engine takes; longer requests are left out.

    Raises:
        WorkloadError: the cell cannot be offered; the message names the field.
        TraceError: its trace cannot be read.
    """
    return Offered(
        cell,
        achievable,
        named_trace(cell.workload.trace) if trace is None else trace,
        block_tokens=block_tokens,
        max_tokens=max_tokens,
    )


def _check(cell: Cell, trace: Trace, block_tokens: int) -> None:
    workload = cell.workload
    tier_set(workload)
    for share in workload.tiers:
        if not (math.isfinite(share.share) and share.share > 0):
            raise WorkloadError(f"tiers: the share of {share.name} must be positive, not {share.share!r}")
    if not (math.isfinite(cell.rate_rps) and cell.rate_rps > 0):
        raise WorkloadError(f"rate_rps must be positive, not {cell.rate_rps!r}")
    if workload.invert_at is not None and not 0.0 <= workload.invert_at <= 1.0:
        raise WorkloadError(f"invert_at is a part of the measured requests, 0 to 1, not {workload.invert_at!r}")
    if workload.arrivals is Arrivals.TRACE and not trace.duration_s:
        raise WorkloadError(f"{trace.name} has lengths only: offer it with Poisson arrivals")
    if workload.own_tiers:
        if workload.invert_at is not None:
            raise WorkloadError("own_tiers: the shares are the trace's own, so invert_at has nothing to reverse")
        missing = {str(row.tier) for row in trace.requests} - {share.name for share in workload.tiers}
        if missing:
            raise WorkloadError(f"own_tiers: the trace has tiers not listed: {', '.join(sorted(missing))}")
    if workload.prefixes and trace.block_tokens is None:
        raise WorkloadError(f"{trace.name} has no prefix blocks: offer it without prefixes")
    if workload.prefixes and (trace.block_tokens or 0) % block_tokens:
        raise WorkloadError(
            f"{trace.name} has blocks of {trace.block_tokens} tokens, which are no whole number of the engine's "
            f"{block_tokens}: set block_tokens to one that divides them"
        )


def _stream(cell: Cell, name: str) -> Random:
    return Random(f"{cell.seed}:{name}")


def _poisson_units(cell: Cell) -> Iterator[float]:
    """Arrivals of a Poisson process of one request per unit of time."""
    gap = _stream(cell, "gaps").expovariate
    at = 0.0
    while True:
        at += gap(1.0)
        yield at


def _trace_units(trace: Trace, start: int) -> Iterator[float]:
    """A trace's arrivals, one request per unit of time on the mean, end to end from `start`."""
    times_s = [row.arrival_s for row in trace.requests]
    rate_rps = (len(times_s) - 1) / (times_s[-1] - times_s[0])
    lap_s = len(times_s) / rate_rps
    for lap in itertools.count():
        for place in range(start if lap == 0 else 0, len(times_s)):
            yield (times_s[place] - times_s[start] + lap * lap_s) * rate_rps
