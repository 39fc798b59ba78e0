"""The emulated engine over HTTP: vLLM's shapes, checked with the official client and with raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters.emulated import EmulatedEngine, EmulatedSettings, Faults, serving
from adapters.emulated.tokens import count_text
from tiergate_engine.model import EngineConfig
from tiergate_engine.steptime import RooflineStepTime

MODEL = "emulated-tiny"
FAST = RooflineStepTime(c0_s=0.002, per_token_s=1e-6)
SLOW = RooflineStepTime(c0_s=0.05, per_token_s=1e-6)


@dataclass(frozen=True, slots=True)
class Up:
    """A running emulated engine and a client session on it."""

    engine: EmulatedEngine
    url: str
    http: aiohttp.ClientSession

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, bytes]:
        async with self.http.post(path, json=body, headers=headers) as answer:
            assert answer.headers["x-tiergate-emulated"] == "1"
            return answer.status, await answer.read()

    async def settled(self) -> None:
        """Wait until the engine has nothing left, and check that it says so."""
        await self.engine.driver.drained()
        while not self.engine.driver.model.idle:  # noqa: ASYNC110 -- the step in flight tells nobody when it ends
            await asyncio.sleep(0.005)
        values = _metrics(await self.metrics())
        assert values["vllm:num_requests_running"] == 0
        assert values["vllm:num_requests_waiting"] == 0
        assert values["vllm:kv_cache_usage_perc"] == 0

    async def metrics(self) -> str:
        async with self.http.get("/metrics") as answer:
            return await answer.text()


@asynccontextmanager
async def up(
    *,
    step_time: RooflineStepTime = FAST,
    faults: Faults | None = None,
    max_body_bytes: int = 2**20,
    kv_tokens: int = 40_000,
    max_running_seqs: int = 256,
    max_queued_seqs: int | None = None,
    priority_scheduling: bool = False,
    prefix_caching: bool = False,
) -> AsyncIterator[Up]:
    config = EngineConfig(
        kv_tokens=kv_tokens,
        max_model_tokens=20_000,
        max_running_seqs=max_running_seqs,
        max_queued_seqs=max_queued_seqs,
        priority_scheduling=priority_scheduling,
        prefix_caching=prefix_caching,
    )
    settings = EmulatedSettings(MODEL, config, faults=faults or Faults(), max_body_bytes=max_body_bytes)
    engine = EmulatedEngine(settings, step_time)
    async with serving([engine]) as (served,), aiohttp.ClientSession(served.url) as http:
        yield Up(engine, served.url, http)


def _metrics(text: str) -> dict[str, float]:
    """Samples without labels of their own, by name."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if set(sample.labels) == {"engine", "model_name"}
    }


def _events(raw: bytes) -> list[bytes]:
    assert raw.endswith(b"\n\n")
    parts = raw[:-2].split(b"\n\n")
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [part.removeprefix(b"data: ") for part in parts]


def _chat(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "two words"}], **fields}


def _completion(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": "three words here", "ignore_eos": True, **fields}


def _client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


# --- the official client ---------------------------------------------------------------------------------------


async def test_openai_client_chats_and_streams() -> None:
    async with up() as engine, _client(engine.url) as client:
        whole = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "say it"}],
            max_tokens=9,
            extra_body={"ignore_eos": True},
        )
        assert whole.id.startswith("chatcmpl-")
        assert whole.choices[0].finish_reason == "length"
        assert count_text(whole.choices[0].message.content or "") == 9
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 9, 12)

        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "say it"}],
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert len(chunks) == 1 + 9 + 1
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[1:-1]]
    assert all(text.strip() for text in texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks[1:-1]] == [None] * 8 + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9


