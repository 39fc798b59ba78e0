"""The OpenAI adapter: what is sent, what errors mean, and servers with habits of their own."""

from __future__ import annotations

import json

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.contract import Failure, OutgoingRequest, Support, Unsupported, UpstreamError
from adapters.http import HttpUpstream
from adapters.openai import OpenAIAdapter
from adapters.usage import with_usage

from .conftest import Connect, Serve, ServeApp, Wire

ASKED = {"include_usage": True}


def outgoing(
    body: bytes = b'{"model":"m"}', path: str = "/v1/chat/completions", **more: object
) -> OutgoingRequest:
    fields: dict[str, object] = {"headers": {}, "request_id": "r-1", "streamed": True, **more}
    return OutgoingRequest(path=path, body=body, **fields)  # type: ignore[arg-type]  # fields vary by test


@pytest.fixture
def adapter() -> OpenAIAdapter:
    """For what needs no server."""
    return OpenAIAdapter(HttpUpstream("http://127.0.0.1:1"))


class TestPrepare:
    def test_body_and_path_go_as_they_came(self, adapter: OpenAIAdapter) -> None:
        body = b'{ "model" : "m",\n "x": 1.50 }'
        call = adapter.prepare(outgoing(body))
        assert (call.method, call.path, call.body) == ("POST", "/v1/chat/completions", body)

    def test_headers_of_the_connection_stay_behind(self, adapter: OpenAIAdapter) -> None:
        headers = {
            "Host": "gateway",
            "Content-Length": "3",
            "Connection": "keep-alive",
            "Transfer-Encoding": "chunked",
            "Accept-Encoding": "gzip",
            "Expect": "100-continue",
            "TE": "trailers",
            "Content-Type": "application/json",
            "Authorization": "Bearer theirs",
            "traceparent": "00-1-2-01",
            "X-Request-Id": "spoofed",
        }
        assert dict(adapter.prepare(outgoing(headers=headers)).headers) == {
            "Content-Type": "application/json",
            "Authorization": "Bearer theirs",
            "traceparent": "00-1-2-01",
            "x-request-id": "r-1",
        }

    def test_the_backends_key_replaces_the_clients(self) -> None:
        adapter = OpenAIAdapter(HttpUpstream("http://h"), api_key="ours")
        headers = adapter.prepare(outgoing(headers={"Authorization": "Bearer theirs"})).headers
        assert dict(headers) == {"authorization": "Bearer ours", "x-request-id": "r-1"}

    def test_priority_is_never_sent(self, adapter: OpenAIAdapter) -> None:
        call = adapter.prepare(outgoing(left_ms=-5, due_ms=10**12))
        assert (call.body, dict(call.headers)) == (b'{"model":"m"}', {"x-request-id": "r-1"})

    @pytest.mark.parametrize(
        ("path", "streamed", "added"),
        [
            ("/v1/chat/completions", True, True),
            ("/v1/completions", True, True),
            ("/v1/chat/completions", False, False),
            ("/v1/messages", True, False),
            ("/v1/responses", True, False),
            ("/v1/embeddings", False, False),
        ],
    )
    def test_usage_is_asked_for_where_it_takes_an_option(
        self, adapter: OpenAIAdapter, path: str, streamed: bool, added: bool
    ) -> None:
        call = adapter.prepare(outgoing(path=path, streamed=streamed, want_usage=True))
        assert (b"include_usage" in call.body) is added

    def test_usage_is_not_asked_of_a_server_that_refuses_the_option(self) -> None:
        adapter = OpenAIAdapter(HttpUpstream("http://h"), adds_usage=False)
        assert adapter.prepare(outgoing(want_usage=True)).body == b'{"model":"m"}'


