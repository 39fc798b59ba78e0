"""A sheltered store goes on while the one behind it fails, keeps its share, and tells later what was missed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from scheduling.load import Cost, Limits, LoadVector, ReserveCandidate
from state.contract import Changed, Conflict, Denied, Granted, Held, Membership, Mode, Publication, StoreEvent
from state.memory import MemoryState
from state.outage import Shelter
from state.sheltered import Sheltered

from .faulty import Fault, FaultyStore

ONE = Cost(1, 100, 50, "chat", 50.0)
BOX = Limits(12, 10**6, 10**6)
SHELTER = Shelter(deadline_s=0.05, lease_s=10.0, settle_s=0.8, look_over_s=1.0)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Fleet:
    """Sheltered replicas on one state in memory, each behind a fault of its own."""

    count: int
    shelter: Shelter = SHELTER
    caps: dict[str, int] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.state = MemoryState(self.clock)
        self.inner = [FaultyStore(self.state, f"r{i}") for i in range(self.count)]
        self.modes: list[list[Mode]] = [[] for _ in self.inner]
        self.stores = [
            Sheltered(
                inner,
                self.clock,
                self.shelter,
                caps=self.caps.get,
                on_mode=lambda mode, why, told=told: told.append(mode),  # type: ignore[misc]
            )
            for inner, told in zip(self.inner, self.modes, strict=True)
        ]
        self.epoch = 0

    async def start(self) -> None:
        for store in self.stores:
            self.epoch = (await store.add_backend("x", "chat")).epoch
        await self.know()

    async def know(self) -> None:
        """Everybody learns how everything stands."""
        for store in self.stores:
            await store.view()
            await store.look()

    def mode(self, replica: int) -> Mode:
        return self.stores[replica].mode

    def fail(self, fault: Fault, replicas: Sequence[int] | None = None) -> None:
        for index in range(self.count) if replicas is None else replicas:
            self.inner[index].fault = fault

    async def look(self, after_s: float = 0.0) -> None:
        self.clock.now_s += after_s
        for store in self.stores:
            await store.look()

    async def heal(self) -> None:
        """Everybody looks until it is over; as time goes on."""
        self.fail(Fault.NONE)
        for _ in range(25):
            await self.look(0.2)

    def candidate(self, cost: Cost = ONE, limits: Limits = BOX, epoch: int | None = None) -> ReserveCandidate:
        return ReserveCandidate("x", cost, limits, 0.0, self.epoch if epoch is None else epoch)

    async def reserve(self, replica: int, lease: str, cost: Cost = ONE, limits: Limits = BOX) -> bool:
        answer = await self.stores[replica].reserve(lease, (self.candidate(cost, limits),))
        return isinstance(answer, Granted)

    async def fill(self, replica: int, prefix: str, limits: Limits = BOX) -> int:
        """Reserve until the first refusal; how many were granted."""
        count = 0
        while await self.reserve(replica, f"{prefix}{count}", limits=limits):
            count += 1
        return count

    async def truth(self) -> int:
        """Sequences that the store counts for all replicas."""
        load = (await self.inner[0].inner.view())["x"]
        return load.own.decodes + load.foreign.decodes


@pytest.fixture
async def fleet() -> Fleet:
    made = Fleet(3)
    await made.start()
    return made


@pytest.mark.parametrize("fault", [Fault.GONE, Fault.SILENT, Fault.LOST, Fault.READ_ONLY])
async def test_requests_flow_whatever_fails_and_are_counted_afterwards(fleet: Fleet, fault: Fault) -> None:
    assert await fleet.reserve(0, "before")
    await fleet.know()
    fleet.fail(fault)

    assert await fleet.reserve(0, "during")
    assert fleet.mode(0) is Mode.ALONE
    assert await fleet.reserve(1, "theirs")
    await fleet.stores[1].release("theirs")

    await fleet.heal()
    assert [store.mode for store in fleet.stores] == [Mode.SHARED] * 3
    assert await fleet.truth() == 2
    await fleet.stores[0].release("during")
    await fleet.stores[0].release("before")
    assert await fleet.truth() == 0


async def test_a_silent_store_is_waited_for_once(fleet: Fleet) -> None:
    fleet.fail(Fault.SILENT)
    assert await fleet.reserve(0, "first")
    asked = fleet.inner[0].calls
    assert await fleet.fill(0, "next") == 3
    await fleet.stores[0].release("first")
    await fleet.stores[0].publish([])
    await fleet.stores[0].view()
    await fleet.stores[0].note_engine("x", 3)
    assert fleet.inner[0].calls == asked


async def test_the_shares_of_all_replicas_are_what_was_free(fleet: Fleet) -> None:
    for lease in ("a", "b", "c"):
        assert await fleet.reserve(0, lease)
    await fleet.know()
    fleet.fail(Fault.GONE)
    # 12 fit and 3 are there: 3 more for each of three replicas
    assert [await fleet.fill(i, f"n{i}-") for i in range(3)] == [3, 3, 3]


async def test_what_ended_makes_room_again(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    assert await fleet.fill(0, "n") == 4
    await fleet.stores[0].release("n0")
    assert await fleet.fill(0, "m") == 1


async def test_a_refusal_shows_the_room_that_is_left_to_this_replica(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    assert await fleet.fill(0, "n") == 4
    answer = await fleet.stores[0].reserve("more", (fleet.candidate(),))
    assert isinstance(answer, Denied)
    assert answer.foreign["x"].decodes == 8
    assert answer.memberships["x"].epoch == fleet.epoch


async def test_after_a_lease_time_a_share_is_an_equal_part(fleet: Fleet) -> None:
    assert await fleet.fill(0, "all") == 12
    await fleet.know()
    fleet.fail(Fault.GONE)
    assert await fleet.fill(1, "early") == 0
    await fleet.look(10.0)
    assert await fleet.fill(1, "late") == 4
    assert await fleet.fill(0, "more") == 0
    for index in range(9):
        await fleet.stores[0].release(f"all{index}")
    assert await fleet.fill(0, "again") == 1


async def test_every_dimension_has_its_share(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    assert await fleet.fill(0, "kv", Limits(100, 900, 10**6)) == 3
    # the first prompt always finds room, whatever its length; the others only within the share
    assert await fleet.fill(1, "prefill", Limits(100, 10**6, 60)) == 1
    assert await fleet.fill(2, "prefill", Limits(100, 10**6, 300)) == 2


async def test_a_measured_load_counts_for_the_share(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    limits = Limits(100, 900, 10**6)
    store = fleet.stores[0]
    assert await fleet.fill(0, "kv", limits) == 3
    sequence = store.sequence_of("x") + 1
    assert await store.publish([Publication("x", LoadVector(3, 120, 0, {"chat": 3}), sequence)]) == {"x"}
    assert await store.publish([Publication("x", LoadVector(3, 0, 0, {"chat": 3}), sequence)]) == set()
    assert await fleet.fill(0, "more", limits) == 1


@pytest.mark.parametrize("fault", [Fault.NONE, Fault.GONE])
async def test_a_measurement_for_a_backend_nobody_knows_leaves_nothing(fleet: Fleet, fault: Fault) -> None:
    fleet.fail(fault)
    assert await fleet.stores[0].publish([Publication("z", LoadVector(1, 1, 1), 1)]) == set()
    assert set(await fleet.stores[0].view()) == {"x"}


async def test_a_measurement_in_flight_keeps_what_began_and_ended_since(fleet: Fleet) -> None:
    store, inner = fleet.stores[0], fleet.inner[0]
    assert await fleet.reserve(0, "old")
    assert await fleet.reserve(0, "gone")
    inner.fault = Fault.SILENT
    measured = Publication("x", LoadVector(2, 150, 20, {"chat": 2}), store.sequence_of("x") + 1)
    async with asyncio.TaskGroup() as tasks:
        telling = tasks.create_task(store.publish([measured]))
        await asyncio.sleep(0)
        await store.release("gone")
        assert await fleet.reserve(0, "new")
    assert telling.result() == {"x"}
    own = (await store.view())["x"].own
    assert (own.decodes, own.peak_kv_tokens, own.queued_prefill_tokens) == (2, 150, 70)


async def test_other_memberships_and_tighter_residents_are_refused_alone(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    stale = fleet.candidate(epoch=fleet.epoch + 1)
    assert isinstance(await fleet.stores[0].reserve("stale", (stale,)), Denied)
    assert await fleet.reserve(0, "tight", Cost(1, 1, 1, "code", 20.0))
    loose = ReserveCandidate("x", ONE, BOX, 50.0, fleet.epoch)
    assert isinstance(await fleet.stores[0].reserve("loose", (loose,)), Denied)


async def test_a_claim_made_alone_stands_for_all_when_nobody_was_first(fleet: Fleet) -> None:
    alone, other = fleet.stores[:2]
    known = (await alone.view())["x"].membership
    fleet.fail(Fault.GONE, [0])
    assert await alone.claim("x", "code", fleet.epoch + 1) == Conflict(known)
    assert await alone.claim("x", "code", fleet.epoch) == Changed(Membership("code", fleet.epoch))
    assert (await alone.view())["x"].membership == Membership("code", fleet.epoch)
    assert await fleet.reserve(0, "one")  # its candidates still name the epoch that all know
    assert (await other.view())["x"].membership == known
    await fleet.heal()
    stands = (await other.view())["x"].membership
    assert (stands.tier, stands.epoch > fleet.epoch) == ("code", True)
    assert (await alone.view())["x"].membership == stands


async def test_a_claim_made_alone_gives_way_to_who_was_first(fleet: Fleet) -> None:
    alone, other = fleet.stores[:2]
    fleet.fail(Fault.GONE, [0])
    assert isinstance(await alone.claim("x", "code", fleet.epoch), Changed)
    first = await other.claim("x", "batch", fleet.epoch)
    assert isinstance(first, Changed)
    await fleet.heal()
    assert (await alone.view())["x"].membership == first.membership
    assert (await other.view())["x"].membership == first.membership


async def test_a_hand_back_conflicts_until_the_store_counts_for_all(fleet: Fleet) -> None:
    store = fleet.stores[0]
    known = (await store.view())["x"].membership
    fleet.fail(Fault.GONE)
    assert await store.hand_back("x", fleet.epoch) == Conflict(known)
    fleet.fail(Fault.NONE)
    await fleet.look()
    assert fleet.mode(0) is Mode.HEALING
    assert await store.hand_back("x", fleet.epoch) == Conflict(known)
    await fleet.heal()
    assert isinstance(await store.hand_back("x", fleet.epoch), Changed)


async def test_a_lease_is_answered_again_and_never_revived(fleet: Fleet) -> None:
    store = fleet.stores[0]
    fleet.fail(Fault.GONE)
    assert await fleet.reserve(0, "one")
    assert await fleet.reserve(0, "one")
    assert (await store.view())["x"].own.decodes == 1
    await store.release("one")
    await store.release("one")
    await store.release("never")
    assert not await fleet.reserve(0, "one")
    assert not await fleet.reserve(0, "never")
    await fleet.heal()
    assert not await fleet.reserve(0, "never")
    assert await fleet.truth() == 0


async def test_an_answer_that_was_lost_leaves_nothing_behind(fleet: Fleet) -> None:
    fleet.fail(Fault.LOST)
    assert await fleet.reserve(0, "one")
    assert await fleet.truth() == 1  # granted there, unknown here
    await fleet.heal()
    assert await fleet.truth() == 1  # the one that was granted here
    await fleet.stores[0].release("one")
    assert await fleet.truth() == 0


async def test_an_answer_that_was_lost_may_have_named_another_backend(fleet: Fleet) -> None:
    store, inner = fleet.stores[0], fleet.inner[0]
    epoch = (await store.add_backend("y", "chat")).epoch
    fleet.fail(Fault.LOST)
    theirs = ReserveCandidate("y", Cost(1, 1, 1, "chat", 50.0), Limits(2, 10**6, 10**6), 0.0, epoch)
    # the store has room for two on y; this replica's share of that is none, so it takes x
    assert await store.reserve("one", (theirs, fleet.candidate())) == Granted("one", "x")
    assert (await inner.inner.view())["y"].own.decodes == 1
    await fleet.heal()
    loads = await inner.inner.view()
    assert (loads["x"].own.decodes, loads["y"].own.decodes) == (1, 0)
    await store.release("one")
    assert await fleet.truth() == 0


async def test_while_healing_the_share_and_the_store_both_hold(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    assert await fleet.fill(0, "n") == 4
    fleet.fail(Fault.NONE, [0])
    await fleet.look()
    assert fleet.mode(0) is Mode.HEALING
    assert not await fleet.reserve(0, "beyond its share")
    await fleet.stores[0].release("n0")
    assert not await fleet.reserve(0, "refused", limits=Limits(3, 10**6, 10**6))
    assert await fleet.reserve(0, "within both")
    assert (await fleet.inner[0].inner.view())["x"].own.decodes == 4


async def test_a_second_silence_while_healing_gives_no_second_share(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    assert [await fleet.fill(i, "n") for i in range(3)] == [4, 4, 4]
    fleet.fail(Fault.NONE, [0])
    await fleet.look()
    await fleet.stores[0].view()  # the others could not tell what they carry
    assert fleet.mode(0) is Mode.HEALING
    fleet.fail(Fault.GONE)
    await fleet.stores[0].release("never")
    assert fleet.modes[0] == [Mode.ALONE, Mode.HEALING, Mode.ALONE]
    assert await fleet.fill(0, "more") == 0


async def test_what_the_store_granted_before_it_fell_silent_was_free_then(fleet: Fleet) -> None:
    store, inner = fleet.stores[0], fleet.inner[0]
    inner.fault = Fault.LATE
    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(store.reserve(f"late{index}", (fleet.candidate(),))) for index in range(3)]
        await asyncio.sleep(0)
        inner.fault = Fault.GONE
        assert await fleet.reserve(0, "alone")
        inner.answer.set()
    assert all(isinstance(one.result(), Granted) for one in asking)
    # 3 were the store's, of the 9 that were left then 3 are its own
    assert await fleet.fill(0, "more") == 2


async def test_a_lease_that_is_being_asked_for_is_not_told_of_as_well(fleet: Fleet) -> None:
    store, inner = fleet.stores[0], fleet.inner[0]
    fleet.fail(Fault.GONE)
    assert await fleet.reserve(0, "one")
    fleet.fail(Fault.NONE)
    await fleet.look()
    assert fleet.mode(0) is Mode.HEALING
    assert await fleet.reserve(1, "tight", Cost(1, 1, 1, "code", 20.0))
    picky = ReserveCandidate("x", ONE, BOX, 50.0, fleet.epoch)
    inner.fault = Fault.LATE
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(store.reserve("denied", (picky,)))
        await asyncio.sleep(0)
        inner.fault = Fault.NONE
        await store._mending.mend()
        inner.answer.set()
    assert isinstance(asking.result(), Denied)
    assert (await inner.inner.view())["x"].own.decodes == 1
    assert (await store.view())["x"].own.decodes == 1


async def test_healing_lasts_until_all_are_back(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    for index in range(3):
        await fleet.reserve(index, f"one{index}")
    empty = MemoryState(fleet.clock)
    fleet.inner[0].move_to(empty)
    fleet.inner[1].move_to(empty)
    fleet.fail(Fault.NONE, [0, 1])
    await fleet.look()
    await fleet.look(5.0)
    assert [store.mode for store in fleet.stores] == [Mode.HEALING, Mode.HEALING, Mode.ALONE]
    fleet.inner[2].move_to(empty)
    fleet.fail(Fault.NONE)
    await fleet.look(1.0)
    assert fleet.mode(0) is Mode.SHARED
    assert fleet.mode(2) is Mode.HEALING  # the others are to hear of what it carries
    await fleet.look(1.0)
    assert fleet.mode(2) is Mode.SHARED


async def test_who_stays_away_is_waited_for_one_lease_time(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    await fleet.reserve(0, "one")
    fleet.inner[0].move_to(MemoryState(fleet.clock))
    fleet.fail(Fault.NONE, [0])
    await fleet.look()
    await fleet.look(9.9)
    assert fleet.mode(0) is Mode.HEALING
    await fleet.look(0.2)
    assert fleet.mode(0) is Mode.SHARED


async def test_a_store_that_comes_back_empty_is_told_everything(fleet: Fleet) -> None:
    for index in range(3):
        assert await fleet.reserve(index, f"before{index}")
    sequence = fleet.stores[0].sequence_of("x") + 1
    await fleet.stores[0].publish([Publication("x", LoadVector(1, 77, 0, {"chat": 1}), sequence)])
    fleet.fail(Fault.GONE)
    assert await fleet.reserve(0, "during")
    await fleet.stores[2].release("before2")
    empty = MemoryState(fleet.clock)
    for inner in fleet.inner:
        inner.move_to(empty)
    await fleet.heal()
    assert [store.mode for store in fleet.stores] == [Mode.SHARED] * 3
    load = (await fleet.inner[0].inner.view())["x"]
    assert (load.own.decodes, load.own.peak_kv_tokens, load.foreign.decodes) == (2, 177, 1)
    fleet.epoch = load.membership.epoch
    assert await fleet.reserve(0, "after")
    for lease in ("before0", "during", "after"):
        await fleet.stores[0].release(lease)
    await fleet.stores[1].release("before1")
    assert await fleet.truth() == 0


async def test_a_store_that_is_suddenly_empty_is_noticed(fleet: Fleet) -> None:
    assert await fleet.reserve(0, "before")
    empty = MemoryState(fleet.clock)
    for inner in fleet.inner:
        inner.move_to(empty)
    await fleet.look(1.0)
    assert fleet.mode(0) is not Mode.SHARED
    await fleet.heal()
    assert fleet.mode(0) is Mode.SHARED
    assert await fleet.truth() == 1


async def test_a_quiet_replica_notices_that_the_store_is_gone() -> None:
    fleet = Fleet(1, Shelter(deadline_s=0.02))
    await fleet.start()
    fleet.fail(Fault.GONE)
    await fleet.look(0.9)
    assert fleet.mode(0) is Mode.SHARED
    await fleet.look(0.2)
    assert fleet.mode(0) is Mode.ALONE


async def test_what_a_store_grants_after_it_forgot_is_held_to_the_share(fleet: Fleet) -> None:
    for lease in ("a", "b", "c"):
        assert await fleet.reserve(1, lease)
    await fleet.know()
    emptied = MemoryState(fleet.clock)
    fleet.inner[0].move_to(emptied)
    fleet.epoch = (await fleet.inner[0].inner.add_backend("x", "chat")).epoch
    fleet.stores[0]._book.restate("x", Membership("chat", fleet.epoch))
    fleet.inner[0].shown_mode = Mode.HEALING
    # of 12, the other has 3 that the store has forgotten: 9 are free, 3 of them for this one
    assert await fleet.fill(0, "n") == 3
    assert fleet.mode(0) is Mode.HEALING


async def test_a_refused_grant_of_a_store_that_forgot_is_ended_there(fleet: Fleet) -> None:
    assert await fleet.fill(1, "all") == 12
    await fleet.know()
    emptied = MemoryState(fleet.clock)
    fleet.inner[0].move_to(emptied)
    fleet.epoch = (await fleet.inner[0].inner.add_backend("x", "chat")).epoch
    fleet.stores[0]._book.restate("x", Membership("chat", fleet.epoch))
    fleet.inner[0].shown_mode = Mode.HEALING
    assert not await fleet.reserve(0, "beyond")
    fleet.inner[0].shown_mode = Mode.SHARED
    await fleet.heal()
    assert (await fleet.inner[0].inner.view())["x"].own.decodes == 0


async def test_a_store_that_says_it_is_healing_is_not_trusted_yet(fleet: Fleet) -> None:
    fleet.inner[0].shown_mode = Mode.HEALING
    await fleet.stores[0].view()
    await fleet.look()
    await fleet.look(2.0)
    assert fleet.mode(0) is Mode.HEALING
    fleet.inner[0].shown_mode = Mode.SHARED
    await fleet.look(2.0)
    assert fleet.mode(0) is Mode.SHARED


async def test_a_gateway_that_starts_without_a_store_serves() -> None:
    fleet = Fleet(1, Shelter(deadline_s=0.02, least_replicas=3))
    fleet.fail(Fault.GONE)
    await fleet.start()
    assert fleet.epoch == 0
    assert await fleet.fill(0, "n") == 4
    await fleet.stores[0].add_backend("y", None)
    await fleet.heal()
    await fleet.look(10.0)
    assert fleet.mode(0) is Mode.SHARED
    assert (await fleet.stores[0].view())["x"].membership.epoch > 0
    assert await fleet.truth() == 4
    await fleet.stores[0].remove_backend("y")
    assert set(await fleet.stores[0].view()) == {"x"}


async def test_a_backend_removed_in_an_outage_is_removed(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    await fleet.reserve(0, "one")
    await fleet.stores[0].remove_backend("x")
    await fleet.stores[0].release("one")
    fleet.fail(Fault.NONE, [0])
    await fleet.stores[0].look()
    assert await fleet.inner[0].inner.view() == {}


async def test_watching_goes_on_from_the_last_knowledge(fleet: Fleet) -> None:
    store = fleet.stores[0]
    watch = store.watch()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(store.run())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await fleet.reserve(1, "theirs")
        event = await anext(watch)
        assert isinstance(event, StoreEvent)
        assert event.load.foreign.decodes == 1
        fleet.fail(Fault.GONE)
        await store.note_engine("x", 1)
        assert fleet.mode(0) is Mode.ALONE
        fleet.clock.now_s += 3.0
        load = (await store.view())["x"]
        assert (load.foreign.decodes, load.foreign.age_s) == (1, 3.0)
        running.cancel()


async def test_held_requests_are_told_again(fleet: Fleet) -> None:
    held = (Held("m", "chat", 0.5, 1, 100),)
    fleet.fail(Fault.GONE)
    await fleet.stores[0].publish([], held)
    others = fleet.stores[1].watch()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(fleet.stores[1].run())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        fleet.fail(Fault.NONE)
        await fleet.stores[0].look()
        event = await anext(others)
        assert not isinstance(event, StoreEvent)
        assert (event.replica, event.held) == ("r0", held)
        running.cancel()


async def test_the_engines_own_count_guards_its_cap() -> None:
    fleet = Fleet(2, caps={"x": 12})
    await fleet.start()
    assert await fleet.fill(0, "all") == 12
    await fleet.know()
    fleet.fail(Fault.GONE)
    await fleet.reserve(0, "noticed")
    await fleet.reserve(1, "noticed")
    await fleet.look(10.0)
    # its share is 6, but the engine is full with what the other still carries
    await fleet.stores[1].note_engine("x", 12)
    assert await fleet.fill(1, "late") == 0
    for index in range(8):
        await fleet.stores[0].release(f"all{index}")
    await fleet.stores[1].note_engine("x", 4)
    assert await fleet.fill(1, "later") == 4
    # an old count says nothing, and the share alone holds
    fleet.clock.now_s += 4.0
    assert await fleet.fill(1, "stale") == 2


async def test_an_idle_engine_takes_one_request_of_a_replica_whose_share_is_none(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    few = Limits(2, 10**6, 10**6)
    assert await fleet.fill(0, "early", few) == 0
    await fleet.look(10.0)
    assert await fleet.fill(0, "late", few) == 0
    await fleet.stores[0].note_engine("x", 0)
    assert await fleet.fill(0, "idle", few) == 1


async def test_every_change_of_mode_is_told_once(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    await fleet.reserve(0, "one")
    await fleet.reserve(0, "two")
    await fleet.look()
    await fleet.heal()
    assert fleet.modes[0] == [Mode.ALONE, Mode.HEALING, Mode.SHARED]


async def test_closing_does_not_wait_for_a_silent_store(fleet: Fleet) -> None:
    fleet.fail(Fault.SILENT)
    watch = fleet.stores[0].watch()
    await fleet.reserve(0, "one")
    await fleet.stores[0].close()
    await fleet.stores[0].close()
    assert [event async for event in watch] == []


async def test_a_caller_that_gives_up_leaves_nothing_behind(fleet: Fleet) -> None:
    fleet.fail(Fault.GONE)
    await fleet.reserve(0, "one")
    fleet.fail(Fault.NONE, [0])
    await fleet.look()
    assert fleet.mode(0) is Mode.HEALING
    fleet.fail(Fault.SILENT, [0])
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(fleet.stores[0].reserve("given up", (fleet.candidate(),)))
        await asyncio.sleep(0)
        asking.cancel()
    assert asking.cancelled()
    assert (await fleet.stores[0].view())["x"].own.decodes == 1
