"""A fleet on a virtual clock: the second shell around the dispatcher.

The very dispatcher that serves live gets its events from `tiergate_engine.model` engines and an agenda instead of
sockets. One replica has a store that always agrees; several share the store in memory, and know of each other's
load what the fleet's `view_age_s` lets them. True output lengths are known to `SimRequest` and the engines only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from scheduling import events as ev
from scheduling.backends import BackendState
from scheduling.dispatcher import Dispatcher
from scheduling.knobs import Means
from scheduling.requests import Request
from scheduling.tiers import Slo
from simulator.agenda import Agenda
from simulator.driving import SimDriving
from simulator.engines import SimEngine, Stream, StreamTimes
from simulator.health import Watch
from simulator.outcome import Sample
from simulator.replica import Replica
from simulator.requests import SimRequest
from simulator.scenario import Fault, FaultKind
from simulator.served import Served, SimResult
from simulator.store import shared_stores
from tiergate_engine.model import EngineModel, SequenceSpec

PROGRESS_PERIOD_S = 0.05
"""How often streams' counters are read, as in the live gateway."""

_NO_SLO = Slo(None, None)


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How the fleet is run.

    Attributes:
        driven: engines cut their chunks to the pace of who is on board.
        received: prompts come with their KV computed (the decode half of a disaggregated fleet).
        view_age_s: how old a replica's knowledge of the others' load is.
        startup_s: how long a backend taken from the pool takes until it serves.
        faults: what happens to which backend, by its place in the order of their names.
        sample_s: how often the gradient is written down; None: never.
        time_decisions: whether the time each decision takes here is measured.
        means: what the replicas' controllers may set on the engines; None: there are no controllers.
    """

    driven: bool = False
    received: bool = False
    view_age_s: float = 0.0
    startup_s: float = 0.0
    faults: tuple[Fault, ...] = ()
    sample_s: float | None = None
    time_decisions: bool = False
    means: Means | None = None


class SimFleet:
    """Run `run(requests)` once. Engines are made by the name of their backend in the dispatchers, one dispatcher a
    gateway replica, all told of the same backends."""

    def __init__(
        self,
        dispatchers: Sequence[Dispatcher],
        engines: Mapping[str, Callable[[], EngineModel]],
        options: FleetOptions | None = None,
        agenda: Agenda | None = None,
        on_end: Callable[[Served], None] | None = None,
    ) -> None:
        self.options = options or FleetOptions()
        self.agenda = agenda or Agenda()
        self.served: list[Served] = []
        self.samples: list[Sample] = []
        self.starting: set[str] = set()
        self._on_end = on_end
        stores = shared_stores(len(dispatchers), self.agenda) if len(dispatchers) > 1 else [None]
        self.replicas = [
            Replica(self, dispatcher, store, self.options.startup_s, self.options.time_decisions)
            for dispatcher, store in zip(dispatchers, stores, strict=True)
        ]
        self._owners: dict[str, Replica] = {}  # of leases
        self.engines = {
            name: SimEngine(
                name,
                make,
                self.agenda,
                self,
                self._pace_of(name) if self.options.driven else None,
                takes_orders=self.options.means is not None,
            )
            for name, make in sorted(engines.items())
        }
        means = self.options.means
        self.driving = [
            SimDriving(replica, self.engines, self.agenda, means) for replica in self.replicas if means is not None
        ]
        self._watches: dict[str, Watch] = {}  # of backends that will fail
        self._dealt = 0
        self._unended_measured = 0
        for replica in self.replicas:
            replica.join_store()
            replica.set_timer()
        self._start()

    @property
    def dispatcher(self) -> Dispatcher:
        """The first replica's."""
        return self.replicas[0].dispatcher

    # --- running -------------------------------------------------------------------------------------------

    def run(self, requests: Iterable[SimRequest], on_event: Callable[[], None] | None = None) -> SimResult:
        """Serve requests, given in order of arrival, until all that are measured have ended.

        `on_event` is called after every event (tests check invariants).
        """
        arrivals = Arrivals(self.agenda, iter(requests), self.arrive)
        while (arrivals.coming or self._unended_measured) and self.agenda.run_next():
            if on_event is not None:
                on_event()
        return self.result()

    def result(self) -> SimResult:
        """What there is so far."""
        now_s = self.agenda.now_s
        return SimResult(
            served=tuple(self.served),
            backend_seconds=self.backend_seconds(),
            busy_s=self.busy_s(),
            preemptions=sum(engine.preemptions for engine in self.engines.values()),
            ended_s=now_s,
            samples=tuple(self.samples),
            decision_s=tuple(took for replica in self.replicas for took in replica.decision_s),
            control=sum((driving.decisions for driving in self.driving), Counter[str]()),
        )

    def backend_seconds(self) -> float:
        """Time that backends spent in a tier so far."""
        return self.dispatcher.fleet.backend_seconds(self.agenda.now_s)

    def busy_s(self) -> float:
        """Time that engines spent in steps so far."""
        return sum(engine.busy_s for engine in self.engines.values())

    def arrive(self, sim: SimRequest) -> None:
        """A request comes to the next replica in turn."""
        self._unended_measured += sim.measured
        replica = self.replicas[self._dealt % len(self.replicas)]
        self._dealt += 1
        replica.arrive(sim)

    def _start(self) -> None:
        self.agenda.at(self.agenda.now_s, self._progress)
        names = list(self.engines)
        for fault in self.options.faults:
            name = names[fault.backend]
            if fault.kind is FaultKind.DOWN and name not in self._watches:
                self._watches[name] = self._watch(name)
            self.agenda.at(fault.from_s, lambda fault=fault, name=name: self._fault(name, fault))  # type: ignore[misc]
            self.agenda.at(fault.from_s + fault.for_s, lambda fault=fault, name=name: self._mend(name, fault))  # type: ignore[misc]
        if self.options.sample_s is not None:
            self.agenda.at(self.agenda.now_s, self._sample)

    def _watch(self, name: str) -> Watch:
        return Watch(self.agenda, lambda: self.engines[name].alive, lambda up: self._noticed(name, up))

    def _pace_of(self, name: str) -> Callable[[], float | None]:
        """The pace an engine is driven at: the shortest that anybody on board, or its host, was promised."""

        def pace_s() -> float | None:
            shortest_s = math.inf
            for replica in self.replicas:
                fleet = replica.dispatcher.fleet
                ledger = fleet[name]
                host_s = math.inf
                if ledger.tier is not None and ledger.tier in fleet.tiers:
                    host_s = ledger.binding_tpot_s(fleet.tiers[ledger.tier].host_tpot_s)
                shortest_s = min(shortest_s, host_s, ledger.tightest_tpot_s)
            return shortest_s if math.isfinite(shortest_s) else None

        return pace_s

    # --- what engines tell ---------------------------------------------------------------------------------

    def first_token(self, lease_id: str) -> None:
        """See `simulator.engines.Listener`."""
        self._owners[lease_id].tell(ev.FirstToken(lease_id))

    def finished(self, lease_id: str, tokens: int) -> None:
        """See `simulator.engines.Listener`."""
        self._owners.pop(lease_id).finished(lease_id, tokens)

    def _progress(self) -> None:
        """Read the streams' counters, backend by backend; tell replicas of each other."""
        now_s = self.agenda.now_s
        alone = len(self.replicas) == 1
        for name, engine in self.engines.items():
            look = engine.look()
            if look is None:
                continue
            age_s = now_s - engine.last_step_s
            for replica in self.replicas:
                moved = look.moved
                if not alone:
                    moved = [one for one in moved if self._owners[one[0]] is replica]
                if moved:
                    replica.tell(ev.Progressed(name, moved, look.step_s(moved), age_s))
        if not alone:
            self._tell_of_others()
        self.agenda.at(now_s + PROGRESS_PERIOD_S, self._progress)

    def _tell_of_others(self) -> None:
        age_s = self.options.view_age_s
        held: list[tuple[Replica, ev.OthersHold]] = []
        for index, replica in enumerate(self.replicas):
            replica.publish()
            first = replica.held_news()
            if first is not None:
                # what is told is how long is left, and it is as old as the rest when it comes
                waiting = tuple(replace(one, due_s=one.due_s + age_s) for one in first)
                held.append((replica, ev.OthersHold(f"replica{index}", waiting)))
        for replica in self.replicas:
            events = [event for teller, event in held if teller is not replica]
            for event in [*events, *replica.changes(self.starting)]:
                tell = lambda replica=replica, event=event: replica.tell(event)  # noqa: E731  # bound now
                self.agenda.at(self.agenda.now_s + age_s, tell)

    def open(
        self, replica: Replica, sim: SimRequest, lease_id: str, backend: str, *, relegated: bool = False
    ) -> bool:
        """Open a stream; False when the engine is not there."""
        engine = self.engines[backend]
        if not engine.alive:
            self._watches[backend].suspect()
            return False
        request = sim.request
        prompt, slo = request.prompt_tokens, request.slo
        if not engine.hears_promises:
            slo, relegated = _NO_SLO, False
        self._owners[lease_id] = replica
        engine.submit(
            SequenceSpec(
                lease_id,
                prompt,
                sim.output_tokens,
                prefix_blocks=sim.prefix_blocks,
                received_tokens=prompt if self.options.received else 0,
                first_due_s=math.inf if slo.ttft_s is None else request.arrival_s + slo.ttft_s,
                pace_s=slo.tpot_s or math.inf,
                relegated=relegated,
            ),
            streamed=request.streamed,
        )
        return True

    def close(self, lease_id: str, backend: str, request: Request) -> StreamTimes:
        """When the tokens of a stream that finished came."""
        return self.engines[backend].close(lease_id, request.arrival_s, request.slo)

    def ended(self, served: Served) -> None:
        """A request came to its end."""
        self._unended_measured -= served.sim.measured
        self.served.append(served)
        if self._on_end is not None:
            self._on_end(served)

    # --- faults --------------------------------------------------------------------------------------------

    def _fault(self, name: str, fault: Fault) -> None:
        engine = self.engines[name]
        if fault.kind is FaultKind.SLOW:
            engine.slowness *= fault.factor
            return
        tokens = dict(engine.progress())
        lost = engine.crash()
        self._lost([stream for stream in lost if stream.told], tokens)
        # A request without a byte of its answer is sent once more before it counts as failed.
        whole = [stream for stream in lost if not stream.told]
        self.agenda.soon(lambda: self._lost(whole, tokens))
        if lost:
            self._watches[name].suspect()

    def _lost(self, streams: list[Stream], tokens: dict[str, int]) -> None:
        for stream in streams:
            begun = stream.told and stream.milestones
            lease_id = stream.lease_id
            self._owners.pop(lease_id).lost(lease_id, tokens.get(lease_id, 1) if begun else 0)

    def _mend(self, name: str, fault: Fault) -> None:
        if fault.kind is FaultKind.SLOW:
            self.engines[name].slowness /= fault.factor
        else:
            self.engines[name].alive = True

    def _noticed(self, name: str, up: bool) -> None:
        """Gateways found out that a backend is up or down."""
        state = BackendState.UP if up else BackendState.DOWN
        for replica in self.replicas:
            backend = replica.dispatcher.fleet[name].backend
            replica.tell(ev.BackendChanged(replace(backend, state=state)))

    # --- looking at it -------------------------------------------------------------------------------------

    def _sample(self) -> None:
        fleet = self.dispatcher.fleet
        loads: dict[str, list[float]] = {}
        for ledger in fleet:
            loads.setdefault(ledger.tier or "pool", []).append(round(ledger.load, 4))
        held = sum(replica.dispatcher.counts.held for replica in self.replicas)
        by_tier = {tier: tuple(sorted(each, reverse=True)) for tier, each in sorted(loads.items())}
        self.samples.append(Sample(self.agenda.now_s, held, by_tier))
        self.agenda.at(self.agenda.now_s + (self.options.sample_s or math.inf), self._sample)


class Arrivals:
    """Lets requests arrive one after the other, each put on the agenda when the one before came."""

    def __init__(
        self, agenda: Agenda, requests: Iterator[SimRequest], arrive: Callable[[SimRequest], None]
    ) -> None:
        self.coming = True
        self._agenda = agenda
        self._requests = requests
        self._arrive = arrive
        self._next()

    def _next(self) -> None:
        sim = next(self._requests, None)
        if sim is None:
            self.coming = False
        else:
            self._agenda.at(sim.request.arrival_s, lambda: self._come(sim))

    def _come(self, sim: SimRequest) -> None:
        self._next()
        self._arrive(sim)
