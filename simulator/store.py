"""The shared store on the virtual clock: the store in memory, asked without an event loop.

Nothing in `state.memory` awaits anything, so each of its calls ends at its first step. Reservations and claims see
the truth, as a script inside Redis does; what replicas know of each other between them is as old as the fleet
says.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from scheduling import events as ev
from scheduling.load import LoadVector, ReserveCandidate
from simulator.agenda import Agenda
from state.contract import BackendLoad, Changed, Granted, Membership, Publication
from state.memory import MemoryState, MemoryStore


class SimStore:
    """One replica's handle, with answers as the dispatcher's events."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def add_backend(self, backend: str, tier: str | None) -> Membership:
        return _now(self._store.add_backend(backend, tier))

    def reserve(
        self, request_id: str, lease_id: str, candidates: Sequence[ReserveCandidate]
    ) -> ev.Reserved | ev.ReserveRefused:
        answer = _now(self._store.reserve(lease_id, candidates))
        if isinstance(answer, Granted):
            return ev.Reserved(request_id, lease_id, answer.backend)
        return ev.ReserveRefused(request_id, lease_id, answer.foreign)

    def release(self, lease_id: str) -> None:
        _now(self._store.release(lease_id))

    def claim(self, backend: str, tier: str, expected_epoch: int) -> ev.Claimed | ev.ClaimRefused:
        answer = _now(self._store.claim(backend, tier, expected_epoch))
        membership = answer.membership
        if isinstance(answer, Changed):
            return ev.Claimed(backend, tier, membership.epoch)
        return ev.ClaimRefused(backend, membership.tier, membership.epoch)

    def hand_back(self, backend: str, expected_epoch: int) -> ev.HandedBack | ev.HandBackRefused:
        answer = _now(self._store.hand_back(backend, expected_epoch))
        membership = answer.membership
        if isinstance(answer, Changed):
            return ev.HandedBack(backend, membership.epoch)
        return ev.HandBackRefused(backend, membership.tier, membership.epoch)

    def sequence_of(self, backend: str) -> int:
        return self._store.sequence_of(backend)

    def publish(self, publications: Sequence[Publication]) -> frozenset[str]:
        return _now(self._store.publish(publications))

    def view(self) -> Mapping[str, BackendLoad]:
        return _now(self._store.view())


def shared_stores(replicas: int, agenda: Agenda) -> list[SimStore]:
    """A handle for each of several replicas on one state."""
    state = MemoryState(lambda: agenda.now_s)
    return [SimStore(state.replica(f"replica{index}")) for index in range(replicas)]


class View:
    """What one replica was told last of the others, so that only changes are told again."""

    def __init__(self) -> None:
        self._foreign: dict[str, LoadVector | None] = {}
        self._epochs: dict[str, int] = {}

    def forget(self, backends: Iterable[str]) -> None:
        """The replica learned of these from elsewhere, newer than what is on its way: tell it again next time."""
        for backend in backends:
            self._foreign[backend] = None

    def changes(self, loads: Mapping[str, BackendLoad]) -> list[ev.Event]:
        """The events that bring the replica up to a reading of the store."""
        events: list[ev.Event] = []
        for backend, load in loads.items():
            if self._epochs.get(backend) != load.membership.epoch:
                self._epochs[backend] = load.membership.epoch
                events.append(ev.MembershipChanged(backend, load.membership.tier, load.membership.epoch))
            ageless = replace(load.foreign, age_s=0.0)
            if self._foreign.get(backend, _NOTHING) != ageless:
                self._foreign[backend] = ageless
                events.append(ev.LoadPublished(backend, load.foreign))
        return events


_NOTHING = LoadVector()
_Answer = TypeVar("_Answer")


def _now(call: Coroutine[object, object, _Answer]) -> _Answer:
    """The result of a coroutine that never waits."""
    try:
        call.send(None)
    except StopIteration as done:
        answer: _Answer = done.value
        return answer
    call.close()
    raise RuntimeError("the store waited, which the store in memory never does")
