"""One gateway replica of a simulated fleet: a dispatcher, and the shell that carries its actions out."""

from __future__ import annotations

from time import perf_counter
from typing import Protocol

from scheduling import events as ev
from scheduling.decisions import Outcome
from scheduling.dispatcher import Dispatcher
from scheduling.requests import Request
from scheduling.rivals import Waiting
from scheduling.scoring import RequestEnd
from simulator.agenda import Agenda
from simulator.engines import StreamTimes
from simulator.requests import SimRequest
from simulator.served import Served
from simulator.store import SimStore, View
from state.contract import Publication
from tiergate_engine.model import SequenceTooLong

TIMER_LATE_S = 0.001
"""How late the dispatcher is told that its time has come, as in the live gateway."""

TELL_ANEW_S = 1.0
"""How often replicas repeat what they hold, as in the live gateway."""


class Home(Protocol):
    """The fleet as a replica needs it. `starting` are backends that were claimed and do not serve yet."""

    agenda: Agenda
    starting: set[str]

    def open(
        self, replica: Replica, sim: SimRequest, lease_id: str, backend: str, *, relegated: bool = False
    ) -> bool: ...

    def close(self, lease_id: str, backend: str, request: Request) -> StreamTimes: ...

    def ended(self, served: Served) -> None: ...


