"""A gateway whose store fails: requests go on, and it says in which mode it is."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

import pytest

from adapters.contract import EngineLoad
from gateway.config import LimitSettings
from gateway.telemetry import log_mode
from state.contract import Mode
from state.memory import MemoryState
from state.outage import Shelter
from state.sheltered import Sheltered
from tests.gateway.rig import Client, client, engine, gateway, idle, settings_for, settled, until
from tests.state.faulty import Fault, FaultyStore

QUICK = Shelter(deadline_s=0.05, probe_s=0.02, settle_s=0.05)


async def told(ask: Client) -> tuple[int, str]:
    """What /readyz says: the status, and the mode of the store."""
    async with ask.session.get(f"{ask.base}/readyz") as answer:
        return answer.status, (await answer.json())["store"]


@pytest.mark.parametrize("fault", [Fault.GONE, Fault.SILENT, Fault.READ_ONLY])
async def test_requests_are_served_through_an_outage(fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tiergate.store")
    inner = FaultyStore(MemoryState(time.monotonic), "only")
    store = Sheltered(inner, time.monotonic, QUICK, on_mode=log_mode)
    async with engine() as one, gateway(settings_for(one), store=store) as made, client(made) as ask:
        assert (await ask.read_chat())[0] == 200
        assert await told(ask) == (200, "shared")

        inner.fault = fault
        for _ in range(3):
            assert (await ask.read_chat())[0] == 200
        assert await told(ask) == (200, "alone")
        async with ask.session.get(f"{ask.base}/metrics") as answer:
            text = await answer.text()
        assert 'tiergate_store_mode{mode="alone"} 1.0' in text
        assert 'tiergate_store_mode{mode="shared"} 0.0' in text
        assert "tiergate_store_down 1.0" in text

        inner.fault = Fault.NONE
        await until(lambda: store.mode is Mode.SHARED)
        assert await told(ask) == (200, "shared")
        assert (await ask.read_chat())[0] == 200
        await settled(made)
        assert idle(made)
        [load] = (await inner.inner.view()).values()
        assert load.own.idle
    lines = [record.message for record in caplog.records if record.name == "tiergate.store"]
    assert [line.split()[1] for line in lines] == ["alone", "healing", "shared"]


async def test_a_gateway_starts_without_its_store() -> None:
    inner = FaultyStore(MemoryState(time.monotonic), "only")
    inner.fault = Fault.GONE
    store = Sheltered(inner, time.monotonic, QUICK)
    async with engine() as one, gateway(settings_for(one), store=store) as made, client(made) as ask:
        assert (await ask.read_chat())[0] == 200
        assert await told(ask) == (200, "alone")
        inner.fault = Fault.NONE
        await until(lambda: store.mode is Mode.SHARED)
        assert (await ask.read_chat())[0] == 200
        assert list(await inner.inner.view()) == ["e0"]


async def test_a_full_share_on_one_backend_leaves_the_others() -> None:
    """Alone among three, a gateway has two places on each of two engines that run six: it finds all four."""
    inner = FaultyStore(MemoryState(time.monotonic), "only")
    inner.fault = Fault.GONE
    store = Sheltered(inner, time.monotonic, replace(QUICK, least_replicas=3))
    limits = LimitSettings(max_running_seqs=6)
    async with engine() as one, engine() as two:
        settings = settings_for(one, two, engine_limits=limits)
        async with gateway(settings, store=store) as made, client(made) as ask, asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(ask.read_chat("first_then_wait")) for _ in range(5)]
            await until(lambda: made.shell.running == 4 and made.shell.held == 1)
            assert {numbers.decodes for numbers in made.view.numbers()} == {2}
            one.release.set()
            two.release.set()
            await until(lambda: all(task.done() for task in asking))
            assert [task.result()[0] for task in asking] == [200] * 5


async def test_the_store_hears_what_an_engine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[str, int]] = []

    class Noting(FaultyStore):
        async def note_engine(self, backend: str, sequences: int) -> None:
            counted.append((backend, sequences))

    async def read_load() -> EngineLoad:
        return EngineLoad(running=2, waiting=1)

    store = Noting(MemoryState(time.monotonic), "only")
    async with engine() as one, gateway(settings_for(one), store=store) as made:
        monkeypatch.setattr(made.fleet.adapter("e0"), "read_load", read_load)
        made.fleet.suspect("e0")
        await until(lambda: bool(counted))
    assert counted[0] == ("e0", 3)