async def test_openai_client_completes_lists_and_embeds() -> None:
    async with up() as engine, _client(engine.url) as client:
        several = await client.completions.create(
            model=MODEL, prompt=["one two", "three"], max_tokens=4, n=2, extra_body={"ignore_eos": True}
        )
        assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
        assert several.usage is not None
        assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (3, 16)
        by_ids = await client.completions.create(model=MODEL, prompt=[7, 8, 9, 10], max_tokens=1)
        assert by_ids.usage is not None
        assert by_ids.usage.prompt_tokens == 4
        models = [model async for model in client.models.list()]
        assert [(model.id, model.owned_by) for model in models] == [(MODEL, "tiergate-emulated")]
        assert getattr(models[0], "max_model_len", None) == 20_000
        embedded = await client.embeddings.create(model=MODEL, input=["a b", "a c"], encoding_format="float")
        first, second = (one.embedding for one in embedded.data)
        assert sum(value * value for value in first) == pytest.approx(1)
        assert first != second
        await engine.settled()


async def test_openai_client_gets_errors_as_its_own_types() -> None:
    async with up(max_running_seqs=1, max_queued_seqs=1, step_time=SLOW) as engine, _client(engine.url) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="other", prompt="x")
        assert missing.value.body == {
            "message": f"The model `other` does not exist. Valid aliases: {MODEL}.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model=MODEL, prompt=list(range(20_001)))
        assert "maximum context length is 20000 tokens. However, your prompt contains 20001" in str(long.value)
        # One runs, one waits, the third does not get in.
        async with asyncio.TaskGroup() as tasks:
            asked = []
            for number in range(2):
                body = client.completions.create(
                    model=MODEL, prompt="x", max_tokens=9000, extra_body={"ignore_eos": True}
                )
                asked.append(tasks.create_task(body))
                model = engine.engine.driver.model
                while (model.running, model.waiting) != (1, number):  # noqa: ASYNC110 -- counters tell nobody
                    await asyncio.sleep(0.005)
            with pytest.raises(openai.InternalServerError) as busy:
                await client.completions.create(model=MODEL, prompt="x")
            for one in asked:
                one.cancel()
        assert busy.value.status_code == 503
        assert "The engine is currently busy and cannot accept new requests." in str(busy.value)
        await engine.settled()


# --- bytes -----------------------------------------------------------------------------------------------------


async def test_chat_stream_bytes() -> None:
    async with up() as engine:
        status, raw = await engine.post(
            "/v1/chat/completions",
            _chat(stream=True, max_tokens=3, ignore_eos=True),
            **{"X-Request-Id": "r1"},
        )
    assert status == 200
    role, first, second, last, done = _events(raw)
    assert done == b"[DONE]"
    created = json.loads(role)["created"]
    opening = (
        f'{{"id":"chatcmpl-r1","object":"chat.completion.chunk","created":{created},"model":"{MODEL}","choices":['
    ).encode()
    assert role == opening + (
        b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        b'"prompt_token_ids":null,"prompt_text":null}'
    )
    text = json.loads(first)["choices"][0]["delta"]["content"].encode()
    assert first == opening + (
        b'{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":null,"token_ids":null}]}' % text
    )
    assert second.startswith(opening)
    text = json.loads(last)["choices"][0]["delta"]["content"].encode()
    assert last == opening + (
        b'{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":"length","stop_reason":null,'
        b'"token_ids":null}],"system_fingerprint":"tiergate-emulated"}' % text
    )


async def test_completion_stream_bytes_with_usage() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with up() as engine:
        _, raw = await engine.post(
            "/v1/completions", _completion(stream=True, max_tokens=2, stream_options=options)
        )
    first, last, total, done = _events(raw)
    assert done == b"[DONE]"
    usage = b'"usage":{"prompt_tokens":3,"total_tokens":%d,"completion_tokens":%d}'
    assert first.endswith(
        b'"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}],'
        + usage % (4, 1)
        + b"}"
    )
    assert last.endswith(b'"token_ids":null}],' + usage % (5, 2) + b"}")
    assert b'"choices":[],' + usage % (5, 2) + b"," in total


async def test_a_stream_of_several_choices_keeps_them_apart() -> None:
    body = _completion(prompt=["a", "b b"], n=2, stream=True, max_tokens=6, seed=5)
    async with up() as engine:
        _, raw = await engine.post("/v1/completions", body)
        _, whole = await engine.post("/v1/completions", {**body, "stream": False})
    texts = ["", "", "", ""]
    for event in _events(raw)[:-1]:
        (choice,) = json.loads(event)["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in json.loads(whole)["choices"]]
    assert len(set(texts)) == 4
    assert all(count_text(text) == 6 for text in texts)


async def test_messages_stream_and_whole() -> None:
    said = {"emulated_output_tokens": 3}
    body = {
        "model": MODEL,
        "system": "be kind",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello you"}]}],
        "max_tokens": 50,
        "vllm_xargs": said,
    }
    async with up() as engine:
        _, raw = await engine.post("/v1/messages", body, **{"X-Request-Id": "same"})
        whole = json.loads(raw)
        _, raw = await engine.post(
            "/v1/messages", {**body, "stream": True, "max_tokens": 2}, **{"X-Request-Id": "same"}
        )
        status, wrong = await engine.post("/v1/messages", {**body, "model": "other"})
        _, counted = await engine.post("/v1/messages/count_tokens", {**body, "max_tokens": None})
        await engine.settled()
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "end_turn")
    assert whole["usage"] == {"input_tokens": 6, "output_tokens": 3}
    assert json.loads(counted) == {"input_tokens": 6}
    assert count_text(whole["content"][0]["text"]) == 3
    events = []
    for part in raw.decode().removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    kinds = [event["type"] for event in events]
    delta = "content_block_delta"
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[2:] == [delta, delta, "content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["usage"] == {"input_tokens": 6, "output_tokens": 0}
    text = "".join(event["delta"]["text"] for event in events if event["type"] == delta)
    assert whole["content"][0]["text"].startswith(text)
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    assert events[-2]["usage"] == {"input_tokens": 6, "output_tokens": 2}
    assert status == 404
    assert json.loads(wrong)["error"]["type"] == "NotFoundError"
    assert json.loads(wrong)["type"] == "error"


async def test_the_length_can_be_said_where_a_gateway_does_not_look() -> None:
    async with up() as engine:
        said = {"emulated_output_tokens": 11}
        _, raw = await engine.post("/v1/chat/completions", _chat(max_tokens=500, vllm_xargs=said))
        answer = json.loads(raw)
        assert answer["usage"]["completion_tokens"] == 11
        assert answer["choices"][0]["finish_reason"] == "stop"
        _, raw = await engine.post("/v1/chat/completions", _chat(max_tokens=5, vllm_xargs=said))
        assert json.loads(raw)["usage"]["completion_tokens"] == 5
        assert json.loads(raw)["choices"][0]["finish_reason"] == "length"
        status, raw = await engine.post("/v1/chat/completions", _chat(vllm_xargs={"emulated_output_tokens": -1}))
        assert status == 400
        assert json.loads(raw)["error"]["param"] == "vllm_xargs.emulated_output_tokens"


async def test_lengths_are_drawn_by_seed_and_bounded() -> None:
    async with up(step_time=RooflineStepTime(c0_s=1e-4)) as engine:
        lengths = []
        for seed in (1, 1, 2, 3):
            _, raw = await engine.post("/v1/chat/completions", _chat(seed=seed, max_tokens=100_000))
            lengths.append(json.loads(raw)["usage"]["completion_tokens"])
        _, raw = await engine.post("/v1/chat/completions", _chat(seed=1, max_tokens=2000, min_tokens=1500))
    assert lengths[0] == lengths[1]
    assert len(set(lengths)) == 3
    assert json.loads(raw)["usage"]["completion_tokens"] >= 1500


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("/v1/chat/completions", {"messages": 3}, "body.messages", "1 validation error:"),
        ("/v1/chat/completions", {}, "body.messages", "Field required"),
        ("/v1/completions", {"max_tokens": 4}, "prompt", "Either prompt or prompt_embeds must be provided"),
        ("/v1/completions", {"prompt": "x", "max_tokens": "many"}, "body.max_tokens", "valid integer"),
        (
            "/v1/completions",
            {"prompt": "x", "max_tokens": 0},
            "max_tokens",
            "max_tokens must be at least 1, got 0.",
        ),
        ("/v1/completions", {"prompt": "x", "n": 0}, "n", "n must be at least 1, got 0."),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, "temperature", "must be non-negative"),
        ("/v1/completions", {"prompt": "x", "logprobs": 1}, "logprobs", "emulated"),
        ("/v1/completions", {"prompt": "x", "priority": 3}, "priority", "Priority scheduling is not enabled"),
        ("/v1/completions", {"prompt": []}, "prompt", "must not be empty"),
        ("/v1/completions", {"prompt": "w " * 20_001}, "input_tokens", "contains at least 20001 input tokens"),
        (
            "/v1/completions",
            {"prompt": "x", "stream_options": {"include_usage": True}},
            "stream_options",
            "Stream options can only be defined when `stream=True`.",
        ),
        ("/tokenize", {}, "prompt", "Either prompt or messages"),
    ],
)
async def test_bad_requests(path: str, body: dict[str, object], param: str, said: str) -> None:
    async with up() as engine:
        status, raw = await engine.post(path, body)
        error = json.loads(raw)["error"]
        assert (status, error["code"], error["param"]) == (400, 400, param)
        assert said in error["message"]
        await engine.settled()