class TestUsage:
    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            (b'{"a":1}', b'{"stream_options":{"include_usage":true},"a":1}'),
            (b' \n{ "a":1}', b' \n{"stream_options":{"include_usage":true}, "a":1}'),
            (b"{}", b'{"stream_options":{"include_usage":true}}'),
            (b"{ \t}", b'{"stream_options":{"include_usage":true} \t}'),
            (b'{"stream_options":{"include_usage":true}}', b'{"stream_options":{"include_usage":true}}'),
            (b"[1]", b"[1]"),
            (b"", b""),
            (b"nothing {", b"nothing {"),
        ],
    )
    def test_the_smallest_edit(self, body: bytes, expected: bytes) -> None:
        assert with_usage(body) == expected

    @pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
    def test_the_clients_options_give_way(self, options: object) -> None:
        body = json.dumps({"a": [1, "ü"], "stream_options": options, "z": None}).encode()
        assert json.loads(with_usage(body)) == {"a": [1, "ü"], "stream_options": ASKED, "z": None}

    def test_the_clients_other_options_stay(self) -> None:
        body = b'{"stream_options":{"continuous_usage_stats":true}}'
        assert json.loads(with_usage(body)) == {"stream_options": {"continuous_usage_stats": True, **ASKED}}

    @pytest.mark.parametrize("body", [b'{"stream_options":7}', b'{"stream_options":', b'"stream_options" {"a":1}'])
    def test_what_the_engine_must_refuse_goes_as_it_came(self, body: bytes) -> None:
        assert with_usage(body) == body

    def test_a_number_too_big_for_the_parser_keeps_its_digits(self) -> None:
        body = b'{"seed":123456789012345678901234567890,"stream_options":{}}'
        assert json.loads(with_usage(body))["seed"] == 123456789012345678901234567890

    @settings(max_examples=50, deadline=None)
    @given(
        st.dictionaries(
            st.text() | st.just("stream_options_"),
            st.recursive(
                st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("stream_options"), inner),
                max_leaves=8,
            ),
        ),
        st.booleans(),
    )
    def test_nothing_else_changes(self, body: dict[str, object], spaced: bool) -> None:
        body.pop("stream_options", None)
        raw = json.dumps(body, indent=1 if spaced else None, ensure_ascii=spaced).encode()
        edited = with_usage(raw)
        assert json.loads(edited) == {**body, "stream_options": ASKED}
        assert edited.replace(b'"stream_options":{"include_usage":true}', b"", 1).replace(b"{,", b"{", 1) == raw


class TestFirstEvent:
    @pytest.mark.parametrize(
        "event",
        [
            b'data: {"choices":[{"delta":{"content":"an error"}}]}\n\n',
            b'data: {"choices":[{"text":"\\"error\\": 1"}],"error":null}\n\n',
            b": error\n\n",
            b"data: [DONE]\n\n",
            b"event: message_start\ndata: {}\n\nevent: error\ndata: {}\n\n",
            b"",
        ],
    )
    def test_that_is_no_error(self, adapter: OpenAIAdapter, event: bytes) -> None:
        assert adapter.stream_failure(event) is None

    @pytest.mark.parametrize(
        ("event", "failure", "status", "message"),
        [
            (
                b'data: {"error":{"message":"busy","type":"Service Unavailable","code":503}}\n\n',
                Failure.OVERLOADED,
                503,
                "busy",
            ),
            (b'data:{"error":{"message":"m","code":"429"}}\r\n\r\n', Failure.OVERLOADED, 429, "m"),
            (b'data: {"error":{"message":"bad","code":400}}\n\n', Failure.REJECTED, 400, "bad"),
            (b'data: {"error":{"message":"x","code":500}}\n\n', Failure.BROKEN, 500, "x"),
            (b'data: {"object":"error","message":"old","code":400}\n\n', Failure.REJECTED, 400, "old"),
            (
                b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"o"}}\n\n',
                Failure.OVERLOADED,
                None,
                "o",
            ),
            (b'data: {"error":"broken","error_type":"generation"}\n\n', Failure.BROKEN, None, "broken"),
            (b"event: error\ndata: oh no\n\n", Failure.BROKEN, None, "oh no"),
            (b': hello\n\ndata: {"error":{"message":"m","code":503}}\n\n', Failure.OVERLOADED, 503, "m"),
        ],
    )
    def test_that_is_one(
        self, adapter: OpenAIAdapter, event: bytes, failure: Failure, status: int | None, message: str
    ) -> None:
        error = adapter.stream_failure(event)
        assert error is not None
        assert (error.failure, error.status, str(error)) == (failure, status, message)


