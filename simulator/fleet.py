"""A fleet on a virtual clock: the second shell around the dispatcher.

The very dispatcher that serves live gets its events from `tiergate_engine.model` engines and a heap of times
instead of sockets. One replica whose store always agrees: what it reserves it gets. True output lengths are known
to `SimRequest` and the engines only; no policy sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from scheduling import events as ev
from scheduling.dispatcher import Dispatcher
from scheduling.requests import Request
from scheduling.scoring import RequestEnd, RequestRecord
from scheduling.tiers import Slo
from tiergate_engine.model import EngineModel, SequenceSpec

PROGRESS_PERIOD_S = 0.05
"""How often streams' counters are read, as in the live gateway."""


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request and the length its answer will really have."""

    request: Request
    output_tokens: int


@dataclass(slots=True)
class _Stream:
    """A request on an engine."""

    sim: SimRequest
    lease_id: str
    backend: str
    token_times_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Engine:
    model: EngineModel
    stepping: bool = False
    last_step_s: float = 0.0
    step_s: float | None = None


@dataclass(frozen=True, slots=True)
class SimResult:
    """What a run gave: a record per request in order of arrival, predictions beside what happened, and cost."""

    records: tuple[RequestRecord, ...]
    ttft_pairs_s: tuple[tuple[float, float], ...]  # predicted, actual
    tpot_pairs_s: tuple[tuple[float, float], ...]
    backend_seconds: float
    preemptions: int
    outcomes: dict[str, int]
    ended_s: float


class SimFleet:
    """Run `run(requests)` once. Engines are given by the name of their backend in the dispatcher."""

    def __init__(self, dispatcher: Dispatcher, engines: dict[str, EngineModel]) -> None:
        self.dispatcher = dispatcher
        self.now_s = 0.0
        self._engines = {name: _Engine(model) for name, model in engines.items()}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._requests: dict[str, SimRequest] = {}
        self._streams: dict[str, _Stream] = {}
        self._by_backend: dict[str, dict[str, _Stream]] = {name: {} for name in engines}
        self._records: dict[str, RequestRecord] = {}
        self._predicted_s: dict[str, tuple[float | None, float | None]] = {}  # TTFT and TPOT by lease
        self._ttft_pairs_s: list[tuple[float, float]] = []
        self._tpot_pairs_s: list[tuple[float, float]] = []
        self._outcomes: dict[str, int] = {}
        self._wake_s: float | None = None
        self._preempted = 0

    def run(self, requests: Sequence[SimRequest], on_event: Callable[[], None] | None = None) -> SimResult:
        """Serve all requests to their end. `on_event` is called after every event (tests check invariants)."""
        for sim in requests:
            self._requests[sim.request.request_id] = sim
            self._at(sim.request.arrival_s, lambda sim=sim: self._tell(ev.Arrived(sim.request)))  # type: ignore[misc]
        self._at(0.0, self._progress)
        left = len(requests)
        while self._heap and len(self._records) < left:
            self.now_s, _, call = heappop(self._heap)
            call()
            self._schedule_wake()
            if on_event is not None:
                on_event()
        records = tuple(
            self._records[sim.request.request_id] for sim in requests if sim.request.request_id in self._records
        )
        return SimResult(
            records,
            tuple(self._ttft_pairs_s),
            tuple(self._tpot_pairs_s),
            self.dispatcher.fleet.backend_seconds(self.now_s),
            sum(engine.model.preemptions for engine in self._engines.values()),
            dict(self._outcomes),
            self.now_s,
        )

    # --- the clock -----------------------------------------------------------------------------------------

    def _at(self, time_s: float, call: Callable[[], None]) -> None:
        heappush(self._heap, (time_s, self._sequence, call))
        self._sequence += 1

    def _schedule_wake(self) -> None:
        at_s = self.dispatcher.next_wake_s()
        if at_s is None or at_s == self._wake_s:
            return
        self._wake_s = at_s
        self._at(max(at_s, self.now_s), lambda: self._wake(at_s))

    def _wake(self, at_s: float) -> None:
        if self._wake_s == at_s:
            self._wake_s = None
        self._tell(ev.TimePassed())

    # --- carrying actions out ------------------------------------------------------------------------------

    def _tell(self, event: ev.Event) -> None:
        actions = self.dispatcher.handle(event, self.now_s)
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: ev.Action) -> None:
        match action:
            case ev.Reserve(request_id, lease_id, candidates):
                self._tell(ev.Reserved(request_id, lease_id, candidates[0].backend))
            case ev.Open(request_id, lease_id, backend, decision):
                outcome = decision.outcome.value
                self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
                chosen = [candidate for candidate in decision.candidates if candidate.backend == backend]
                if chosen:
                    self._predicted_s[lease_id] = (chosen[-1].ttft_s, chosen[-1].tpot_s)
                self._open(request_id, lease_id, backend)
            case ev.Refuse(request_id, refusal):
                self._outcomes["refused"] = self._outcomes.get("refused", 0) + 1
                self._record(self._requests[request_id], RequestEnd.REFUSED, [], refusal.kind.value)
            case ev.Claim(backend, tier, epoch):
                self._tell(ev.Claimed(backend, tier, epoch + 1))
            case ev.HandBack(backend, epoch):
                self._tell(ev.HandedBack(backend, epoch + 1))
            case ev.Hold() | ev.Release():
                pass

    def _open(self, request_id: str, lease_id: str, backend: str) -> None:
        sim = self._requests[request_id]
        stream = _Stream(sim, lease_id, backend)
        self._streams[lease_id] = stream
        self._by_backend[backend][lease_id] = stream
        engine = self._engines[backend]
        engine.model.submit(SequenceSpec(lease_id, sim.request.prompt_tokens, sim.output_tokens), self.now_s)
        if not engine.stepping:
            self._step(backend, engine)

    def _step(self, backend: str, engine: _Engine) -> None:
        planned = engine.model.next_step(self.now_s)
        engine.stepping = planned is not None
        if planned is not None:
            engine.step_s = planned.duration_s
            self._at(planned.ends_s, lambda: self._step_done(backend, engine))

    def _step_done(self, backend: str, engine: _Engine) -> None:
        emitted = engine.model.finish_step(self.now_s)
        engine.last_step_s = self.now_s
        self._step(backend, engine)
        for token in emitted:
            stream = self._streams[token.sequence_id]
            stream.token_times_s.append(self.now_s)
            if token.index == 0:
                self._tell(ev.FirstToken(stream.lease_id))
            if token.finished:
                del self._streams[stream.lease_id]
                del self._by_backend[backend][stream.lease_id]
                self._score_prediction(stream)
                self._record(stream.sim, RequestEnd.FINISHED, stream.token_times_s, None)
                self._tell(ev.Ended(stream.lease_id, ev.EndKind.FINISHED, token.index + 1))

    def _score_prediction(self, stream: _Stream) -> None:
        ttft_s, tpot_s = self._predicted_s.get(stream.lease_id, (None, None))
        times_s = stream.token_times_s
        if ttft_s is not None:
            self._ttft_pairs_s.append((ttft_s, times_s[0] - stream.sim.request.arrival_s))
        if tpot_s is not None and len(times_s) > 1:
            self._tpot_pairs_s.append((tpot_s, (times_s[-1] - times_s[0]) / (len(times_s) - 1)))

    def _progress(self) -> None:
        """Read the streams' counters, backend by backend."""
        for backend, streams in self._by_backend.items():
            if not streams:
                continue
            engine = self._engines[backend]
            progress = tuple(
                ev.Progress(lease_id, len(stream.token_times_s))
                for lease_id, stream in streams.items()
                if stream.token_times_s
            )
            self._tell(ev.Progressed(backend, progress, engine.step_s, self.now_s - engine.last_step_s))
        self._at(self.now_s + PROGRESS_PERIOD_S, self._progress)

    def _record(self, sim: SimRequest, end: RequestEnd, times_s: list[float], reason: str | None) -> None:
        request = sim.request
        self._records[request.request_id] = RequestRecord(
            request.tier,
            Slo(request.slo.ttft_s, request.slo.tpot_s),
            request.arrival_s,
            end,
            self.now_s,
            times_s,
            None,
            request.streamed,
            request.prompt_tokens,
            reason,
        )
