"""A gateway drives engines: emulated ones with the plug-in's contract, and a fake SGLang. No model runs in any."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace

import orjson
import pytest

from adapters.contract import Failure, Unsupported, UpstreamError
from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from adapters.emulated.plugin import EmulatedPlugin, Urgency
from adapters.vllm import VllmAdapter
from gateway.app import Gateway
from gateway.config import BackendSettings, Settings
from gateway.fleet import Member
from gateway.generate import promise_of
from profiles import load
from scheduling.backends import Backend
from scheduling.decisions import Decision, Outcome
from scheduling.events import Open
from scheduling.knobs import ControlOptions, Rung, Setting
from scheduling.requests import Request
from scheduling.tiers import Slo
from tests.adapters.fake_sglang import Habits, fake_sglang
from tests.gateway.rig import MODEL, PROFILE, Client, client, engine, gateway, idle, settings_for, settled, until
from tiergate_engine.control import EngineState, Mode, Orders, Promise, StepFacts
from tiergate_engine.model import EngineConfig
from tiergate_engine.step import Step, StepTime
from tiergate_engine.steptime import ScaledStepTime, ShiftedStepTime

_OTHER = "h100-llama-3.1-8b-fp8"
_STEP_TIME = load(PROFILE).step_time
_CONFIG = EngineConfig(kv_tokens=200_000, max_model_tokens=16_384)
_QUICK = ControlOptions(every_s=0.02, lapse_s=1.0, refresh_s=0.1, yield_s=0.3, raise_after_s=0.1)

_CALM = replace(_QUICK, yield_s=3.0, lapse_s=20.0)  # a busy machine does not make one gateway look gone


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
    def published(self) -> Backend:
        """What the core knows of it."""
        published = self.member.published
        assert published is not None
        return published

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


def _settings(url: str, *, profile: str = PROFILE, tier: str = "chat", **more: object) -> Settings:
    backend = BackendSettings(url=url, name="one", profile=profile, tier=tier)
    base: dict[str, object] = {"port": 0, "backends": [backend], "tick_ms": 20, "admin_token": "secret"}
    return Settings.model_validate(base | {"log_requests": False, "health": {"every_s": 0.1}} | more)


@contextlib.asynccontextmanager
async def _in_front(engine: EmulatedEngine, settings: Settings) -> AsyncIterator[Stand]:
    async with gateway(settings) as made, client(made) as ask:
        made.driving.controller.options = _QUICK
        yield Stand(engine, made, ask, settings)
        await settled(made)
        assert idle(made)


def _engine(
    config: EngineConfig = _CONFIG, step_time: StepTime = _STEP_TIME, *, plugin: bool = True
) -> EmulatedEngine:
    return EmulatedEngine(EmulatedSettings(MODEL, config, plugin=plugin), step_time)


@contextlib.asynccontextmanager
async def _stand(
    made: EmulatedEngine | None = None, *, tier: str = "chat", driving: bool = True
) -> AsyncIterator[Stand]:
    made = made or _engine()
    async with contextlib.AsyncExitStack() as stack:
        (served,) = await stack.enter_async_context(serving([made]))
        settings = _settings(served.url, tier=tier, driving=driving)
        yield await stack.enter_async_context(_in_front(made, settings))


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


async def test_requests_carry_their_promise_to_an_engine_with_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _stand() as stand:
        await until(lambda: stand.driven)
        seen: list[Promise] = []
        given = stand.plugin.urgency

        def note(priority: int, xargs: Mapping[str, object] | None) -> Urgency:
            seen.append(Promise.from_xargs(xargs))
            return given(priority, xargs)

        monkeypatch.setattr(stand.plugin, "urgency", note)
        await stand.complete()
        await stand.complete(x_slo_tier="batch")
        promised, best_effort = seen
        assert promised.ttft_s is not None
        assert 0.0 < promised.ttft_s <= 2.0 - 0.005, "with time to deliver the token"
        assert (promised.tpot_s, promised.relegated) == (0.05, False)
        assert best_effort == Promise()


def test_a_request_that_gave_up_its_promise_says_so() -> None:
    request = Request("r", MODEL, "chat", Slo(2.0, 0.05), prompt_tokens=8, arrival_s=1.0)
    decision = Decision("r", 1.0, Outcome.RELEGATED, "", "one", ())
    order = Open("r", "l", "one", decision, math.inf)
    assert promise_of(request, order, 1.5, 0.0) == Promise(1.5, 0.05, relegated=True)
    kept = replace(order, decision=replace(decision, outcome=Outcome.OWN_TIER))
    assert promise_of(request, kept, 4.0, 0.25) == Promise(-1.25, 0.05)


async def test_without_the_plugin_not_a_byte_changes_and_nothing_is_set() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        made.driving.controller.options = _QUICK
        await until(lambda: made.driving.controller.decisions("e0") != ())
        assert (await ask.read_chat())[0] == 200
        assert one.seen[0].keys() == {"model", "messages", "stream", "stream_options"}
        (setting,) = made.driving.controller.decisions("e0")
        assert setting.rung is Rung.UNSET
        (member,) = made.fleet.members()
        assert member.published is not None
        assert not member.published.dynamic_chunk


async def test_driving_can_be_switched_off() -> None:
    async with _stand(driving=False) as stand:
        for _ in range(3):
            await stand.complete()
        assert stand.plugin.puts == 0
        assert stand.control == ()
        assert not stand.member.takes_promises


async def test_switched_off_for_one_backend_while_it_runs_it_goes_back_to_stock() -> None:
    async with _stand() as stand:
        await until(lambda: stand.driven)
        backend = stand.settings.backends[0].model_copy(update={"driving": False})
        await stand.gateway.reload(stand.settings.model_copy(update={"backends": (backend,)}))
        await until(lambda: stand.plugin.orders == Orders())
        await until(lambda: not stand.driven)
        await stand.gateway.reload(stand.settings.model_copy(update={"driving": False}))
        assert not stand.gateway.live.now.settings.driving


async def test_an_engine_that_was_started_anew_gets_its_orders_again() -> None:
    async with _stand() as stand:
        await until(lambda: stand.driven)
        stand.plugin.forget()
        await until(lambda: stand.plugin.state().mode is Mode.DRIVEN)


async def test_an_engine_goes_on_alone_and_a_gateway_that_comes_back_drives_it_again() -> None:
    made = _engine()
    plugin = made.plugin
    assert plugin is not None
    async with serving([made]) as (served,):
        async with _in_front(made, _settings(served.url)) as stand:
            await until(lambda: stand.driven)
            digest = plugin.orders.digest
        assert plugin.orders.digest == digest
        await until(lambda: plugin.state().mode is Mode.STOCK)
        async with _in_front(made, _settings(served.url)) as stand:
            await until(lambda: stand.driven)
            assert plugin.state().mode is Mode.DRIVEN


async def test_two_gateways_that_differ_agree_and_one_takes_over_from_the_other() -> None:
    made = _engine()
    plugin = made.plugin
    assert plugin is not None
    async with serving([made]) as (served,), _in_front(made, _settings(served.url, profile=_OTHER)) as second:
        second.gateway.driving.controller.options = _CALM
        await until(lambda: second.driven and plugin.orders.lapse_s == _CALM.lapse_s)
        others = plugin.orders.digest
        async with _in_front(made, _settings(served.url)) as first:
            first.gateway.driving.controller.options = _CALM
            await until(lambda: first.driven)
            puts = plugin.puts
            await until(lambda: plugin.puts >= puts + 3)
            assert plugin.orders.digest == others
            second.gateway.driving.controller.options = replace(_CALM, every_s=3600.0)
            await until(lambda: plugin.orders.digest != others)
            assert (first.driven, plugin.state().mode) == (True, Mode.DRIVEN)


async def test_an_engine_that_does_not_obey_is_set_from_outside(caplog: pytest.LogCaptureFixture) -> None:
    async with _stand(tier="fast") as stand:
        await until(lambda: stand.driven)
        stand.plugin.refuses = "its plans fail"
        await until(lambda: stand.plugin.orders.mode is Mode.STOCK)
        assert [one.rung for one in stand.control] == [Rung.DRIVEN, Rung.CHUNK_BUDGET]
        chunk = stand.plugin.orders.chunk_tokens
        assert chunk is not None
        await until(lambda: stand.published.chunk_tokens == chunk)
        await stand.complete(4_000, x_slo_tier="batch")
        told = stand.plugin.facts()
        assert sum(fact.step.prefill_tokens for fact in told) == 4_000
        assert all(fact.step.prefill_tokens <= chunk for fact in told)
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len([text for text in warned if "driven with less" in text]) == 1
    assert "its plans fail" in "".join(warned)


async def test_an_engine_that_comes_back_without_its_plugin_is_served_as_stock() -> None:
    made = _engine()
    async with contextlib.AsyncExitStack() as stack:
        serve = contextlib.AsyncExitStack()
        (served,) = await serve.enter_async_context(serving([made]))
        stand = await stack.enter_async_context(_in_front(made, _settings(served.url)))
        await until(lambda: stand.driven)
        await serve.aclose()
        port = int(served.url.rpartition(":")[2])
        await stack.enter_async_context(serving([_engine(plugin=False)], ports=[port]))
        await until(lambda: not stand.driven and stand.gateway.fleet.up == 1)
        await until(lambda: stand.control[-1].rung is Rung.UNSET)
        assert not stand.member.takes_promises
        assert await stand.complete()


async def test_steps_that_an_engine_tells_are_learned_from() -> None:
    slower = ScaledStepTime(_STEP_TIME, 1.5, 1.5)
    async with _stand(_engine(step_time=slower)) as stand:
        await until(lambda: stand.driven)
        learner = stand.member.learner
        assert learner is not None
        before_s = learner.timing().step_time.decode_seconds(8, 8_000)
        for _ in range(3):
            await stand.complete(tokens=100)

        def learned() -> bool:
            return learner.timing().step_time.decode_seconds(8, 8_000) > 1.4 * before_s

        await until(learned)
        assert stand.member.tells_steps
        await until(lambda: len(stand.control) > 1)  # and told to the engine
        assert stand.control[-1].rung is Rung.DRIVEN


async def test_a_tight_stream_keeps_its_time_beside_a_long_prompt() -> None:
    """The whole loop: the promise travels, and the emulated engine cuts the prompt to the slack on board."""
    config = replace(_CONFIG, max_batched_tokens=16_384, kv_tokens=400_000)
    largest: dict[bool, int] = {}
    for driving in (True, False):
        async with _stand(_engine(config), driving=driving) as stand:
            await until(lambda: stand.driven is driving)  # noqa: B023  (it is awaited in the same turn)
            async with asyncio.TaskGroup() as tasks:
                tight = tasks.create_task(stand.complete(tokens=150, x_slo_ttft_ms="120", x_slo_tpot_ms="8"))
                await until(lambda: stand.gateway.shell.pace.openings == 0 and len(stand.plugin.facts()) > 3)
                tasks.create_task(stand.complete(15_000, x_slo_tier="batch"))
            assert b"[DONE]" in tight.result()
            mixed = [fact.step for fact in stand.plugin.facts() if fact.step.decode_seqs]
            largest[driving] = max(step.prefill_tokens for step in mixed)
    assert largest[False] == 15_000
    assert 0 < largest[True] < 12_000


async def test_an_sglang_with_the_plugin_gets_a_chunk_size() -> None:
    async with fake_sglang(MODEL, habits=Habits(plugin=True)) as fake:
        backend = BackendSettings(url=fake.url, name="one", profile=PROFILE, tier="fast")
        async with gateway(_settings(fake.url, backends=[backend])) as made:
            made.driving.controller.options = _QUICK
            (member,) = made.fleet.members()
            await until(lambda: member.driven)
            (setting,) = made.driving.controller.decisions("one")
            assert setting.rung is Rung.CHUNK_BUDGET
            assert setting.chunk_tokens is not None
            assert fake.chunk <= setting.chunk_tokens < 2_048


@pytest.mark.parametrize(
    ("habits", "apart"),
    [(Habits(plugin=True), 1), (Habits(plugin=True, interval=3), 3), (Habits(plugin=True, mixed=True), None)],
)
async def test_an_sglang_with_a_chunk_size_is_known_for_the_decodes_between(
    habits: Habits, apart: int | None
) -> None:
    """With chunks apart a step of decodes at least is put behind each, even where its own size keeps the pace."""
    async with fake_sglang(MODEL, habits=habits) as fake, gateway(_settings(fake.url, tier="summary")) as made:
        made.driving.controller.options = _QUICK
        (member,) = made.fleet.members()
        await until(lambda: member.driven)
        assert member.published is not None
        assert member.published.prefill_interval == apart
        assert fake.interval == (apart or 0)
        (setting,) = made.driving.controller.decisions("one")
        assert setting.chunk_tokens == (None if apart is None else 2_048)


async def test_a_backend_too_slow_for_its_tier_goes_to_a_looser_one() -> None:
    step = Step.decode(8, 8_000)
    took_s = ShiftedStepTime(_STEP_TIME, 0.03).seconds(step)
    async with _stand(_engine(plugin=False), tier="fast") as stand:
        assert stand.member.learner is not None
        for _ in range(10):
            stand.member.learner.observe_told([(step, took_s)] * 50, 50)
        await until(lambda: stand.gateway.view.numbers()[0].tier != "fast")
        told = [one for one in stand.control if one.rung is Rung.LOOSER_TIER]
        assert told[-1].tier == stand.gateway.view.numbers()[0].tier


async def test_a_knob_that_an_engine_refuses_is_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_sglang(MODEL, habits=Habits(plugin=True)) as fake:
        backend = BackendSettings(url=fake.url, name="one", profile=PROFILE, tier="fast")
        async with gateway(_settings(fake.url, backends=[backend])) as made:
            asked = 0

            async def refuse(tokens: int | None) -> None:
                nonlocal asked
                asked += 1
                raise Unsupported("not any more")

            monkeypatch.setattr(made.fleet.adapter("one"), "set_chunk_budget", refuse)
            made.driving.controller.options = _QUICK
            await until(lambda: len(made.driving.controller.decisions("one")) > 1)
            settings = made.driving.controller.decisions("one")
            assert [one.rung for one in settings] == [Rung.CHUNK_BUDGET, Rung.RUNNING_CAP]
            assert asked == 1
            assert not made.fleet.members()[0].driven
    assert len([one for one in caplog.records if "chunk_budget does not work" in one.getMessage()]) == 1


async def test_an_engine_that_fails_to_answer_is_left_to_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with _stand() as stand:
        await until(lambda: stand.driven)

        async def fail() -> EngineState:
            raise UpstreamError(Failure.TIMEOUT, "too late")

        monkeypatch.setattr(stand.gateway.fleet.adapter("one"), "read_state", fail)
        await until(lambda: not stand.driven)
        await until(lambda: stand.control[-1].rung is Rung.UNSET)
        assert await stand.complete()
        assert not stand.member.takes_promises
    assert len([one for one in caplog.records if "too late" in one.getMessage()]) == 1


async def test_an_engine_that_made_no_step_is_asked_for_its_steps_once() -> None:
    """The plug-in counts and keeps steps only for whom asks: who waits until some are made learns of none."""
    async with _stand() as stand:
        plugin = stand.member.adapter
        assert isinstance(plugin, VllmAdapter)
        asked: list[int] = []
        own = plugin.read_steps

        async def note(since: int) -> StepFacts:
            asked.append(since)
            return await own(since)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plugin, "read_steps", note)
            stand.gateway.driving._engines.clear()  # as when the engine was probed anew
            await until(lambda: asked == [0])
            await asyncio.sleep(5 * _QUICK.every_s)
            assert asked == [0]


async def test_how_long_orders_hold_is_configured() -> None:
    async with (
        serving([_engine()]) as (served,),
        gateway(_settings(served.url, orders_lapse_s=6)) as made,
    ):
        options = made.driving.controller.options
        assert (options.lapse_s, options.refresh_s, options.yield_s) == (6.0, 1.0, 2.0)
    assert ControlOptions.lapsing(30.0) == ControlOptions()
