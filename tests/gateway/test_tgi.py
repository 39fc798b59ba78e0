"""A fake TGI behind a running gateway, alone, in twos, and beside an emulated vLLM. Neither has a model inside."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import orjson
import pytest

from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from gateway.app import Gateway
from gateway.config import BackendSettings, Settings
from tests.adapters.fake_parts import unminted
from tests.adapters.fake_tgi import FakeTgi, Habits, fake_tgi
from tests.gateway.rig import MODEL, PROFILE, Client, client, gateway, idle, settled, until
from tiergate_engine.model import EngineConfig
from tiergate_engine.steptime import RooflineStepTime

_DONE = (b"data: [DONE]\n\n", b"data:[DONE]\n\n")


def _settings(urls: dict[str, str], **more: object) -> Settings:
    backends = [BackendSettings(url=url, name=name, profile=PROFILE) for name, url in urls.items()]
    base: dict[str, object] = {"port": 0, "backends": backends, "tick_ms": 20, "log_requests": False}
    return Settings.model_validate(base | more)


@contextlib.asynccontextmanager
async def _alone(habits: Habits | None = None) -> AsyncIterator[tuple[FakeTgi, Gateway, Client]]:
    async with fake_tgi(MODEL, habits=habits or Habits()) as tgi:
        async with gateway(_settings({"tgi": tgi.url})) as made, client(made) as ask:
            yield tgi, made, ask
            await settled(made)
            assert idle(made)
        await until(lambda: not tgi.permits)


@contextlib.asynccontextmanager
async def _emulated_vllm() -> AsyncIterator[tuple[EmulatedEngine, str]]:
    config = EngineConfig(kv_tokens=200_000, max_model_tokens=4_096)
    engine = EmulatedEngine(EmulatedSettings(MODEL, config), RooflineStepTime(c0_s=0.002))
    async with serving([engine]) as (served,):
        yield engine, served.url


def _events(body: bytes) -> list[bytes]:
    return [event + b"\n\n" for event in body.split(b"\n\n") if event]


def _counted(made: Gateway) -> int:
    return made.shell.counts.tokens


@pytest.mark.parametrize("habits", [Habits(), Habits(spaced=False), Habits(comments=True), Habits(done=False)])
async def test_a_chat_passes_byte_for_byte_but_for_its_id_and_the_usage_that_we_asked_for(habits: Habits) -> None:
    async with _alone(habits) as (tgi, made, ask):
        for options in (None, {"include_usage": True}):
            before = _counted(made)
            status, body = await ask.read_chat(max_tokens=5, seed=1, stream_options=options)
            written = _events(bytes(tgi.written[-1]))
            asked = [event for event in written if b'"choices":[]' in event]
            assert len(asked) == 1
            assert status == 200
            assert unminted(body) == b"".join(event for event in written if options or event not in asked)
            ids = {orjson.loads(event.partition(b"data:")[2])["id"] for event in _events(body) if b'"id"' in event}
            assert len(ids) == 1, "one of ours in every event"
            assert ids.pop().startswith("chatcmpl-")
            assert body.endswith(_DONE) is habits.done
            await settled(made)
            assert _counted(made) == before + 5
        assert made.shell.counts.finished == 2
        assert made.telemetry.merged_streams == 0


@pytest.mark.parametrize("spaced", [True, False])
async def test_completions_of_several_prompts_are_counted_by_the_usage_of_each(spaced: bool) -> None:
    async with _alone(Habits(spaced=spaced)) as (tgi, made, ask):
        body = {"model": MODEL, "prompt": ["a b", "c", "d"], "max_tokens": 4, "seed": 1, "stream": True}
        async with ask.session.post(f"{ask.base}/v1/completions", json=body) as answer:
            assert (answer.status, unminted(await answer.read())) == (200, bytes(tgi.written[0]))
        await settled(made)
        assert _counted(made) == 12
        assert made.shell.counts.finished == 1


async def test_a_whole_answer_passes_unchanged_but_for_its_id() -> None:
    async with _alone() as (_, made, ask):
        status, body = await ask.read_chat(stream=False, max_tokens=3, seed=1)
        answer = orjson.loads(body)
        assert (status, answer["id"][:9], answer["usage"]["completion_tokens"]) == (200, "chatcmpl-", 3)
        await settled(made)
        assert _counted(made) == 3


async def test_an_overload_goes_to_another_backend_in_the_stream_and_before_it() -> None:
    async with fake_tgi(MODEL) as full, fake_tgi(MODEL) as free:
        for habits in ({"overloaded": True}, {"overloaded": True, "flat_errors": True}, {"fails_after": 0}):
            full.behave(**{"overloaded": False, "flat_errors": False, "fails_after": None} | habits)
            settings = _settings({"full": full.url, "free": free.url}, policy={"name": "round_robin"})
            async with gateway(settings) as made, client(made) as ask:
                for stream in (True, False):
                    before = made.shell.counts.retried
                    answers = [await ask.read_chat(max_tokens=3, seed=1, stream=stream) for _ in range(3)]
                    assert [status for status, _ in answers] == [200] * 3, habits
                    assert all(b"error" not in body for _, body in answers)
                    assert made.shell.counts.retried > before
                    await asyncio.sleep(0.6)  # the rest of a backend that failed
                await settled(made)
                assert idle(made)
        assert not full.permits


async def test_when_all_are_overloaded_the_client_is_told() -> None:
    async with _alone(Habits(overloaded=True)) as (_, made, ask):
        for stream in (True, False):
            status, body = await ask.read_chat(stream=stream)
            assert status == 502
            assert orjson.loads(body)["error"]["code"] == "overloaded"
        assert made.shell.counts.refused == 2


@pytest.mark.parametrize("spaced", [True, False])
async def test_an_error_in_the_middle_is_passed_on_and_counts_as_failed(spaced: bool) -> None:
    async with _alone(Habits(fails_after=2, spaced=spaced)) as (tgi, made, ask):
        status, body = await ask.read_chat(max_tokens=9, seed=1)
        assert (status, unminted(body)) == (200, bytes(tgi.written[0]))
        error = orjson.loads(_events(body)[-2].removeprefix(b"data:"))["error"]
        assert error["message"].startswith("Request failed during generation")
        await settled(made)
        assert made.shell.counts.failed == 1


async def test_what_it_calls_wrong_in_a_stream_is_told_as_an_answer() -> None:
    async with _alone() as (_, made, ask):
        body = {"model": MODEL, "prompt": " ", "stream": True}
        async with asyncio.timeout(10):  # it once waited for ever
            for stream in (True, False):
                asked = ask.session.post(f"{ask.base}/v1/completions", json={**body, "stream": stream})
                async with asked as answer:
                    told = orjson.loads(await answer.read())
                assert answer.status == 422
                error = told["error"]["message"] if stream else told["error"]
                assert error == "Input validation error: `inputs` cannot be empty"
        await settled(made)
        assert made.shell.counts.failed == 2
        assert made.shell.counts.retried == 0


@pytest.mark.parametrize("habits", [Habits(ends_after=3), Habits(cut_after=3)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_stream_that_breaks_off_ends_with_an_error(habits: Habits, path: str) -> None:
    """A completion's empty `finish_reason` is no end."""
    async with _alone(habits) as (_, made, ask):
        prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
        body = {"model": MODEL, "max_tokens": 9, "seed": 1, "stream": True} | prompt
        async with ask.session.post(ask.base + path, json=body) as answer:
            *_, last, done = _events(await answer.read())
        assert done == _DONE[0]
        assert orjson.loads(last.removeprefix(b"data: "))["error"]["code"] == "broken"
        await settled(made)
        assert made.shell.counts.failed == 1


