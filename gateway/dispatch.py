"""The shell around the dispatcher: it carries out what the core decides and tells it what happened.

Every request's own handler makes its reservations and opens its stream, so no task is made for it. The shell owns
four tasks: one that ends leases and moves backends in the store, one that listens to the store, one that publishes
to it, and a ticker.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.pace import Pace
from gateway.publishing import Core as Published
from gateway.publishing import Publisher, waiting_of
from gateway.ticket import Stage, Ticket
from scheduling.events import (
    Action,
    Arrived,
    Cancelled,
    Claim,
    Claimed,
    ClaimRefused,
    Ended,
    EndKind,
    Event,
    FirstToken,
    HandBack,
    HandBackRefused,
    HandedBack,
    LoadPublished,
    MembershipChanged,
    OpenFailed,
    OthersHold,
    Refuse,
    Release,
    Reserve,
    Reserved,
    ReserveRefused,
    TimePassed,
)
from scheduling.requests import Request
from state.contract import Changed, Granted, HeldEvent, Store, StoreUnavailable

_STORE_TRIES = 3
_STORE_PAUSE_S = 0.05


class Core(Published, Protocol):
    """What the shell needs of a dispatcher."""

    def handle(self, event: Event, now_s: float) -> list[Action]: ...

    def next_wake_s(self) -> float | None: ...


@dataclass(slots=True)
class Counts:
    """Where all requests went: arrived = finished + failed + refused + cancelled + held + running."""

    arrived: int = 0
    finished: int = 0
    failed: int = 0
    refused: int = 0
    cancelled: int = 0
    retried: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """How the ticker looks after streams: its period, and what it takes for a stall."""

    tick_s: float = 0.05
    stall_s: float = 120.0
    client_stall_s: float = 300.0


class Shell:
    """The dispatcher's hands. One per gateway; all methods run on one event loop."""

    def __init__(
        self,
        core: Core,
        store: Store,
        clock: Callable[[], float],
        timing: Timing = Timing(),
    ) -> None:
        self._core = core
        self._store = store
        self._clock = clock
        self._timing = timing
        self._tickets: dict[str, Ticket] = {}
        self._publisher = Publisher(core, store, clock)
        self._releases: deque[tuple[str, str]] = deque()  # lease, backend
        self._moves: deque[Claim | HandBack] = deque()
        self._work = asyncio.Event()
        self._left = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = float("inf")
        self.counts = Counts()
        self.pace = Pace()
        self.loop_lag_s = 0.0
        self.loop_lag_max_s = 0.0
        self.store_down = False

    # --- requests ------------------------------------------------------------------------------------------

    def admit(self, request: Request) -> Ticket:
        """A ticket for a request; entering it tells the core that the request arrived."""
        return Ticket(self, request)

    def arrived(self, ticket: Ticket) -> None:
        """A request came in."""
        self._tickets[ticket.request.request_id] = ticket
        self.counts.arrived += 1
        try:
            self.feed(Arrived(ticket.request))
        except BaseException:
            # The core does not know it, and its handler will not come back to end it.
            self._leave(ticket)
            self.counts.failed += 1
            raise

    async def reserve(self, order: Reserve) -> None:
        """Ask the store for a place and tell the core what it said."""
        for attempt in range(_STORE_TRIES):
            try:
                answer = await self._store.reserve(order.lease_id, order.candidates)
            except StoreUnavailable:
                self.store_down = True
                if attempt + 1 < _STORE_TRIES:
                    await asyncio.sleep(_STORE_PAUSE_S)
                continue
            self.store_down = False
            if isinstance(answer, Granted):
                self.feed(Reserved(order.request_id, order.lease_id, answer.backend))
                return
            for backend, membership in answer.memberships.items():
                self.feed(MembershipChanged(backend, membership.tier, membership.epoch))
            self.feed(ReserveRefused(order.request_id, order.lease_id, answer.foreign))
            return
        self._give_up(order)

    def _give_up(self, order: Reserve) -> None:
        """Whether the store granted it is unknown: releasing is idempotent and ends it either way."""
        for candidate in order.candidates:
            self._release(order.lease_id, candidate.backend)
        self.feed(ReserveRefused(order.request_id, order.lease_id, {}))

    def opening(self, ticket: Ticket) -> None:
        """The ticket's stream is about to be opened."""
        self.pace.opening(ticket)
        ticket.stage = Stage.OPENING

    def first_token(self, ticket: Ticket) -> None:
        """The engine began to answer."""
        assert ticket.lease_id is not None
        self._opened(ticket)
        ticket.stage = Stage.RUNNING
        self.feed(FirstToken(ticket.lease_id))
        self.pace.first_token(ticket)

    def _opened(self, ticket: Ticket) -> None:
        if ticket.stage is Stage.OPENING:
            self.pace.opened(ticket)

    def open_failed(self, ticket: Ticket, *, retryable: bool, cause: str, at_fault: bool = True) -> None:
        assert ticket.lease_id is not None
        self._opened(ticket)
        lease_id, ticket.lease_id, ticket.backend = ticket.lease_id, None, None
        ticket.stage = Stage.HELD
        self.counts.retried += retryable
        self.feed(OpenFailed(ticket.request.request_id, lease_id, retryable, cause, at_fault))

    def ended(self, ticket: Ticket, kind: EndKind) -> None:
        """The engine's answer is over. Idempotent."""
        if ticket.stage is Stage.ENDED:
            return
        assert ticket.lease_id is not None
        self._leave(ticket)
        match kind:
            case EndKind.FINISHED:
                self.counts.finished += 1
            case EndKind.FAILED:
                self.counts.failed += 1
            case EndKind.CANCELLED:
                self.counts.cancelled += 1
        self.counts.tokens += ticket.output_tokens
        self.feed(Ended(ticket.lease_id, kind, ticket.output_tokens))

    def left(self, ticket: Ticket, kind: EndKind) -> None:
        """The handler ended without saying how: client gone, or an error of ours."""
        if ticket.stage in {Stage.OPENING, Stage.RUNNING}:
            self.ended(ticket, kind)
            return
        if ticket.stage is Stage.ENDED:
            return
        self._leave(ticket)
        self.counts.cancelled += 1
        self.feed(Cancelled(ticket.request.request_id))
        for order in ticket.asked():
            self._give_up(order)

    def _leave(self, ticket: Ticket) -> None:
        self._opened(ticket)
        ticket.stage = Stage.ENDED
        self._left.set()
        self._tickets.pop(ticket.request.request_id, None)

    # --- the core ------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Tell the core what happened, and hand out what it wants done."""
        for action in self._core.handle(event, self._clock()):
            match action:
                case Release():
                    self._release(action.lease_id, action.backend)
                case Claim() | HandBack():
                    self._moves.append(action)
                    self._work.set()
                case _:
                    ticket = self._tickets.get(action.request_id)
                    if ticket is None:
                        continue
                    if isinstance(action, Refuse):
                        self._leave(ticket)
                        self.counts.refused += 1
                    ticket.give(action)
        self._arm()

    def move(self, claim: Claim) -> None:
        """Have a backend work for another tier, if nobody has moved it meanwhile."""
        self._moves.append(claim)
        self._work.set()

    def _arm(self) -> None:
        wake_s = self._core.next_wake_s()
        if wake_s is None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
                self._timer_at_s = float("inf")
            return
        if self._timer is not None:
            if wake_s == self._timer_at_s:
                return
            self._timer.cancel()
        self._timer_at_s = wake_s
        # A hair late rather than early: an early wake would find nothing due and come back at once.
        delay_s = max(0.0, wake_s - self._clock()) + 0.001
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._timer_at_s = float("inf")
        self.feed(TimePassed())

    # --- the store -----------------------------------------------------------------------------------------

    def _release(self, lease_id: str, backend: str) -> None:
        self._publisher.ending(backend)
        self._releases.append((lease_id, backend))
        self._work.set()

    async def settle(self) -> None:
        """Release what waits for it. A lease stays in the queue until the store has answered."""
        while self._releases:
            lease_id, backend = self._releases.popleft()
            try:
                await self._store.release(lease_id)
            except StoreUnavailable:
                self.store_down = True
                self._releases.append((lease_id, backend))
                return
            except asyncio.CancelledError:
                self._releases.append((lease_id, backend))
                self._work.set()
                raise
            self._publisher.ended(backend)

    async def _work_off(self) -> None:
        """End leases nobody waits for, and move backends between tiers."""
        while True:
            await self._work.wait()
            self._work.clear()
            await self.settle()
            while self._moves:
                move = self._moves.popleft()
                try:
                    await self._move(move)
                except StoreUnavailable:
                    self.store_down = True
                    self._moves.append(move)
                    break
            if self._releases or self._moves:
                await asyncio.sleep(_STORE_PAUSE_S)
                self._work.set()

    async def _move(self, move: Claim | HandBack) -> None:
        if isinstance(move, Claim):
            answer = await self._store.claim(move.backend, move.tier, move.expected_epoch)
            stands = answer.membership
            if isinstance(answer, Changed):
                self.feed(Claimed(move.backend, move.tier, stands.epoch))
            else:
                self.feed(ClaimRefused(move.backend, stands.tier, stands.epoch))
            return
        answer = await self._store.hand_back(move.backend, move.expected_epoch)
        stands = answer.membership
        if isinstance(answer, Changed):
            self.feed(HandedBack(move.backend, stands.epoch))
        else:
            self.feed(HandBackRefused(move.backend, stands.tier, stands.epoch))

    async def _watch(self) -> None:
        async for event in self._store.watch():
            if isinstance(event, HeldEvent):
                self.feed(OthersHold(event.replica, waiting_of(event.held, self._clock())))
                continue
            stands = event.load.membership
            self.feed(MembershipChanged(event.backend, stands.tier, stands.epoch))
            self.feed(LoadPublished(event.backend, event.load.foreign))
            self.pace.others(event.backend, event.load.foreign, self._clock())

    # --- the ticker ----------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        period_s = self._timing.tick_s
        due_s = self._clock() + period_s
        while True:
            await asyncio.sleep(max(0.0, due_s - self._clock()))
            now_s = self._clock()
            self.loop_lag_s = max(0.0, now_s - due_s)
            self.loop_lag_max_s = max(self.loop_lag_max_s, self.loop_lag_s)
            due_s = max(due_s + period_s, now_s)
            self.look(now_s)
            self._publisher.begin()

    def look(self, now_s: float) -> None:
        """Tell the core where the streams are, and end what has stalled."""
        tickets = self.tickets()
        for ticket in tickets:
            if ticket.abort is not None:
                self._end_stalled(ticket, now_s)
        for event in self.pace.look(tickets, now_s):
            self.feed(event)

    def _end_stalled(self, ticket: Ticket, now_s: float) -> None:
        silent_s = now_s - ticket.last_bytes_s
        limit_s = self._timing.client_stall_s if ticket.waits_for_client else self._timing.stall_s
        if silent_s <= limit_s:
            return
        abort = ticket.abort_client if ticket.waits_for_client else ticket.abort
        ticket.stalled = True
        ticket.abort = ticket.abort_client = None
        if abort is not None:
            abort()

    # --- life ----------------------------------------------------------------------------------------------

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Start the shell's tasks; they run until they are cancelled."""
        self.feed(TimePassed())
        return [
            tasks.create_task(self._work_off(), name="store-work"),
            tasks.create_task(self._watch(), name="store-watch"),
            tasks.create_task(self._publisher.run(), name="store-publish"),
            tasks.create_task(self._tick(), name="ticker"),
        ]

    def stop_timer(self) -> None:
        """No wake-up any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def held(self) -> int:
        """Requests without an open stream."""
        return sum(ticket.stage is Stage.HELD for ticket in self._tickets.values())

    @property
    def running(self) -> int:
        """Requests on an engine, prefill included."""
        return len(self._tickets) - self.held

    async def wait_empty(self, backend: str | None = None) -> None:
        """Wait until no request is left, or none on this backend."""
        while any(backend is None or ticket.backend == backend for ticket in self._tickets.values()):
            self._left.clear()
            await self._left.wait()

    def running_lengths(self) -> dict[tuple[str, str], list[int]]:
        """Tokens a sequence of every open stream, by (model, tier)."""
        found: dict[tuple[str, str], list[int]] = {}
        for ticket in self._tickets.values():
            if ticket.stage is Stage.RUNNING:
                request = ticket.request
                tokens = ticket.output_tokens // request.sequences
                found.setdefault((request.model, request.tier), []).append(tokens)
        return found

    def passing_leases(self) -> list[str]:
        """Leases that are being asked for, and those whose end the store was not told yet."""
        asked = [ticket.reserving.lease_id for ticket in self._tickets.values() if ticket.reserving is not None]
        return asked + [lease_id for lease_id, _ in self._releases]

    def tickets(self) -> list[Ticket]:
        """Every request that has not ended."""
        return list(self._tickets.values())