async def test_bodies_that_are_no_json_or_too_big() -> None:
    async with up(max_body_bytes=1000) as engine:
        for headers, data, status in (
            ({"content-type": "application/json"}, b"{nope", 400),
            ({"content-type": "text/plain"}, b"{}", 400),
            ({"content-type": "application/json"}, b'"' + b"x" * 2000 + b'"', 413),
            ({"content-type": "application/json", "content-encoding": "gzip"}, b"no gzip", 400),
            ({"content-type": "application/json", "content-encoding": "gzip"}, gzip.compress(b"{}")[:-9], 400),
        ):
            async with engine.http.post("/v1/completions", data=data, headers=headers) as answer:
                assert answer.status == status
                assert (await answer.json())["error"]["code"] == status
        assert (await engine.post("/nowhere", {}))[0] == 404


async def test_refusals_of_streams_can_come_as_an_event() -> None:
    async with up(faults=Faults(refuse_every=2, refuse_in_stream=True)) as engine:
        statuses = []
        for _ in range(4):
            status, raw = await engine.post("/v1/completions", _completion(stream=True, max_tokens=2))
            statuses.append((status, b'"error"' in raw))
        assert statuses == [(200, False), (200, True)] * 2
        error, done = _events(raw)
        assert done == b"[DONE]"
        assert json.loads(error)["error"]["code"] == 503
        assert json.loads(error)["error"]["type"] == "Service Unavailable"
        await engine.post("/v1/completions", _completion(max_tokens=2))
        status, _ = await engine.post("/v1/completions", _completion(max_tokens=2))
        assert status == 503
        await engine.settled()


