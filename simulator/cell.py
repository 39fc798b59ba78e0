"""One run from its description to its numbers."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from time import process_time
from typing import Protocol

from profiles.lengths import LengthBook
from scheduling import events as ev
from scheduling.dispatcher import Dispatcher
from scheduling.lengths import FixedLength
from scheduling.scoring import RequestEnd, quantile, score_predictions
from scheduling.tiers import TierSet
from simulator.agenda import Agenda
from simulator.build import (
    BLOCK_TOKENS,
    Kind,
    dispatchers,
    engine_makers,
    idle_ttft,
    kinds_of,
    shortest_model_tokens,
)
from simulator.contenders import setup_for
from simulator.disagg import DisaggregatedFleet, Half, Link, prefill_tiers
from simulator.fleet import PROGRESS_PERIOD_S, FleetOptions, SimFleet
from simulator.outcome import CellOutcome, TierOutcome, Timing
from simulator.reference import needs_of, reference
from simulator.requests import SimRequest
from simulator.scenario import Cell, FleetSpec, Form
from simulator.served import Served, SimResult
from simulator.setup import Setup
from simulator.workload import MODEL, Offered, offered, tier_set
from workloads.traces import Trace, named_trace

SAMPLES = 200
"""How many times the gradient is written down while requests arrive; at most as often as progress is told."""
PREFILL_STEP_TOKENS = 1024
"""Token budget of an engine that only prefills: a prompt's token comes at the end of a step, so a large step makes
everybody in it wait, while a small one wastes little (its fixed part is a few per cent)."""
_SPLIT_REQUESTS = 2000  # requests whose lengths decide how a disaggregated fleet is split
_LEARNING_PERIOD_S = 1.0  # how often learned lengths are told to dispatchers


class _Run(Protocol):
    agenda: Agenda

    def run(self, requests: Iterator[SimRequest]) -> SimResult: ...

    def backend_seconds(self) -> float: ...

    def busy_s(self) -> float: ...


def run_cell(cell: Cell, traces: Callable[[str], Trace] = named_trace) -> CellOutcome:
    """Run a cell. The same cell gives the same outcome, but for its `timing`.

    `traces` finds a trace by its name. Raises WorkloadError, TraceError, ProfileError, UnknownContender or
    ValueError, each naming what is wrong.
    """
    with _collecting_no_garbage():
        return _run(cell, traces)


@contextmanager
def _collecting_no_garbage() -> Iterator[None]:
    """A run makes no cycles, but keeps hundreds of thousands of objects: looking for garbage among them takes a
    tenth of its time, in pauses that would be taken for slow decisions."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def _run(cell: Cell, traces: Callable[[str], Trace]) -> CellOutcome:
    began_s = process_time()
    kinds = kinds_of(cell.fleet)
    setup = setup_for(cell.contender)
    requests = offered(
        cell,
        idle_ttft(kinds, cell.fleet),
        trace=traces(cell.workload.trace),
        block_tokens=BLOCK_TOKENS,
        max_tokens=shortest_model_tokens(kinds),
    )
    tiers = setup.tiers(tier_set(cell.workload))
    run = _fleet(cell, kinds, setup, tiers, requests)
    window = _Window(cell, run)
    sims = iter(requests)
    if setup.lengths == "known":
        sims = map(_told, sims)
    result = run.run(window.watch(sims))
    outcome = _outcome(cell, result, window, requests.left_out)
    decision_s = sorted(result.decision_s)
    timing = Timing(process_time() - began_s, quantile(decision_s, 0.5), quantile(decision_s, 0.99))
    return replace(outcome, timing=timing)


def _told(sim: SimRequest) -> SimRequest:
    return replace(sim, request=replace(sim.request, expected_output_tokens=sim.output_tokens))


# --- making the fleet --------------------------------------------------------------------------------------


def _fleet(cell: Cell, kinds: list[Kind], setup: Setup, tiers: TierSet, requests: Offered) -> _Run:
    spec = cell.fleet
    options = FleetOptions(
        driven=setup.paced,
        view_age_s=spec.view_age_s,
        startup_s=spec.startup_s,
        faults=spec.faults,
        sample_s=max(cell.requests / cell.rate_rps / SAMPLES, PROGRESS_PERIOD_S),
        time_decisions=True,
        means=setup.means,
    )
    mean_tokens = requests.mean_output_tokens
    if setup.form is Form.COLOCATED:
        names = [f"b{index:04}" for index in range(len(kinds))]
        made = dispatchers(names, kinds, spec, setup, tiers, cell.seed)
        learner = _lengths(made, setup, tiers, mean_tokens)
        fleet = SimFleet(made, engine_makers(names, kinds, spec, setup), options, on_end=learner.observe)
        learner.begin(fleet.agenda)
        return fleet
    return _disaggregated(cell, kinds, setup, tiers, requests, options)


