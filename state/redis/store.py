"""One replica's handle on the state in Redis or Valkey (`state.contract.Store`).

Every method is one script and one round trip. A replica that the store does not know (any more) is told so, joins
with all it knows of itself (`own`), and asks again.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from scheduling.load import LoadVector, ReserveCandidate
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
    StoreEvent,
    StoreUnavailable,
)
from state.redis import codec
from state.redis.codec import items, text, whole
from state.redis.connect import Answer, Connection
from state.redis.healing import Healing
from state.redis.keys import Keys
from state.redis.library import load_library
from state.redis.mirror import Changes, Hearing, Mirror
from state.redis.own import Own
from state.redis.scripts import Argument, Runner, Script
from state.redis.upkeep import Upkeep
from state.watch import Watch

_STRANGER = -1
_LOST = -2
_NEVER = 0


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How a replica keeps its place in the store.

    Attributes:
        lease_s: a replica that is silent for longer is an orphan; after twice as long its load is taken out. The
            same for all replicas of a fleet.
        timeout_s: for one call, opening a connection included.
        first_s: for the calls before the first answer, where that is more.
        announce_s: changes by reservations and releases are told to the others together, so long after the first.
        remember_s, endings: how long, and how many, ended leases are remembered, so that a reservation that was
            delayed on its way cannot revive one.
    """

    lease_s: float = 10.0
    timeout_s: float = 0.25
    first_s: float = 2.0
    announce_s: float = 0.02
    remember_s: float = 120.0
    endings: int = 65_536


_SCRIPTS = load_library()


