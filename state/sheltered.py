"""A store that goes on when the store behind it does not answer.

Every call is answered within a deadline, and at once while the store is known to be silent: then this replica
admits within its share of what was free (`state.book`), remembers what it would have told, and asks in the
background whether the store answers again. docs/state.md ("Outages") has the rules and what they come to.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress

from scheduling.load import LoadVector, ReserveCandidate
from state.book import Book
from state.contract import (
    BackendLoad,
    Changed,
    Conflict,
    Denied,
    Granted,
    Held,
    HeldEvent,
    Membership,
    Mode,
    Publication,
    Store,
    StoreEvent,
    StoreUnavailable,
)
from state.mending import Mending
from state.outage import Outage, Shelter
from state.watch import Watch


def _no_cap(backend: str) -> int | None:
    return None


def _nobody_listens(mode: Mode, why: str) -> None:
    """Nobody asked to be told."""


class Sheltered:
    """One replica's handle (`state.contract.Store`) that never raises StoreUnavailable."""

    def __init__(
        self,
        inner: Store,
        clock: Callable[[], float],
        options: Shelter | None = None,
        *,
        caps: Callable[[str], int | None] = _no_cap,
        on_mode: Callable[[Mode, str], None] = _nobody_listens,
    ) -> None:
        """`caps`: the most sequences a backend's engine runs at once, None when not known. `on_mode` is told every
        change of mode and its cause."""
        self._inner = inner
        self._clock = clock
        self._options = options = options or Shelter()
        self._book = Book(caps)
        self._outage = Outage(options, on_mode)
        self._mending = Mending(inner, self._book, clock, options, self._doubt)
        self._looked_s = clock()  # when the store was last looked over
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._lost: frozenset[str] = frozenset()  # backends where it had lost our load at the last look
        self._mended = False
        self._closed = False

    # --- the store ---------------------------------------------------------------------------------------

    async def add_backend(self, backend: str, tier: str | None) -> Membership:
        """See the contract. While the store is silent, one that was never met stands at epoch 0."""
        if not self._mending.met:
            await self.view()  # before anything is admitted here, who else there is has to be known
        self._mending.removed.pop(backend, None)
        self._mending.wanted[backend] = tier
        if self._outage.mode is not Mode.ALONE:
            try:
                self._book.member(backend, await self._mending.ask(self._inner.add_backend(backend, tier)))
            except StoreUnavailable as error:
                self._cut(f"adding {backend}: {error}")
        if backend not in self._book.sites:
            self._book.member(backend, Membership(tier, 0))
        return self._book.sites[backend].membership

    async def remove_backend(self, backend: str) -> None:
        self._mending.wanted.pop(backend, None)
        self._book.drop(backend)
        if self._outage.mode is not Mode.ALONE:
            try:
                await self._mending.ask(self._inner.remove_backend(backend))
                return
            except StoreUnavailable as error:
                self._cut(f"removing {backend}: {error}")
        self._mending.removed[backend] = None

    async def reserve(self, lease_id: str, candidates: Sequence[ReserveCandidate]) -> Granted | Denied:
        """See the contract. Waits at most `deadline_s`, and not at all while the store is silent."""
        book = self._book
        standing = book.leases.get(lease_id)
        if standing is not None:
            return Granted(lease_id, standing.backend)
        if book.has_ended(lease_id):
            return self._denied(lease_id, candidates, {})
        match self._outage.mode:
            case Mode.SHARED:
                return await self._reserve_shared(lease_id, candidates)
            case Mode.HEALING:
                return await self._reserve_healing(lease_id, candidates)
            case Mode.ALONE:
                return self._reserve_alone(lease_id, candidates)

    async def _reserve_shared(self, lease_id: str, candidates: Sequence[ReserveCandidate]) -> Granted | Denied:
        book = self._book
        try:
            answer = await self._mending.ask(self._inner.reserve(lease_id, candidates))
        except StoreUnavailable as error:
            self._cut(f"reserving: {error}")
            alone = self._reserve_alone(lease_id, candidates)
            # Whether the store granted it is unknown: it is asked again, or told the end, when it answers.
            lease = book.leases.get(lease_id)
            if lease is None:
                self._mending.owed[lease_id] = None
            else:
                lease.store_id = lease_id
            return alone
        if isinstance(answer, Denied):
            self._mending.learn(answer)
            return answer
        if book.has_ended(lease_id):
            await self._tell_end(lease_id)
            return self._denied(lease_id, candidates, {})
        if lease_id not in book.leases:
            taken = next(one for one in candidates if one.backend == answer.backend)
            if self._inner.mode is Mode.HEALING:
                now_s = self._clock()
                refused = book.refusal(taken, self._outage.share(now_s), now_s)
                if refused is not None:
                    book.end(lease_id)
                    await self._tell_end(lease_id)
                    return self._denied(lease_id, candidates, {taken.backend: refused})
            book.begin(lease_id, taken, self._clock(), lease_id)
            if self._outage.mode is not Mode.SHARED:
                book.granted_late(answer.backend, taken.cost)
        return answer

    async def _reserve_healing(self, lease_id: str, candidates: Sequence[ReserveCandidate]) -> Granted | Denied:
        """Within the share, and only if the store agrees; counted here while it is asked."""
        book = self._book
        foreign: dict[str, LoadVector] = {}
        now_s = self._clock()
        share = self._outage.share(now_s)
        for candidate in candidates:
            refused = book.refusal(candidate, share, now_s)
            if refused is not None:
                foreign[candidate.backend] = refused
                continue
            lease = book.begin(lease_id, candidate, now_s, lease_id)
            lease.asking = True
            try:
                answer = await self._mending.ask(self._inner.reserve(lease_id, (candidate,)))
            except StoreUnavailable as error:
                lease.told = False
                self._cut(f"reserving: {error}")
                if book.has_ended(lease_id):
                    return self._denied(lease_id, candidates, foreign)
                return Granted(lease_id, candidate.backend)
            except asyncio.CancelledError:
                book.forget(lease_id)
                self._mending.owed[lease_id] = None
                raise
            finally:
                lease.asking = False
            if isinstance(answer, Denied):
                book.forget(lease_id)
                self._mending.learn(answer)
            elif book.has_ended(lease_id):
                return self._denied(lease_id, candidates, foreign)
            return answer
        return self._denied(lease_id, candidates, foreign)

    def _reserve_alone(self, lease_id: str, candidates: Sequence[ReserveCandidate]) -> Granted | Denied:
        book = self._book
        if book.has_ended(lease_id):
            return self._denied(lease_id, candidates, {})
        foreign: dict[str, LoadVector] = {}
        now_s = self._clock()
        share = self._outage.share(now_s)
        for candidate in candidates:
            refused = book.refusal(candidate, share, now_s)
            if refused is None:
                book.begin(lease_id, candidate, now_s, None)
                return Granted(lease_id, candidate.backend)
            foreign[candidate.backend] = refused
        return self._denied(lease_id, candidates, foreign)

    def _denied(
        self, lease_id: str, candidates: Sequence[ReserveCandidate], foreign: Mapping[str, LoadVector]
    ) -> Denied:
        sites, now_s = self._book.sites, self._clock()
        known = {one.backend: sites[one.backend] for one in candidates if one.backend in sites}
        return Denied(
            lease_id,
            {name: site.load(now_s).foreign for name, site in known.items()} | dict(foreign),
            {name: site.membership for name, site in known.items()},
        )

    async def release(self, lease_id: str) -> None:
        """See the contract. While the store is silent it is remembered, and told when the store answers."""
        lease = self._book.end(lease_id)
        if lease is not None and lease.store_id is None:
            return  # the store never heard of it
        await self._tell_end(lease_id if lease is None or lease.store_id is None else lease.store_id)

    async def _tell_end(self, store_id: str) -> None:
        self._mending.owed[store_id] = None
        if self._outage.mode is Mode.ALONE:
            return
        try:
            await self._mending.ask(self._inner.release(store_id))
        except StoreUnavailable as error:
            self._cut(f"releasing: {error}")
        else:
            self._mending.owed.pop(store_id, None)

    async def publish(self, publications: Sequence[Publication], held: Sequence[Held] = ()) -> frozenset[str]:
        """See the contract. While the store is silent, what is measured counts for this replica's own share."""
        self._mending.held = tuple(held)
        book, inner = self._book, self._inner
        fresh = [one for one in publications if book.accepts(one)]
        for one in fresh:
            book.send(one)
        taken = frozenset(one.backend for one in fresh if not book.sites[one.backend].nowhere)
        try:
            if self._outage.mode is not Mode.ALONE:
                told = [Publication(one.backend, one.own, inner.sequence_of(one.backend) + 1) for one in fresh]
                taken = await self._mending.ask(inner.publish(told, self._mending.held))
        except StoreUnavailable as error:
            self._cut(f"publishing: {error}")
        except asyncio.CancelledError:
            taken = frozenset()
            raise
        finally:
            for one in fresh:
                book.settle(one, taken=one.backend in taken)
        return taken

    def sequence_of(self, backend: str) -> int:
        site = self._book.sites.get(backend)
        return 0 if site is None else site.own.sequence

    async def claim(self, backend: str, tier: str, expected_epoch: int) -> Changed | Conflict:
        """See the contract. While the store is silent the claim holds for this replica alone, and for all when the
        store answers and nobody was first: else a tier without a backend would wait for the store."""
        if self._outage.mode is not Mode.ALONE:
            try:
                answer = await self._mending.ask(self._inner.claim(backend, tier, expected_epoch))
            except StoreUnavailable as error:
                self._cut(f"claiming {backend}: {error}")
            else:
                self._book.member(backend, answer.membership)
                return answer
        claimed = self._book.claim(backend, tier, expected_epoch)
        return self._conflict(backend) if claimed is None else Changed(claimed)

    async def hand_back(self, backend: str, expected_epoch: int) -> Changed | Conflict:
        """See the contract. Whether nobody carries anything is known only while the store counts for all."""
        if self._outage.mode is Mode.SHARED:
            try:
                answer = await self._mending.ask(self._inner.hand_back(backend, expected_epoch))
            except StoreUnavailable as error:
                self._cut(f"handing {backend} back: {error}")
            else:
                self._book.member(backend, answer.membership)
                return answer
        return self._conflict(backend)

    def _conflict(self, backend: str) -> Conflict:
        site = self._book.sites.get(backend)
        return Conflict(Membership(None, 0) if site is None else site.membership)

    async def view(self) -> Mapping[str, BackendLoad]:
        """See the contract. While the store is silent, as it was last known."""
        if self._outage.mode is not Mode.ALONE:
            try:
                return await self._mending.look_over()
            except StoreUnavailable as error:
                self._cut(f"looking: {error}")
        return self._book.loads(self._clock())

    def watch(self) -> AsyncIterator[StoreEvent | HeldEvent]:
        watch = Watch(self._event)
        if self._closed:
            watch.end()
        else:
            self._watches.add(watch)
        return watch

    async def note_engine(self, backend: str, sequences: int) -> None:
        self._book.counted(backend, sequences, self._clock())
        if self._outage.mode is Mode.ALONE:
            self._notice(backend)  # there may be more room than a refusal said
            return
        try:
            await self._mending.ask(self._inner.note_engine(backend, sequences))
        except StoreUnavailable as error:
            self._cut(f"telling an engine's count: {error}")

    @property
    def mode(self) -> Mode:
        return self._outage.mode

    @property
    def replicas(self) -> int:
        return self._inner.replicas if self._outage.mode is Mode.SHARED else self._outage.peers

    async def close(self) -> None:
        """See the contract. Idempotent; a silent store is not waited for."""
        if self._closed:
            return
        self._closed = True
        for watch in tuple(self._watches):
            watch.end()
        if self._outage.mode is not Mode.ALONE:
            with suppress(StoreUnavailable):
                for store_id in list(self._mending.owed):
                    await self._mending.ask(self._inner.release(store_id))
        with suppress(StoreUnavailable):
            await self._mending.ask(self._inner.close())

    # --- upkeep ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """See the contract."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._run_inner(), name="store-upkeep")
            tasks.create_task(self._listen(), name="store-listen")
            while True:
                await self.look()
                await asyncio.sleep(self._options.probe_s)

    async def _run_inner(self) -> None:
        while True:
            with suppress(StoreUnavailable):
                await self._inner.run()
            await asyncio.sleep(self._options.probe_s)

    async def _listen(self) -> None:
        """Hear what others do, and pass it on."""
        while not self._closed:
            with suppress(StoreUnavailable):
                async for event in self._inner.watch():
                    self._hear(event)
            await asyncio.sleep(self._options.probe_s)

    def _hear(self, event: StoreEvent | HeldEvent) -> None:
        self._doubt()
        if isinstance(event, HeldEvent):
            for watch in self._watches:
                watch.notice_held(event)
        else:
            self._book.told(event.backend, event.load, self._clock())
            self._notice(event.backend)

    async def look(self) -> None:
        """Look after the store once: ask it whether it answers, and mend what its silence left."""
        outage, inner = self._outage, self._inner
        now_s = self._clock()
        try:
            if outage.mode is Mode.SHARED:
                await self._look_shared(now_s)
                return
            if outage.aged(now_s):
                self._notice_all()
            if outage.mode is Mode.ALONE:
                await self._mending.pulse()
                self._mended = False
                outage.returned(self._clock())
            if not self._mended:
                await self._mending.mend()
                self._mended = True
                self._notice_all()
            await self._mending.settle_owed()
            if outage.over(inner.mode, inner.replicas, self._clock()):
                self._notice_all()
        except StoreUnavailable as error:
            self._cut(str(error))

    async def _look_shared(self, now_s: float) -> None:
        self._outage.count(self._inner.replicas, now_s)
        await self._mending.settle_owed()
        if self._inner.mode is Mode.ALONE:
            self._cut("it does not answer")
        elif now_s - self._looked_s >= self._options.look_over_s:
            self._looked_s = now_s
            loads = await self._mending.pulse()
            # What was just published or released may make a reading too small, but hardly two of them.
            lost, self._lost = self._lost, self._book.lost(loads, now_s - self._options.pulse_s)
            if (self._mending.wanted and not loads) or self._lost & lost:
                self._forgot()
        elif now_s - self._mending.heard_s >= self._options.pulse_s:
            await self._mending.sign()

    def _doubt(self) -> None:
        """A store that knows that it forgot does not count for all; what it says of others may be too little."""
        if self._outage.mode is Mode.SHARED and self._inner.mode is Mode.HEALING:
            self._forgot()

    def _forgot(self) -> None:
        """The store answers, and lost what it was told: until it is whole, the share has to allow as well."""
        if not self._closed:
            now_s = self._clock()
            self._outage.count(self._inner.replicas, now_s)
            self._outage.forgot(self._mending.heard_s, now_s)
            self._book.cut()
            self._mended = False

    def _cut(self, why: str) -> None:
        """The store is silent: go on alone."""
        if self._closed:
            return  # it is this handle that is silent
        if self._outage.mode is Mode.SHARED:
            self._outage.count(self._inner.replicas, self._clock())
        if self._outage.cut(why, self._mending.heard_s):
            self._book.cut()

    # --- telling -----------------------------------------------------------------------------------------

    def _event(self, backend: str) -> StoreEvent | None:
        site = self._book.sites.get(backend)
        return None if site is None else StoreEvent(backend, site.load(self._clock()))

    def _notice(self, backend: str) -> None:
        for watch in self._watches:
            watch.notice(backend)

    def _notice_all(self) -> None:
        for backend in self._book.sites:
            self._notice(backend)
