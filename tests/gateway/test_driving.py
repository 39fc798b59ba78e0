"""A gateway drives engines: emulated ones with the plug-in's contract, and a fake SGLang. No model runs in any."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import orjson
import pytest

from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from adapters.emulated.plugin import EmulatedPlugin
from gateway.app import Gateway
from gateway.config import BackendSettings, Settings
from gateway.fleet import Member
from profiles import load
from scheduling.knobs import ControlOptions, Rung, Setting
from tests.gateway.rig import MODEL, PROFILE, Client, client, gateway, idle, settled, until
from tiergate_engine.control import Mode, Orders
from tiergate_engine.model import EngineConfig

_STEP_TIME = load(PROFILE).step_time
_CONFIG = EngineConfig(kv_tokens=200_000, max_model_tokens=16_384)
_QUICK = ControlOptions(every_s=0.02, lapse_s=1.0, refresh_s=0.1, yield_s=0.3, raise_after_s=0.1)


@dataclass(frozen=True, slots=True)
class Stand:
    """An emulated engine, and a gateway in front of it."""

    engine: EmulatedEngine
    gateway: Gateway
    ask: Client
    settings: Settings

    @property
    def member(self) -> Member:
        (member,) = self.gateway.fleet.members()
        return member

    @property
    def plugin(self) -> EmulatedPlugin:
        assert self.engine.plugin is not None
        return self.engine.plugin

    @property
    def control(self) -> tuple[Setting, ...]:
        return self.gateway.driving.controller.decisions("one")

    @property
    def driven(self) -> bool:
        published = self.member.published
        return published is not None and published.dynamic_chunk

    async def complete(self, prompt_tokens: int = 8, tokens: int = 4, **headers: str) -> bytes:
        body = {"model": MODEL, "prompt": [1] * prompt_tokens, "max_tokens": tokens, "ignore_eos": True}
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"{self.ask.base}/v1/completions"
        async with self.ask.session.post(url, json=body | {"stream": True}, headers=sent) as answer:
            assert answer.status == 200
            return await answer.read()


def _settings(url: str, **more: object) -> Settings:
    backend = BackendSettings(url=url, name="one", profile=PROFILE, tier="chat")
    base: dict[str, object] = {"port": 0, "backends": [backend], "tick_ms": 20, "admin_token": "secret"}
    return Settings.model_validate(base | {"log_requests": False, "health": {"every_s": 0.1}} | more)


@contextlib.asynccontextmanager
async def _in_front(engine: EmulatedEngine, settings: Settings) -> AsyncIterator[Stand]:
    async with gateway(settings) as made, client(made) as ask:
        made.driving.controller.options = _QUICK
        yield Stand(engine, made, ask, settings)
        await settled(made)
        assert idle(made)


@contextlib.asynccontextmanager
async def _stand(*, plugin: bool = True, **more: object) -> AsyncIterator[Stand]:
    made = EmulatedEngine(EmulatedSettings(MODEL, _CONFIG, plugin=plugin), _STEP_TIME)
    async with serving([made]) as (served,), _in_front(made, _settings(served.url, **more)) as stand:
        yield stand


async def test_an_emulated_engine_gets_its_orders_and_is_predicted_as_driven() -> None:
    async with _stand() as stand:
        await until(lambda: stand.driven)
        assert stand.plugin.orders.mode is Mode.DRIVEN
        assert stand.plugin.orders.lapse_s == _QUICK.lapse_s
        assert stand.control[-1].rung is Rung.DRIVEN
        url = f"{stand.ask.base}/admin/v1/state"
        async with stand.ask.session.get(url, headers={"authorization": "Bearer secret"}) as answer:
            (told,) = orjson.loads(await answer.read())["backends"]
        assert told["driven"] is True
        assert told["control"][0]["rung"] == "driven"
        assert told["control"][0]["reason"]
        async with stand.ask.session.get(f"{stand.ask.base}/metrics") as answer:
            text = await answer.text()
        assert 'tiergate_backend_driven{backend="one",tier="chat"} 1.0' in text
        assert 'tiergate_control_decisions_total{backend="one",rung="driven"} 1.0' in text