async def test_priority_decides_who_waits() -> None:
    finished: list[str] = []
    async with up(max_running_seqs=1, priority_scheduling=True, step_time=SLOW) as engine:

        async def ask(name: str, body: dict[str, object], **headers: str) -> None:
            status, _ = await engine.post("/v1/completions", body, **headers)
            assert status == 200
            finished.append(name)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask("first", _completion(max_tokens=40)))
            await asyncio.sleep(0.1)
            tasks.create_task(ask("loose", _completion(max_tokens=2, priority=9)))
            tasks.create_task(ask("none", _completion(max_tokens=2)))
            tasks.create_task(ask("header", _completion(max_tokens=2, priority=5), **{"X-Vllm-Priority": "-3"}))
    assert finished == ["first", "header", "none", "loose"]


# --- leaving, slowness, faults ---------------------------------------------------------------------------------


async def test_a_client_that_leaves_frees_the_engine() -> None:
    async with up(step_time=SLOW) as engine:
        for stream in (True, False):
            body = _completion(max_tokens=5000, stream=stream)
            request = asyncio.timeout(1.0)
            with pytest.raises(TimeoutError):
                async with request, engine.http.post("/v1/completions", json=body) as answer:
                    await answer.read()
        await engine.settled()
        assert engine.engine.driver.stats.aborted == 2