async def test_a_client_that_leaves_closes_the_stream_upstream() -> None:
    async with _alone() as (tgi, made, ask):
        async with ask.chat(seed=1, max_tokens=3_000) as answer:
            await answer.content.readany()
            assert tgi.permits == 1
            answer.close()
        await until(lambda: not tgi.permits)
        assert (tgi.disconnects, tgi.driver.open_sequences) == (1, 0)
        await settled(made)
        assert made.shell.counts.cancelled == 1


async def test_a_mixed_fleet_serves_mixed_tiers() -> None:
    async with _emulated_vllm() as (vllm, url), fake_tgi(MODEL) as tgi:
        settings = _settings({"vllm": url, "tgi": tgi.url}, health={"every_s": 0.1})
        served: Counter[tuple[str, str]] = Counter()
        async with gateway(settings) as made, client(made) as ask:
            kinds = {member.name: member.capabilities for member in made.fleet.members()}
            assert {name: found and found.engine for name, found in kinds.items()} == {
                "vllm": "vllm",
                "tgi": "tgi",
            }
            assert all(found is not None and found.emulated for found in kinds.values())

            async def one(number: int) -> None:
                tier = ("fast", "summary", "batch")[number % 3]
                stream = number % 2 == 0
                headers = {"x-slo-tier": tier}
                async with ask.chat(stream=stream, headers=headers, max_tokens=12, seed=number) as answer:
                    text = await answer.read()
                    assert answer.status == 200, text
                    assert b"error" not in text
                    served[answer.headers["x-tiergate-backend"], tier] += 1

            for first in range(0, 60, 12):
                async with asyncio.TaskGroup() as tasks:
                    for number in range(first, first + 12):
                        tasks.create_task(one(number))
            assert {backend for backend, _ in served} == {"vllm", "tgi"}
            assert {tier for _, tier in served} == {"fast", "summary", "batch"}
            assert sum(served.values()) == made.shell.counts.finished == 60
            await settled(made)
            assert idle(made)
            await until(lambda: [one.engine.running for one in made.fleet.members()] == [0, 0])
        assert (tgi.permits, tgi.driver.open_sequences, vllm.driver.open_sequences) == (0, 0, 0)