def _disaggregated(
    cell: Cell, kinds: list[Kind], setup: Setup, tiers: TierSet, requests: Offered, options: FleetOptions
) -> DisaggregatedFleet:
    spec = cell.fleet
    count = prefill_backends(spec, kinds, requests)
    halves = []
    for first, end, half_tiers, letter in (
        (0, count, prefill_tiers(tiers), "p"),
        (count, len(kinds), tiers, "d"),
    ):
        own = kinds[first:end]
        names = [f"{letter}{index:04}" for index in range(len(own))]
        faults = tuple(
            replace(fault, backend=fault.backend - first) for fault in spec.faults if first <= fault.backend < end
        )
        if letter == "p":
            own_setup = replace(
                setup,
                policy=setup.prefill_policy or setup.policy,
                chunk_tokens=min(setup.chunk_tokens or PREFILL_STEP_TOKENS, PREFILL_STEP_TOKENS),
            )
        else:
            own_setup = setup
        made = dispatchers(names, own, spec, own_setup, half_tiers, cell.seed)
        if letter == "p":
            _tell_lengths(made, half_tiers, FixedLength(1.0))
        else:
            # answers are learned whole, at the end of the decode half; the mean does for both
            _tell_lengths(made, half_tiers, FixedLength(max(requests.mean_output_tokens - 1.0, 1.0)))
        halves.append(Half(made, engine_makers(names, own, spec, own_setup), replace(options, faults=faults)))
    link = Link(spec.transfer_bytes_per_s, spec.kv_bytes_per_token)
    return DisaggregatedFleet(halves[0], halves[1], link)


def prefill_backends(spec: FleetSpec, kinds: list[Kind], requests: Offered) -> int:
    """How many of a disaggregated fleet's backends prefill: as told, else by the reference model's costs.

    Raises ValueError when either half would be empty.
    """
    most = len(kinds) - 1
    if spec.prefill_backends is not None:
        if not 1 <= spec.prefill_backends <= most:
            raise ValueError(f"prefill_backends must be 1 to {most}, not {spec.prefill_backends}")
        return spec.prefill_backends
    if most < 1:
        raise ValueError("backends: a disaggregated fleet needs at least two")
    try:
        needs = needs_of(islice(requests, _SPLIT_REQUESTS), prefix_caching=spec.prefix_caching)
    except ValueError as error:
        raise ValueError(
            f"prefill_backends: the costs do not say how to split the fleet, set it ({error})"
        ) from None
    apart = reference(kinds[0].step_time, kinds[0].limits, needs, Form.DISAGGREGATED)
    return apart.prefill_backends(len(kinds))


class _Learner:
    """Tells dispatchers how long answers become, as the gateway does; nothing when lengths are not learned."""

    def __init__(self, made: list[Dispatcher], tiers: TierSet, *, learns: bool) -> None:
        self._made = made
        self._tiers = tiers
        self._book = LengthBook() if learns else None
        self._agenda: Agenda | None = None

    def observe(self, served: Served) -> None:
        if self._book is not None and served.times is not None:
            self._book.observe(MODEL, self._name(served), served.times.tokens, finished=True)

    def _name(self, served: Served) -> str:
        tier = served.sim.request.tier
        return tier if tier in self._tiers else self._tiers.default

    def begin(self, agenda: Agenda) -> None:
        if self._book is not None:
            self._agenda = agenda
            agenda.at(_LEARNING_PERIOD_S, self._tell)

    def _tell(self) -> None:
        if self._book is None or self._agenda is None:
            return
        for tier in self._tiers.tiers:
            snapshot = self._book.snapshot(MODEL, tier.name)
            for dispatcher in self._made:
                dispatcher.handle(ev.LengthsChanged(MODEL, tier.name, snapshot), self._agenda.now_s)
        self._agenda.at(self._agenda.now_s + _LEARNING_PERIOD_S, self._tell)


def _lengths(made: list[Dispatcher], setup: Setup, tiers: TierSet, mean_tokens: float) -> _Learner:
    _tell_lengths(made, tiers, FixedLength(mean_tokens))
    return _Learner(made, tiers, learns=setup.lengths == "learned")


