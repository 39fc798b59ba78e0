"""Three engine families in one tier set behind one gateway: an emulated vLLM, a fake SGLang and a fake TGI.

None of them has a model inside, and only the first is more than shapes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import orjson
import pytest

from adapters.contract import Support
from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from gateway.app import Gateway
from gateway.config import BackendSettings, EngineKind, LimitSettings, Settings
from tests.adapters import fake_sglang as sglang
from tests.adapters import fake_tgi as tgi
from tests.gateway.rig import MODEL, PROFILE, Client, client, gateway, idle, settled, until
from tiergate_engine.model import EngineConfig
from tiergate_engine.steptime import RooflineStepTime

KINDS = ("vllm", "sglang", "tgi")
_SGLANG, _TGI = sglang.Habits(), tgi.Habits()
_LONG = 201  # the seed of an answer of thousands of tokens
TIERS = ("fast", "summary", "batch")


@dataclass(frozen=True, slots=True)
class Fleet:
    """The engines, and the gateway in front of them."""

    vllm: EmulatedEngine
    sglang: sglang.FakeSglang
    tgi: tgi.FakeTgi
    gateway: Gateway
    ask: Client

    def left(self) -> tuple[int, int, int, int]:
        """What no engine may have when nobody asks for anything."""
        others = self.sglang.driver.open_sequences + self.tgi.driver.open_sequences
        return (self.vllm.driver.open_sequences, others, len(self.sglang.requests), self.tgi.permits)


@contextlib.asynccontextmanager
async def fleet(
    sglang_habits: sglang.Habits = _SGLANG, tgi_habits: tgi.Habits = _TGI, **more: object
) -> AsyncIterator[Fleet]:
    """All three up, each with limits and a profile of its own."""
    config = EngineConfig(kv_tokens=200_000, max_model_tokens=4_096)
    emulated = EmulatedEngine(EmulatedSettings(MODEL, config), RooflineStepTime(c0_s=0.002))
    async with (
        serving([emulated]) as (vllm,),
        sglang.fake_sglang(MODEL, habits=sglang_habits, limits=sglang.Limits(max_running_requests=64)) as sgl,
        tgi.fake_tgi(MODEL, habits=tgi_habits) as text,
    ):
        backends = [
            BackendSettings(url=vllm.url, name="vllm", profile=PROFILE),
            BackendSettings(url=sgl.url, name="sglang", profile=PROFILE, engine=EngineKind.SGLANG),
            BackendSettings(
                url=text.url,
                name="tgi",
                profile=PROFILE,
                limits=LimitSettings(kv_tokens=65_536, max_running_seqs=32, max_batched_tokens=1_024),
            ),
        ]
        base: dict[str, object] = {"port": 0, "backends": backends, "tick_ms": 20, "log_requests": False}
        settings = Settings.model_validate(base | {"health": {"every_s": 0.1}} | more)
        async with gateway(settings) as made, client(made) as ask:
            found = Fleet(emulated, sgl, text, made, ask)
            yield found
            await settled(made)
            assert idle(made)
        await until(lambda: found.left() == (0, 0, 0, 0))


async def test_each_is_known_for_what_it_is() -> None:
    async with fleet() as made:
        found = {member.name: member.capabilities for member in made.gateway.fleet.members()}
        assert {name: one and (one.engine, one.emulated) for name, one in found.items()} == {
            kind: (kind, True) for kind in KINDS
        }
        caps = {name: one.running_cap for name, one in found.items() if one is not None}
        assert caps["sglang"] is Support.YES
        assert caps["tgi"] is Support.NO
        published = [one.published for one in made.gateway.fleet.members()]
        limits = {one.name: one.limits for one in published if one is not None}
        assert limits["sglang"].max_running_seqs == 64
        assert (limits["tgi"].max_running_seqs, limits["tgi"].max_batched_tokens) == (32, 1_024)


@pytest.mark.parametrize("policy", ["polyserve", "round_robin"])
async def test_mixed_tiers_share_them(policy: str) -> None:
    """Round robin uses all of them; PolyServe as many as it needs, which depends on how fast they just are."""
    async with fleet(policy={"name": policy}) as made:
        served: Counter[tuple[str, str]] = Counter()

        async def one(number: int) -> None:
            headers = {"x-slo-tier": TIERS[number % 3]}
            stream = number % 2 == 0
            async with made.ask.chat(stream=stream, headers=headers, max_tokens=12, seed=number) as answer:
                text = await answer.read()
                assert answer.status == 200, text
                assert b"error" not in text
                served[answer.headers["x-tiergate-backend"], TIERS[number % 3]] += 1

        for first in range(0, 60, 12):
            async with asyncio.TaskGroup() as tasks:
                for number in range(first, first + 12):
                    tasks.create_task(one(number))
        used = {backend for backend, _ in served}
        assert used == set(KINDS) if policy == "round_robin" else used <= set(KINDS)
        assert {tier for _, tier in served} == set(TIERS)
        assert sum(served.values()) == made.gateway.shell.counts.finished == 60
        await settled(made.gateway)
        # A TGI that was given nothing tells no number, as long as it has none.
        await until(lambda: not any(one.engine.running for one in made.gateway.fleet.members()))


async def test_tokens_are_counted_alike_however_they_come() -> None:
    """SGLang may put several into one event, which is told by the usage at the end."""
    habits = sglang.Habits(merged=4)
    async with fleet(habits, policy={"name": "round_robin"}) as made:
        for number in range(6):
            before = made.gateway.shell.counts.tokens
            status, _ = await made.ask.read_chat(max_tokens=12, seed=1)
            await settled(made.gateway)
            assert (status, made.gateway.shell.counts.tokens - before) == (200, 12), number
        assert made.sglang.seen
        assert made.gateway.telemetry.merged_streams == len(made.sglang.seen)


async def test_an_overload_in_either_stream_goes_elsewhere() -> None:
    async with fleet(
        sglang.Habits(overloaded=True), tgi.Habits(overloaded=True), policy={"name": "round_robin"}
    ) as made:
        for stream in (True, False):
            for _ in range(6):
                async with made.ask.chat(stream=stream, max_tokens=3, seed=1) as answer:
                    body = await answer.read()
                    assert (answer.status, answer.headers["x-tiergate-backend"]) == (200, "vllm")
                    assert b"error" not in body
        assert made.gateway.shell.counts.retried > 0
        assert made.gateway.shell.counts.failed == 0
        assert made.sglang.asked.count("/v1/chat/completions") > 0
        assert made.tgi.refused > 0


async def test_priorities_reach_the_one_that_schedules_by_them() -> None:
    async with fleet(sglang.Habits(priority=True), policy={"name": "round_robin"}) as made:
        for tier in TIERS * 3:
            assert (await made.ask.read_chat(max_tokens=2, headers={"x-slo-tier": tier}))[0] == 200
        told = {body["priority"] for body in made.sglang.seen}
        assert told <= set(range(11)), "a few values, never a deadline"
        assert all("priority" not in body for body in made.tgi.seen)


@pytest.mark.parametrize("gone", KINDS)
async def test_clients_that_leave_free_every_engine(gone: str) -> None:
    async with fleet(policy={"name": "round_robin"}) as made:
        for _ in range(6):
            async with made.ask.chat(seed=_LONG, max_tokens=3_000) as answer:
                await answer.content.readany()
                if answer.headers["x-tiergate-backend"] == gone:
                    answer.close()
                    break
                answer.close()
        await settled(made.gateway)
        await until(lambda: made.left() == (0, 0, 0, 0))


async def test_one_that_would_go_on_without_its_client_is_told_to_stop() -> None:
    """SGLang looks for clients that left only after two seconds; the fake never does."""
    habits = sglang.Habits(lingers=True)
    async with fleet(habits, policy={"name": "round_robin"}) as made:
        for stream in (True, False):
            for _ in range(3):
                async with asyncio.TaskGroup() as tasks:
                    asking = tasks.create_task(made.ask.read_chat(stream=stream, seed=_LONG, max_tokens=4_000))
                    await until(lambda: sum(made.left()) > 0)
                    asking.cancel()
                await until(lambda: made.left() == (0, 0, 0, 0))
        assert len([name for name in made.sglang.aborts if name != "tiergate-probe"]) == made.sglang.disconnects
        assert made.sglang.disconnects == 2
        # One that ended well is not aborted as well.
        for _ in range(3):
            assert (await made.ask.read_chat(max_tokens=2))[0] == 200
        assert len(made.sglang.aborts) == 3


async def test_a_whole_answer_of_each_is_in_one_shape() -> None:
    async with fleet(policy={"name": "round_robin"}) as made:
        ids = set()
        for _ in range(6):
            status, body = await made.ask.read_chat(stream=False, max_tokens=3, seed=1)
            answer = orjson.loads(body)
            assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
            assert answer["id"]
            ids.add(answer["id"])
        assert len(ids) == 6


async def test_step_times_that_streams_do_not_show_are_learned_from_what_sglang_tells() -> None:
    """Its events carry several tokens, so their gaps say nothing; its steps take four times the profile's."""
    async with sglang.fake_sglang(MODEL, habits=sglang.Habits(merged=6), step_s=0.02) as sgl:
        backend = BackendSettings(url=sgl.url, name="sglang", profile=PROFILE)
        base: dict[str, object] = {"port": 0, "backends": [backend], "tick_ms": 20, "log_requests": False}
        settings = Settings.model_validate(base | {"health": {"every_s": 0.1}})
        async with gateway(settings) as made, client(made) as ask:
            (member,) = made.fleet.members()
            assert member.published is not None
            before_s = member.published.step_time.decode_seconds(1, 100)
            assert before_s < 0.006

            async def stream() -> None:
                async with ask.chat(seed=_LONG, max_tokens=3_000) as answer:
                    await answer.read()

            def learned() -> bool:
                return member.published is not None and member.published.step_time.decode_seconds(1, 100) > 0.015

            async with asyncio.TaskGroup() as tasks:
                asking = tasks.create_task(stream())
                await until(learned)
                asking.cancel()
            backends = made.view.state(0.0)["backends"]
            assert isinstance(backends, list)
            told = backends[0]
            assert isinstance(told, dict)
            assert told["engine_waiting_tokens"] == 0
            assert told["engine_age_s"] is not None
            await settled(made)
        await until(lambda: not sgl.requests)


async def test_tgi_is_given_no_more_than_it_reserves_kv_for() -> None:
    """So nobody waits in it, neither at first nor for the KV of the next 1,024 tokens of an answer."""
    limits = tgi.Limits(max_batch_total_tokens=2_600, max_total_tokens=2_048)
    async with tgi.fake_tgi(MODEL, limits=limits, step_s=0.001) as text:
        known = LimitSettings(kv_tokens=2_600, max_batched_tokens=2_048)
        backend = BackendSettings(url=text.url, name="tgi", profile=PROFILE, limits=known)
        base: dict[str, object] = {"port": 0, "backends": [backend], "tick_ms": 20, "log_requests": False}
        async with gateway(Settings.model_validate(base)) as made, client(made) as ask:

            async def one(number: int) -> bytes:
                headers = {"x-slo-tier": "batch"}
                status, body = await ask.read_chat(seed=_LONG + number, max_tokens=1_100, headers=headers)
                assert status == 200, body
                return body

            async with asyncio.TaskGroup() as tasks:
                for number in range(4):
                    tasks.create_task(one(number))
                await until(lambda: text.permits == 2)
            assert text.requeued > 0
            assert text.waited == 0
            await settled(made)
            assert idle(made)
