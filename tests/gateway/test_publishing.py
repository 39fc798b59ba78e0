"""What a gateway publishes: in one call a tick, never beside a lease that is not answered for. Whatever comes of
it, the dispatcher's picture of the store stays right."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from random import Random

import pytest

from gateway.dispatch import Shell, Timing
from profiles import load
from scheduling.backends import Backend, EngineLimits
from scheduling.dispatcher import Dispatcher
from scheduling.events import BackendChanged, EndKind, MembershipChanged, Open
from scheduling.load import LoadVector, ReserveCandidate
from scheduling.policies import make
from scheduling.requests import Request
from scheduling.stored import Stored
from scheduling.tiers import Slo, Tier, TierSet
from state.contract import Denied, Granted, Held, Publication, StoreUnavailable
from state.memory import MemoryState, MemoryStore
from tests.gateway.rig import PROFILE, until

_SLO = Slo(2.0, 0.05)
_TIERS = TierSet((Tier("only", _SLO, 0),), "only")
_BACKENDS = ("b", "c")


class _Slow(MemoryStore):
    """A memory store whose calls take their time, and whose answers to publishes may be lost, before or after."""

    def __init__(self, state: MemoryState, name: str, rng: Random | None = None) -> None:
        super().__init__(state, name)
        state._replicas[name] = self
        self.rng = rng
        self.hold: asyncio.Event | None = None
        self.published: list[tuple[Sequence[Publication], Sequence[Held]]] = []
        self.in_flight = 0

    async def _travel(self) -> None:
        if self.rng is not None:
            await asyncio.sleep(self.rng.random() * 0.004)

    async def reserve(self, lease_id: str, candidates: Sequence[ReserveCandidate]) -> Granted | Denied:
        await self._travel()
        answer = await super().reserve(lease_id, candidates)
        await self._travel()
        return answer

    async def release(self, lease_id: str) -> None:
        await self._travel()
        await super().release(lease_id)
        await self._travel()

    async def publish(self, publications: Sequence[Publication], held: Sequence[Held] = ()) -> frozenset[str]:
        self.in_flight += 1
        assert self.in_flight == 1, "one publish at a time"
        try:
            self.published.append((publications, held))
            if self.hold is not None:
                await self.hold.wait()
            await self._travel()
            if self.rng is not None and self.rng.random() < 0.15:
                raise StoreUnavailable("lost on its way")
            taken = await super().publish(publications, held)
            await self._travel()
            if self.rng is not None and self.rng.random() < 0.15:
                raise StoreUnavailable("its answer was lost")
            return taken
        finally:
            self.in_flight -= 1


class _Gateway:
    """A shell with a dispatcher on its own handle."""

    def __init__(self, state: MemoryState, name: str, rng: Random | None = None) -> None:
        self.store = _Slow(state, name, rng)
        self.core = Dispatcher(_TIERS, make("polyserve", Random(1)))
        self.shell = Shell(self.core, self.store, time.monotonic, Timing(tick_s=0.005))
        self.name = name
        self.count = 0

    async def meet(self, most: int = 64) -> None:
        profile = await asyncio.to_thread(load, PROFILE)
        limits = EngineLimits(max_running_seqs=most, kv_tokens=100_000)
        for name in _BACKENDS:
            membership = await self.store.add_backend(name, "only")
            self.shell.feed(BackendChanged(Backend(name, profile.step_time, limits=limits)))
            self.shell.feed(MembershipChanged(name, membership.tier, membership.epoch))

    def request(self) -> Request:
        self.count += 1
        return Request(f"{self.name}{self.count}", "m", "only", _SLO, 100, time.monotonic())

    async def serve(self, seconds: float) -> None:
        async with self.shell.admit(self.request()) as ticket:
            if isinstance(await ticket.next_order(), Open):
                ticket.first_token()
                await asyncio.sleep(seconds)
                ticket.ended(EndKind.FINISHED)

    def agrees(self) -> bool:
        """Whether the dispatcher is sure of what the store counts, and right."""
        sure = []
        for name in _BACKENDS:
            stored, home = self.core.fleet[name].stored, self.store._state._homes[name]
            sure.append(stored.certain and _sums(stored) == _sums_of(self.store._load(home).own))
        return all(sure)


def _sums(stored: Stored) -> tuple[int, int, int]:
    return stored.decodes, stored.kv_tokens, stored.prefill_tokens


def _sums_of(load: LoadVector) -> tuple[int, int, int]:
    return load.decodes, load.peak_kv_tokens, load.queued_prefill_tokens


@pytest.mark.parametrize("seed", [1, 2])
async def test_what_is_believed_of_the_store_is_right_again_after_anything(seed: int) -> None:
    """Requests come and go on two gateways while publishes are late, refused and lost."""
    state, rng = MemoryState(), Random(seed)
    pair = [_Gateway(state, name, Random(f"{seed}{name}")) for name in ("one", "two")]
    async with asyncio.TaskGroup() as tasks:
        own = []
        for gateway in pair:
            await gateway.meet()
            own += gateway.shell.start(tasks)
        serving = []
        for _ in range(60):
            serving.append(tasks.create_task(rng.choice(pair).serve(rng.random() * 0.3)))
            await asyncio.sleep(rng.random() * 0.01)
        stays = [tasks.create_task(gateway.serve(30.0)) for gateway in pair for _ in range(3)]
        await asyncio.wait(serving)
        for gateway in pair:
            gateway.store.rng = None
        await until(lambda: all(gateway.core.counts.open == 3 for gateway in pair))
        await until(lambda: all(gateway.agrees() for gateway in pair))
        for stay in stays:
            stay.cancel()
        await asyncio.wait(stays)
        await until(lambda: all(gateway.agrees() for gateway in pair))
        for gateway in pair:
            view = await gateway.store.view()
            assert all(load.own.idle for load in view.values())
        for task in own:
            task.cancel()
    for gateway in pair:
        gateway.shell.stop_timer()


async def test_nothing_is_published_beside_an_unanswered_lease() -> None:
    state = MemoryState()
    gateway = _Gateway(state, "one")
    await gateway.meet()
    async with asyncio.TaskGroup() as tasks:
        own = gateway.shell.start(tasks)
        async with gateway.shell.admit(gateway.request()) as ticket:
            order = await ticket.next_order()
            assert isinstance(order, Open)
            await until(lambda: gateway.store.published != [])
            publications, _ = gateway.store.published[-1]
            assert [one.backend for one in publications] == [order.backend]
            assert publications[0].own.residents == {"only": 1}
            gateway.shell._publisher.ending(order.backend)  # a release that the store has not answered
            told = len(gateway.store.published)
            ticket.first_token()
            await asyncio.sleep(0.05)
            assert len(gateway.store.published) == told
            gateway.shell._publisher.ended(order.backend)
            await until(lambda: len(gateway.store.published) > told)
            ticket.ended(EndKind.FINISHED)
        for task in own:
            task.cancel()
    gateway.shell.stop_timer()


async def test_a_store_that_does_not_answer_a_publish_keeps_nobody_waiting() -> None:
    """The ticker goes on, and so do requests."""
    gateway = _Gateway(MemoryState(), "one")
    await gateway.meet()
    gateway.store.hold = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        own = gateway.shell.start(tasks)
        staying = tasks.create_task(gateway.serve(30.0))
        await until(lambda: gateway.store.in_flight == 1)
        await gateway.serve(0.01)
        assert gateway.core.counts.finished == 1
        assert gateway.store.in_flight == 1
        gateway.store.hold.set()
        gateway.store.hold = None
        await until(gateway.agrees)
        staying.cancel()
        await asyncio.wait([staying])
        for task in own:
            task.cancel()
    gateway.shell.stop_timer()


async def test_what_one_holds_the_others_know() -> None:
    state = MemoryState()
    pair = [_Gateway(state, name) for name in ("one", "two")]
    one, two = pair
    async with asyncio.TaskGroup() as tasks:
        own = []
        for gateway in pair:
            await gateway.meet(most=1)
            own += gateway.shell.start(tasks)
        staying = [tasks.create_task(two.serve(30.0)) for _ in _BACKENDS]
        await until(lambda: two.core.counts.open == len(_BACKENDS))
        held = tasks.create_task(one.serve(0.01))
        await until(lambda: one.core.counts.held == 1)
        rivals = two.core._ladder.rivals
        await until(lambda: bool(rivals._waiting))
        ((_, (waiting,)),) = rivals._waiting.values()
        assert (waiting.model, waiting.tier, waiting.decodes) == ("m", "only", 1)
        assert 0.5 < waiting.due_s - time.monotonic() <= 2.0
        for stay in staying:
            stay.cancel()
        await asyncio.wait([held, *staying])
        assert one.core.counts.finished == 1
        await until(lambda: not rivals._waiting)
        for task in own:
            task.cancel()
    for gateway in pair:
        gateway.shell.stop_timer()


async def test_what_others_carry_is_known_where_step_times_are_learned() -> None:
    state = MemoryState()
    pair = [_Gateway(state, name) for name in ("one", "two")]
    one, two = pair
    async with asyncio.TaskGroup() as tasks:
        own = []
        for gateway in pair:
            await gateway.meet()
            own += gateway.shell.start(tasks)
        staying = [tasks.create_task(two.serve(30.0)) for _ in range(3)]
        known = one.shell.pace._backends
        await until(lambda: sum(backend.others.decodes for backend in known.values()) == 3)
        for stay in staying:
            stay.cancel()
        await asyncio.wait(staying)
        await until(lambda: not any(backend.others.decodes for backend in known.values()))
        for task in own:
            task.cancel()
    for gateway in pair:
        gateway.shell.stop_timer()
