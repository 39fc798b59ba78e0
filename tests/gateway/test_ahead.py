"""Long prompts are sent ahead to an engine's prefix cache in chunks: an emulated one, with no model inside."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from adapters.contract import Capabilities, Failure, OutgoingRequest, PromptIds, Support, UpstreamError
from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from adapters.http import HttpUpstream
from adapters.openai import OpenAIAdapter
from adapters.vllm import VllmAdapter
from gateway.ahead import Sent, Turns, chunks_ahead, names_of, prefix_lengths, whole_blocks
from gateway.app import Gateway
from gateway.config import BackendSettings, LimitSettings, Settings
from gateway.fleet import Member
from gateway.pace import PrefillSample, StepSample
from gateway.teachers import BackendUnusable
from tests.gateway.rig import MODEL, PROFILE, Client, client, engine, gateway, idle, settings_for, settled, until
from tiergate_engine.model import EngineConfig
from tiergate_engine.steptime import RooflineStepTime

_BLOCK = 16
_CHUNK = 64
_LONG = " ".join(f"w{index}" for index in range(300))  # a token a word
_CONFIG = EngineConfig(kv_tokens=20_000, max_model_tokens=4_096, block_tokens=_BLOCK, prefix_caching=True)
_QUICK = RooflineStepTime(c0_s=0.002)


@given(st.integers(1, 10_000), st.integers(1, 3_000), st.integers(1, 256))
def test_prefixes_grow_by_a_chunk_and_leave_at_most_one(prompt: int, wanted: int, block: int) -> None:
    chunk = whole_blocks(wanted, block)
    assert chunk % block == 0
    assert chunk <= max(wanted, block)
    lengths = [0, *prefix_lengths(prompt, chunk)]
    assert all(later - earlier == chunk for earlier, later in itertools.pairwise(lengths))
    assert 0 < prompt - lengths[-1] <= chunk


class TestSent:
    def test_names_are_equal_exactly_where_prefixes_are(self) -> None:
        lengths = prefix_lengths(10, 4)
        one = names_of(PromptIds(tuple(range(10)), {"model": "m"}), lengths)
        assert one == names_of(PromptIds((*range(9), 0), {"model": "m"}), lengths)
        later = names_of(PromptIds((*range(7), 0, 0, 0), {"model": "m"}), lengths)
        assert (one[0] == later[0], one[1] == later[1]) == (True, False)
        assert not set(one) & set(names_of(PromptIds(tuple(range(10)), {"model": "lora"}), lengths))
        assert not set(one) & set(
            names_of(PromptIds(tuple(range(10)), {"model": "m", "cache_salt": "s"}), lengths)
        )

    def test_the_end_of_what_was_not_used_for_long_is_forgotten_first(self) -> None:
        sent = Sent(kv_tokens=64, chunk_tokens=8)  # four
        for name in (1, 2, 3, 4):
            sent.add(name)
        assert sent.longest([1, 2, 9]) == 2
        sent.add(5)
        assert sent.longest([3]) == 0
        assert sent.longest([7, 4]) == 2
        sent.add(6)
        assert [sent.longest([name]) for name in (1, 2, 5, 7)] == [0, 0, 1, 1]


class TestTurns:
    async def test_the_most_urgent_is_next(self) -> None:
        turns, got = Turns(), list[str]()

        async def wait(name: str, due_ms: float) -> None:
            await turns.take(due_ms)
            got.append(name)
            await asyncio.sleep(0)
            turns.give_back()

        await turns.take(9.0)
        async with asyncio.TaskGroup() as tasks:
            for name, due_ms in (("never", float("inf")), ("b", 5.0), ("a", 1.0), ("c", 5.0)):
                tasks.create_task(wait(name, due_ms))
            await asyncio.sleep(0)
            assert got == []
            turns.give_back()
        assert got == ["a", "b", "c", "never"]

    async def test_whoever_left_gets_none_and_loses_none(self) -> None:
        turns = Turns()
        await turns.take(0.0)
        async with asyncio.timeout(5):
            async with asyncio.TaskGroup() as tasks:
                gone = tasks.create_task(turns.take(1.0))
                late = tasks.create_task(turns.take(2.0))
                tasks.create_task(turns.take(3.0))
                await asyncio.sleep(0)
                gone.cancel()
                await asyncio.sleep(0)
                turns.give_back()  # to the second, which is given up in the same moment
                late.cancel()
            assert gone.cancelled()
            assert late.cancelled()
            turns.give_back()
            await turns.take(0.0)


def _found(caching: Support = Support.YES, block: int | None = 16, engines: int | None = 1) -> Capabilities:
    return Capabilities("vllm", block_tokens=block, prefix_caching=caching, engines=engines)


async def test_what_cannot_be_is_refused_with_a_reason() -> None:
    asked = BackendSettings(url="http://127.0.0.1:1", name="a", chunks_outside_tokens=100)
    known = asked.model_copy(update={"limits": LimitSettings(block_tokens=32)})
    upstream = HttpUpstream(asked.url)
    vllm = VllmAdapter(upstream)
    silent = _found(Support.UNKNOWN, None, None)
    assert chunks_ahead(asked.model_copy(update={"chunks_outside_tokens": None}), vllm, _found(Support.NO)) is None
    for settings, found in ((asked, _found()), (known, silent)):
        chunks = chunks_ahead(settings, vllm, found)
        assert chunks is not None
        assert chunks.chunk_tokens == 96
    for adapter, found, word in (
        (OpenAIAdapter(upstream), _found(), "is for vLLM"),
        (vllm, _found(Support.NO), "--enable-prefix-caching"),
        (vllm, _found(engines=4), "4 data-parallel engines"),
        (vllm, silent, "limits.block_tokens"),
    ):
        with pytest.raises(BackendUnusable, match=f"chunks_outside_tokens .*{word}"):
            chunks_ahead(asked, adapter, found)
    await upstream.close()


@dataclass(frozen=True, slots=True)
class Stand:
    """An emulated engine, and a gateway that sends prompts ahead to it."""

    engine: EmulatedEngine
    gateway: Gateway
    ask: Client

    @property
    def member(self) -> Member:
        (member,) = self.gateway.fleet.members()
        return member

    def chunks(self) -> list[int]:
        """Prompt tokens of the steps that had any."""
        assert self.engine.plugin is not None
        return [fact.step.prefill_tokens for fact in self.engine.plugin.facts() if fact.step.prefill_tokens]

    def post(self, path: str = "/v1/completions", **fields: object) -> aiohttp.client._RequestContextManager:
        body: dict[str, object] = {"model": MODEL, "max_tokens": 5, "ignore_eos": True, "stream": True, "seed": 1}
        if path == "/v1/completions":
            body["prompt"] = _LONG
        return self.ask.session.post(self.ask.base + path, json=body | fields)

    async def text(self, path: str = "/v1/completions", **fields: object) -> str:
        async with self.post(path, **fields) as answer:
            assert answer.status == 200
            raw = await answer.read()
        events = [orjson.loads(event[6:]) for event in raw.split(b"\n\n") if event.startswith(b"data: {")]
        return "".join(choice.get("text", "") for event in events for choice in event["choices"])


def _settings(url: str, chunk: int | None, **more: object) -> Settings:
    backend = BackendSettings(url=url, name="one", profile=PROFILE, tier="batch", chunks_outside_tokens=chunk)
    base: dict[str, object] = {"port": 0, "backends": [backend], "tick_ms": 20, "driving": False}
    return Settings.model_validate(base | {"log_requests": False, "health": {"every_s": 0.1}} | more)


@contextlib.asynccontextmanager
async def _stand(
    chunk: int | None = _CHUNK, step_time: RooflineStepTime = _QUICK, **more: object
) -> AsyncIterator[Stand]:
    # its plug-in is only there to tell what its steps held: it is not driven
    made = EmulatedEngine(EmulatedSettings(MODEL, _CONFIG, plugin=True), step_time)
    async with (
        serving([made]) as (served,),
        gateway(_settings(served.url, chunk, **more)) as front,
        client(front) as ask,
    ):
        yield Stand(made, front, ask)
        await settled(front)
        assert idle(front)
        await until(lambda: made.driver.open_sequences == 0)


async def test_a_long_prompt_comes_in_chunks_and_its_answer_is_the_same() -> None:
    async with _stand() as stand:
        chunked = await stand.text()
        assert stand.chunks() == [64, 64, 64, 64, 44]
        assert stand.gateway.shell.counts.arrived == 1
        assert stand.member.published is not None
        assert stand.member.published.ahead_chunk_tokens == 64
    async with _stand(chunk=None) as stand:
        assert await stand.text() == chunked
        assert stand.chunks() == [300]


@pytest.mark.parametrize(
    ("path", "fields", "chunks"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": _LONG}]}, [64] * 4 + [45]),
        ("/v1/completions", {"prompt": list(range(200))}, [64] * 3 + [8]),
        ("/v1/completions", {"stream": False}, [64] * 4 + [44]),
        ("/v1/completions", {"prompt": _LONG[: _LONG.index("w64") - 1]}, [64]),
        ("/v1/completions", {"prompt": [_LONG, _LONG + " x"]}, [601]),
    ],
)
async def test_what_is_cut_and_what_is_not(path: str, fields: dict[str, object], chunks: list[int]) -> None:
    async with _stand() as stand:
        async with stand.post(path, **fields) as answer:
            assert answer.status == 200
            await answer.read()
        assert stand.chunks() == chunks


async def test_a_conversation_goes_on_where_its_prefixes_ended() -> None:
    async with _stand() as stand:
        await stand.text()
        await stand.text(prompt=_LONG + " answer" * 100)
        assert stand.chunks() == [64, 64, 64, 64, 44, 32, 64, 16]  # 288 are in whole blocks already


async def test_decodes_step_between_two_chunks() -> None:
    async with _stand() as stand:
        async with stand.post(prompt="short", max_tokens=400) as beside:
            await beside.content.readany()
            await stand.text()
        assert stand.engine.plugin is not None
        facts = [fact.step for fact in stand.engine.plugin.facts()]
        filled = [index for index, step in enumerate(facts) if step.prefill_tokens > 1]
        assert [facts[index].prefill_tokens for index in filled] == [64, 64, 64, 64, 44]
        assert all(later - earlier > 1 for earlier, later in itertools.pairwise(filled))


async def test_prompts_share_no_step_to_their_last_chunk() -> None:
    async with _stand(step_time=RooflineStepTime(c0_s=0.02)) as stand:
        async with asyncio.TaskGroup() as tasks:
            for word in ("a", "b", "c", "d"):
                tasks.create_task(stand.text(prompt=f"prompt-{word} " * 128))
        assert stand.chunks() == [64] * 8


class _Learner:
    def __init__(self) -> None:
        self.prefills: list[PrefillSample] = []

    def learn_step(self, sample: StepSample) -> None: ...

    def learn_prefill(self, sample: PrefillSample) -> None:
        self.prefills.append(sample)


async def test_what_is_left_of_a_prompt_teaches_nothing() -> None:
    async with _stand() as stand:
        learner = stand.gateway.shell.pace.learner = _Learner()
        await stand.text()
        assert learner.prefills == []
        await stand.text(prompt="one two three")
        (sample,) = learner.prefills
        assert sample.prompt_tokens <= 4


async def test_a_prefix_that_fails_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    send = VllmAdapter.compute_ahead

    async def fail_later(adapter: VllmAdapter, prompt: PromptIds, tokens: int, like: OutgoingRequest) -> None:
        if tokens > _CHUNK:
            raise UpstreamError(Failure.OVERLOADED, "busy", 503)
        await send(adapter, prompt, tokens, like)

    monkeypatch.setattr(VllmAdapter, "compute_ahead", fail_later)
    async with _stand() as stand:
        assert await stand.text()
        assert stand.chunks() == [64, 236]
        assert await stand.text(prompt=_LONG + " again")
        assert stand.gateway.shell.counts.retried == 0


async def test_an_engine_that_tells_no_ids_gets_the_request_whole() -> None:
    async with engine() as one:
        settings = settings_for(one)
        limits = LimitSettings(block_tokens=16)
        backend = settings.backends[0].model_copy(update={"chunks_outside_tokens": 16, "limits": limits})
        async with gateway(settings.model_copy(update={"backends": (backend,)})) as made, client(made) as ask:
            messages = [{"role": "user", "content": "word " * 400}]
            status, _ = await ask.read_chat(messages=messages)
            assert status == 200
            assert [body["messages"] for body in one.seen] == [messages]


async def test_a_client_that_leaves_leaves_nothing_behind() -> None:
    slow = RooflineStepTime(c0_s=0.05)
    async with _stand(step_time=slow) as stand:
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(stand.text(prompt=prompt)) for prompt in (_LONG, "other " * 200)]
            await until(lambda: len(stand.chunks()) >= 2)
            for one in asking:
                one.cancel()
        await settled(stand.gateway)
        await until(lambda: stand.engine.driver.open_sequences == 0)
        assert len(stand.chunks()) < 8
        await stand.text(prompt="more " * 100)
        assert stand.chunks()[-2:] == [64, 36]
        assert len(stand.chunks()) < 8


async def test_an_engine_that_is_silent_has_the_time_of_one_head(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(_: VllmAdapter, prompt: PromptIds, tokens: int, like: OutgoingRequest) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(VllmAdapter, "compute_ahead", silent)
    options = {"options": {"max_attempts": 1}}
    async with _stand(timeouts={"head_s": 0.2}, policy=options) as stand, stand.post() as answer:
        assert answer.status >= 500
        assert b"was not computed within 0.2 s" in await answer.read()


async def test_without_a_prefix_cache_the_backend_is_not_used() -> None:
    config = EngineConfig(kv_tokens=20_000, max_model_tokens=4_096)
    made = EmulatedEngine(EmulatedSettings(MODEL, config), _QUICK)
    async with serving([made]) as (served,), gateway(_settings(served.url, _CHUNK), up=0) as front:
        (member,) = front.fleet.members()
        await until(lambda: member.problem is not None)
        assert "--enable-prefix-caching" in str(member.problem)
        assert member.published is None


async def test_a_driven_engine_cuts_its_prompts_itself() -> None:
    async with _stand(driving=True) as stand:
        await until(lambda: stand.member.driven)
        assert stand.member.published is not None
        assert stand.member.published.ahead_chunk_tokens is None
        await stand.text()
        assert sum(stand.chunks()) == 300
        assert stand.chunks() != [64, 64, 64, 64, 44]


def test_the_option_is_off_and_stands_in_a_flag_too() -> None:
    made = Settings.model_validate({"backends": ["http://a:1,chunks_outside_tokens=512", "http://b:1"]})
    assert [one.chunks_outside_tokens for one in made.backends] == [512, None]
    with pytest.raises(ValidationError, match="chunks_outside_tokens"):
        Settings.model_validate({"backends": ["http://a:1,chunks_outside_tokens=0"]})
