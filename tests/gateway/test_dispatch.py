"""The shell against a store that is slow, away, or loses answers: every lease ends, nothing is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from random import Random

from gateway.dispatch import Shell, Timing
from gateway.ticket import Stage
from profiles import load
from scheduling.backends import Backend, EngineLimits
from scheduling.dispatcher import Dispatcher
from scheduling.events import BackendChanged, EndKind, MembershipChanged, Open, Refuse
from scheduling.load import ReserveCandidate
from scheduling.policies import make
from scheduling.requests import Request
from scheduling.tiers import Slo, Tier, TierSet
from state.contract import Denied, Granted, StoreUnavailable
from state.memory import MemoryStore
from tests.gateway.rig import PROFILE, until

_SLO = Slo(2.0, 0.05)
_TIERS = TierSet((Tier("only", _SLO, 0),), "only")


class _Store(MemoryStore):
    """A memory store that waits, is away, or does the work and loses the answer, as told."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: asyncio.Event | None = None
        self.away = 0
        self.lost_answers = 0

    async def reserve(self, lease_id: str, candidates: Sequence[ReserveCandidate]) -> Granted | Denied:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")
        answer = await super().reserve(lease_id, candidates)
        if self.gate is not None:
            await self.gate.wait()
        if self.lost_answers:
            self.lost_answers -= 1
            raise StoreUnavailable("the answer was lost")
        return answer

    async def release(self, lease_id: str) -> None:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")
        await super().release(lease_id)


async def _shell() -> tuple[Shell, _Store, Dispatcher]:
    store = _Store()
    rng = Random(1)
    core = Dispatcher(_TIERS, make("polyserve", rng))
    shell = Shell(core, store, time.monotonic, Timing(tick_s=0.01))
    profile = await asyncio.to_thread(load, PROFILE)
    membership = await store.add_backend("b", "only")
    shell.feed(BackendChanged(Backend("b", profile.step_time, limits=EngineLimits(kv_tokens=100_000))))
    shell.feed(MembershipChanged("b", membership.tier, membership.epoch))
    return shell, store, core


def _request(name: str) -> Request:
    return Request(name, "m", "only", _SLO, 100, time.monotonic())


async def _serve(shell: Shell, name: str) -> EndKind | None:
    async with shell.admit(_request(name)) as ticket:
        order = await ticket.next_order()
        if isinstance(order, Refuse):
            return None
        assert isinstance(order, Open)
        ticket.first_token()
        ticket.ended(EndKind.FINISHED)
        return EndKind.FINISHED


async def _empty(shell: Shell, store: _Store, core: Dispatcher) -> bool:
    view = await store.view()
    shell.stop_timer()
    counts = shell.counts
    ended = counts.finished + counts.failed + counts.refused + counts.cancelled
    return counts.arrived == ended and core.counts.conserved and core.own_load("b").idle and view["b"].own.idle


async def test_a_client_that_leaves_while_the_store_thinks() -> None:
    shell, store, core = await _shell()
    store.gate = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(_serve(shell, "r"))
        await asyncio.sleep(0.02)
        assert core.counts.reserving == 1
        serving.cancel()
    assert shell.counts.cancelled == 1
    assert core.counts.cancelled == 1
    assert await _empty(shell, store, core)


async def test_a_lost_answer_is_asked_for_again() -> None:
    shell, store, core = await _shell()
    store.lost_answers = 2
    assert await _serve(shell, "r") is EndKind.FINISHED
    assert await _empty(shell, store, core)


async def test_a_release_that_fails_is_made_later() -> None:
    shell, store, core = await _shell()
    async with asyncio.TaskGroup() as tasks:
        own = shell.start(tasks)
        async with shell.admit(_request("r")) as ticket:
            await ticket.next_order()
            ticket.first_token()
            store.away = 2
            ticket.ended(EndKind.FINISHED)
        await until(lambda: store.away == 0)
        await asyncio.sleep(0.1)
        for task in own:
            task.cancel()
    assert await _empty(shell, store, core)


async def test_a_store_that_stays_away_holds_and_then_serves() -> None:
    shell, store, core = await _shell()
    store.away = 4
    assert await _serve(shell, "r") is EndKind.FINISHED
    assert await _empty(shell, store, core)


async def test_leaving_at_any_point_ends_the_lease_once() -> None:
    """Cancelled after any number of turns of the loop, and by errors, at every stage."""
    shell, store, core = await _shell()
    for turns in range(12):
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(_stays(shell, f"c{turns}"))
            for _ in range(turns):
                await asyncio.sleep(0)
            serving.cancel()
    for stage in Stage:
        try:
            async with shell.admit(_request(f"e{stage.value}")) as ticket:
                if stage is not Stage.HELD:
                    await ticket.next_order()
                if stage in {Stage.RUNNING, Stage.ENDED}:
                    ticket.first_token()
                if stage is Stage.ENDED:
                    ticket.ended(EndKind.FINISHED)
                    ticket.ended(EndKind.FAILED)
                raise RuntimeError
        except RuntimeError:
            pass
    assert await _empty(shell, store, core)
    assert shell.pace.openings == 0


async def _stays(shell: Shell, name: str) -> None:
    async with shell.admit(_request(name)) as ticket:
        await ticket.next_order()
        await asyncio.sleep(0)
        ticket.first_token()
        await asyncio.Event().wait()
