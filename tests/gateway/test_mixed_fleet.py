"""An emulated vLLM, a fake SGLang and a fake TGI in one tier set, each with its own profile, speed and limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import orjson
import pytest

from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from gateway.app import Gateway
from gateway.config import BackendSettings, LimitSettings, Settings
from tests.adapters import fake_sglang as sglang
from tests.adapters import fake_tgi as tgi
from tests.gateway.rig import MODEL, Client, client, gateway, idle, settled, until
from tiergate_engine.model import EngineConfig
from tiergate_engine.steptime import RooflineStepTime

KINDS = ("vllm", "sglang", "tgi")
PROFILES = {"vllm": "h200-llama-3.1-8b-fp8", "sglang": "h100-llama-3.1-8b-bf16", "tgi": "l40s-llama-3.1-8b-bf16"}
STEPS_S = {"vllm": 0.0045, "sglang": 0.0062, "tgi": 0.0225}  # as in their profiles, for a single decode
TIERS = ("fast", "summary", "batch")
_LONG = 201  # the seed of an answer of thousands of tokens


@dataclass(frozen=True, slots=True)
class Fleet:
    """The engines, how to end one, and the gateway in front of them."""

    urls: dict[str, str]
    engines: dict[str, contextlib.AsyncExitStack]
    vllm: EmulatedEngine
    sglang: sglang.FakeSglang
    tgi: tgi.FakeTgi
    gateway: Gateway
    ask: Client

    async def end(self, name: str) -> None:
        """As if its process was killed."""
        await self.engines[name].aclose()

    def asked(self) -> dict[str, int]:
        """Requests that reached the fakes."""
        return {"sglang": len(self.sglang.seen), "tgi": len(self.tgi.seen)}

    def limits(self, name: str) -> tuple[int | None, int | None, int | None]:
        """Most sequences, longest request, longest prompt."""
        member = next(one for one in self.gateway.fleet.members() if one.name == name)
        assert member.published is not None
        found = member.published.limits
        return found.max_running_seqs, found.max_model_tokens, found.max_prompt_tokens


@contextlib.asynccontextmanager
async def fleet(
    steps_s: dict[str, float] = STEPS_S, caps: dict[str, int] | None = None, **more: object
) -> AsyncIterator[Fleet]:
    """All three up, pinned to the tightest tier so that everybody may go to each."""
    config = EngineConfig(kv_tokens=200_000, max_model_tokens=4_096)
    emulated = EmulatedEngine(EmulatedSettings(MODEL, config), RooflineStepTime(c0_s=steps_s["vllm"]))
    async with contextlib.AsyncExitStack() as stack:
        engines = {name: await stack.enter_async_context(contextlib.AsyncExitStack()) for name in KINDS}
        (vllm,) = await engines["vllm"].enter_async_context(serving([emulated]))
        sgl = await engines["sglang"].enter_async_context(
            sglang.fake_sglang(
                MODEL,
                limits=sglang.Limits(max_running_requests=64, context_tokens=1_024),
                step_s=steps_s["sglang"],
            )
        )
        text = await engines["tgi"].enter_async_context(
            tgi.fake_tgi(
                MODEL,
                limits=tgi.Limits(max_concurrent_requests=48, max_total_tokens=640, max_input_tokens=512),
                step_s=steps_s["tgi"],
            )
        )
        urls = {"vllm": vllm.url, "sglang": sgl.url, "tgi": text.url}
        known = {"tgi": LimitSettings(kv_tokens=65_536, max_batched_tokens=1_024)}
        backends = [
            BackendSettings(
                url=url,
                name=name,
                profile=PROFILES[name],
                tier="fast",
                pinned=True,
                limits=known.get(name, LimitSettings()).model_copy(
                    update={"max_running_seqs": (caps or {}).get(name)}
                ),
            )
            for name, url in urls.items()
        ]
        base: dict[str, object] = {"port": 0, "backends": backends, "tick_ms": 20, "log_requests": False}
        settings = Settings.model_validate(base | {"health": {"every_s": 0.2}} | more)
        async with gateway(settings) as made, client(made) as ask:
            yield Fleet(urls, engines, emulated, sgl, text, made, ask)
            await settled(made)
            assert idle(made)


def said(body: bytes) -> str:
    """The text of a stream."""
    found = ""
    for line in body.splitlines():
        if line.startswith(b"data:") and b"[DONE]" not in line:
            event = orjson.loads(line[5:])
            assert "error" not in event, event
            found += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return found


async def directly(url: str, seed: int, tokens: int) -> str:
    """What an engine says without a gateway."""
    messages = [{"role": "user", "content": "hello there"}]
    body = {"model": MODEL, "messages": messages, "max_tokens": tokens, "seed": seed}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=body) as answer:
        return str((await answer.json())["choices"][0]["message"]["content"])


async def test_each_has_its_own_profile_and_limits() -> None:
    async with fleet() as made:
        assert made.limits("vllm") == (1_024, 4_096, None)
        assert made.limits("sglang") == (64, 1_024, None)
        assert made.limits("tgi") == (48, 640, 512)
        published = {one.name: one.published for one in made.gateway.fleet.members()}
        alone = {name: one.step_time.decode_seconds(1, 100) for name, one in published.items() if one is not None}
        assert alone["vllm"] < alone["sglang"] < 0.02 < alone["tgi"]


async def test_the_one_that_is_too_slow_for_a_tier_gets_none_of_it() -> None:
    """Fast requests go to the two that keep 20 ms; a loose one to the third when those are full."""
    async with fleet(caps={"vllm": 1, "sglang": 1}) as made, contextlib.AsyncExitStack() as open_streams:
        hosts = set()
        for _ in range(2):
            stream = made.ask.chat(seed=_LONG, ignore_eos=True, max_tokens=800, headers={"x-slo-tier": "fast"})
            answer = await open_streams.enter_async_context(stream)
            assert answer.status == 200
            hosts.add(answer.headers["x-tiergate-backend"])
        assert hosts == {"vllm", "sglang"}
        async with made.ask.chat(max_tokens=3, seed=1, headers={"x-slo-tier": "summary"}) as loose:
            assert (loose.status, loose.headers["x-tiergate-backend"]) == (200, "tgi")
            await loose.read()
        async with made.ask.chat(max_tokens=3, seed=1, headers={"x-slo-tier": "fast"}) as refused:
            await refused.read()
            assert refused.status == 429, "it is refused rather than given to one that is too slow"
        assert made.asked()["tgi"] == 1


@pytest.mark.parametrize("policy", ["polyserve", "round_robin"])
async def test_every_stream_says_what_its_engine_says(policy: str) -> None:
    async with fleet(dict.fromkeys(KINDS, 0.002), policy={"name": policy}) as made:
        got: list[tuple[str, int, str]] = []

        async def one(number: int) -> None:
            headers = {"x-slo-tier": TIERS[number % 3]}
            async with made.ask.chat(headers=headers, max_tokens=9 + number % 4, seed=number) as answer:
                body = await answer.read()
                assert answer.status == 200, body
                got.append((answer.headers["x-tiergate-backend"], number, said(body)))

        for first in range(0, 36, 12):
            async with asyncio.TaskGroup() as tasks:
                for number in range(first, first + 12):
                    tasks.create_task(one(number))
        assert len(got) == 36
        if policy == "round_robin":
            assert {backend for backend, _, _ in got} == set(KINDS)
        for backend, number, text in got:
            expected = await directly(made.urls[backend], number, 9 + number % 4)
            assert text.replace("</s>", "") == expected.replace("</s>", ""), backend


@pytest.mark.parametrize("policy", ["polyserve", "round_robin"])
@pytest.mark.parametrize(
    ("words", "answer", "takers"),
    [
        (100, 8, {"vllm", "sglang", "tgi"}),
        (600, 8, {"vllm", "sglang"}),  # more than TGI's 512 of a prompt
        (350, 400, {"vllm", "sglang"}),  # prompt and answer are more than TGI's 640 together
        (700, 400, {"vllm"}),  # more than SGLang's 1,024
        (1_500, 8, {"vllm"}),
    ],
)
async def test_what_is_too_long_for_one_goes_to_another(
    policy: str, words: int, answer: int, takers: set[str]
) -> None:
    async with fleet(dict.fromkeys(KINDS, 0.001), policy={"name": policy}) as made:
        messages = [{"role": "user", "content": "word " * words}]
        hosts = set()
        for number in range(6):
            async with made.ask.chat(
                stream=number % 2 == 0,
                messages=messages,
                max_tokens=answer,
                seed=5,
                headers={"x-slo-tier": "batch"},
            ) as found:
                body = await found.read()
                assert found.status == 200, body
                hosts.add(found.headers["x-tiergate-backend"])
        assert hosts == takers if policy == "round_robin" else hosts <= takers
        assert all(not made.asked()[name] for name in {"sglang", "tgi"} - takers), "nobody was asked in vain"
        await settled(made.gateway)
        assert made.gateway.shell.counts.retried == 0


async def test_what_only_the_engine_knows_to_be_too_long_goes_to_another() -> None:
    """Without a tokenizer prompts are estimated; 700 tokens look like 350 here, which TGI refuses to take."""
    async with fleet(dict.fromkeys(KINDS, 0.001), policy={"name": "round_robin"}) as made:
        messages = [{"role": "user", "content": "a " * 700}]

        async def one(stream: bool) -> None:
            async with made.ask.chat(stream=stream, messages=messages, max_tokens=8, seed=5) as found:
                body = await found.read()
                assert found.status == 200, body
                assert found.headers["x-tiergate-backend"] != "tgi"
                assert b"error" not in body

        async with asyncio.TaskGroup() as tasks:  # together: the first answer tells how long its prompt was
            for number in range(6):
                tasks.create_task(one(stream=number % 2 == 0))
        await settled(made.gateway)
        counts = made.gateway.shell.counts
        assert made.asked()["tgi"] == counts.retried == 2
        assert (counts.finished, counts.failed) == (6, 0)


async def test_what_all_find_too_long_is_told_in_the_words_of_one() -> None:
    async with fleet(dict.fromkeys(KINDS, 0.001), policy={"name": "round_robin"}) as made:
        messages = [{"role": "user", "content": "a " * 5_000}]
        status, body = await made.ask.read_chat(messages=messages, max_tokens=8)
        assert status == 400
        assert b"maximum context length" in body
        await settled(made.gateway)
        assert made.gateway.shell.counts.failed + made.gateway.shell.counts.refused == 1


async def test_a_prompt_that_nobody_takes_is_refused_before_anybody_is_asked() -> None:
    async with fleet() as made:
        status, body = await made.ask.read_chat(messages=[{"role": "user", "content": "word " * 5_000}])
        assert (status, orjson.loads(body)["error"]["code"]) == (400, "context_length_exceeded")
        assert made.asked() == {"sglang": 0, "tgi": 0}


async def test_a_long_prompt_of_a_tier_that_has_short_engines_only_lives_in_a_looser_one() -> None:
    async with fleet(dict.fromkeys(KINDS, 0.002)) as made:
        backends = [
            one.settings.model_copy(update={"tier": "summary" if one.name == "vllm" else "fast"})
            for one in made.gateway.fleet.members()
        ]
        settings = Settings.model_validate({"port": 0, "backends": backends, "tick_ms": 20, "log_requests": False})
        async with gateway(settings) as other, client(other) as ask:
            messages = [{"role": "user", "content": "word " * 1_500}]
            for _ in range(3):
                async with ask.chat(messages=messages, max_tokens=4, headers={"x-slo-tier": "fast"}) as answer:
                    body = await answer.read()
                    assert (answer.status, answer.headers.get("x-tiergate-backend")) == (200, "vllm"), body
            async with ask.chat(max_tokens=4, headers={"x-slo-tier": "fast"}) as answer:
                await answer.read()
                assert answer.headers["x-tiergate-backend"] != "vllm", "a short one stays in its tier"
            await settled(other)
            assert idle(other)


@pytest.mark.parametrize("gone", KINDS)
async def test_one_that_dies_leaves_the_others_serving(gone: str) -> None:
    async with fleet(dict.fromkeys(KINDS, 0.004), policy={"name": "round_robin"}) as made:
        ended: dict[str, bytes] = {}
        begun = asyncio.Event()

        async def stream() -> None:
            async with made.ask.chat(seed=_LONG, ignore_eos=True, max_tokens=150) as answer:
                first = await answer.content.readany()
                name = answer.headers["x-tiergate-backend"]
                ended[name] = b""
                if len(ended) == 3:
                    begun.set()
                ended[name] = first + await answer.read()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(stream())
            await begun.wait()
            await made.end(gone)
        for name, body in ended.items():
            if name == gone:
                assert b"error" in body
            else:
                assert len(said(body).split()) == 150
        for number in range(6):
            async with made.ask.chat(stream=number % 2 == 0, max_tokens=4, seed=1) as answer:
                body = await answer.read()
                assert (answer.status, b"error" in body) == (200, False)
                assert answer.headers["x-tiergate-backend"] != gone
        phases = {one.name: one.phase.value for one in made.gateway.fleet.members()}
        await until(lambda: {one.name: one.phase.value for one in made.gateway.fleet.members()}[gone] == "down")
        assert {phases[name] for name in KINDS if name != gone} == {"up"}