async def test_nothing_is_left_after_many_cancels() -> None:
    chance = random.Random(4)
    async with up(max_running_seqs=40, kv_tokens=20_000) as engine:

        async def stay(number: int) -> None:
            body = _completion(prompt="w " * 40, max_tokens=30, stream=number % 2 > 0, n=1 + number % 3)
            status, raw = await engine.post("/v1/completions", body)
            assert status == 200
            assert raw.endswith(b"[DONE]\n\n") or not body["stream"]

        async def leave_in_the_answer() -> None:
            body = _completion(prompt="w " * chance.randint(1, 400), max_tokens=2000, stream=True, n=2)
            async with engine.http.post("/v1/completions", json=body) as answer:
                await answer.content.readexactly(chance.randint(1, 3000))
                answer.close()

        async def leave_at_some_time(stream: bool) -> None:
            body = _completion(prompt="w " * chance.randint(1, 400), max_tokens=500, stream=stream)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(engine.post("/v1/completions", body), chance.uniform(0.0, 0.5))

        async with asyncio.TaskGroup() as tasks:
            for number in range(75):
                tasks.create_task(stay(number))
                tasks.create_task(leave_in_the_answer())
                tasks.create_task(leave_at_some_time(stream=True))
                tasks.create_task(leave_at_some_time(stream=False))
        await engine.settled()
        stats = engine.engine.driver.stats
        async with engine.http.get("/load") as load:
            assert (await load.json()) == {"server_load": 0}
        assert engine.engine.driver.open_sequences == 0
        assert stats.finished_length >= 75 * 2
        assert stats.aborted >= 75 * 2


