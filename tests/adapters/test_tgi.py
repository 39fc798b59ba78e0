"""The TGI adapter, in front of a fake TGI (`fake_tgi`) and of servers that are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import orjson
import pytest
from aiohttp import web

from adapters.contract import (
    Capabilities,
    EngineLoad,
    Failure,
    OutgoingRequest,
    Support,
    Unsupported,
    UpstreamError,
    UpstreamResponse,
)
from adapters.openai import OpenAIAdapter
from adapters.registry import AdapterOptions, detect, make
from adapters.tgi import TgiAdapter
from adapters.vllm import VllmAdapter
from tests.adapters.fake_parts import unminted
from tests.adapters.fake_tgi import Habits, Limits, fake_tgi

from .conftest import Connect, ServeApp, until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "a b c"}]
OVERLOADED = {"error": {"message": "Model is overloaded", "http_status_code": 422}}
USAGE = {"include_usage": True}


def outgoing(path: str, body: Mapping[str, object], **more: object) -> OutgoingRequest:
    fields: dict[str, object] = {"headers": {}, "request_id": "r-1", "streamed": True, **more}
    return OutgoingRequest(path=path, body=orjson.dumps(body), **fields)  # type: ignore[arg-type]  # vary by test


async def exchange(
    adapter: TgiAdapter, path: str, body: Mapping[str, object], **more: object
) -> tuple[int, bytes]:
    response = await adapter.upstream.open(adapter.prepare(outgoing(path, body, **more)))
    try:
        return response.status, await response.read_all(1 << 20)
    finally:
        response.release()


def events(body: bytes) -> list[bytes]:
    """The data of a stream's events."""
    return [one.removeprefix(b"data:").strip() for one in body.split(b"\n\n") if one]


def texts(event: bytes) -> str:
    """What an event of any of its routes says."""
    if event == b"[DONE]":
        return ""
    told = orjson.loads(event)
    if "token" in told:
        return str(told["token"]["text"])
    choice = (told["choices"] or [{}])[0]
    return str(choice.get("text") or choice.get("delta", {}).get("content") or "")


def server(**answers: object) -> web.Application:
    """An application with these answers, by route without its slash; a text is no JSON."""
    app = web.Application()
    for route, answer in answers.items():

        async def handle(_: web.Request, answer: object = answer) -> web.Response:
            return web.Response(text=answer) if isinstance(answer, str) else web.json_response(answer)

        app.router.add_get(f"/{route.replace('_', '/')}", handle)
    return app


class TestProbe:
    async def test_what_it_tells(self, connect: Connect) -> None:
        limits = Limits(max_concurrent_requests=7, max_total_tokens=512)
        async with fake_tgi("org/tiny", limits=limits) as tgi:
            found = await TgiAdapter(connect(tgi.url)).probe()
            assert tgi.seen == []
        assert found == Capabilities(
            engine="tgi",
            version="3.3.7",
            emulated=True,
            models=("org/tiny",),
            max_model_tokens=512,
            max_running_seqs=7,
            priority=Support.NO,
            tokenize=Support.YES,
            continuous_usage=Support.NO,
            tokens_per_event=1,
            lease_tokens=1024,
            max_prompt_tokens=511,
        )
        assert found.load is Support.UNKNOWN

    async def test_an_older_server_that_tells_its_budgets(self, serve_app: ServeApp, connect: Connect) -> None:
        info = {"model_id": "m", "max_total_tokens": 2048, "max_concurrent_requests": 128, "max_best_of": 2}
        told = info | {"max_batch_total_tokens": 32_000, "max_batch_prefill_tokens": 1024, "version": "1.4.0"}
        metrics = "tgi_queue_size 1\ntgi_batch_current_max_tokens 8000\n"
        adapter = TgiAdapter(connect(await serve_app(server(info=told, metrics=metrics))))
        found = await adapter.probe()
        assert (found.models, found.kv_tokens, found.max_batched_tokens) == (("m",), 32_000, 1024)
        assert (found.load, found.tokenize) == (Support.YES, Support.NO)
        assert await adapter.read_load() == EngineLoad(waiting=1, kv_used_fraction=0.25)
        with pytest.raises(Unsupported):
            await adapter.count_tokens({"prompt": "a"})

    async def test_capacity_from_metrics(self, serve_app: ServeApp, connect: Connect) -> None:
        info = {"model_id": "m", "max_total_tokens": 2048, "max_concurrent_requests": 128, "max_best_of": 2}
        metrics = "tgi_batch_max_total_tokens 1000\ntgi_batch_current_max_tokens 1500\n"
        adapter = TgiAdapter(connect(await serve_app(server(info=info, metrics=metrics))))
        assert (await adapter.probe()).kv_tokens == 1000
        assert (await adapter.read_load()).kv_used_fraction == 1.0

    @pytest.mark.parametrize("info", [{}, {"model_id": "m"}, [], "no json"])
    async def test_a_server_that_is_none(self, serve_app: ServeApp, connect: Connect, info: object) -> None:
        adapter = TgiAdapter(connect(await serve_app(server(info=info))))
        with pytest.raises(UpstreamError, match="not that of TGI") as caught:
            await adapter.probe()
        assert caught.value.failure is Failure.BROKEN

    async def test_nobody_there(self, connect: Connect) -> None:
        adapter = TgiAdapter(connect("http://127.0.0.1:1"))
        with pytest.raises(UpstreamError):
            await adapter.probe()
        assert not await adapter.healthy()


