"""Invariant: the load a store shows is the sum of the leases that stand, at every moment, whoever asks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scheduling.load import Cost, Limits, LoadVector, ReserveCandidate
from state.contract import Changed, Conflict, Denied, Granted, Membership, Publication, Store

from .conftest import CLUSTERS, run_machine

T = TypeVar("T")

REPLICAS = ("a", "b", "c")
BACKENDS = ("x", "y")
IDS = tuple(f"l{i}" for i in range(12))
replicas = st.sampled_from(REPLICAS)
backends = st.sampled_from(BACKENDS)
ids = st.sampled_from(IDS)
costs = st.builds(
    Cost,
    decodes=st.integers(0, 4),
    peak_kv_tokens=st.integers(0, 100),
    prefill_tokens=st.integers(0, 50),
    tier=st.sampled_from(("code", "chat")),
    tpot_ms=st.sampled_from((20.0, 50.0, float("inf"))),
)
limits = st.builds(Limits, st.integers(0, 12), st.integers(0, 300), st.integers(0, 150))
paces = st.sampled_from((0.0, 20.0, 50.0, float("inf")))


@dataclass(frozen=True, slots=True)
class Held:
    backend: str
    cost: Cost


class StoreMachine(RuleBasedStateMachine):
    """Random calls from three replicas against a model of plain dicts."""

    implementation: str
    runner: asyncio.Runner

    def __init__(self) -> None:
        super().__init__()
        self.cluster = CLUSTERS[self.implementation]()
        self.stores: dict[str, Store] = {}
        self.held: dict[tuple[str, str], Held] = {}
        self.ended: set[tuple[str, str]] = set()
        self.members: dict[str, Membership] = {}
        # Backends where a publish was followed by a release: there queued prefill may still be overstated.
        self.overstated: set[tuple[str, str]] = set()
        self.published: set[tuple[str, str]] = set()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def teardown(self) -> None:
        try:
            for replica, lease in list(self.held):
                self.run(self.stores[replica].release(lease))
            for store in self.stores.values():
                for load in self.run(store.view()).values():
                    assert load.own.idle
                    assert load.foreign.idle
                    assert not any(load.own.residents.values())
        finally:
            self.run(self.cluster.close())

    @initialize()
    def start(self) -> None:
        for name in REPLICAS:
            self.stores[name] = self.run(self.cluster.replica(name))
        for backend in BACKENDS:
            self.members[backend] = self.run(self.stores["a"].add_backend(backend, "chat"))

    def carried(self, backend: str, replica: str | None = None) -> list[Cost]:
        return [
            held.cost
            for (owner, _), held in self.held.items()
            if held.backend == backend and replica in (None, owner)
        ]

    @rule(
        replica=replicas,
        lease=ids,
        cost=costs,
        order=st.permutations(BACKENDS),
        box=limits,
        tightest=paces,
        stale=st.booleans(),
    )
    def reserve(
        self,
        replica: str,
        lease: str,
        cost: Cost,
        order: list[str],
        box: Limits,
        tightest: float,
        stale: bool,
    ) -> None:
        key = (replica, lease)
        asked = [
            ReserveCandidate(name, cost, box, tightest, self.members[name].epoch - (stale and i == 0))
            for i, name in enumerate(order)
        ]
        expected = self._expected(key, asked)
        answer = self.run(self.stores[replica].reserve(lease, asked))
        if expected is None:
            assert isinstance(answer, Denied)
            assert dict(answer.memberships) == self.members
            return
        assert answer == Granted(lease, expected)
        self.held.setdefault(key, Held(expected, cost))

    def _expected(self, key: tuple[str, str], asked: list[ReserveCandidate]) -> str | None:
        if key in self.held:
            return self.held[key].backend
        if key in self.ended:
            return None
        for one in asked:
            shown = self.run(self.stores["a"].view())[one.backend]
            total = shown.own + shown.foreign
            if (
                one.epoch == self.members[one.backend].epoch
                and all(cost.tpot_ms >= one.tightest_resident_ms for cost in self.carried(one.backend))
                and total.decodes + one.cost.decodes <= one.limits.decodes
                and total.peak_kv_tokens + one.cost.peak_kv_tokens <= one.limits.peak_kv_tokens
                and total.queued_prefill_tokens + one.cost.prefill_tokens <= one.limits.queued_prefill_tokens
            ):
                return one.backend
        return None

    @rule(replica=replicas, lease=ids)
    def release(self, replica: str, lease: str) -> None:
        self.run(self.stores[replica].release(lease))
        held = self.held.pop((replica, lease), None)
        self.ended.add((replica, lease))
        if held is None:
            return
        place = (replica, held.backend)
        if not self.carried(held.backend, replica):
            self.overstated.discard(place)
            self.published.discard(place)
        elif place in self.published:
            self.overstated.add(place)

    @rule(replica=replicas, backend=backends, late=st.booleans())
    def publish(self, replica: str, backend: str, late: bool) -> None:
        """A replica that measured exactly what it carries changes nothing; a late one is refused."""
        carried = self.carried(backend, replica)
        residents: dict[str, int] = {}
        for cost in carried:
            residents[cost.tier] = residents.get(cost.tier, 0) + cost.decodes
        measured = LoadVector(
            sum(cost.decodes for cost in carried),
            sum(cost.peak_kv_tokens for cost in carried),
            sum(cost.prefill_tokens for cost in carried),
            residents,
        )
        store = self.stores[replica]
        sequence = store.sequence_of(backend)
        if late:
            assert not self.run(store.publish([Publication(backend, LoadVector(99, 99, 99), sequence)]))
        else:
            assert self.run(store.publish([Publication(backend, measured, sequence + 1)]))
            self.published.add((replica, backend))
            self.overstated.discard((replica, backend))

    @rule(replica=replicas, backend=backends, tier=st.sampled_from(("code", "chat")), stale=st.booleans())
    def claim(self, replica: str, backend: str, tier: str, stale: bool) -> None:
        before = self.members[backend]
        answer = self.run(self.stores[replica].claim(backend, tier, before.epoch - stale))
        assert isinstance(answer, Conflict if stale else Changed)
        assert answer.membership.epoch > before.epoch or stale
        self.members[backend] = answer.membership

    @rule(replica=replicas, backend=backends)
    def hand_back(self, replica: str, backend: str) -> None:
        before = self.members[backend]
        answer = self.run(self.stores[replica].hand_back(backend, before.epoch))
        assert isinstance(answer, Conflict if self.carried(backend) else Changed)
        assert answer.membership.epoch > before.epoch or isinstance(answer, Conflict)
        self.members[backend] = answer.membership

    @invariant()
    def vectors_are_the_leases(self) -> None:
        for replica, store in self.stores.items():
            for backend, load in self.run(store.view()).items():
                own, everyone = load.own, load.own + load.foreign
                assert load.membership == self.members[backend]
                for vector, costs_there, overstated in (
                    (own, self.carried(backend, replica), (replica, backend) in self.overstated),
                    (everyone, self.carried(backend), any(place[1] == backend for place in self.overstated)),
                ):
                    assert vector.decodes == sum(cost.decodes for cost in costs_there)
                    assert vector.peak_kv_tokens == sum(cost.peak_kv_tokens for cost in costs_there)
                    prefill = sum(cost.prefill_tokens for cost in costs_there)
                    assert vector.queued_prefill_tokens >= prefill
                    assert vector.queued_prefill_tokens == prefill or overstated
                    assert sum(vector.residents.values()) == vector.decodes
                    assert all(count > 0 for count in vector.residents.values())


@pytest.mark.parametrize("implementation", sorted(CLUSTERS))
def test_load_is_the_sum_of_the_leases(implementation: str) -> None:
    with asyncio.Runner() as runner:
        machine = type("Machine", (StoreMachine,), {"implementation": implementation, "runner": runner})
        run_machine(machine, max_examples=40)
