"""Measuring over HTTP: what a server refuses is put in another way, and what it answers is counted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import orjson
import pytest
from aiohttp import web

from adapters import registry
from profiles.measure import MeasureError
from tiergate.probe_connection import HttpConnection


class Server:
    """An OpenAI-like server that refuses what it is told to, and answers in `per_event` tokens an event."""

    def __init__(self) -> None:
        self.refuses: set[str] = set()
        self.per_event = 1
        self.asked: list[str] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        way = "chat" if "messages" in body else "ids" if isinstance(body["prompt"], list) else "words"
        self.asked.append(way)
        if way in self.refuses:
            return web.json_response({"error": {"message": f"no {way} here"}}, status=400)
        text = body["messages"][0]["content"] if way == "chat" else body["prompt"]
        prompt_tokens = len(text) if way == "ids" else 2 * len(text.split())
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        events: list[dict[str, object]] = []
        if way == "chat":
            events.append({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        token = {"delta": {"content": "a"}} if way == "chat" else {"text": "a"}
        events += [{"choices": [token]} for _ in range(body["max_tokens"] // self.per_event)]
        events.append({"choices": [{"delta": {}, "finish_reason": "length"}]})
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": body["max_tokens"]}
        events.append({"choices": [], "usage": usage})
        for event in events:
            await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def served(free_port: Callable[[], int]) -> AsyncIterator[tuple[Server, HttpConnection]]:
    server, app, port = Server(), web.Application(), free_port()
    app.router.add_post("/v1/completions", server.answer)
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    adapter = registry.make("openai", f"http://127.0.0.1:{port}")
    yield server, HttpConnection(adapter, "m", 0)
    await adapter.close()
    await runner.cleanup()


@pytest.mark.parametrize(("refuses", "way"), [(set[str](), "ids"), ({"ids"}, "words"), ({"ids", "words"}, "chat")])
async def test_another_way_is_found_once(
    served: tuple[Server, HttpConnection], refuses: set[str], way: str
) -> None:
    server, connection = served
    server.refuses = refuses
    first = await connection.complete(100, 5)
    second = await connection.complete(100, 5)
    assert server.asked == [*(known for known in ("ids", "words") if known in refuses), way, way]
    for done in (first, second):
        assert len(done.token_s) == 5
        assert done.sent_s <= done.token_s[0]
        assert list(done.token_s) == sorted(done.token_s)
    # Words turned out to be two tokens each; the second prompt has the length that was asked for.
    assert first.prompt_tokens == (100 if way == "ids" else 200)
    assert second.prompt_tokens == 100


async def test_what_is_refused_in_every_way_ends_the_measurement(served: tuple[Server, HttpConnection]) -> None:
    server, connection = served
    server.refuses = {"ids", "words", "chat"}
    with pytest.raises(MeasureError, match="no chat here"):
        await connection.complete(100, 5)


async def test_several_tokens_in_an_event_cannot_be_measured(served: tuple[Server, HttpConnection]) -> None:
    server, connection = served
    server.per_event = 4
    with pytest.raises(MeasureError, match="40 tokens came in 11 events"):
        await connection.complete(100, 40)
