"""What the store counts of one replica's load on one backend, followed so that limits can be told in its terms.

The store adds a lease's cost when it grants it and takes it away when it ends; a publish replaces all of that by
what was measured (`state.contract.Store`). Until a publish is answered nobody here knows whether it has happened,
and after an answer that was lost nobody ever will, until the next one that is taken. So every way in which the
store may count by now is kept, a **world**, and followed through what happens since.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scheduling.load import Cost, LoadVector

_MOST_WORLDS = 3
"""Beyond so many at once (answers lost in a row), two are taken for one that counts the least."""


@dataclass(slots=True)
class _Sums:
    decodes: int = 0
    kv_tokens: int = 0
    prefill_tokens: int = 0

    def take(self, decodes: int, kv_tokens: int, prefill_tokens: int) -> None:
        """Never below zero: what was measured may be less than what was asked for."""
        self.decodes = max(self.decodes - decodes, 0)
        self.kv_tokens = max(self.kv_tokens - kv_tokens, 0)
        self.prefill_tokens = max(self.prefill_tokens - prefill_tokens, 0)

    def least(self, other: _Sums) -> _Sums:
        return _Sums(
            min(self.decodes, other.decodes),
            min(self.kv_tokens, other.kv_tokens),
            min(self.prefill_tokens, other.prefill_tokens),
        )


@dataclass(slots=True)
class _World:
    """What was measured at the last publish that was taken, and what was asked for since.

    `leases` counts those that this publish saw and that have not ended; `number` is the last of them.
    """

    measured: _Sums
    reserved: _Sums
    leases: int
    number: int

    def add(self, cost: Cost) -> None:
        self.reserved.decodes += cost.decodes
        self.reserved.kv_tokens += cost.peak_kv_tokens
        self.reserved.prefill_tokens += cost.prefill_tokens

    def take(self, cost: Cost, number: int) -> None:
        """Of a lease that a publish has seen, how much of the prompt is still queued is told by the next."""
        if number > self.number:
            self.reserved.take(cost.decodes, cost.peak_kv_tokens, cost.prefill_tokens)
            return
        self.leases -= 1
        if self.leases:
            self.measured.take(cost.decodes, cost.peak_kv_tokens, 0)
        else:
            self.measured = _Sums()

    def least(self, other: _World) -> _World:
        return _World(
            self.measured.least(other.measured),
            self.reserved.least(other.reserved),
            min(self.leases, other.leases),
            min(self.number, other.number),
        )


class Stored:
    """The store's sums, as if every lease that was asked for or released had been answered.

    `decodes`, `kv_tokens` and `prefill_tokens` are the least that it may count, so that limits that rest on them
    never promise room that is not there.
    """

    __slots__ = ("_candidate", "_paces", "_settled", "_writes", "decodes", "kv_tokens", "leases", "prefill_tokens")

    def __init__(self) -> None:
        self.decodes = self.kv_tokens = self.prefill_tokens = 0
        self.leases = 0
        self._writes = 0
        self._paces: dict[float, int] = {}  # tpot_ms of every lease: how many
        self._settled = [_World(_Sums(), _Sums(), 0, 0)]
        self._candidate: _World | None = None  # how it counts if the publish in flight is taken

    def add(self, cost: Cost) -> int:
        """A lease was asked for. Returns its number, to be given back to `take`."""
        self._writes += 1
        self.leases += 1
        self._paces[cost.tpot_ms] = self._paces.get(cost.tpot_ms, 0) + 1
        for world in self._worlds():
            world.add(cost)
        self._sum_up()
        return self._writes

    def take(self, cost: Cost, number: int) -> None:
        """The lease of that number ended."""
        self.leases -= 1
        left = self._paces[cost.tpot_ms] - 1
        if left:
            self._paces[cost.tpot_ms] = left
        else:
            del self._paces[cost.tpot_ms]
        for world in self._worlds():
            world.take(cost, number)
        self._sum_up()

    def begin(self, own: LoadVector) -> None:
        """This is on its way to be published. The store has to have answered for every lease that is here, and
        for every one that ended."""
        assert self._candidate is None, "one publish at a time"
        measured = _Sums(
            max(own.decodes, 0),
            max(own.peak_kv_tokens, 0),
            max(own.queued_prefill_tokens, 0),
        )
        self._candidate = _World(measured, _Sums(), self.leases, self._writes)
        self._sum_up()

    def settle(self, taken: bool | None) -> None:
        """The store took it, refused it, or (None) nobody knows."""
        candidate, self._candidate = self._candidate, None
        if candidate is None:
            return
        if taken:
            self._settled = [candidate]
        elif taken is None:
            self._settled.append(candidate)
            if len(self._settled) > _MOST_WORLDS:
                first, second, *others = self._settled
                self._settled = [first.least(second), *others]
        self._sum_up()

    @property
    def publishing(self) -> bool:
        """Whether a publish is on its way."""
        return self._candidate is not None

    @property
    def certain(self) -> bool:
        """Whether there is one way only in which the store may count."""
        return len(self._settled) == 1 and self._candidate is None

    @property
    def tightest_ms(self) -> float:
        """The tightest pace of a lease, as the store looks at it: lost promises included. Infinity without one."""
        return min(self._paces, default=math.inf)

    def _worlds(self) -> list[_World]:
        return self._settled if self._candidate is None else [*self._settled, self._candidate]

    def _sum_up(self) -> None:
        worlds = self._worlds()
        self.decodes = min([world.measured.decodes + world.reserved.decodes for world in worlds])
        self.kv_tokens = min([world.measured.kv_tokens + world.reserved.kv_tokens for world in worlds])
        self.prefill_tokens = min(
            [world.measured.prefill_tokens + world.reserved.prefill_tokens for world in worlds]
        )
