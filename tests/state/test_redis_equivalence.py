"""Redis and Valkey answer as the memory store does, whatever comes in which order and whatever gets lost.

The same calls go to a fleet on memory and to one on a server. On the way to the server answers get lost (the
caller asks again by the same lease), reservations arrive late or twice, and publishes are delayed past others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scheduling.load import Cost, Limits, LoadVector, ReserveCandidate
from state.contract import BackendLoad, Changed, Conflict, Denied, Granted, Publication, Store

from .conftest import CLUSTERS, Cluster, MemoryCluster, run_machine

T = TypeVar("T")

REPLICAS = ("a", "b")
BACKENDS = ("x", "y", "http://backend|one:8000")
LEASES = tuple(f"l{i}" for i in range(8))
TIERS = ("code", "chat mode")
NEVER_EPOCHS = (-7, -7)
replicas = st.sampled_from(REPLICAS)
backends = st.sampled_from(BACKENDS)
leases = st.sampled_from(LEASES)
costs = st.builds(
    Cost,
    decodes=st.integers(0, 3),
    peak_kv_tokens=st.integers(0, 100),
    prefill_tokens=st.integers(0, 50),
    tier=st.sampled_from(TIERS),
    tpot_ms=st.sampled_from((20.0, 33.3, 50.0, float("inf"))),
)
limits = st.builds(Limits, st.integers(0, 9), st.integers(0, 300), st.integers(0, 150))
paces = st.sampled_from((0.0, 20.0, 33.3, 50.0, float("inf")))
floors = st.sampled_from(((), ((0.02, -0.5),), ((0.02, 0.1), (0.05, 0.3))))
vectors = st.builds(
    LoadVector,
    st.integers(0, 6),
    st.integers(0, 300),
    st.integers(0, 150),
    st.dictionaries(st.sampled_from(TIERS), st.integers(0, 4)),
    st.just(0.0),
    floors,
    floors,
)


def plain(load: LoadVector) -> tuple[object, ...]:
    """All but the age."""
    return (
        load.decodes,
        load.peak_kv_tokens,
        load.queued_prefill_tokens,
        dict(load.residents),
        load.slack,
        load.queued_slack,
    )


class Two(RuleBasedStateMachine):
    """Each step is done on both; epochs differ, so they are compared by what they stand for."""

    implementation: str
    runner: asyncio.Runner

    def __init__(self) -> None:
        super().__init__()
        self.clusters: tuple[Cluster, Cluster] = (MemoryCluster(), CLUSTERS[self.implementation]())
        self.stores: dict[str, tuple[Store, Store]] = {}
        self.late: list[tuple[str, Publication, Publication]] = []
        self.old_epochs: list[Mapping[str, tuple[int, int]]] = []

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def teardown(self) -> None:
        for cluster in self.clusters:
            self.run(cluster.close())

    @initialize()
    def start(self) -> None:
        for name in REPLICAS:
            self.stores[name] = (
                self.run(self.clusters[0].replica(name)),
                self.run(self.clusters[1].replica(name)),
            )
        for backend in BACKENDS[:2]:
            self.add(REPLICAS[0], backend, TIERS[0])

    def views(self, replica: str) -> tuple[Mapping[str, BackendLoad], Mapping[str, BackendLoad]]:
        memory, served = self.stores[replica]
        return self.run(memory.view()), self.run(served.view())

    def epochs(self) -> dict[str, tuple[int, int]]:
        one, other = self.views(REPLICAS[0])
        assert one.keys() == other.keys()
        return {name: (one[name].membership.epoch, other[name].membership.epoch) for name in one}

    @rule(replica=replicas, backend=backends, tier=st.sampled_from((None, *TIERS)))
    def add(self, replica: str, backend: str, tier: str | None) -> None:
        memory, served = self.stores[replica]
        assert self.run(memory.add_backend(backend, tier)).tier == self.run(served.add_backend(backend, tier)).tier

    @rule(replica=replicas, backend=backends)
    def remove(self, replica: str, backend: str) -> None:
        self.old_epochs.append(self.epochs())
        for store in self.stores[replica]:
            self.run(store.remove_backend(backend))

    @rule(
        replica=replicas,
        lease=leases,
        cost=costs,
        order=st.permutations(BACKENDS),
        box=limits,
        tightest=paces,
        again=st.sampled_from((0, 0, 1, 2)),
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
        again: int,
        stale: bool,
    ) -> None:
        """`again`: the server's answer is lost so often, and the same is asked once more."""
        known = self.old_epochs[-1] if stale and self.old_epochs else self.epochs()
        sides = range(2)
        asked = [
            [
                ReserveCandidate(name, cost, box, tightest, known.get(name, NEVER_EPOCHS)[side])
                for name in order[: 1 + len(order) // (1 + again)]
            ]
            for side in sides
        ]
        memory, served = self.stores[replica]
        for _ in range(again):
            self.run(served.reserve(lease, asked[1]))
        first, second = self.run(memory.reserve(lease, asked[0])), self.run(served.reserve(lease, asked[1]))
        if isinstance(first, Granted):
            assert first == second
            return
        assert isinstance(second, Denied)
        assert {name: plain(load)[:4] for name, load in first.foreign.items()} == {
            name: plain(load)[:4] for name, load in second.foreign.items()
        }
        assert {name: one.tier for name, one in first.memberships.items()} == {
            name: one.tier for name, one in second.memberships.items()
        }

    @rule(replica=replicas, lease=leases, again=st.booleans())
    def release(self, replica: str, lease: str, again: bool) -> None:
        memory, served = self.stores[replica]
        self.run(memory.release(lease))
        self.run(served.release(lease))
        if again:
            self.run(served.release(lease))

    @rule(replica=replicas, backend=backends, load=vectors, ahead=st.integers(0, 3), late=st.booleans())
    def publish(self, replica: str, backend: str, load: LoadVector, ahead: int, late: bool) -> None:
        """`late`: it is taken down here and arrives later, behind whatever comes between."""
        memory, served = (
            Publication(backend, load, store.sequence_of(backend) + ahead) for store in self.stores[replica]
        )
        if late:
            self.late.append((replica, memory, served))
        else:
            self._arrive(replica, memory, served)

    @rule(which=st.integers(0, 5))
    def a_late_publish_arrives(self, which: int) -> None:
        if self.late:
            self._arrive(*self.late.pop(which % len(self.late)))

    def _arrive(self, replica: str, memory: Publication, served: Publication) -> None:
        stores = self.stores[replica]
        assert self.run(stores[0].publish([memory])) == self.run(stores[1].publish([served]))

    @rule(replica=replicas, backend=backends, tier=st.sampled_from((None, *TIERS)), stale=st.booleans())
    def move(self, replica: str, backend: str, tier: str | None, stale: bool) -> None:
        """A claim, or handing back."""
        known = self.old_epochs[-1] if stale and self.old_epochs else self.epochs()
        epochs = known.get(backend, NEVER_EPOCHS)
        self.old_epochs.append(self.epochs())
        answers: list[Changed | Conflict] = []
        for side, store in enumerate(self.stores[replica]):
            move = (
                store.hand_back(backend, epochs[side])
                if tier is None
                else store.claim(backend, tier, epochs[side])
            )
            answers.append(self.run(move))
        assert type(answers[0]) is type(answers[1])
        assert answers[0].membership.tier == answers[1].membership.tier
        for name, before in self.old_epochs[-1].items():
            now = self.epochs().get(name, before)
            assert all(now[side] >= before[side] for side in range(2))

    @invariant()
    def everybody_sees_the_same(self) -> None:
        for replica in self.stores:
            one, other = self.views(replica)
            assert one.keys() == other.keys()
            for name, load in one.items():
                assert plain(load.own) == plain(other[name].own)
                assert plain(load.foreign) == plain(other[name].foreign)
                assert load.membership.tier == other[name].membership.tier
            # Sequences may have different origins, but move together.
            memory, served = self.stores[replica]
            for name in one:
                assert served.sequence_of(name) >= memory.sequence_of(name)


@pytest.mark.parametrize("implementation", ["redis", "valkey"])
def test_a_served_store_equals_the_memory_store(implementation: str) -> None:
    with asyncio.Runner() as runner:
        machine = type("Machine", (Two,), {"implementation": implementation, "runner": runner})
        run_machine(machine, max_examples=60)