class TestErrorAnswers:
    @pytest.mark.parametrize(
        ("status", "failure"),
        [
            (400, Failure.REJECTED),
            (404, Failure.REJECTED),
            (401, Failure.REJECTED),
            (422, Failure.REJECTED),
            (408, Failure.TIMEOUT),
            (429, Failure.OVERLOADED),
            (500, Failure.BROKEN),
            (502, Failure.UNREACHABLE),
            (503, Failure.OVERLOADED),
            (504, Failure.TIMEOUT),
        ],
    )
    def test_by_status(self, adapter: OpenAIAdapter, status: int, failure: Failure) -> None:
        error = adapter.response_failure(status, b"<html>")
        assert (error.failure, error.status) == (failure, status)
        assert str(status) in str(error)

    @pytest.mark.parametrize(
        "body",
        [
            b'{"error":{"message":"why"}}',
            b'{"object":"error","message":"why"}',
            b'{"detail":"why"}',
            b'{"error":"why","error_type":"validation"}',
        ],
    )
    def test_the_message_in_every_familys_shape(self, adapter: OpenAIAdapter, body: bytes) -> None:
        assert str(adapter.response_failure(400, body)) == "why"

    def test_our_own_keys_refusal_is_not_the_clients_fault(self) -> None:
        adapter = OpenAIAdapter(HttpUpstream("http://h"), api_key="ours")
        assert adapter.response_failure(401, b"{}").failure is Failure.BROKEN


class TestProbe:
    @staticmethod
    async def _probe(serve_app: ServeApp, connect: Connect, status: int, body: str) -> OpenAIAdapter:
        async def models(_: web.Request) -> web.Response:
            return web.Response(status=status, text=body)

        app = web.Application()
        app.router.add_get("/v1/models", models)
        return OpenAIAdapter(connect(await serve_app(app)))

    async def test_models(self, serve_app: ServeApp, connect: Connect) -> None:
        listed = {"data": [{"id": "a", "max_model_len": 8192}, {"id": "b", "max_model_len": 4096}, {"no": "id"}]}
        adapter = await self._probe(serve_app, connect, 200, json.dumps(listed))
        found = await adapter.probe()
        assert (found.engine, found.models, found.max_model_tokens) == ("openai", ("a", "b"), 4096)
        assert (found.emulated, found.priority, found.tokens_per_event) == (False, Support.NO, None)
        assert await adapter.healthy()

    @pytest.mark.parametrize(
        ("status", "body"),
        [(200, '{"data":[]}'), (200, "not json"), (200, '{"data":7}'), (200, "[]"), (500, "boom"), (404, "")],
    )
    async def test_without_a_usable_list(
        self, serve_app: ServeApp, connect: Connect, status: int, body: str
    ) -> None:
        adapter = await self._probe(serve_app, connect, status, body)
        assert (await adapter.probe()).models == ()
        assert await adapter.healthy()

    async def test_another_key_is_wanted(self, serve_app: ServeApp, connect: Connect) -> None:
        adapter = await self._probe(serve_app, connect, 401, '{"error":{"message":"key?"}}')
        with pytest.raises(UpstreamError, match=r"key\?") as caught:
            await adapter.probe()
        assert caught.value.failure is Failure.REJECTED

    async def test_nobody_there(self, adapter: OpenAIAdapter) -> None:
        with pytest.raises(UpstreamError):
            await adapter.probe()
        assert not await adapter.healthy()
        await adapter.close()

    async def test_a_stall_in_the_body_ends(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{")
            await wire.gone()

        adapter = OpenAIAdapter(connect((await serve(script)).url), probe_timeout_s=0.1)
        with pytest.raises(UpstreamError) as caught:
            await adapter.probe()
        assert caught.value.failure is Failure.TIMEOUT

    async def test_verbs_it_has_not(self, adapter: OpenAIAdapter) -> None:
        for call in (
            adapter.abort("r"),
            adapter.count_tokens({"prompt": "a"}),
            adapter.set_chunk_budget(1),
            adapter.set_running_cap(1),
        ):
            with pytest.raises(Unsupported):
                await call
        assert (await adapter.read_load()).running is None
