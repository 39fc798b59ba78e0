"""One request inside the gateway: where it stands, what it has counted, and what the core wants done with it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Self

from scheduling.decisions import Decision
from scheduling.events import EndKind, Hold, Open, Refuse, Reserve
from scheduling.requests import Request

if TYPE_CHECKING:
    from gateway.dispatch import Shell

Order = Reserve | Open | Hold | Refuse


class Stage(Enum):
    HELD = "held"  # in the dispatcher: being placed, or waiting
    OPENING = "opening"  # a place is reserved; the engine has not answered with a token
    RUNNING = "running"
    ENDED = "ended"


class Ticket:
    """The handle of one request's handler on the shell. Leave it as an async context manager: every exit path
    then ends the lease exactly once.

    The handler writes `output_tokens` and the `_s` times while it relays; a ticker reads them.
    """

    __slots__ = (
        "_orders",
        "_shell",
        "_waiter",
        "abort",
        "abort_client",
        "alone_at",
        "backend",
        "decision",
        "held_since_s",
        "last_bytes_s",
        "last_token_s",
        "lease_id",
        "merged",
        "opened_s",
        "output_tokens",
        "request",
        "reserving",
        "seen_s",
        "seen_tokens",
        "stage",
        "stalled",
        "waits_for_client",
        "was_held",
    )

    def __init__(self, shell: Shell, request: Request) -> None:
        self._shell = shell
        self._orders: deque[Order] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.request = request
        self.stage = Stage.HELD
        self.lease_id: str | None = None
        self.reserving: Reserve | None = None  # was asked for and not yet answered
        self.backend: str | None = None
        self.decision: Decision | None = None
        self.abort: Callable[[], None] | None = None  # closes the engine's answer; set by the relay
        self.abort_client: Callable[[], None] | None = None  # closes the client's connection
        self.stalled = False
        self.alone_at: int | None = None  # the shell's mark of a prefill that had its backend for itself
        self.merged = False  # its events carry several tokens, by their text or by the engine's usage
        self.output_tokens = 0
        self.opened_s = 0.0
        self.last_bytes_s = 0.0
        self.last_token_s = 0.0
        self.waits_for_client = False
        self.was_held = False
        self.held_since_s = request.arrival_s
        self.seen_tokens = 0  # the ticker's memory of its last look
        self.seen_s = 0.0

    def asked(self) -> list[Reserve]:
        """Leases the core waits for that this handler has not asked of the store, or had no answer for."""
        asked = [order for order in self._orders if isinstance(order, Reserve)]
        return asked if self.reserving is None else [self.reserving, *asked]

    def give(self, order: Order) -> None:
        """The shell hands over what the core decided."""
        self._orders.append(order)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def next_order(self, patience_s: float | None = None) -> Open | Refuse | None:
        """The next thing to do; None when `patience_s` passed first. Reservations are made on the way."""
        while True:
            while self._orders:
                order = self._orders.popleft()
                self.decision = order.decision
                if isinstance(order, Open):
                    self.lease_id = order.lease_id
                    self.backend = order.backend
                    self._shell.opening(self)
                    return order
                if isinstance(order, Refuse):
                    return order
                if isinstance(order, Reserve):
                    self.reserving = order
                    await self._shell.reserve(order)
                    self.reserving = None
                else:
                    self.was_held = True
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                if patience_s is None:
                    await self._waiter
                else:
                    async with asyncio.timeout(patience_s):
                        await self._waiter
            except TimeoutError:
                return None
            finally:
                self._waiter = None

    def first_token(self) -> None:
        """The engine began to answer."""
        self._shell.first_token(self)

    def open_failed(self, *, retryable: bool, cause: str, at_fault: bool = True) -> None:
        """The backend failed before the client's first byte; the next order says what follows."""
        self._shell.open_failed(self, retryable=retryable, cause=cause, at_fault=at_fault)

    def ended(self, kind: EndKind) -> None:
        """The exchange is over; idempotent."""
        self._shell.ended(self, kind)

    async def __aenter__(self) -> Self:
        self._shell.arrived(self)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.stage is not Stage.ENDED:
            gone = kind is None or issubclass(kind, (asyncio.CancelledError, ConnectionError))
            self._shell.left(self, EndKind.CANCELLED if gone else EndKind.FAILED)
        await self._shell.settle()
