"""A request without a promise starts at once where nothing runs, in front of an emulated engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from gateway.app import Gateway
from gateway.config import BackendSettings, Settings
from scheduling.events import BackendChanged
from tests.gateway.rig import MODEL, PROFILE, Client, client, gateway, settled
from tiergate_engine.model import EngineConfig
from tiergate_engine.steptime import RooflineStepTime

_TIERS = (
    {"name": "fast", "ttft_ms": 1_000, "tpot_ms": 20},
    {"name": "chat", "ttft_ms": 2_000, "tpot_ms": 50},
    {"name": "batch", "on_miss": "relegate"},
)
_MARGIN = 5.0  # predictions are multiplied by it


@contextlib.asynccontextmanager
async def _one_backend(profile: str | None) -> AsyncIterator[tuple[Gateway, Client]]:
    config = EngineConfig(kv_tokens=200_000, max_model_tokens=8_192)
    engine = EmulatedEngine(EmulatedSettings(MODEL, config), RooflineStepTime(c0_s=0.004))
    async with serving([engine]) as (served,):
        backend = BackendSettings(url=served.url, name="only", profile=profile)
        settings = Settings.model_validate(
            {"port": 0, "backends": [backend], "tiers": _TIERS, "default_tier": "chat", "tick_ms": 20}
        )
        async with gateway(settings) as made, client(made) as ask:
            yield made, ask


def _widen(made: Gateway) -> None:
    """Give the backend a wide margin, as a profile of poor fit or a noisy machine does."""
    [member] = made.fleet.members()
    assert member.published is not None
    made.shell.feed(BackendChanged(replace(member.published, margin=_MARGIN)))


async def _batch_starts_at_once(ask: Client) -> None:
    async with asyncio.timeout(1.0):  # a bound for a hang; it was once held for 45 s
        async with ask.chat(headers={"x-slo-tier": "batch"}, max_tokens=20) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.headers["x-tiergate-tier"] == "batch"
            await answer.read()


async def _tight_first(made: Gateway, ask: Client) -> None:
    for _ in range(3):
        async with ask.chat(headers={"x-slo-tier": "fast"}, max_tokens=20) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()
    await settled(made)
    [numbers] = made.view.numbers()
    assert numbers.tier == "fast"
    _widen(made)


@pytest.mark.parametrize("profile", [None, PROFILE], ids=["uncalibrated", "calibrated"])
async def test_batch_starts_at_once_on_an_idle_backend_of_a_tight_tier(profile: str | None) -> None:
    async with _one_backend(profile) as (made, ask):
        await _tight_first(made, ask)
        assert made.view.numbers()[0].calibrated is (profile is not None)
        for _ in range(3):
            await _batch_starts_at_once(ask)
        await settled(made)


@pytest.mark.parametrize("profile", [None, PROFILE], ids=["uncalibrated", "calibrated"])
async def test_batch_starts_at_once_beside_other_batch_work(profile: str | None) -> None:
    async with _one_backend(profile) as (made, ask):
        await _tight_first(made, ask)
        async with ask.chat(headers={"x-slo-tier": "batch"}, max_tokens=4_000) as running:
            await running.content.readany()
            await _batch_starts_at_once(ask)
            running.close()
        await settled(made)


@pytest.mark.parametrize("profile", [None, PROFILE], ids=["uncalibrated", "calibrated"])
async def test_batch_starts_at_once_beside_one_tight_stream(profile: str | None) -> None:
    async with _one_backend(profile) as (made, ask):
        async with ask.chat(headers={"x-slo-tier": "fast"}, max_tokens=4_000) as running:
            assert running.status == 200, await running.text()
            await running.content.readany()
            await _batch_starts_at_once(ask)
            running.close()
        await settled(made)