class TestDetect:
    async def test_it_is_told_from_the_others(self, serve_app: ServeApp) -> None:
        embeds = {"model_id": "m", "max_concurrent_requests": 512, "max_client_batch_size": 32, "version": "1.8"}
        listed = {"data": [{"id": "m", "owned_by": "vllm"}]}
        async with fake_tgi() as tgi:
            for url, kind in (
                (tgi.url, TgiAdapter),
                (await serve_app(server(v1_models=listed)), VllmAdapter),
                (await serve_app(server(info=embeds)), OpenAIAdapter),
                (await serve_app(server(info="tgi")), OpenAIAdapter),
                (await serve_app(server()), OpenAIAdapter),
            ):
                adapter = await detect(url)
                assert type(adapter) is kind
                await adapter.close()

    async def test_by_name(self) -> None:
        adapter = make("tgi", "http://127.0.0.1:1", AdapterOptions(api_key="k"))
        assert type(adapter) is TgiAdapter
        assert adapter.prepare(outgoing(CHAT, {}, left_ms=3, due_ms=3)).headers == {
            "x-request-id": "r-1",
            "authorization": "Bearer k",
        }


class TestStreams:
    @pytest.mark.parametrize("habits", [Habits(), Habits(spaced=False), Habits(comments=True)])
    async def test_a_chat(self, connect: Connect, habits: Habits) -> None:
        async with fake_tgi(habits=habits) as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            body = {"messages": MESSAGES, "max_tokens": 3, "seed": 1, "stream": True}
            status, answer = await exchange(adapter, CHAT, body, want_usage=True)
            assert (status, unminted(answer)) == (200, bytes(tgi.written[0]))
            assert answer.count(b'"id":"chatcmpl-r-1"') == 4
            assert tgi.bodies == [b'{"stream_options":{"include_usage":true},' + orjson.dumps(body)[1:]]
        first, _, last, usage, done = (one for one in events(answer) if one != b":")
        assert orjson.loads(first)["choices"][0]["finish_reason"] is None
        assert orjson.loads(last)["choices"][0]["finish_reason"] == "length"
        assert orjson.loads(usage)["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
        assert done == b"[DONE]"
        assert adapter.stream_failure(answer) is None

    async def test_completions_bring_their_usage_unasked(self, connect: Connect) -> None:
        async with fake_tgi() as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            body = {"prompt": ["a b", "c"], "max_tokens": 2, "seed": 1, "stream": True}
            _, answer = await exchange(adapter, COMPLETIONS, body, want_usage=True)
            assert tgi.bodies == [orjson.dumps(body)]
        told = [orjson.loads(one) for one in events(answer) if one != b"[DONE]"]
        assert [one["choices"][0]["finish_reason"] for one in told].count("") == 2
        assert [one["usage"]["prompt_tokens"] for one in told if "usage" in one] == [2, 1]

    @pytest.mark.parametrize("flat", [False, True])
    async def test_an_overload_comes_as_a_stream_of_200(self, connect: Connect, flat: bool) -> None:
        async with fake_tgi(habits=Habits(overloaded=True, flat_errors=flat)) as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            status, answer = await exchange(adapter, CHAT, {"messages": MESSAGES, "stream": True})
        assert status == 200
        if not flat:
            assert answer == b"data: " + orjson.dumps(OVERLOADED) + b"\n\ndata: [DONE]\n\n"
        failure = adapter.stream_failure(answer)
        assert failure is not None
        assert (failure.failure, failure.status, str(failure)) == (
            Failure.OVERLOADED,
            429,
            "Model is overloaded",
        )

    async def test_permits_are_what_it_refuses_by(self, connect: Connect) -> None:
        async with fake_tgi(limits=Limits(max_concurrent_requests=2)) as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            three = {"prompt": ["a", "b", "c"], "max_tokens": 2}
            status, answer = await exchange(adapter, COMPLETIONS, three)
            assert (status, orjson.loads(answer)["error_type"]) == (429, "overloaded")
            status, answer = await exchange(adapter, COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 2})
            assert status == 200
            assert orjson.loads(answer)["usage"]["prompt_tokens"] == 2
            assert tgi.permits == 0

    async def test_a_client_that_leaves_frees_its_sequence(self, connect: Connect) -> None:
        async with fake_tgi(step_s=0.01) as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            call = adapter.prepare(outgoing(CHAT, {"messages": MESSAGES, "stream": True, "seed": 1}))
            response = await adapter.upstream.open(call)
            assert await response.read()
            assert (tgi.permits, tgi.driver.open_sequences) == (1, 1)
            response.abort()
            await until(lambda: not tgi.permits)
            assert (tgi.driver.open_sequences, tgi.disconnects) == (0, 1)

    async def test_one_that_leaves_while_its_prompt_is_computed_costs_all_of_it(self, connect: Connect) -> None:
        async with fake_tgi(limits=Limits(max_batch_prefill_tokens=10), step_s=0.04) as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            call = adapter.prepare(outgoing(COMPLETIONS, {"prompt": "a " * 100, "stream": True, "seed": 1}))
            response = await adapter.upstream.open(call)
            await until(lambda: tgi.driver.model.running > 0)
            steps = tgi.driver.model.steps
            response.abort()
            await until(lambda: not tgi.permits)
            assert tgi.driver.open_sequences == 1
            await until(lambda: not tgi.driver.open_sequences)
            assert tgi.driver.model.steps - steps >= 9

    @pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/generate_stream"])
    async def test_a_long_answer_is_queued_again(self, connect: Connect, path: str) -> None:
        """Its tokens come as if nothing were, but it waits behind what came meanwhile."""
        limits = Limits(lease_tokens=4, max_batch_prefill_tokens=64)
        prompt: dict[str, object] = {"messages": MESSAGES} if path == CHAT else {"prompt": "a b c"}
        body = {**prompt, "max_tokens": 14, "seed": 1, "stream": True}
        if path == "/generate_stream":
            body = {"inputs": "a b c", "parameters": {"max_new_tokens": 14, "seed": 1}}
        async with fake_tgi(limits=limits) as tgi, fake_tgi() as other:
            _, answer = await exchange(TgiAdapter(connect(tgi.url)), path, body)
            _, plain = await exchange(TgiAdapter(connect(other.url)), path, body)
            assert (tgi.requeued, other.requeued) == (3, 0)
            said = [[texts(event) for event in events(one)] for one in (answer, plain)]
            assert said[0] == said[1]
            assert len([one for one in said[0] if one]) == 14

    async def test_kv_is_taken_ahead(self, connect: Connect) -> None:
        """For the prompt, and up to 1,024 tokens of what the client allows for an answer."""
        async with fake_tgi(limits=Limits(max_batch_total_tokens=1_500), step_s=0.005) as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            body = {"messages": MESSAGES, "stream": True, "seed": 1}
            first = await adapter.upstream.open(adapter.prepare(outgoing(CHAT, body)))
            assert await first.read()
            async with asyncio.TaskGroup() as tasks:
                waits = tasks.create_task(exchange(adapter, CHAT, {**body, "max_tokens": 600}))
                await until(lambda: bool(tgi.leases))
                assert tgi.driver.model.kv_used_tokens < 200, "and there is room for it"
                load = await adapter.read_load()
                assert (load.running, load.waiting) == (1, 1)
                first.abort()
                assert (await waits)[0] == 200
            assert (tgi.waited, tgi.reserved) == (1, 0)
            status, _ = await exchange(adapter, CHAT, {**body, "max_tokens": 8})
            assert (status, tgi.waited) == (200, 1)

    async def test_behind_all_that_wait(self, connect: Connect) -> None:
        limits = Limits(lease_tokens=20, max_batch_prefill_tokens=20)
        async with fake_tgi(limits=limits, step_s=0.01) as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            body = {"messages": MESSAGES, "max_tokens": 24, "seed": 1, "stream": True}
            response = await adapter.upstream.open(adapter.prepare(outgoing(CHAT, body)))
            assert await response.read()
            long = {"prompt": "a " * 400, "max_tokens": 1, "stream": True, "seed": 1}
            behind = await adapter.upstream.open(adapter.prepare(outgoing(COMPLETIONS, long)))
            ended: list[str] = []

            async def read(name: str, answer: UpstreamResponse) -> None:
                await answer.read_all(1 << 20)
                ended.append(name)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(read("early", response))
                tasks.create_task(read("late", behind))
            assert ended == ["late", "early"], "the late prompt is computed before the early one goes on"


