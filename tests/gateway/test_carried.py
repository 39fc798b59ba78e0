"""What a replica tells of what it carries, lease by lease."""

from __future__ import annotations

import asyncio

from tests.gateway.rig import client, engine, gateway, settings_for, settled
from tiergate.audit.readings import read_carried

_TOKEN = {"authorization": "Bearer secret"}


async def test_a_request_is_carried_from_its_first_token_to_its_end() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        url = f"{ask.base}/admin/v1/carried"
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(ask.read_chat("first_then_wait"))
            while True:
                async with ask.session.get(url, headers=_TOKEN) as answer:
                    (told,) = read_carried(await answer.read())
                if told.leases and told.leases[0].stage == "running":
                    break
                await asyncio.sleep(0.01)
            (lease,) = told.leases
            assert (lease.backend, lease.sequences) == ("e0", 1)
            assert (told.mode, told.fleet, told.passing) == ("shared", None, frozenset())
            (backend,) = told.backends
            assert (backend.name, backend.url, backend.phase, backend.decodes) == ("e0", one.url, "up", 1)
            assert backend.epoch is not None
            one.release.set()
            await waiting
        await settled(made)
        async with ask.session.get(url, headers=_TOKEN) as answer:
            (told,) = read_carried(await answer.read())
        assert (told.leases, told.passing, told.backends[0].decodes) == ((), frozenset(), 0)


async def test_who_has_no_token_is_told_nothing() -> None:
    async with (
        engine() as one,
        gateway(settings_for(one)) as made,
        client(made) as ask,
        ask.session.get(f"{ask.base}/admin/v1/carried") as answer,
    ):
        assert answer.status == 401