class RedisStore:
    """See `state.contract.Store`. `run` has to run for watches, for `replicas`, and to stay alive."""

    def __init__(
        self,
        connection: Connection,
        fleet: str,
        replica: str,
        options: StoreOptions = StoreOptions(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`replica` is this replica's name and incarnation, never met before: a process that starts again is
        another replica. The connection stays the caller's, who closes it after the store. Raises ValueError for
        names the keys cannot carry."""
        if not replica or "|" in replica:
            raise ValueError(f"replica name {replica!r} must not be empty and not contain '|'")
        self._keys = Keys.of(fleet)
        self._name = replica
        self._options = options
        self._runner = Runner(connection, options.timeout_s, options.first_s)
        self._own = Own()
        self._mirror = Mirror(replica, clock)
        self._upkeep = Upkeep(self, connection, self._keys.channel, options.lease_s, options.announce_s)
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._joining = asyncio.Lock()
        self._join_number = _NEVER
        self._era = _NEVER
        self._healing = Healing(clock, options.lease_s)
        self._silent = False
        self._missed_writes = False
        self._closed = False
        keys = self._keys
        self._leases_key, self._ended_key = keys.leases(replica), keys.ended(replica)
        self._reserve_keys = (keys.load, self._leases_key, self._ended_key)
        self._state_keys = (keys.load, keys.meta)

    async def add_backend(self, backend: str, tier: str | None) -> Membership:
        """See the contract. Raises StoreUnavailable after `close`, as all that follow."""
        arguments = (*self._told(), backend) if tier is None else (*self._told(), backend, tier)
        answer = items(await self._run(_SCRIPTS.add, self._state_keys, arguments))
        membership = Membership(codec.name_or_none(answer[1]), whole(answer[0]))
        self._mirror.settle(backend, membership)
        return membership

    async def remove_backend(self, backend: str) -> None:
        await self._run(_SCRIPTS.remove, self._state_keys, (*self._told(), backend))
        self._mirror.forget(backend)
        self._own.forget(backend)

    async def reserve(self, lease_id: str, candidates: Sequence[ReserveCandidate]) -> Granted | Denied:
        """See the contract. A lease that has ended is denied, so that a late second request cannot revive it."""
        own = self._own
        packed = codec.pack_candidates(candidates)
        own.asking(lease_id)
        try:
            for _ in range(2):
                seen = [own.sequence(one.backend) for one in candidates]
                number = self._join_number
                answer = items(
                    await self._run(_SCRIPTS.reserve, self._reserve_keys, (self._name, number, lease_id, *packed))
                )
                verdict = answer[0]
                if verdict == 1:
                    index, sequence, birth = whole(answer[1]), whole(answer[2]), whole(answer[3])
                    one = candidates[index]
                    own.granted(lease_id, one.backend, birth, sequence, one.cost)
                    self._upkeep.changed(one.backend)
                    if sequence <= seen[index] == own.sequence(one.backend):
                        self._miss_writes()
                    return Granted(lease_id, one.backend)
                if verdict == 0:
                    return self._with_readings(codec.read_denied(lease_id, candidates, answer))
                if verdict == 2:
                    stands = codec.read_standing(answer)
                    own.granted(lease_id, stands.backend, stands.birth, stands.sequence, stands.cost)
                    return Granted(lease_id, stands.backend)
                await self._join(number)
        finally:
            own.asked(lease_id)
        raise self._never_known()

    async def release(self, lease_id: str) -> None:
        """See the contract. After `close` there is nothing left to end."""
        if self._closed:
            return
        self._own.releasing(lease_id)
        remember_ms = round(self._options.remember_s * 1000.0)
        answer = items(await self._run(_SCRIPTS.release, self._reserve_keys, (self._name, lease_id, remember_ms)))
        if answer:
            backend = text(answer[0])
            self._own.wrote(backend, whole(answer[1]))
            self._upkeep.changed(backend)

    async def publish(self, publications: Sequence[Publication], held: Sequence[Held] = ()) -> frozenset[str]:
        own, keys = self._own, self._keys
        holding = tuple(held)
        told = (b"1", codec.dump_held(holding)) if holding != own.held else (b"", b"")
        packed = codec.pack_publications(publications)
        since = own.publishing()
        try:
            for _ in range(2):
                seen = [own.sequence(one.backend) for one in publications]
                number = self._join_number
                answer = items(
                    await self._run(
                        _SCRIPTS.publish,
                        (keys.load, self._leases_key, keys.replicas, keys.held, keys.meta),
                        (self._name, number, keys.channel, *told, *packed),
                    )
                )
                if len(answer) == 1:
                    await self._join(number)
                    continue
                own.held = holding
                return self._published(publications, seen, since, answer)
        finally:
            own.publish_over()
        raise self._never_known()

    def _published(
        self, publications: Sequence[Publication], seen: Sequence[int], since: int, answer: list[Answer]
    ) -> frozenset[str]:
        taken = set()
        for place, one in enumerate(publications):
            verdict, met, birth = (whole(part) for part in answer[3 * place : 3 * place + 3])
            if met < 0:
                continue
            if self._own.birth(one.backend) == birth and met < seen[place]:
                self._miss_writes()
            if verdict:
                taken.add(one.backend)
                self._own.published(one.backend, birth, one.own, one.sequence, since)
            else:
                self._own.met(one.backend, birth, met)
        return frozenset(taken)

    def sequence_of(self, backend: str) -> int:
        return self._own.sequence(backend)

    async def claim(self, backend: str, tier: str, expected_epoch: int) -> Changed | Conflict:
        """See the contract. An unknown backend conflicts at epoch 0, which no backend ever has."""
        return await self._move(backend, expected_epoch, (tier,))

    async def hand_back(self, backend: str, expected_epoch: int) -> Changed | Conflict:
        """See the contract. A lease counts even when its cost is zero."""
        return await self._move(backend, expected_epoch, ())

    async def _move(self, backend: str, expected_epoch: int, tier: tuple[str, ...]) -> Changed | Conflict:
        arguments: tuple[Argument, ...] = (*self._told(), backend, expected_epoch, *tier)
        moved, epoch, stands = items(await self._run(_SCRIPTS.move, self._state_keys, arguments))
        membership = Membership(codec.name_or_none(stands), whole(epoch))
        if membership.epoch:
            self._mirror.settle(backend, membership)
        return Changed(membership) if moved else Conflict(membership)

    async def view(self) -> Mapping[str, BackendLoad]:
        picture = await self._look()
        self._notify(self._mirror.adopt(picture))
        own: dict[str, LoadVector] = {}
        foreign: dict[str, LoadVector] = {}
        for stored in picture.parts:
            part = stored.part
            if part.replica == self._name:
                own[part.backend] = replace(part.load, age_s=0.0)
            elif not part.load.idle or part.load.residents:
                foreign[part.backend] = foreign.get(part.backend, LoadVector()) + part.load
        return {
            backend: BackendLoad(
                total.membership, own.get(backend, LoadVector()), foreign.get(backend, LoadVector())
            )
            for backend, total in picture.totals.items()
        }

    async def picture(self) -> codec.Picture:
        """Everything the store keeps of this fleet's load, for an audit. Raises StoreUnavailable."""
        keys = self._keys
        answer = await self._run(_SCRIPTS.view, (keys.load, keys.replicas, keys.orphans, keys.held, keys.meta), ())
        return codec.read_picture(answer)

    def watch(self) -> AsyncIterator[StoreEvent | HeldEvent]:
        """See the contract. Listens from this call on; changes of one backend that were not fetched yet become one
        event. A removed backend is not told of."""
        watch = Watch(self._event)
        if self._closed:
            watch.end()
        else:
            self._watches.add(watch)
        return watch

    async def note_engine(self, backend: str, sequences: int) -> None:
        """See the contract. Costs nothing while no replica is known to be dead."""
        if not self._mirror.orphans:
            return
        keys = self._keys
        arguments = (*self._told(), backend, max(sequences, 0))
        await self._run(_SCRIPTS.note, (keys.load, keys.orphans, keys.meta), arguments)

    @property
    def mode(self) -> Mode:
        """As far as the last call tells: ALONE when it got no answer; HEALING after the store was emptied or lost
        writes, until every replica that was known before was heard again, or one lease time has passed."""
        if self._silent:
            return Mode.ALONE
        return Mode.HEALING if self._healing.under_way else Mode.SHARED

    @property
    def replicas(self) -> int:
        return len(self._mirror.live | {self._name})

    @property
    def healing(self) -> bool:
        """Whether the store may not know yet what the others carry."""
        return self._healing.under_way

    async def run(self) -> None:
        await self._upkeep.run()

    async def listening(self) -> None:
        """Wait until `run` hears the others."""
        await self._upkeep.listening.wait()

    async def close(self) -> None:
        """See the contract. Idempotent. When the store does not answer, the lease time ends what is left there."""
        if self._closed:
            return
        self._closed = True
        for watch in tuple(self._watches):
            watch.end()
        with suppress(StoreUnavailable):
            await self._bury(self._name, leaves=True)
        await self._runner.close()

    # --- upkeep --------------------------------------------------------------------------------------------

    async def beat(self) -> None:
        """Show life, take in what was lost, and bury the dead. Raises StoreUnavailable."""
        keys, options, number = self._keys, self._options, self._join_number
        sequences = self._own.sequences()
        answer = items(
            await self._run(
                _SCRIPTS.beat,
                (keys.replicas, self._leases_key, keys.orphans, self._ended_key, keys.meta, keys.load),
                (
                    self._name,
                    number,
                    _milliseconds(options.lease_s),
                    _milliseconds(options.remember_s),
                    options.endings,
                    codec.pack_doubles(list(sequences.values())),
                    *sequences,
                ),
            )
        )
        if len(answer) == 1 or self._missed_writes:
            if answer[0] == _LOST or self._missed_writes:
                self._doubt()
            await self._join(number)
            self._missed_writes = False
        else:
            for name in items(answer[3]):
                await self._bury(text(name), leaves=False)
        if self._healing.under_way:
            await self.resync()

    async def announce(self, backends: Iterable[str]) -> None:
        """Tell the others what this replica carries there. Raises StoreUnavailable."""
        await self._run(_SCRIPTS.announce, self._state_keys, (*self._told(), *backends))

    async def resync(self) -> None:
        """Read everything anew. Raises StoreUnavailable."""
        picture = await self._look()
        changes = self._mirror.adopt(picture)
        self._healing.look(picture)
        self._notify(changes)

    async def _look(self) -> codec.Picture:
        """The state, with this replica in it."""
        picture = await self.picture()
        if self._mirror.ahead_of(picture):
            picture = await self.picture()  # the first may be older than an answer that came meanwhile
        lost = self._mirror.ahead_of(picture)
        if lost:
            self._doubt()
        if lost or self._era not in {_NEVER, picture.era}:
            # At once: who knows which backends there were, and in which tiers, must not learn otherwise.
            await self._join(self._join_number)
            picture = await self.picture()
        return picture

    def hear(self, payload: bytes) -> bool:
        """Take in a message. False when something was missed."""
        try:
            news = codec.read_news(payload)
        except StoreUnavailable:
            return False
        match self._mirror.hear(news):
            case Hearing.MISSED:
                return False
            case Hearing.OLD:
                return True
        if self._name in news.orphaned or self._name in news.gone:
            self._upkeep.hurry()
        for backend in news.removed:
            self._own.forget(backend)
        self._notify(self._mirror.apply(news))
        return True

    async def _bury(self, name: str, *, leaves: bool) -> None:
        keys = self._keys
        of_it = (keys.leases(name), keys.ended(name))
        arguments = (*self._told(), name, _milliseconds(self._options.lease_s), int(leaves))
        await self._ask(
            _SCRIPTS.bury, (keys.load, *of_it, keys.replicas, keys.orphans, keys.held, keys.meta), arguments
        )

    async def _join(self, known_number: int) -> None:
        """Register anew, once for all who were told to at the same number."""
        async with self._joining:
            if self._join_number != known_number:
                return
            keys, number = self._keys, known_number + 1
            account = self._own.account(self._era, self._mirror.memberships)
            answer = await self._run(
                _SCRIPTS.join,
                (
                    keys.load,
                    self._leases_key,
                    self._ended_key,
                    keys.replicas,
                    keys.orphans,
                    keys.held,
                    keys.meta,
                ),
                (*self._told(), number, account),
            )
            joined = codec.read_joined(answer)
            emptied = self._era not in {_NEVER, joined.era}
            if emptied:
                self._doubt()
            self._own.rejoined(joined, emptied=emptied)
            for backend, membership in joined.members.items():
                if self._mirror.settle(backend, membership):
                    self._notify(Changes({backend: None}))
            self._join_number, self._era = number, joined.era
            # What was on its way meanwhile may be missing in the account: a beat compares once more.
            self._upkeep.hurry()

    def _miss_writes(self) -> None:
        """The store has lost writes of this replica. By the next beat its sequences may have caught up."""
        self._missed_writes = True
        self._upkeep.hurry()

    def _doubt(self) -> None:
        """What the store says of the others may be too little."""
        self._healing.begin(self._mirror.live - {self._name})

    # --- small -------------------------------------------------------------------------------------------------

    async def _run(self, script: Script, keys: tuple[str, ...], arguments: Iterable[Argument]) -> Answer:
        if self._closed:
            raise StoreUnavailable(f"the store handle of replica {self._name!r} is closed")
        return await self._ask(script, keys, arguments)

    async def _ask(self, script: Script, keys: tuple[str, ...], arguments: Iterable[Argument]) -> Answer:
        try:
            answer = await self._runner.run(script, keys, arguments)
        except StoreUnavailable:
            self._silent = True
            self._upkeep.hurry()
            raise
        self._silent = False
        return answer

    def _told(self) -> tuple[str, str]:
        return self._name, self._keys.channel

    def _with_readings(self, denied: Denied) -> Denied:
        """With the ages and slacks that the others told."""
        foreign = {}
        for backend, load in denied.foreign.items():
            told = self._mirror.foreign(backend)
            foreign[backend] = replace(load, age_s=told.age_s, slack=told.slack, queued_slack=told.queued_slack)
        return Denied(denied.lease_id, foreign, denied.memberships)

    def _event(self, backend: str) -> StoreEvent | None:
        membership = self._mirror.memberships.get(backend)
        if membership is None:
            return None
        return StoreEvent(
            backend, BackendLoad(membership, self._own.vector(backend), self._mirror.foreign(backend))
        )

    def _notify(self, changes: Changes) -> None:
        for watch in self._watches:
            for backend in changes.backends:
                watch.notice(backend)
            for event in changes.held:
                watch.notice_held(event)

    def _never_known(self) -> StoreUnavailable:
        return StoreUnavailable(f"the store forgets replica {self._name!r} as fast as it joins")


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000.0)