class TestOwnRoutes:
    async def test_bodies_and_answers_pass_as_they_are(self, connect: Connect) -> None:
        raw = b'{"inputs": "a b",  "parameters":{"max_new_tokens":3,"stop":["x"],"details":true}}'
        async with fake_tgi() as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            for path in ("/generate", "/generate_stream"):
                call = adapter.prepare(OutgoingRequest(path, {}, raw, "r-1", True, want_usage=True))
                assert (call.path, call.body) == (path, raw)
                response = await adapter.upstream.open(call)
                answer = await response.read_all(1 << 20)
                assert response.status == 200
                last = answer if path == "/generate" else events(answer)[-1]
                details = orjson.loads(last)["details"]
                assert (details["generated_tokens"], details["input_length"]) == (3, 2)
            assert answer == bytes(tgi.written[0])
            assert b"[DONE]" not in answer
            assert adapter.stream_failure(answer) is None

    async def test_overload(self, connect: Connect) -> None:
        async with fake_tgi(habits=Habits(overloaded=True)) as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            status, answer = await exchange(adapter, "/generate", {"inputs": "a"})
            assert (status, adapter.response_failure(status, answer).failure) == (429, Failure.OVERLOADED)
            status, answer = await exchange(adapter, "/generate_stream", {"inputs": "a"})
            assert (status, answer) == (
                200,
                b'data: {"error":"Model is overloaded","error_type":"overloaded"}\n\n',
            )
            failure = adapter.stream_failure(answer)
            assert failure is not None
            assert (failure.failure, failure.status) == (Failure.OVERLOADED, 429)

    @pytest.mark.parametrize("kind", ["vllm", "sglang", "openai"])
    @pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
    def test_other_engines_mean_something_else_by_them(self, kind: str, path: str) -> None:
        with pytest.raises(UpstreamError, match=path) as caught:
            make(kind, "http://h").prepare(outgoing(path, {}))
        assert caught.value.failure is Failure.UNSUPPORTED

    async def test_counting_tokens(self, connect: Connect) -> None:
        async with fake_tgi() as tgi:
            assert await TgiAdapter(connect(tgi.url)).count_tokens({"inputs": "a b c"}) == 3


