"""A small real SSE server that answers as a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import orjson
import pytest
from aiohttp import web

Handler = Callable[[web.Request, dict[str, object]], Awaitable[web.StreamResponse]]


def token_event(text: str = " tok", finish: str | None = None) -> bytes:
    """A chat chunk as vLLM writes it."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    return b"data: " + orjson.dumps({"id": "c", "object": "chat.completion.chunk", "choices": [choice]}) + b"\n\n"


ROLE_EVENT = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
)
DONE_EVENT = b"data: [DONE]\n\n"


def usage_event(tokens: int) -> bytes:
    return b"data: " + orjson.dumps({"id": "c", "choices": [], "usage": {"completion_tokens": tokens}}) + b"\n\n"


def stream_bytes(tokens: int) -> bytes:
    """A whole stream of `tokens` tokens."""
    body = [token_event() for _ in range(tokens - 1)] + [token_event(finish="length")]
    return ROLE_EVENT + b"".join(body) + usage_event(tokens) + DONE_EVENT


@dataclass
class Server:
    """What arrived, and how to answer it."""

    url: str = ""
    handler: Handler | None = None
    bodies: list[dict[str, object]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.arrivals_s.append(asyncio.get_running_loop().time())
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        handler = self.handler or paced()
        return await handler(request, body)


def paced(gap_s: float = 0.0) -> Handler:
    """Streams `max_tokens` tokens with a gap between them; an answer in one piece when not asked to stream."""

    async def handle(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        tokens = body["max_tokens"]
        assert isinstance(tokens, int)
        if not body.get("stream"):
            return web.json_response({"usage": {"completion_tokens": tokens}, "choices": []})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "x-tiergate-backend": "b0"})
        await response.prepare(request)
        await response.write(ROLE_EVENT)
        for index in range(tokens):
            if gap_s:
                await asyncio.sleep(gap_s)
            await response.write(token_event(finish="length" if index == tokens - 1 else None))
        await response.write(usage_event(tokens))
        await response.write(DONE_EVENT)
        await response.write_eof()
        return response

    return handle


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server on a free loopback port."""
    state = Server()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", state.answer)
    app.router.add_post("/v1/completions", state.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    state.url = f"http://{host}:{port}/v1"
    yield state
    await runner.cleanup()