class Replica:
    """Carries the actions of one dispatcher out. `timed`: measure what each decision takes here."""

    def __init__(
        self, fleet: Home, dispatcher: Dispatcher, store: SimStore | None, startup_s: float, timed: bool
    ) -> None:
        self.dispatcher = dispatcher
        self.decision_s: list[float] = []
        self._fleet = fleet
        self._agenda = fleet.agenda
        self._store = store
        self._view = View()
        self._held: tuple[Waiting, ...] = ()
        self._held_anew_s = 0.0
        self._wake_s: float | None = None
        self._requests: dict[str, SimRequest] = {}
        self._open: dict[str, tuple[SimRequest, ev.Open]] = {}  # by lease
        self._startup_s = startup_s
        self._timed = timed

    def join_store(self) -> None:
        """Make the backends known to the store, which says how they stand; claim those that the dispatcher dealt
        to tiers when it was told of them, before there was anybody to claim them for it."""
        if self._store is not None:
            for ledger in list(self.dispatcher.fleet):
                membership = self._store.add_backend(ledger.backend.name, ledger.tier)
                self.tell(ev.MembershipChanged(ledger.backend.name, membership.tier, membership.epoch))
        for ledger in list(self.dispatcher.fleet):
            if ledger.claiming_for is not None:
                self._claim(ev.Claim(ledger.backend.name, ledger.claiming_for, ledger.epoch, "dealt"))

    def publish(self) -> None:
        """Tell the store what this replica carries, where that is news. Its answer comes at once, and there is
        never a lease that it has not answered for."""
        if self._store is None:
            return
        dispatcher = self.dispatcher
        begun: list[Publication] = []
        for ledger in dispatcher.fleet:
            name = ledger.backend.name
            sequence = self._store.sequence_of(name)
            own = dispatcher.begin_publish(name, self._agenda.now_s)
            if own is not None:
                begun.append(Publication(name, own, sequence + 1))
        taken = self._store.publish(begun)
        for one in begun:
            dispatcher.settle_publish(one.backend, one.backend in taken)

    def held_news(self) -> tuple[Waiting, ...] | None:
        """What others are to be told that this replica holds; None when they know, and were told of late."""
        first, now_s = self.dispatcher.first_held(), self._agenda.now_s
        if first == self._held and (not first or now_s < self._held_anew_s):
            return None
        self._held, self._held_anew_s = first, now_s + TELL_ANEW_S
        return first

    def changes(self, hidden: set[str]) -> list[ev.Event]:
        """What the store says of the others that this replica was not told yet, but of some backends."""
        if self._store is None:
            return []
        return self._view.changes({name: load for name, load in self._store.view().items() if name not in hidden})

    def arrive(self, sim: SimRequest) -> None:
        self._requests[sim.request.request_id] = sim
        if not self._timed:
            self.tell(ev.Arrived(sim.request))
            return
        began_s = perf_counter()
        actions = self.dispatcher.handle(ev.Arrived(sim.request), self._agenda.now_s)
        self.decision_s.append(perf_counter() - began_s)
        self._carry_all_out(actions)

    def tell(self, event: ev.Event) -> None:
        self._carry_all_out(self.dispatcher.handle(event, self._agenda.now_s))

    def _carry_all_out(self, actions: list[ev.Action]) -> None:
        for action in actions:
            self._carry_out(action)
        self.set_timer()

    def set_timer(self) -> None:
        """Have the dispatcher told when its time has come."""
        at_s = self.dispatcher.next_wake_s()
        if at_s != self._wake_s:
            self._wake_s = at_s
            if at_s is not None:
                self._agenda.at(max(at_s, self._agenda.now_s) + TIMER_LATE_S, lambda: self._wake(at_s))

    def _wake(self, at_s: float) -> None:
        if self._wake_s != at_s:
            return  # another time is wanted by now
        self._wake_s = None
        self.tell(ev.TimePassed())

    def _carry_out(self, action: ev.Action) -> None:
        match action:
            case ev.Reserve(request_id, lease_id, candidates):
                if self._store is None:
                    self.tell(ev.Reserved(request_id, lease_id, candidates[0].backend))
                else:
                    answer = self._store.reserve(request_id, lease_id, candidates)
                    if isinstance(answer, ev.ReserveRefused):
                        self._view.forget(answer.foreign)
                    self.tell(answer)
            case ev.Open():
                self._open_stream(action)
            case ev.Refuse(request_id, refusal):
                self._end(self._requests[request_id], None, RequestEnd.REFUSED, refusal.kind.value)
            # The store is asked to move a backend when all that happens at this instant has been told.
            case ev.Claim():
                self.move(action)
            case ev.HandBack():
                self._agenda.soon(lambda: self._hand_back(action))
            case ev.Release(lease_id):
                if self._store is not None:
                    self._store.release(lease_id)
            case ev.Hold():
                pass

    def _open_stream(self, action: ev.Open) -> None:
        sim = self._requests[action.request_id]
        self._open[action.lease_id] = (sim, action)
        try:
            relegated = action.decision.outcome is Outcome.RELEGATED
            opened = self._fleet.open(self, sim, action.lease_id, action.backend, relegated=relegated)
        except SequenceTooLong as error:
            del self._open[action.lease_id]
            self.tell(ev.OpenFailed(action.request_id, action.lease_id, retryable=False, cause=str(error)))
            self._end(sim, action, RequestEnd.FAILED, "too_long")
            return
        if not opened:
            # To be turned away takes longer than to hear from the store, or of streams that broke off.
            self._agenda.soon(lambda: self.lost(action.lease_id, 0), turns=2)

    def _hand_back(self, action: ev.HandBack) -> None:
        backend, epoch = action.backend, action.expected_epoch
        if self._store is not None:
            self.tell(self._store.hand_back(backend, epoch))
            return
        ledger = self.dispatcher.fleet[backend]
        if ledger.idle:
            self.tell(ev.HandedBack(backend, epoch + 1))
        else:
            self.tell(ev.HandBackRefused(backend, ledger.tier, ledger.epoch))

    def move(self, claim: ev.Claim) -> None:
        """Have a backend work for another tier, if nobody has moved it meanwhile."""
        self._agenda.soon(lambda: self._claim(claim))

    def _claim(self, action: ev.Claim) -> None:
        backend = action.backend
        answer: ev.Event
        if self._store is None:
            answer = ev.Claimed(backend, action.tier, action.expected_epoch + 1)
        else:
            answer = self._store.claim(backend, action.tier, action.expected_epoch)
        # a policy without a pool is dealt backends that run already
        from_pool = self.dispatcher.policy.uses_pool and self.dispatcher.fleet[backend].tier is None
        wait_s = self._startup_s if from_pool and isinstance(answer, ev.Claimed) else 0.0
        if not wait_s:
            self.tell(answer)
            return
        self._fleet.starting.add(backend)

        def started() -> None:
            self._fleet.starting.discard(backend)
            self.tell(answer)

        self._agenda.at(self._agenda.now_s + wait_s, started)

    def finished(self, lease_id: str, tokens: int) -> None:
        """A stream came to its natural end."""
        sim, action = self._open.pop(lease_id)
        self._end(sim, action, RequestEnd.FINISHED, None)
        self.tell(ev.Ended(lease_id, ev.EndKind.FINISHED, tokens))

    def lost(self, lease_id: str, tokens: int) -> None:
        """A stream's engine crashed after `tokens` tokens; before the first, another backend may be tried."""
        sim, action = self._open.pop(lease_id)
        if tokens:
            self._end(sim, action, RequestEnd.FAILED, "engine_down")
            self.tell(ev.Ended(lease_id, ev.EndKind.FAILED, tokens))
        else:
            self.tell(ev.OpenFailed(action.request_id, lease_id, retryable=True, cause="engine down"))

    def _end(self, sim: SimRequest, action: ev.Open | None, end: RequestEnd, reason: str | None) -> None:
        request = sim.request
        del self._requests[request.request_id]
        times = None
        predicted_ttft_s = predicted_tpot_s = None
        if action is not None:
            if end is RequestEnd.FINISHED:
                times = self._fleet.close(action.lease_id, action.backend, request)
            for candidate in reversed(action.decision.candidates):
                if candidate.backend == action.backend:
                    predicted_ttft_s, predicted_tpot_s = candidate.ttft_s, candidate.tpot_s
                    break
        self._fleet.ended(
            Served(
                sim=sim,
                end=end,
                ended_s=self._agenda.now_s,
                reason=reason,
                rung=None if action is None else action.decision.outcome,
                backend=None if action is None else action.backend,
                times=times,
                predicted_ttft_s=predicted_ttft_s,
                predicted_tpot_s=predicted_tpot_s,
            )
        )
