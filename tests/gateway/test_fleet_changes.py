"""Backends that change while they serve: in place where that is enough, never forgotten by the store meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from gateway.app import Gateway, running
from gateway.config import Settings
from state.contract import BackendLoad, Store, StoreUnavailable
from state.memory import MemoryState, MemoryStore
from tests.gateway.rig import client, engine, gateway, settings_for, settled, until, until_told
from tiergate.root import wire


async def _known(made: Gateway) -> Mapping[str, BackendLoad]:
    store: Store = made.fleet._store
    return await store.view()


def _with(settings: Settings, **changed: object) -> Settings:
    [backend] = settings.backends
    fields = {**backend.model_dump(), **changed}
    return Settings.model_validate({**settings.model_dump(), "admin_token": "secret", "backends": [fields]})


async def test_limits_and_tiers_change_in_place() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        async with ask.chat("first_then_wait") as stream:
            [member] = made.fleet.members()
            adapter, before = member.adapter, (await _known(made))["e0"]
            assert before.own.decodes == 1
            await made.reload(_with(settings_for(one), limits={"max_running_seqs": 7}, tier="chat"))
            [same] = made.fleet.members()
            assert same is member
            assert same.adapter is adapter
            assert same.published is not None
            assert same.published.limits.max_running_seqs == 7
            after = (await _known(made))["e0"]
            assert (after.membership, after.own.decodes) == (before.membership, 1)
            one.release.set()
            assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        await settled(made)
        assert made.view.conserved()


async def test_another_key_is_another_connection_but_the_same_backend_in_the_store() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        async with ask.chat("first_then_wait") as stream:
            before = (await _known(made))["e0"]
            await made.reload(_with(settings_for(one), api_key="another"))
            await until(lambda: made.fleet.up == 1)
            after = (await _known(made))["e0"]
            # Another replica may carry load on it: it must not be lost, nor the epoch that it reserves by.
            assert (after.membership.epoch, after.own.decodes) == (before.membership.epoch, 1)
            assert (await ask.read_chat())[0] == 200
            assert one.headers[-1]["Authorization"] == "Bearer another"
            one.release.set()
            assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        await settled(made)


class Deaf(MemoryStore):
    """Does not hear a removal, so many times."""

    deaf = 2

    async def remove_backend(self, backend: str) -> None:
        if self.deaf:
            self.deaf -= 1
            raise StoreUnavailable("deaf, by the test")
        await super().remove_backend(backend)


async def test_a_backend_that_is_gone_is_forgotten_by_the_store_as_soon_as_it_answers() -> None:
    async with engine() as one, engine() as two:
        settings = settings_for(one, two)
        store = Deaf(MemoryState())
        wiring = await asyncio.to_thread(wire, settings)
        async with running(settings, replace(wiring, store=store)) as made:
            await until(lambda: made.fleet.up == 2)
            await made.reload(settings_for(one))

            async def forgotten() -> bool:
                return set(await store.view()) == {"e0"}

            await until_told(forgotten)
            async with client(made) as ask:
                assert (await ask.read_chat())[0] == 200
            await settled(made)
            # It may come back, and is not forgotten after that.
            await made.reload(settings)
            await until(lambda: made.fleet.up == 2)
            assert set(await store.view()) == {"e0", "e1"}