async def test_a_reader_that_does_not_read_gets_merged_tokens_and_no_memory() -> None:
    tokens = 6000
    body = json.dumps(_completion(stream=True, max_tokens=tokens)).encode()
    # A long id makes long events: more than all socket buffers hold is soon written.
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: {'i' * 3000}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    async with up(step_time=RooflineStepTime(c0_s=3e-4)) as engine:
        driver = engine.engine.driver
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 131_072)
        slow.setblocking(False)
        host, port = engine.url.removeprefix("http://").split(":")
        await asyncio.get_running_loop().sock_connect(slow, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=slow)
        writer.write(head.encode() + body)
        raw = bytearray()
        for pause_until in (tokens // 2, tokens):
            while driver.stats.generation_tokens < pause_until:  # noqa: ASYNC110 -- counters tell nobody
                await asyncio.sleep(0.01)
            written = len(raw) + 8_000_000  # read what is there, then stop again until the answer is finished
            while len(raw) < written and (data := await reader.read(65_536)):
                raw += data
        while data := await reader.read(65_536):
            raw += data
        writer.close()
    parts: list[bytes] = []
    rest = bytes(raw).partition(b"\r\n\r\n")[2]
    start = 0
    while start < len(rest):  # take the chunked framing off
        end = rest.index(b"\r\n", start)
        size = int(rest[start:end], 16)
        parts.append(rest[end + 2 : end + 2 + size])
        start = end + 2 + size + 2
    choices = [json.loads(event)["choices"][0] for event in _events(b"".join(parts))[:-1]]
    words = "".join(choice["text"] for choice in choices).split()
    assert len(words) == tokens
    assert all(one == other for one, other in zip(words, words[256:], strict=False))  # none lost or doubled
    merged = [choice for choice in choices if count_text(choice["text"]) > 1]
    assert any(choice["finish_reason"] is None for choice in merged)  # in the middle, when it read again


async def test_faults_cut_or_stall_streams() -> None:
    seen = bytearray()

    async def listen(engine: Up) -> None:
        seen.clear()
        async with engine.http.post("/v1/completions", json=_completion(stream=True, max_tokens=9)) as answer:
            async for data in answer.content.iter_any():
                seen.extend(data)

    async with up(faults=Faults(cut_after_tokens=3)) as engine:
        with pytest.raises(aiohttp.ClientPayloadError):
            await listen(engine)
        assert len(_events(bytes(seen))) == 3
        await engine.settled()
    async with up(faults=Faults(stall_after_tokens=2)) as engine:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(listen(engine), 1.0)
        assert len(_events(bytes(seen))) == 2
        await engine.settled()


# --- what it tells about itself --------------------------------------------------------------------------------


async def test_metrics_parse_and_add_up() -> None:
    async with up(prefix_caching=True) as engine:
        for _ in range(3):
            await engine.post("/v1/completions", _completion(prompt="w " * 50, max_tokens=7))
        await engine.settled()
        families = {family.name: family for family in text_string_to_metric_families(await engine.metrics())}
    samples = {
        (sample.name, sample.labels.get("le") or sample.labels.get("finished_reason")): sample
        for family in families.values()
        for sample in family.samples
    }
    assert samples["vllm:generation_tokens_total", None].value == 21
    assert samples["vllm:prompt_tokens_total", None].value == 150
    assert samples["vllm:request_success_total", "length"].value == 3
    assert samples["vllm:num_preemptions_total", None].value == 0
    assert samples["vllm:time_to_first_token_seconds_count", None].value == 3
    assert samples["vllm:inter_token_latency_seconds_count", None].value == 18
    config = samples["vllm:cache_config_info", None].labels
    assert (config["block_size"], config["num_gpu_blocks"]) == ("16", "2500")
    late = families["tiergate_emulated_step_lateness_seconds"]
    buckets = [sample.value for sample in late.samples if sample.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == samples["tiergate_emulated_steps_total", None].value
    assert families["tiergate_emulated_info"].samples[0].value == 1


async def test_it_says_that_it_emulates() -> None:
    async with up() as engine:
        for path in ("/health", "/ping", "/version", "/load", "/v1/models", "/metrics", "/nowhere"):
            async with engine.http.get(path) as answer:
                assert answer.headers["x-tiergate-emulated"] == "1", path
        async with engine.http.get("/version") as answer:
            version = await answer.json()
        assert "emulated" in version["version"]
        async with engine.http.post("/v1/completions", json=_completion(stream=True, max_tokens=1)) as answer:
            assert answer.headers["x-tiergate-emulated"] == "1"
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_tokenize_counts_as_usage_does() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is  this\n?"}]},
    ]
    async with up() as engine:
        _, raw = await engine.post("/tokenize", {"messages": messages})
        counted = json.loads(raw)
        _, raw = await engine.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
        assert json.loads(raw)["usage"]["prompt_tokens"] == counted["count"] == len(counted["tokens"]) == 8
        assert counted["max_model_len"] == 20_000
        _, raw = await engine.post("/v1/completions", _completion(max_tokens=5))
        text = json.loads(raw)["choices"][0]["text"]
        _, raw = await engine.post("/tokenize", {"prompt": text})
        _, raw = await engine.post("/detokenize", {"tokens": json.loads(raw)["tokens"]})
        assert json.loads(raw)["prompt"] == text.strip()


async def test_engines_in_one_process_have_ports_of_their_own() -> None:
    settings = [
        EmulatedSettings(f"m{number}", EngineConfig(kv_tokens=1000, max_model_tokens=500)) for number in range(4)
    ]
    async with serving([EmulatedEngine(one, FAST) for one in settings]) as served, aiohttp.ClientSession() as http:
        assert len({one.url for one in served}) == 4
        for one, number in zip(served, itertools.count(), strict=False):
            async with http.get(f"{one.url}/v1/models") as answer:
                assert (await answer.json())["data"][0]["id"] == f"m{number}"


async def test_leaving_lets_open_requests_finish_in_the_grace_time() -> None:
    engine = EmulatedEngine(EmulatedSettings(MODEL, EngineConfig(kv_tokens=1000, max_model_tokens=500)), SLOW)
    async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
        async with serving([engine], grace_s=20.0) as (served,):

            async def ask() -> bytes:
                async with http.post(f"{served.url}/v1/completions", json=_completion(stream=True)) as answer:
                    return await answer.read()

            asked = tasks.create_task(ask())
            while not engine.driver.stats.generation_tokens:  # noqa: ASYNC110 -- counters tell nobody
                await asyncio.sleep(0.01)
        assert engine.driver.stats.aborted == 0
        assert (await asked).endswith(b"data: [DONE]\n\n")