class TestPrepare:
    @pytest.mark.parametrize(
        ("body", "sent"),
        [
            (b'{ "top_p" : 0.9, "stop": ["x"] }', None),
            (b'{"messages":[{"content":"\\"top_p\\" 1"}]}', None),
            (b'{"a":{"top_p":1}}', None),
            (b'{"top_p":1,', None),
            (b'["top_p"]', None),
            (b'{"a":123456789012345678901234567890,"top_p":1.0}', b'{"a":123456789012345678901234567890}'),
            (b'{"stop": "x", "top_p": 1, "b": "\xc3\xbc"}', b'{"stop":["x"],"b":"\xc3\xbc"}'),
        ],
    )
    def test_what_it_refuses_though_it_means_nothing(self, body: bytes, sent: bytes | None) -> None:
        request = OutgoingRequest(CHAT, {}, body, "r-1", True)
        prepared = make("tgi", "http://h").prepare(request)
        assert prepared.body == (body if sent is None else sent)

    async def test_the_fake_refuses_it_unless_it_is_respelled(self, connect: Connect) -> None:
        body = {"messages": MESSAGES, "max_tokens": 2, "top_p": 1, "stop": "x"}
        async with fake_tgi() as tgi:
            upstream = connect(tgi.url)
            assert (await exchange(TgiAdapter(upstream), CHAT, body))[0] == 200
            raw = OpenAIAdapter(upstream).prepare(outgoing(CHAT, {**body, "stop": ["x"]}))
            response = await upstream.open(raw)
            assert response.status == 422
            failure = TgiAdapter(upstream).response_failure(422, await response.read_all(9999))
        assert failure.failure is Failure.REJECTED
        assert "top_p" in str(failure)

    @pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/embeddings"])
    def test_routes_that_it_has_not(self, path: str) -> None:
        with pytest.raises(UpstreamError, match=path) as caught:
            make("tgi", "http://h").prepare(outgoing(path, {}))
        assert caught.value.failure is Failure.UNSUPPORTED
        assert caught.value.retryable


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "body", "failure"),
        [
            (429, {"error": "Model is overloaded", "error_type": "overloaded"}, Failure.OVERLOADED),
            (422, {"error": "Input validation error: x", "error_type": "validation"}, Failure.REJECTED),
            (422, {"error": "Template error: x", "error_type": "template_error"}, Failure.REJECTED),
            (422, {"error": "Tool error: x", "error_type": "tool_error"}, Failure.REJECTED),
            (424, {"error": "Request failed during generation: x", "error_type": "generation"}, Failure.BROKEN),
            (500, {"error": "Incomplete generation", "error_type": "incomplete_generation"}, Failure.BROKEN),
            (503, {"error": "unhealthy", "error_type": "healthcheck"}, Failure.UNREACHABLE),
            (418, {"error": "x", "error_type": "another"}, Failure.REJECTED),
            (503, {"error": "x", "error_type": 7}, Failure.OVERLOADED),
        ],
    )
    def test_an_answer(self, status: int, body: dict[str, object], failure: Failure) -> None:
        error = make("tgi", "http://h").response_failure(status, orjson.dumps(body))
        assert (error.failure, error.status, str(error)) == (failure, status, body["error"])

    def test_an_answer_in_another_shape(self) -> None:
        error = make("tgi", "http://h").response_failure(422, b"Failed to deserialize the JSON body")
        assert (error.failure, error.status) == (Failure.REJECTED, 422)

    @pytest.mark.parametrize(
        ("message", "failure", "status"),
        [
            ("Model is overloaded", Failure.OVERLOADED, 429),
            ("Input validation error: `inputs` cannot be empty", Failure.REJECTED, 422),
            ("Template error: template not found", Failure.REJECTED, 422),
            ("Missing template vatiable: x", Failure.REJECTED, 422),
            ("Request failed during generation: Model is overloaded", Failure.BROKEN, 424),
            ("Incomplete generation stream", Failure.BROKEN, 500),
            ("something else", Failure.BROKEN, 500),
        ],
    )
    def test_a_streams_first_event(self, message: str, failure: Failure, status: int) -> None:
        adapter = make("tgi", "http://h")
        for space in ("", " "):
            told = json.dumps({"error": {"message": message, "http_status_code": 422}})
            error = adapter.stream_failure(f"data:{space}{told}\n\n".encode())
            assert error is not None
            assert (error.failure, error.status, str(error)) == (failure, status, message)

    async def test_the_fakes_own(self, connect: Connect) -> None:
        async with fake_tgi(habits=Habits(fails_after=0)) as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            body = {"messages": MESSAGES, "max_tokens": 3}
            status, answer = await exchange(adapter, CHAT, body)
            assert (status, adapter.response_failure(status, answer).failure) == (424, Failure.BROKEN)
            _, answer = await exchange(adapter, CHAT, {**body, "stream": True})
            failure = adapter.stream_failure(answer)
            assert failure is not None
            assert failure.failure is Failure.BROKEN
            long = {"messages": MESSAGES, "max_tokens": 10_000, "stream": True}
            failure = adapter.stream_failure((await exchange(adapter, CHAT, long))[1])
            assert failure is not None
            assert (failure.failure, failure.status) == (Failure.TOO_LONG, 422)


