"""What every store does. Runs on each implementation named in conftest.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from scheduling.load import Cost, Limits, LoadVector
from state.contract import (
    BackendLoad,
    Changed,
    Conflict,
    Denied,
    Granted,
    Held,
    HeldEvent,
    Membership,
    Publication,
    Store,
    StoreEvent,
)

from .conftest import Asking, Cluster

PATIENCE_S = 10.0


def plain(vector: LoadVector) -> tuple[int, int, int, Mapping[str, int]]:
    """Everything but the age."""
    return (vector.decodes, vector.peak_kv_tokens, vector.queued_prefill_tokens, dict(vector.residents))


NOBODY: dict[str, int] = {}
IDLE = (0, 0, 0, NOBODY)
ONE = (1, 100, 50, {"chat": 1})


async def standing(store: Store, backend: str) -> BackendLoad:
    return (await store.view())[backend]


async def own(store: Store, backend: str) -> tuple[int, int, int, Mapping[str, int]]:
    return plain((await standing(store, backend)).own)


async def epoch_of(store: Store, backend: str) -> int:
    return (await standing(store, backend)).membership.epoch


async def next_event(events: AsyncIterator[StoreEvent | HeldEvent]) -> StoreEvent:
    """The next about a backend."""
    async with asyncio.timeout(PATIENCE_S):
        async for event in events:
            if isinstance(event, StoreEvent):
                return event
    raise AssertionError("the store ended the watch")


async def next_held(events: AsyncIterator[StoreEvent | HeldEvent]) -> HeldEvent:
    """The next about what a replica holds."""
    async with asyncio.timeout(PATIENCE_S):
        async for event in events:
            if isinstance(event, HeldEvent):
                return event
    raise AssertionError("the store ended the watch")


class TestBackends:
    async def test_a_known_backend_keeps_its_membership(self, store: Store, other: Store) -> None:
        first = await store.add_backend("x", "chat")
        assert first.tier == "chat"
        assert await other.add_backend("x", None) == first
        assert (await standing(other, "x")).membership == first

    async def test_an_epoch_is_never_met_again_after_removal(self, store: Store, asking: Asking) -> None:
        before = await store.add_backend("x", "chat")
        await store.remove_backend("x")
        assert "x" not in await store.view()
        after = await store.add_backend("x", "chat")
        assert after.epoch > before.epoch
        assert isinstance(await store.reserve("l", [asking("x", before.epoch)]), Denied)

    async def test_a_lease_on_a_removed_backend_is_released_to_no_effect(
        self, store: Store, asking: Asking
    ) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("old", [asking("x", epoch)])
        await store.remove_backend("x")
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("new", [asking("x", epoch)])
        await store.release("old")
        assert await own(store, "x") == ONE

    async def test_removing_what_is_not_there_is_no_error(self, store: Store) -> None:
        await store.remove_backend("never")
        assert await store.view() == {}


class TestReserve:
    async def test_takes_the_first_candidate_that_fits(self, store: Store, asking: Asking) -> None:
        epochs = {name: (await store.add_backend(name, "chat")).epoch for name in "xyz"}
        full = Limits(0, 10**9, 10**9)
        asked = [
            asking("x", epochs["x"], limits=full),
            asking("y", epochs["y"]),
            asking("z", epochs["z"]),
        ]
        assert await store.reserve("l", asked) == Granted("l", "y")
        assert [await own(store, name) for name in "xyz"] == [IDLE, ONE, IDLE]

    async def test_passes_over_another_epoch_and_an_unknown_backend(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        wrong = [asking("x", epoch + 1), asking("x", epoch - 1), asking("nowhere", epoch)]
        answer = await store.reserve("l", wrong)
        assert isinstance(answer, Denied)
        assert set(answer.memberships) == {"x"}
        assert await store.reserve("m", [*wrong, asking("x", epoch)]) == Granted("m", "x")

    @pytest.mark.parametrize(
        "limits",
        [Limits(2, 10**9, 10**9), Limits(10**6, 299, 10**9), Limits(10**6, 10**9, 149)],
        ids=["decodes", "kv", "prefill"],
    )
    async def test_each_limit_binds_on_the_total_of_all_replicas(
        self, store: Store, other: Store, asking: Asking, limits: Limits
    ) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        assert isinstance(await store.reserve("1", [asking("x", epoch, limits=limits)]), Granted)
        assert isinstance(await other.reserve("2", [asking("x", epoch, limits=limits)]), Granted)
        for replica in (store, other):
            answer = await replica.reserve("3", [asking("x", epoch, limits=limits)])
            assert isinstance(answer, Denied)
            assert plain(answer.foreign["x"]) == ONE
            assert answer.memberships["x"] == Membership("chat", epoch)

    async def test_exactly_at_the_limit_still_fits(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        exact = Limits(1, 100, 50)
        assert isinstance(await store.reserve("1", [asking("x", epoch, limits=exact)]), Granted)
        assert isinstance(await store.reserve("2", [asking("x", epoch, limits=exact)]), Denied)

    async def test_no_resident_may_be_tighter_than_assumed(
        self, store: Store, other: Store, asking: Asking
    ) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        tight = asking("x", epoch, cost=Cost(1, 1, 1, "code", 20.0), tightest_resident_ms=float("inf"))
        loose = asking("x", epoch, tightest_resident_ms=50.0)
        fair = asking("x", epoch, tightest_resident_ms=20.0)
        # Nobody is there yet, so whatever was assumed holds.
        assert isinstance(await other.reserve("tight", [tight]), Granted)
        assert isinstance(await store.reserve("1", [loose]), Denied)
        assert isinstance(await store.reserve("2", [fair]), Granted)
        await other.release("tight")
        assert isinstance(await store.reserve("3", [loose]), Granted)

    async def test_two_of_one_pace_stay_the_tightest_until_both_left(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        for lease in ("1", "2"):
            await store.reserve(lease, [asking("x", epoch, cost=Cost(1, 1, 1, "code", 20.0))])
        loose = asking("x", epoch, tightest_resident_ms=50.0)
        await store.release("1")
        assert isinstance(await store.reserve("3", [loose]), Denied)
        await store.release("2")
        assert isinstance(await store.reserve("4", [loose]), Granted)

    async def test_of_several_paces_the_smallest_counts(self, store: Store, other: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        for replica, lease, pace_ms in ((store, "1", 50.0), (other, "2", 20.0), (store, "3", 100.0)):
            await replica.reserve(lease, [asking("x", epoch, cost=Cost(1, 1, 1, "any", pace_ms))])
        assert isinstance(await store.reserve("4", [asking("x", epoch, tightest_resident_ms=21.0)]), Denied)
        assert isinstance(await store.reserve("5", [asking("x", epoch, tightest_resident_ms=20.0)]), Granted)

    async def test_a_request_without_a_pace_is_never_the_tightest(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        batch = asking("x", epoch, cost=Cost(1, 1, 1, "batch", float("inf")))
        assert isinstance(await store.reserve("batch", [batch]), Granted)
        assert isinstance(await store.reserve("1", [asking("x", epoch, tightest_resident_ms=1e9)]), Granted)

    async def test_asking_again_with_one_lease_takes_one_place(self, store: Store, asking: Asking) -> None:
        """The first answer was lost. The second may even ask elsewhere: the place is where it is."""
        epochs = {name: (await store.add_backend(name, "chat")).epoch for name in "xy"}
        first = await store.reserve("l", [asking("x", epochs["x"])])
        again = await store.reserve("l", [asking("y", epochs["y"]), asking("x", epochs["x"])])
        assert first == again == Granted("l", "x")
        assert [await own(store, name) for name in "xy"] == [ONE, IDLE]

    async def test_nothing_to_choose_from_is_denied(self, store: Store) -> None:
        assert await store.reserve("l", []) == Denied("l", {}, {})

    async def test_racing_replicas_never_pass_the_limit(self, cluster: Cluster, asking: Asking) -> None:
        replicas = [await cluster.replica(f"r{i}") for i in range(5)]
        epoch = (await replicas[0].add_backend("x", "chat")).epoch
        limits = Limits(17, 10**9, 10**9)
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(replica.reserve(f"{i}-{k}", [asking("x", epoch, limits=limits)]))
                for k in range(10)
                for i, replica in enumerate(replicas)
            ]
        assert sum(isinstance(one.result(), Granted) for one in asked) == 17
        view = await standing(replicas[0], "x")
        assert (view.own + view.foreign).decodes == 17


class TestRelease:
    async def test_takes_away_what_was_reserved_once(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("1", [asking("x", epoch)])
        await store.reserve("2", [asking("x", epoch, cost=Cost(3, 7, 9, "code", 20.0))])
        await store.release("1")
        await store.release("1")
        assert await own(store, "x") == (3, 7, 9, {"code": 3})
        await store.release("2")
        assert await own(store, "x") == IDLE

    async def test_an_unknown_lease_is_no_error(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("1", [asking("x", epoch)])
        await store.release("never")
        assert await own(store, "x") == ONE

    async def test_an_ended_lease_cannot_be_revived(self, store: Store, asking: Asking) -> None:
        """The release overtook a reservation that was delayed on its way, or asked twice."""
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.release("overtaken")
        assert isinstance(await store.reserve("overtaken", [asking("x", epoch)]), Denied)
        await store.reserve("ended", [asking("x", epoch)])
        await store.release("ended")
        assert isinstance(await store.reserve("ended", [asking("x", epoch)]), Denied)
        assert await own(store, "x") == IDLE

    async def test_leases_are_the_replicas_own(self, store: Store, other: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("1", [asking("x", epoch)])
        await other.release("1")
        assert await own(store, "x") == ONE


class TestPublish:
    async def test_replaces_the_replicas_own_part_only(self, store: Store, other: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("1", [asking("x", epoch)])
        await other.reserve("2", [asking("x", epoch)])
        measured = LoadVector(1, 120, 10, {"chat": 1})
        assert await store.publish([Publication("x", measured, store.sequence_of("x") + 1)])
        assert await own(store, "x") == plain(measured)
        assert plain((await standing(other, "x")).foreign) == plain(measured)
        assert await own(other, "x") == ONE

    async def test_others_see_how_much_slack_is_left(self, store: Store, other: Store, asking: Asking) -> None:
        """As long as any lease stands that the publish saw; the least of each pace over all replicas."""
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("1", [asking("x", epoch)])
        await other.reserve("2", [asking("x", epoch)])
        measured = LoadVector(1, 120, 10, {"chat": 1}, slack=((0.05, 0.25),), queued_slack=((0.02, -0.125),))
        assert await store.publish([Publication("x", measured, store.sequence_of("x") + 1)])
        seen = (await standing(other, "x")).foreign
        assert (seen.slack, seen.queued_slack) == (measured.slack, measured.queued_slack)
        seen = (await standing(store, "x")).foreign
        assert (seen.slack, seen.queued_slack) == ((), ())
        await store.release("1")
        seen = (await standing(other, "x")).foreign
        assert (seen.slack, seen.queued_slack) == ((), ())

    async def test_counts_towards_the_limits(self, store: Store, other: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("1", [asking("x", epoch)])
        limits = Limits(10, 10**9, 60)
        assert isinstance(await other.reserve("2", [asking("x", epoch, limits=limits)]), Denied)
        assert await store.publish(
            [Publication("x", LoadVector(1, 100, 10, {"chat": 1}), store.sequence_of("x") + 1)]
        )
        assert isinstance(await other.reserve("2", [asking("x", epoch, limits=limits)]), Granted)

    async def test_reordered_publishes_keep_the_newest(self, store: Store) -> None:
        await store.add_backend("x", "chat")
        base = store.sequence_of("x")
        assert await store.publish([Publication("x", LoadVector(2, 20, 0), base + 2)])
        assert not await store.publish([Publication("x", LoadVector(1, 10, 0), base + 1)])
        assert not await store.publish([Publication("x", LoadVector(3, 30, 0), base + 2)])
        assert await own(store, "x") == (2, 20, 0, {})
        assert store.sequence_of("x") == base + 2

    async def test_a_measurement_from_before_a_reservation_is_refused(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        sequence = store.sequence_of("x")
        await store.reserve("1", [asking("x", epoch)])
        assert not await store.publish([Publication("x", LoadVector(), sequence + 1)])
        assert await own(store, "x") == ONE

    async def test_a_measurement_from_before_a_release_is_refused(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("1", [asking("x", epoch)])
        sequence = store.sequence_of("x")
        await store.release("1")
        assert not await store.publish([Publication("x", LoadVector(1, 100, 0, {"chat": 1}), sequence + 1)])
        assert await own(store, "x") == IDLE

    async def test_another_replicas_writes_do_not_make_it_old(
        self, store: Store, other: Store, asking: Asking
    ) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        sequence = store.sequence_of("x")
        await other.reserve("1", [asking("x", epoch)])
        assert await store.publish([Publication("x", LoadVector(), sequence + 1)])

    async def test_a_denied_reservation_does_not_make_it_old(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        sequence = store.sequence_of("x")
        await store.reserve("1", [asking("x", epoch + 1)])
        assert await store.publish([Publication("x", LoadVector(), sequence + 1)])

    async def test_a_release_after_it_never_goes_below_zero(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        for lease in ("1", "2"):
            await store.reserve(lease, [asking("x", epoch, cost=Cost(2, 100, 50, "chat", 50.0))])
        assert await store.publish(
            [Publication("x", LoadVector(1, 10, 5, {"chat": 1}), store.sequence_of("x") + 1)]
        )
        await store.release("1")
        assert await own(store, "x") == (0, 0, 5, {})
        await store.release("2")
        assert await own(store, "x") == IDLE

    async def test_a_reservation_after_it_is_added_and_taken_away_exactly(
        self, store: Store, asking: Asking
    ) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("1", [asking("x", epoch)])
        assert await store.publish(
            [Publication("x", LoadVector(1, 80, 20, {"chat": 1}), store.sequence_of("x") + 1)]
        )
        await store.reserve("2", [asking("x", epoch, cost=Cost(4, 1000, 500, "code", 20.0))])
        assert await own(store, "x") == (5, 1080, 520, {"chat": 1, "code": 4})
        await store.release("2")
        assert await own(store, "x") == (1, 80, 20, {"chat": 1})

    async def test_several_at_once_are_taken_each_for_itself(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.add_backend("y", "chat")
        before = {name: store.sequence_of(name) for name in "xy"}
        await store.reserve("1", [asking("x", epoch)])
        both = [Publication(name, LoadVector(2, 20, 2), before[name] + 1) for name in "xy"]
        assert await store.publish(both) == {"y"}
        assert [await own(store, name) for name in "xy"] == [ONE, (2, 20, 2, NOBODY)]

    async def test_to_a_backend_that_is_gone_is_refused(self, store: Store) -> None:
        assert not await store.publish([Publication("nowhere", LoadVector(1, 1, 1), 1)])
        assert store.sequence_of("nowhere") == 0


class TestMembership:
    async def test_claim_moves_and_raises_the_epoch(self, store: Store, other: Store) -> None:
        before = await store.add_backend("x", None)
        changed = await store.claim("x", "chat", before.epoch)
        assert isinstance(changed, Changed)
        assert changed.membership.tier == "chat"
        assert changed.membership.epoch > before.epoch
        assert (await standing(other, "x")).membership == changed.membership

    async def test_of_two_claims_one_wins(self, store: Store, other: Store) -> None:
        epoch = (await store.add_backend("x", None)).epoch
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(store.claim("x", "chat", epoch))
            second = tasks.create_task(other.claim("x", "code", epoch))
        results = [first.result(), second.result()]
        assert sorted(type(result).__name__ for result in results) == ["Changed", "Conflict"]
        assert results[0].membership == results[1].membership

    async def test_a_lost_answer_shows_in_the_conflict(self, store: Store) -> None:
        epoch = (await store.add_backend("x", None)).epoch
        changed = await store.claim("x", "chat", epoch)
        again = await store.claim("x", "chat", epoch)
        assert isinstance(again, Conflict)
        assert again.membership == changed.membership

    async def test_a_reservation_under_the_old_epoch_fails_after_a_claim(
        self, store: Store, other: Store, asking: Asking
    ) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await other.claim("x", "code", epoch)
        answer = await store.reserve("l", [asking("x", epoch)])
        assert isinstance(answer, Denied)
        assert answer.memberships["x"].tier == "code"
        assert isinstance(await store.reserve("l", [asking("x", answer.memberships["x"].epoch)]), Granted)

    async def test_a_backend_with_residents_can_be_claimed(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("l", [asking("x", epoch)])
        assert isinstance(await store.claim("x", "code", epoch), Changed)
        assert await own(store, "x") == ONE

    async def test_an_empty_backend_is_handed_back(self, store: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("l", [asking("x", epoch)])
        await store.release("l")
        changed = await store.hand_back("x", epoch)
        assert isinstance(changed, Changed)
        assert changed.membership.tier is None
        assert changed.membership.epoch > epoch

    async def test_not_while_anybody_carries_anything(self, store: Store, other: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await other.reserve("l", [asking("x", epoch)])
        for replica in (store, other):
            assert await replica.hand_back("x", epoch) == Conflict(Membership("chat", epoch))
        await other.release("l")
        assert isinstance(await store.hand_back("x", epoch), Changed)

    async def test_not_while_a_measured_load_stands(self, store: Store, other: Store) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        assert await other.publish([Publication("x", LoadVector(0, 0, 7), 1)])
        assert isinstance(await store.hand_back("x", epoch), Conflict)
        assert await other.publish([Publication("x", LoadVector(), 2)])
        assert isinstance(await store.hand_back("x", epoch), Changed)

    async def test_not_under_an_old_epoch(self, store: Store, other: Store) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        now = (await other.claim("x", "code", epoch)).membership
        assert await store.hand_back("x", epoch) == Conflict(now)

    async def test_an_unknown_backend_conflicts(self, store: Store) -> None:
        for answer in (await store.claim("nowhere", "chat", 1), await store.hand_back("nowhere", 1)):
            assert isinstance(answer, Conflict)
            assert answer.membership.tier is None

    async def test_hand_back_races_reserve_and_only_one_happens(
        self, store: Store, other: Store, asking: Asking
    ) -> None:
        for round_number in range(20):
            epoch = (await store.add_backend(f"x{round_number}", "chat")).epoch
            async with asyncio.TaskGroup() as tasks:
                back = tasks.create_task(store.hand_back(f"x{round_number}", epoch))
                asked = [asking(f"x{round_number}", epoch)]
                taken = tasks.create_task(other.reserve(f"{round_number}", asked))
            assert isinstance(back.result(), Changed) != isinstance(taken.result(), Granted)


class TestWatch:
    async def test_tells_of_other_replicas_only(self, store: Store, other: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        events = store.watch()
        await store.reserve("mine", [asking("x", epoch)])
        await other.reserve("theirs", [asking("x", epoch, cost=Cost(2, 20, 2, "code", 20.0))])
        event = await next_event(events)
        assert event.backend == "x"
        assert plain(event.load.foreign) == (2, 20, 2, {"code": 2})
        assert plain(event.load.own) == ONE

    async def test_tells_of_every_kind_of_change(self, store: Store, other: Store, asking: Asking) -> None:
        events = store.watch()
        epoch = (await other.add_backend("x", "chat")).epoch
        assert (await next_event(events)).load.membership == Membership("chat", epoch)
        await other.reserve("l", [asking("x", epoch)])
        assert plain((await next_event(events)).load.foreign) == ONE
        await other.publish([Publication("x", LoadVector(1, 90, 0, {"chat": 1}), other.sequence_of("x") + 1)])
        assert plain((await next_event(events)).load.foreign) == (1, 90, 0, {"chat": 1})
        await other.release("l")
        assert plain((await next_event(events)).load.foreign) == IDLE
        await other.claim("x", "code", epoch)
        changed = (await next_event(events)).load.membership
        assert changed.tier == "code"
        await other.hand_back("x", changed.epoch)
        assert (await next_event(events)).load.membership.tier is None

    async def test_tells_what_others_hold(self, store: Store, other: Store) -> None:
        events = store.watch()
        held = (Held("m", "chat", 0.25, 1, 900),)
        await store.publish((), (Held("m", "code", 0.1, 1, 100),))  # its own is not told
        await other.publish((), held)
        event = await next_held(events)
        (told,) = event.held
        assert (told.model, told.tier, told.decodes, told.kv_tokens) == ("m", "chat", 1, 900)
        assert 0.0 <= told.due_in_s <= 0.25
        await other.publish(())
        assert await next_held(events) == HeldEvent(event.replica, ())

    async def test_a_replica_that_closes_holds_nobody(self, store: Store, other: Store) -> None:
        events = store.watch()
        await other.publish((), (Held("m", "chat", 0.25, 1, 900),))
        assert (await next_held(events)).held
        await other.close()
        assert not (await next_held(events)).held

    async def test_a_reader_that_waits_is_woken(self, store: Store, other: Store) -> None:
        events = store.watch()
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(next_event(events))
            await asyncio.sleep(0)
            tasks.create_task(other.add_backend("x", "chat"))
        assert waiting.result().backend == "x"

    async def test_a_slow_reader_misses_no_final_state(self, store: Store, other: Store, asking: Asking) -> None:
        epochs = {name: (await store.add_backend(name, "chat")).epoch for name in "xyz"}
        events = store.watch()
        for i in range(300):
            name = "xyz"[i % 3]
            await other.reserve(f"{i}", [asking(name, epochs[name])])
        seen: dict[str, int] = {}
        while len(seen) < 3 or set(seen.values()) != {100}:
            event = await next_event(events)
            seen[event.backend] = event.load.foreign.decodes

    async def test_ends_when_the_store_is_closed(self, store: Store, other: Store) -> None:
        waiting, later = store.watch(), other.watch()
        async with asyncio.TaskGroup() as tasks:
            woken = tasks.create_task(_drain(waiting))
            await asyncio.sleep(0)
            await store.close()
        assert woken.result() == []
        await other.close()
        assert await _drain(later) == []


async def _drain(events: AsyncIterator[StoreEvent | HeldEvent]) -> list[StoreEvent | HeldEvent]:
    async with asyncio.timeout(PATIENCE_S):
        return [event async for event in events]


class TestClose:
    async def test_gives_back_every_lease(self, store: Store, other: Store, asking: Asking) -> None:
        epochs = {name: (await store.add_backend(name, "chat")).epoch for name in "xy"}
        await other.reserve("kept", [asking("x", epochs["x"])])
        for i, name in enumerate("xyxy"):
            await store.reserve(f"{i}", [asking(name, epochs[name])])
        assert await store.publish([Publication("y", LoadVector(2, 300, 9), store.sequence_of("y") + 1)])
        await store.close()
        await store.close()
        view = await other.view()
        assert {name: plain(load.foreign) for name, load in view.items()} == {"x": IDLE, "y": IDLE}
        assert plain(view["x"].own) == ONE
        assert isinstance(await other.hand_back("y", epochs["y"]), Changed)

    async def test_its_residents_no_longer_hold_the_pace(self, store: Store, other: Store, asking: Asking) -> None:
        epoch = (await store.add_backend("x", "chat")).epoch
        await store.reserve("tight", [asking("x", epoch, cost=Cost(1, 1, 1, "code", 20.0))])
        await store.close()
        assert isinstance(await other.reserve("1", [asking("x", epoch, tightest_resident_ms=50.0)]), Granted)
