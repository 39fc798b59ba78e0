"""Comparing what was read: every difference named, and nothing called one that is only on its way. Pure: made-up
readings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from state.inventory import CarriedPart, Counted, Damage, Inventory, Standing, StoredLease
from tiergate.audit.causes import CAUSES, Kind
from tiergate.audit.compare import Difference, compare
from tiergate.audit.readings import Carried, CarriedBackend, CarriedLease, Reading, Readings

LEASE_S = 10.0
TIMES = 4


def store(*leases: tuple[str, str], **more: object) -> Inventory:
    """A store without contradictions: backend x with these leases of (replica, lease), one sequence each."""
    total = Counted()
    parts: dict[tuple[str, str], CarriedPart] = {}
    stored: dict[tuple[str, str], StoredLease] = {}
    for replica, lease in leases:
        one = Counted(1, 100, 0, 1, {"chat": 1})
        total += one
        part = parts.get((replica, "x"), CarriedPart(Counted(), 0, 0.0))
        parts[replica, "x"] = CarriedPart(part.load + one, part.measured_leases, 0.0)
        stored[replica, lease] = StoredLease("x", 7, 1, "chat", 50.0, ended=False)
    made = Inventory(
        taken_ms=1000,
        born_ms=1,
        last_epoch=9,
        standings={"x": Standing("chat", 7, 7, 50.0 if leases else float("inf"), total)},
        parts=parts,
        paces={"x": {50.0: len(leases)}} if leases else {},
        leases=stored,
        live={"a": 0.1, "b": 0.1},
        strays=(),
    )
    return replace(made, **more)  # type: ignore[arg-type]  # each test knows the field it changes


def replica(
    name: str,
    *leases: str,
    mode: str = "shared",
    stage: str = "running",
    passing: frozenset[str] = frozenset(),
    backends: Mapping[str, tuple[str | None, int]] | None = None,
) -> Carried:
    """A replica that carries these leases on x."""
    where = {"x": ("chat", 7)} if backends is None else backends
    return Carried(
        replica=name,
        fleet="f",
        mode=mode,
        backends=tuple(
            CarriedBackend(name=one, url="http://e", phase="up", tier=tier, epoch=epoch)
            for one, (tier, epoch) in where.items()
        ),
        leases=tuple(CarriedLease(lease=one, backend="x", stage=stage, sequences=1) for one in leases),
        passing=passing,
    )


def reading(seen: Inventory, *told: Carried, engine: int | None = None, after: Inventory | None = None) -> Reading:
    return Reading(seen, {one.replica: one for one in told}, {"x": engine}, after or seen)


def differences(*readings: Reading) -> list[tuple[Kind | Damage, str | None, str | None, str | None]]:
    """All that is found in these readings; one reading is repeated."""
    many = readings if len(readings) > 1 else readings * TIMES
    return [one.key for one in compare(Readings(many, 1.0, LEASE_S)).differences]


def test_where_all_agree_nothing_is_told() -> None:
    seen = store(("a", "a1"), ("b", "b1"), ("b", "b2"))
    assert not differences(reading(seen, replica("a", "a1"), replica("b", "b1", "b2"), engine=3))


def test_a_lease_that_its_replica_forgot_is_leaked() -> None:
    seen = store(("a", "a1"), ("a", "a2"), ("b", "b1"))
    told = reading(seen, replica("a", "a2"), replica("b", "b1"), engine=2)
    assert differences(told) == [(Kind.LEAKED_LEASE, "x", "a", "a1")]
    # one that is being asked for, or whose end is still to be told, is not
    passing = replica("a", "a2", passing=frozenset({"a1"}))
    assert not differences(reading(seen, passing, replica("b", "b1"), engine=2))


def test_a_lease_that_the_store_forgot_is_not_counted() -> None:
    seen = store(("a", "a1"), ("b", "b1"))
    told = reading(seen, replica("a", "a1", "a2"), replica("b", "b1"), engine=3)
    assert differences(told) == [(Kind.UNCOUNTED_LEASE, "x", "a", "a2")]


def test_a_lease_granted_without_the_store_is_the_same_lease_under_its_other_name() -> None:
    seen = store(("a", "a1~"), ("b", "b1"))
    assert not differences(reading(seen, replica("a", "a1"), replica("b", "b1"), engine=2))


def test_requests_that_come_and_go_are_no_differences() -> None:
    """Every reading misses something, and always something else."""
    rounds = []
    for number in range(TIMES):
        before = store(("a", f"a{number}"), ("a", f"a{number + 1}"))
        after = store(("a", f"a{number + 1}"), ("a", f"a{number + 2}"))
        told = replica("a", f"a{number + 2}", f"a{number + 3}")
        rounds.append(reading(before, told, replica("b"), engine=2, after=after))
    found = compare(Readings(rounds, 1.0, LEASE_S))
    assert not found.differences
    assert found.passing > 0


def test_what_is_there_every_time_is_told_however_much_comes_and_goes_around_it() -> None:
    rounds = []
    for number in range(TIMES):
        seen = store(("a", "leaked"), ("a", f"a{number}"))
        rounds.append(reading(seen, replica("a", f"a{number}"), replica("b")))
    assert differences(*rounds) == [(Kind.LEAKED_LEASE, "x", "a", "leaked")]


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        ((2, 2, 2, 2), []),
        ((5, 2, 5, 5), []),  # once it had no more than was counted: the others were on their way
        ((5, 4, 3, 5), [(Kind.ENGINE_HAS_MORE, "x", None, None)]),
        ((2, 1, 2, 2), []),
        ((0, 1, 0, 2), [(Kind.ENGINE_HAS_LESS, "x", None, None)]),
        ((None, None, None, None), []),
    ],
)
def test_an_engine_that_always_has_more_or_less_is_told(
    engines: tuple[int | None, ...], expected: list[tuple[Kind, str | None, str | None, str | None]]
) -> None:
    seen = store(("a", "a1"), ("b", "b1"))
    rounds = [reading(seen, replica("a", "a1"), replica("b", "b1"), engine=engine) for engine in engines]
    assert differences(*rounds) == expected


def test_an_engine_is_not_said_to_lack_what_has_not_reached_it() -> None:
    seen = store(("a", "a1"), ("b", "b1"))
    told = reading(seen, replica("a", "a1", stage="opening"), replica("b", "b1", stage="opening"), engine=0)
    assert not differences(told)


def test_a_dead_replica_and_what_it_leaves_is_told() -> None:
    seen = store(("a", "a1"), ("b", "b1"), live={"a": 0.1}, orphans={"b": 12.0})
    found = compare(Readings([reading(seen, replica("a", "a1"))] * TIMES, 1.0, LEASE_S)).differences
    assert [one.key for one in found] == [(Kind.DEAD_REPLICA, None, "b", None)]
    assert "1 sequences" in found[0].detail
    assert "8.0 s" in found[0].detail
    assert found[0].cause.heals


def test_a_replica_that_the_store_does_not_know_or_that_stands_alone_is_told() -> None:
    seen = store(("a", "a1"), live={"a": 0.1})
    stranger = reading(seen, replica("a", "a1"), replica("b", "b1"), engine=2)
    assert differences(stranger) == [(Kind.UNREGISTERED_REPLICA, None, "b", None)]
    alone = reading(store(("a", "a1")), replica("a", "a1", mode="alone"), replica("b"))
    assert differences(alone) == [(Kind.ALONE, None, "a", None)]


def test_other_memberships_and_backends_of_one_side_are_told() -> None:
    seen = store(("a", "a1"))
    late = replica("b", backends={"x": ("chat", 6)})
    assert differences(reading(seen, replica("a", "a1"), late)) == [(Kind.MEMBERSHIP, "x", "b", None)]
    more = replica("b", backends={"x": ("chat", 7), "y": (None, 8)})
    assert differences(reading(seen, replica("a", "a1"), more)) == [(Kind.BACKEND_NOT_IN_STORE, "y", "b", None)]
    nobody = {**seen.standings, "z": Standing(None, 5, 5, float("inf"), Counted())}
    left = reading(replace(seen, standings=nobody), replica("a", "a1"), replica("b"))
    assert differences(left) == [(Kind.NOBODYS_BACKEND, "z", None, None)]
    # a replica that was not asked may have it
    assert not differences(reading(replace(seen, standings=nobody), replica("a", "a1")))


def test_a_part_that_never_agrees_with_its_leases_is_told() -> None:
    seen = store(("a", "a1"), ("b", "b1"))
    drifted = CarriedPart(Counted(3, 100, 0, 1, {"chat": 3}), 1, 0.0)
    total = seen.parts["b", "x"].load + drifted.load
    high = replace(
        seen,
        parts={**seen.parts, ("a", "x"): drifted},
        standings={"x": replace(seen.standings["x"], total=total)},
    )
    told = replica("a", "a1"), replica("b", "b1")
    assert differences(reading(high, *told, engine=2)) == [(Kind.LOAD_DRIFT, "x", "a", None)]
    assert not differences(*[reading(high, *told, engine=2)] * 3, reading(seen, *told, engine=2))


def test_damage_inside_the_store_is_told_with_the_rest() -> None:
    seen = store(("a", "a1"), unreadable=("z|what",))
    assert differences(reading(seen, replica("a", "a1"), replica("b"))) == [(Damage.UNREADABLE, None, None, None)]


def test_every_difference_has_a_cause_and_says_what_follows() -> None:
    assert set(CAUSES) == {*Kind, *Damage}
    for kind in (*Kind, *Damage):
        cause = Difference(kind, "").cause
        assert cause.likely
        assert cause.then


def test_a_drift_that_a_leaked_lease_explains_is_not_told_again() -> None:
    seen = store(("a", "a1"), ("a", "leaked"))
    measured = CarriedPart(Counted(1, 200, 0, 2, {"chat": 1}), 2, 0.0)  # the replica's next publication
    low = replace(
        seen,
        parts={("a", "x"): measured},
        standings={"x": replace(seen.standings["x"], total=measured.load)},
    )
    told = reading(low, replica("a", "a1"), replica("b"), engine=1)
    assert differences(told) == [(Kind.LEAKED_LEASE, "x", "a", "leaked")]