class TestVerbs:
    async def test_load(self, connect: Connect) -> None:
        async with fake_tgi(limits=Limits(max_batch_prefill_tokens=64), step_s=0.01) as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            assert await adapter.read_load() == EngineLoad()
            call = adapter.prepare(outgoing(CHAT, {"messages": MESSAGES, "stream": True, "seed": 1}))
            response = await adapter.upstream.open(call)
            await response.read()
            load = await adapter.read_load()
            assert (load.running, load.waiting, load.kv_used_fraction) == (1, 0, None)
            assert (await adapter.probe()).load is Support.YES
            response.abort()
            await until(lambda: not tgi.driver.model.running)  # the step in flight ends first
            assert (await adapter.read_load()).running == 0

    async def test_load_without_metrics_is_an_error(self, serve_app: ServeApp, connect: Connect) -> None:
        with pytest.raises(UpstreamError):
            await TgiAdapter(connect(await serve_app(server()))).read_load()

    async def test_health(self, connect: Connect) -> None:
        async with fake_tgi() as tgi:
            adapter = TgiAdapter(connect(tgi.url))
            assert await adapter.healthy()
            tgi.behave(healthy=False)
            assert not await adapter.healthy()

    @pytest.mark.parametrize(
        ("body", "tokens"),
        [({"messages": MESSAGES, "temperature": 0}, 4), ({"prompt": "a b"}, 2), ({"prompt": ["a b c"]}, 3)],
    )
    async def test_counting_tokens(self, connect: Connect, body: dict[str, object], tokens: int) -> None:
        async with fake_tgi() as tgi:
            assert await TgiAdapter(connect(tgi.url)).count_tokens(body) == tokens
            assert len(tgi.seen) == 1
            assert "temperature" not in tgi.seen[0]

    @pytest.mark.parametrize("body", [{}, {"prompt": [1, 2]}, {"prompt": ["a", "b"]}, {"prompt": 7}])
    async def test_what_cannot_be_counted(self, body: dict[str, object]) -> None:
        with pytest.raises(Unsupported):
            await make("tgi", "http://h").count_tokens(body)

    async def test_counting_where_it_fails(self, serve_app: ServeApp, connect: Connect) -> None:
        adapter = TgiAdapter(connect(await serve_app(server())))
        with pytest.raises(UpstreamError):
            await adapter.count_tokens({"prompt": "a"})
        nested: object = 1
        for _ in range(400):
            nested = [nested]
        with pytest.raises(Unsupported):
            await adapter.count_tokens({"messages": nested})

    async def test_verbs_it_has_not(self) -> None:
        adapter = make("tgi", "http://h")
        for call in (adapter.abort("r"), adapter.set_chunk_budget(1), adapter.set_running_cap(1)):
            with pytest.raises(Unsupported, match="TGI"):
                await call