def _tell_lengths(made: list[Dispatcher], tiers: TierSet, lengths: FixedLength) -> None:
    for dispatcher in made:
        for tier in tiers.tiers:
            dispatcher.handle(ev.LengthsChanged(MODEL, tier.name, lengths), 0.0)


# --- measuring ---------------------------------------------------------------------------------------------


class _Window:
    """The time in which measured requests arrive, and what the fleet had spent at its ends."""

    def __init__(self, cell: Cell, run: _Run) -> None:
        self._first = cell.warmup_requests
        self._last = cell.warmup_requests + cell.measured_requests - 1
        self._run = run
        self.begins_s = self.ends_s = 0.0
        self._at_begin = self._at_end = (0.0, 0.0)

    def watch(self, requests: Iterator[SimRequest]) -> Iterator[SimRequest]:
        for index, sim in enumerate(requests):
            if index == self._first:
                self.begins_s = sim.request.arrival_s
                self._run.agenda.at(self.begins_s, self._begin)
            if index == self._last:
                self.ends_s = sim.request.arrival_s
                self._run.agenda.at(self.ends_s, self._end)
            yield sim

    def _begin(self) -> None:
        self._at_begin = (self._run.backend_seconds(), self._run.busy_s())

    def _end(self) -> None:
        self._at_end = (self._run.backend_seconds(), self._run.busy_s())

    @property
    def length_s(self) -> float:
        return self.ends_s - self.begins_s

    @property
    def backend_seconds(self) -> float:
        return self._at_end[0] - self._at_begin[0]

    @property
    def busy_s(self) -> float:
        return self._at_end[1] - self._at_begin[1]


def _outcome(cell: Cell, result: SimResult, window: _Window, left_out: float) -> CellOutcome:
    measured = [served for served in result.served if served.sim.measured]
    names = [tier.name for tier in tier_set(cell.workload).tiers]
    by_tier: dict[str, list[Served]] = {name: [] for name in names}
    for served in measured:
        by_tier[served.sim.request.tier].append(served)
    finished = sum(served.end is RequestEnd.FINISHED for served in result.served)
    backend_seconds = window.backend_seconds or window.length_s * cell.fleet.backends
    refused = [served.reason or "" for served in measured if served.end is RequestEnd.REFUSED]
    rungs = [served.rung.value for served in measured if served.rung is not None]
    ttft_pairs = [
        (served.predicted_ttft_s, served.ttft_s)
        for served in measured
        if served.predicted_ttft_s is not None and served.ttft_s is not None
    ]
    tpot_pairs = [
        (served.predicted_tpot_s, served.tpot_s)
        for served in measured
        if served.predicted_tpot_s is not None and served.tpot_s is not None
    ]
    return CellOutcome(
        tiers=tuple(_tier_outcome(name, by_tier[name]) for name in names),
        overall=_tier_outcome("overall", measured),
        refusals=dict(sorted(Counter(refused).items())),
        outcomes=dict(sorted(Counter(rungs).items())),
        backend_seconds=backend_seconds,
        backend_seconds_busy=window.busy_s,
        instance_s_per_request=result.busy_s / finished if finished else None,
        window_s=window.length_s,
        ended_s=result.ended_s,
        preemptions=result.preemptions,
        decisions=len(result.decision_s),
        left_out=left_out,
        predicted_ttft=score_predictions(ttft_pairs),
        predicted_tpot=score_predictions(tpot_pairs),
        samples=result.samples,
        control=dict(sorted(result.control.items())),
    )


def _tier_outcome(name: str, served: list[Served]) -> TierOutcome:
    ttft_s = sorted(one.ttft_s for one in served if one.ttft_s is not None)
    tpot_s = sorted(one.tpot_s for one in served if one.tpot_s is not None)
    ends = Counter(one.end for one in served)
    return TierOutcome(
        tier=name,
        offered=len(served),
        attained=sum(one.attained for one in served),
        attained_one_based=sum(one.attained_one_based for one in served),
        finished=ends[RequestEnd.FINISHED],
        refused=ends[RequestEnd.REFUSED],
        failed=ends[RequestEnd.FAILED],
        ttft_p50_s=quantile(ttft_s, 0.5),
        ttft_p99_s=quantile(ttft_s, 0.99),
        tpot_p50_s=quantile(tpot_s, 0.5),
        tpot_p99_s=quantile(tpot_s, 0.99),
        unpromised=sum(not one.promised for one in served),
    )
