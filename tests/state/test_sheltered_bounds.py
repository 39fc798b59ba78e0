"""What N replicas admit while they cannot ask the store stays within what docs/state.md ("Outages") derives."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.load import Cost, Limits, LoadVector, ReserveCandidate
from state.book import Share, allowance
from state.contract import Granted, Mode, Publication
from state.memory import MemoryState
from state.outage import Shelter
from state.sheltered import Sheltered

from .faulty import Fault, FaultyStore

LEASE_S = 10.0
MOST = 12  # sequences in the box
KV_EACH = 10
FREE = 10**9
REPLICAS = 3


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Stand:
    """Replicas on one backend, and what each of them carries by its own account."""

    cap: int | None = None
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.state = MemoryState(self.clock)
        self.inner = [FaultyStore(self.state, f"r{i}") for i in range(REPLICAS)]
        shelter = Shelter(deadline_s=1.0, lease_s=LEASE_S)
        self.stores = [Sheltered(one, self.clock, shelter, caps=lambda name: self.cap) for one in self.inner]
        self.carried: list[dict[str, Cost]] = [{} for _ in self.stores]
        self.count = 0
        self.epoch = 0

    async def start(self, filled: list[int]) -> None:
        for store in self.stores:
            self.epoch = (await store.add_backend("x", "chat")).epoch
        for replica, count in enumerate(filled):
            for _ in range(count):
                await self.reserve(replica, 1)
        await self.know()

    async def know(self) -> None:
        for store in self.stores:
            await store.view()
            await store.look()

    async def reserve(self, replica: int, decodes: int, most: int = MOST) -> bool:
        cost = Cost(decodes, decodes * KV_EACH, 0, "chat", 50.0)
        limits = Limits(most, most * KV_EACH, FREE)
        self.count += 1
        lease = f"l{self.count}"
        answer = await self.stores[replica].reserve(lease, (ReserveCandidate("x", cost, limits, 0.0, self.epoch),))
        if isinstance(answer, Granted):
            self.carried[replica][lease] = cost
        return isinstance(answer, Granted)

    async def release(self, replica: int, which: int) -> None:
        leases = sorted(self.carried[replica])
        if leases:
            lease = leases[which % len(leases)]
            del self.carried[replica][lease]
            await self.stores[replica].release(lease)

    async def publish(self, replica: int) -> None:
        store, own = self.stores[replica], self.own(replica)
        load = LoadVector(own, own * KV_EACH, 0, {"chat": own} if own else {})
        await store.publish([Publication("x", load, store.sequence_of("x") + 1)])

    async def cut(self, replica: int) -> None:
        self.inner[replica].fault = Fault.GONE
        await self.stores[replica].note_engine("x", self.total)

    async def look(self, after_s: float) -> None:
        self.clock.now_s += after_s
        for store in self.stores:
            await store.look()

    def own(self, replica: int) -> int:
        return sum(cost.decodes for cost in self.carried[replica].values())

    @property
    def total(self) -> int:
        return sum(map(self.own, range(REPLICAS)))


replicas = st.integers(0, REPLICAS - 1)
which = st.integers(0, 20)
sizes = st.integers(1, 3)
fillings = st.lists(st.integers(0, 4), min_size=REPLICAS, max_size=REPLICAS)
doings = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), replicas, sizes),
        st.tuples(st.just("reserve"), replicas, sizes),
        st.tuples(st.just("release"), replicas, which),
        st.tuples(st.just("publish"), replicas, which),
    ),
    max_size=60,
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), replicas, sizes),
        st.tuples(st.just("reserve"), replicas, sizes),
        st.tuples(st.just("release"), replicas, which),
        st.tuples(st.just("cut"), replicas, which),
        st.tuples(st.just("heal"), replicas, which),
        st.tuples(st.just("wait"), replicas, st.sampled_from((0, 1, 4, 11))),
    ),
    max_size=60,
)


async def do(stand: Stand, what: str, replica: int, number: int) -> None:
    match what:
        case "reserve":
            await stand.reserve(replica, number)
        case "release":
            await stand.release(replica, number)
        case "publish":
            await stand.publish(replica)
        case "cut":
            await stand.cut(replica)
        case "heal":
            stand.inner[replica].fault = Fault.NONE
            await stand.look(0.0)
        case "wait":
            await stand.look(float(number))


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=9),
    st.lists(st.integers(0, 300), min_size=9, max_size=9),
    st.booleans(),
)
def test_allowances_sum_to_the_largest_limit_at_most(own: list[int], limits: list[int], known: bool) -> None:
    share = Share(len(own), known, 1.0, 1.0)
    total = sum(own)
    allowed = [
        allowance(limit, mine, total - mine, share) for limit, mine in zip(limits[: len(own)], own, strict=True)
    ]
    assert sum(allowed) <= max(limits[: len(own)])


@settings(max_examples=150)
@given(fillings, doings)
def test_nothing_is_oversold_within_the_first_lease_time(
    filled: list[int], doing: list[tuple[str, int, int]]
) -> None:
    async def scene() -> None:
        stand = Stand()
        await stand.start(filled)
        for replica in range(REPLICAS):
            await stand.cut(replica)
        for index, (what, replica, number) in enumerate(doing):
            await stand.look(LEASE_S * 0.9 * (index == len(doing) // 2))
            await do(stand, what, replica, number)
            assert stand.total <= MOST

    asyncio.run(scene())


@settings(max_examples=150)
@given(fillings, doings, doings)
def test_later_only_residents_that_outlive_it_are_beyond_the_shares(
    filled: list[int], early: list[tuple[str, int, int]], late: list[tuple[str, int, int]]
) -> None:
    async def scene() -> None:
        stand = Stand()
        await stand.start(filled)
        for replica in range(REPLICAS):
            await stand.cut(replica)
        for what, replica, number in early:
            await do(stand, what, replica, number)
        await stand.look(LEASE_S)
        old = [set(leases) for leases in stand.carried]
        for what, replica, number in late:
            await do(stand, what, replica, number)
            outlived = [
                sum(cost.decodes for name, cost in leases.items() if name in old[index])
                for index, leases in enumerate(stand.carried)
            ]
            beyond = sum(max(count - MOST // REPLICAS, 0) for count in outlived)
            assert stand.total <= MOST + beyond
        for index, leases in enumerate(stand.carried):
            for name in old[index] & set(leases):
                del leases[name]
                await stand.stores[index].release(name)
        assert stand.total <= MOST

    asyncio.run(scene())


@settings(max_examples=150)
@given(fillings, steps)
def test_replicas_that_are_cut_off_add_their_shares_at_most(
    filled: list[int], doing: list[tuple[str, int, int]]
) -> None:
    """Whoever is cut off may use its share while the others use all; nothing else is ever oversold."""

    async def scene() -> None:
        stand = Stand()
        await stand.start(filled)
        beyond = 0
        for what, replica, number in doing:
            await stand.know()
            if stand.total <= MOST and all(store.mode is Mode.SHARED for store in stand.stores):
                beyond = 0
            if what == "cut" and stand.stores[replica].mode is Mode.SHARED:
                mine = stand.own(replica)
                beyond += max(MOST // REPLICAS - mine, max(MOST - stand.total, 0) // REPLICAS, 0)
            await do(stand, what, replica, number)
            assert stand.total <= MOST + beyond
        for replica in range(REPLICAS):
            stand.inner[replica].fault = Fault.NONE
        for _ in range(3):
            await stand.look(LEASE_S)
        assert {store.mode for store in stand.stores} == {Mode.SHARED}
        loads = [(await one.inner.view())["x"] for one in stand.inner]
        assert [load.own.decodes for load in loads] == [stand.own(index) for index in range(REPLICAS)]
        for replica in range(REPLICAS):
            while stand.carried[replica]:
                await stand.release(replica, 0)
        assert (await stand.inner[0].inner.view())["x"].own.idle

    asyncio.run(scene())


@settings(max_examples=150)
@given(
    fillings,
    st.lists(st.tuples(st.sampled_from((True, True, False)), replicas, which, st.integers(0, 4)), max_size=80),
)
def test_no_engine_passes_its_cap_by_its_own_count(
    filled: list[int], doing: list[tuple[bool, int, int, int]]
) -> None:
    """Alone for long, with counts that are never older than they may be."""

    async def scene() -> None:
        stand = Stand(MOST)
        await stand.start(filled)
        counted = [0.0] * REPLICAS
        for replica in range(REPLICAS):
            await stand.cut(replica)
        await stand.look(LEASE_S)
        for begins, replica, number, tenths in doing:
            stand.clock.now_s += tenths / 10
            for each in range(REPLICAS):
                if stand.clock.now_s - counted[each] > 1.5 or (each == replica and number % 5 == 0):
                    counted[each] = stand.clock.now_s
                    await stand.stores[each].note_engine("x", stand.total)
            if begins:
                await stand.reserve(replica, 1 + number % 2, 100)
            else:
                await stand.release(replica, number)
            assert stand.total <= MOST

    asyncio.run(scene())
