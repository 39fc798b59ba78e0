"""What a store missed while it was silent, and telling it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from scheduling.load import Limits, ReserveCandidate
from state.book import Book, Lease
from state.contract import BackendLoad, Denied, Held, Publication, Store, StoreUnavailable
from state.deadline import within
from state.outage import Shelter

T = TypeVar("T")

_EVERYTHING = Limits(2**53, 2**53, 2**53)
ALONE_SUFFIX = "~"
"""Ends the store's name of a lease that this replica granted on another backend than the store had."""
_AT_ONCE = 32  # calls to the store side by side
_TRIES = 3  # a membership may change between two of them


class Mending:
    """Asks the store within the deadline, and keeps what it could not be told. All methods that ask raise
    StoreUnavailable."""

    def __init__(
        self,
        inner: Store,
        book: Book,
        clock: Callable[[], float],
        options: Shelter,
        answered: Callable[[], None],
    ) -> None:
        """`answered` is called after every answer, before anything is learned from it."""
        self._answered = answered
        self._inner = inner
        self._book = book
        self._clock = clock
        self._deadline_s = options.deadline_s
        self._limit_s = max(options.deadline_s, options.first_s)
        self.met = False  # whether the store has ever answered
        self.wanted: dict[str, str | None] = {}  # backends added here, and their first tier
        self.removed: dict[str, None] = {}  # backends whose removal the store was not told
        self.owed: dict[str, None] = {}  # leases, by the store's name, whose end it was not told
        self.held: tuple[Held, ...] = ()
        self.heard_s = clock()  # when the store answered last

    async def ask(self, call: Awaitable[T]) -> T:
        """What the store answers; StoreUnavailable too when it takes longer than the deadline."""
        try:
            answer = await within(self._limit_s, call)
        except TimeoutError:
            raise StoreUnavailable(f"no answer within {self._limit_s * 1e3:.0f} ms") from None
        self._limit_s, self.met = self._deadline_s, True
        self._answered()
        self.heard_s = self._clock()
        return answer

    async def look_over(self) -> Mapping[str, BackendLoad]:
        """How everything stands, which the book learns."""
        loads = await self.ask(self._inner.view())
        now_s = self._clock()
        for backend, load in loads.items():
            self._book.told(backend, load, now_s)
        return loads

    async def pulse(self) -> Mapping[str, BackendLoad]:
        """The same, by a store that takes writes as well."""
        await self.sign()
        return await self.look_over()

    async def sign(self) -> None:
        """Give a sign of life, and get one."""
        await self.ask(self._inner.publish((), self.held))

    def learn(self, answer: Denied) -> None:
        now_s = self._clock()
        for backend, membership in answer.memberships.items():
            self._book.member(backend, membership)
        for backend, foreign in answer.foreign.items():
            self._book.foreign(backend, foreign, now_s)

    async def settle_owed(self) -> None:
        """End the leases whose end was not told."""
        if self.owed:
            await self._side_by_side(self._settle, [(store_id, None) for store_id in self.owed])

    async def mend(self) -> None:
        """Tell the store all that it missed, and what it may have lost."""
        inner, book = self._inner, self._book
        for backend in list(self.removed):
            await self.ask(inner.remove_backend(backend))
            self.removed.pop(backend, None)
        for backend, first_tier in list(self.wanted.items()):
            site = book.sites.get(backend)
            tier = first_tier if site is None else site.membership.tier
            stands = await self.ask(inner.add_backend(backend, tier))
            if site is not None and site.claimed and tier is not None and stands.tier != tier:
                unmoved = stands.epoch == site.membership.epoch or stands.tier is None
                if unmoved:  # what this replica did alone may stand for all
                    stands = (await self.ask(inner.claim(backend, tier, stands.epoch))).membership
            book.restate(backend, stands)
        await self.settle_owed()
        await self._side_by_side(self._tell, book.untold())
        # A store that lost its last writes has forgotten leases that it had granted.
        await self._side_by_side(self._tell, book.short(await self.look_over()))
        await self.settle_owed()
        await self._publish_own()

    async def _settle(self, store_id: str, nothing: None) -> None:
        await self.ask(self._inner.release(store_id))
        self.owed.pop(store_id, None)

    async def _tell(self, lease_id: str, lease: Lease) -> None:
        """Make the store count a lease that stands, whatever its limits are by now."""
        book = self._book
        for _ in range(_TRIES):
            site = book.sites.get(lease.backend)
            if site is None or book.leases.get(lease_id) is not lease:
                return
            store_id = lease.store_id = lease.store_id or lease_id
            candidate = ReserveCandidate(lease.backend, lease.cost, _EVERYTHING, 0.0, site.membership.epoch)
            answer = await self.ask(self._inner.reserve(store_id, (candidate,)))
            if isinstance(answer, Denied):
                self.learn(answer)
            elif answer.backend == lease.backend:
                lease.told = True
                return
            else:  # granted there before the answer was lost; a lease cannot be moved
                self.owed[store_id] = None
                lease.store_id = store_id + ALONE_SUFFIX

    async def _publish_own(self) -> None:
        """What was measured last, which the store may have missed."""
        inner = self._inner
        own = [
            Publication(backend, site.own.vector(0.0), inner.sequence_of(backend) + 1)
            for backend, site in self._book.sites.items()
            if site.settled
        ]
        await self.ask(inner.publish(own, self.held))

    async def _side_by_side(
        self, tell: Callable[[str, T], Awaitable[None]], each: Sequence[tuple[str, T]]
    ) -> None:
        for first in range(0, len(each), _AT_ONCE):
            some = [tell(name, what) for name, what in each[first : first + _AT_ONCE]]
            for answer in await asyncio.gather(*some, return_exceptions=True):
                if isinstance(answer, BaseException):
                    raise answer