async def test_routes_that_only_vllm_has_are_served_by_it() -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    async with _emulated_vllm() as (_, url), fake_tgi(MODEL) as tgi:
        settings = _settings({"tgi": tgi.url, "vllm": url}, policy={"name": "round_robin"})
        async with gateway(settings) as made, client(made) as ask:
            for _ in range(4):
                async with ask.session.post(f"{ask.base}/v1/messages", json=body) as answer:
                    assert answer.status == 200, await answer.text()
                    assert answer.headers["x-tiergate-backend"] == "vllm"
            assert tgi.seen == []
            # To lack a route is no fault: the others' requests still go there.
            before = made.shell.counts.retried
            assert [(await ask.read_chat(max_tokens=2))[0] for _ in range(4)] == [200] * 4
            assert len(tgi.seen) == 2
            assert made.shell.counts.retried == before > 0
            await settled(made)
            assert idle(made)
    async with _alone() as (_, _, ask), ask.session.post(f"{ask.base}/v1/messages", json=body) as answer:
        assert answer.status == 404
        assert "TGI has no /v1/messages" in await answer.text()


_OWN = {"inputs": "a b c", "parameters": {"max_new_tokens": 5, "seed": 1}}


@pytest.mark.parametrize("habits", [Habits(), Habits(spaced=False), Habits(comments=True)])
async def test_its_own_routes_pass_unchanged(habits: Habits) -> None:
    async with _alone(habits) as (tgi, made, ask):
        async with ask.session.post(f"{ask.base}/generate_stream", json=_OWN) as answer:
            assert (answer.status, await answer.read()) == (200, bytes(tgi.written[0]))
        await settled(made)
        assert _counted(made) == 5
        async with ask.session.post(f"{ask.base}/generate", json=_OWN) as answer:
            told = orjson.loads(await answer.read())
            assert (answer.status, len(told["generated_text"].split())) == (200, 5)
            assert answer.headers["x-tiergate-backend"] == "tgi"
        await settled(made)
        assert made.shell.counts.finished == 2


async def test_an_overload_on_its_own_routes_goes_to_another_one() -> None:
    async with fake_tgi(MODEL, habits=Habits(overloaded=True)) as full, fake_tgi(MODEL) as free:
        settings = _settings({"full": full.url, "free": free.url}, policy={"name": "round_robin"})
        async with gateway(settings) as made, client(made) as ask:
            for path in ("/generate", "/generate_stream") * 2:
                async with ask.session.post(ask.base + path, json=_OWN) as answer:
                    text = await answer.read()
                    assert (answer.status, answer.headers["x-tiergate-backend"]) == (200, "free"), text
            assert full.refused > 0
            await settled(made)
    async with _alone(Habits(overloaded=True)) as (_, made, ask):
        for path in ("/generate", "/generate_stream"):
            async with ask.session.post(ask.base + path, json=_OWN) as answer:
                told = orjson.loads(await answer.read())
                assert (answer.status, told["error_type"]) == (502, "overloaded")


async def test_an_error_in_the_middle_of_its_own_stream() -> None:
    async with _alone(Habits(cut_after=2)) as (_, made, ask):
        async with ask.session.post(f"{ask.base}/generate_stream", json=_OWN) as answer:
            *_, last = _events(await answer.read())
        assert orjson.loads(last.removeprefix(b"data:"))["error_type"] == "broken"
        await settled(made)
        assert made.shell.counts.failed == 1


async def test_its_own_routes_go_to_it_alone() -> None:
    async with _emulated_vllm() as (_, url), fake_tgi(MODEL) as tgi:
        settings = _settings({"vllm": url, "tgi": tgi.url}, policy={"name": "round_robin"})
        async with gateway(settings) as made, client(made) as ask:
            for _ in range(4):
                async with ask.session.post(f"{ask.base}/generate", json=_OWN) as answer:
                    assert (answer.status, answer.headers["x-tiergate-backend"]) == (200, "tgi")
            await settled(made)
            assert idle(made)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"inputs": "a", "parameters": 7}, "parameters"),
        ({"inputs": 7}, "inputs"),
        ({}, "inputs"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 10**6}}, "max_new_tokens"),
        ({"inputs": "a", "parameters": {"best_of": "x"}}, "best_of"),
    ],
)
async def test_its_own_bodies_are_checked(body: dict[str, object], field: str) -> None:
    async with _alone() as (tgi, _, ask):
        async with ask.session.post(f"{ask.base}/generate", json=body) as answer:
            told = orjson.loads(await answer.read())
            assert (answer.status, told["error_type"]) == (400, "invalid_request_error")
            assert field in told["error"]
        assert tgi.seen == []
