"""What prompts do to the streams of engines that take no chunk budget, by the engines' own steps.

A fake SGLang, which computes prompts before it goes on with its decodes; a fake TGI and an emulated vLLM without
plug-in, which are paced. Times are those that the engines' models give their steps, not of the clock. No model
runs in any.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterable

import pytest

from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from adapters.emulated.driver import EngineDriver
from gateway.config import BackendSettings, LimitSettings, Settings
from profiles import load
from tests.adapters import fake_sglang as sglang
from tests.adapters import fake_tgi as tgi
from tests.gateway.rig import MODEL, PROFILE, Client, client, gateway, idle, settled, until
from tiergate_engine.model import EngineConfig, PlannedStep
from tiergate_engine.step import Step

_STEP_TIME = load(PROFILE).step_time
_KV = 400_000


class Watched:
    """An engine's steps, as they are planned, and the prompt tokens that it has not computed yet at each.

    `gathers`: behind its third step it waits for so many prompts: they come together on a busy machine, too.
    """

    def __init__(self, driver: EngineDriver, gathers: int = 0) -> None:
        self.steps: list[PlannedStep] = []
        self.waiting: list[int] = []
        model = driver.model
        plan = model.next_step

        def watch(now_s: float) -> PlannedStep | None:
            nonlocal gathers
            prompts = [one.target - one.kv for one in model._known.values() if not one.generated]
            if len(self.steps) > 3 and len(prompts) < gathers:
                return None
            if prompts and len(prompts) >= gathers:
                gathers = 0
            planned = plan(now_s)
            if planned is not None:
                self.steps.append(planned)
                self.waiting.append(sum(prompts))
            return planned

        model.next_step = watch  # type: ignore[method-assign]  # the model's own, watched

    def beside_decodes(self) -> list[tuple[Step, float, int]]:
        """Steps from the first decode to the last: what was in them, how long they took, what waited."""
        told = [(one.step, one.duration_s) for one in self.steps]
        ends = [index for index, (step, _) in enumerate(told) if step.decode_seqs]
        span = range(ends[0], ends[-1] + 1)
        return [(*told[index], self.waiting[index]) for index in span]


def _settings(backend: BackendSettings, **more: object) -> Settings:
    base: dict[str, object] = {"port": 0, "backends": [backend], "tick_ms": 20, "log_requests": False}
    return Settings.model_validate(base | {"health": {"every_s": 0.2}} | more)


async def _beside(ask: Client, prompts: Iterable[int], watched: Watched, tokens: int, **slo: str) -> None:
    """One stream that was promised a pace, and best-effort prompts that come all at once when it speaks."""
    headers = {name.replace("_", "-"): value for name, value in slo.items()}

    async def one(words: int, most: int, headers: dict[str, str]) -> None:
        messages = [{"role": "user", "content": "word " * words}]
        async with ask.chat(messages=messages, max_tokens=most, ignore_eos=True, seed=201, headers=headers) as got:
            body = await got.read()
            assert (got.status, b"error" in body) == (200, False), body

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(one(8, tokens, headers))
        await until(lambda: sum(bool(step.step.decode_seqs) for step in watched.steps) > 2)
        for words in prompts:
            tasks.create_task(one(words, 2, {"x-slo-tier": "batch"}))


async def _lateness_s(habits: sglang.Habits, gathers: int = 0) -> float:
    """By how much the latest token of the stream is late, were its first due in 2 s and each 50 ms later."""
    limits = sglang.Limits(kv_tokens=_KV)
    async with sglang.fake_sglang(MODEL, limits=limits, habits=habits, step_time=_STEP_TIME) as fake:
        watched = Watched(fake.driver, gathers)
        backend = BackendSettings(url=fake.url, name="one", profile=PROFILE, tier="chat")
        async with gateway(_settings(backend)) as made, client(made) as ask:
            slo = {"x_slo_ttft_ms": "2000", "x_slo_tpot_ms": "50"}
            await _beside(ask, [2_800] * 55, watched, 40, **slo)
            await settled(made)
            assert idle(made)
        # the stream is the first to decode, so its first tokens are those of all steps with decodes
        ends_s = itertools.accumulate(planned.duration_s for planned in watched.steps)
        tokens = [at_s for at_s, one in zip(ends_s, watched.steps, strict=True) if one.step.decode_seqs][:39]
        return max(at_s - (2.0 + 0.05 * (index + 1)) for index, at_s in enumerate(tokens))


async def test_a_stream_keeps_its_pace_where_decodes_wait_for_all_prompts() -> None:
    """2.7 seconds of prompts come at once, each chunk shorter than its pace. Where the core takes chunks for
    mixed, because the server says so, it lets them all in, and the stream waits for all of them."""
    assert await _lateness_s(sglang.Habits()) < 0.0
    assert await _lateness_s(sglang.Habits(says_mixed=True), gathers=55) > 0.0


@contextlib.asynccontextmanager
async def _engine(kind: str, gathers: int) -> AsyncIterator[tuple[str, Watched]]:
    if kind == "tgi":
        limits = tgi.Limits(max_batch_total_tokens=_KV)
        async with tgi.fake_tgi(MODEL, limits=limits, step_time=_STEP_TIME) as fake:
            yield fake.url, Watched(fake.driver, gathers)
    else:
        config = EngineConfig(kv_tokens=_KV, max_model_tokens=4_096, max_batched_tokens=2_048)
        emulated = EmulatedEngine(EmulatedSettings(MODEL, config, plugin=False), _STEP_TIME)
        async with serving([emulated]) as (served,):
            yield served.url, Watched(emulated.driver, gathers)


async def _steps_beside(
    kind: str, prompts: list[int], pace_ms: int, *, paced: bool
) -> list[tuple[Step, float, int]]:
    """The engine's steps beside a stream that was promised a pace, and a first token so late that it is not lost
    on a busy machine."""
    async with _engine(kind, 0 if paced else len(prompts)) as (url, watched):
        limits = LimitSettings(kv_tokens=_KV, max_batched_tokens=2_048, max_running_seqs=100)
        backend = BackendSettings(url=url, name="one", profile=PROFILE, limits=limits)
        # a policy that looks at nobody's pace itself
        policy = {"name": "round_robin", "options": {"paces_prefill": paced}}
        async with gateway(_settings(backend, policy=policy)) as made, client(made) as ask:
            slo = {"x_slo_ttft_ms": "20000", "x_slo_tpot_ms": str(pace_ms)}
            await _beside(ask, prompts, watched, 250, **slo)
            await settled(made)
            assert idle(made)
        assert sum(one.step.prefill_tokens for one in watched.steps) > sum(prompts)
        return watched.beside_decodes()


@pytest.mark.parametrize("kind", ["tgi", "vllm"])
async def test_no_more_prompts_are_in_prefill_than_a_step_can_bear(kind: str) -> None:
    """A step with one of the prompts keeps the pace; one with two does not, and with seven is far from it."""
    paced = await _steps_beside(kind, [300] * 8, 10, paced=True)
    stock = await _steps_beside(kind, [300] * 8, 10, paced=False)
    one = 310  # with what a chat adds to it
    assert max(waiting for _, _, waiting in paced) <= one
    assert max(waiting for _, _, waiting in stock) > 7 * 300
    longest_s = [max(took_s for step, took_s, _ in steps if step.decode_seqs) for steps in (paced, stock)]
    assert longest_s[0] <= 0.010
    assert longest_s[1] > 0.015


@pytest.mark.parametrize("kind", ["tgi", "vllm"])
async def test_prompts_longer_than_a_step_can_bear_come_at_a_rate(kind: str) -> None:
    """A step with any of them is too long, so on average there are short ones enough in between."""
    mean_s = {}
    for paced in (True, False):
        steps = await _steps_beside(kind, [900] * 8, 6, paced=paced)
        prompts = [index for index, (step, _, _) in enumerate(steps) if step.prefill_tokens]
        span = [took_s for _, took_s, _ in steps[prompts[0] : prompts[-1] + 1]]
        mean_s[paced] = sum(span) / len(span)
        at_once = max(waiting for _, _, waiting in steps)
        assert at_once <= 910 if paced else at_once > 7 * 900
    assert mean_s[True] <= 0.007, "the first two are let in at once"
    assert mean_s[False] > 0.015
