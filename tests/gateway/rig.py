"""A scripted engine, and a gateway in front of it, for the gateway's tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

import aiohttp
import orjson
from aiohttp import web

from gateway.app import Gateway, running
from gateway.config import BackendSettings, LimitSettings, Settings
from gateway.shared import PolicySource
from state.contract import Store
from tiergate.root import wire

MODEL = "test-model"
BEHAVIOUR = "x-behave"
PROFILE = "h200-llama-3.1-8b-fp8"


def chunk(text: str, finish: str | None = None) -> bytes:
    """One chat event with a token."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + orjson.dumps({"id": "c1", "model": MODEL, "choices": [choice]}) + b"\n\n"


ROLE = (
    b'data: {"id":"c1","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
)
DONE = b"data: [DONE]\n\n"
OVERLOAD = (
    b'data: {"error":{"message":"The engine is currently busy","type":"Service Unavailable","code":503}}\n\n'
)
USAGE = b'data: {"id":"c1","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":3,"total_tokens":14}}\n\n'
WHOLE = orjson.dumps(
    {
        "id": "c1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "a b c"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }
)


class Engine:
    """An HTTP engine that does what the header `x-behave` says."""

    def __init__(self) -> None:
        self.port = 0
        self.streams = 0
        self.seen: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []
        self.disconnects = 0
        self.script: Sequence[bytes] = (ROLE, chunk("a"), chunk(" b"), chunk(" c", "stop"), DONE)
        self.usage_event = USAGE
        self.usage_tokens = 3  # what the usage event says of a script's output
        self.down = False
        self.health_asked = 0
        self.always: str | None = None
        self.release = asyncio.Event()
        self.sent_bytes = 0
        self.server = web.Server(self._handle, handler_cancellation=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.health_asked += request.path == "/health"
        if self.down:
            return web.Response(status=503)
        if request.path == "/v1/models":
            card = {"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 8192}
            return web.json_response({"object": "list", "data": [card]})
        if request.method == "GET":
            return web.Response(text="")
        body = orjson.loads(await request.read())
        if request.path not in _GENERATES:
            return web.json_response({"count": 3, "max_model_len": 8192})
        if body.get("max_tokens") == 1 and "priority" in body:
            return web.json_response({"id": "probe", "choices": []})
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        behaviour = self.always or request.headers.get(BEHAVIOUR) or "good"
        self.streams += 1
        try:
            return await _BEHAVIOURS[behaviour](self, request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.disconnects += 1
            raise
        finally:
            self.streams -= 1

    async def begin(self, request: web.BaseRequest) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        return answer

    async def good(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        if not body.get("stream"):
            return web.Response(body=WHOLE, content_type="application/json")
        answer = await self.begin(request)
        options = body.get("stream_options")
        usage = isinstance(options, dict) and bool(options.get("include_usage"))
        for event in self.script:
            if usage and event == DONE:
                await answer.write(
                    self.usage_event.replace(b'completion_tokens":3', b'completion_tokens":%d' % self.usage_tokens)
                )
            await answer.write(event)
        return answer

    async def role_first(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        """A comment and a role, then nothing until the test says so."""
        answer = await self.begin(request)
        await answer.write(b": hello\n\n" + ROLE)
        await self.release.wait()
        for event in self.script[1:]:
            await answer.write(event)
        return answer

    async def first_then_wait(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        """A token, and the rest when the test says so."""
        answer = await self.begin(request)
        await answer.write(ROLE + chunk("first"))
        await self.release.wait()
        for event in self.script[1:]:
            await answer.write(event)
        return answer

    async def overload(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        return web.json_response(orjson.loads(OVERLOAD[6:]), status=503)

    async def overload_in_stream(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        answer = await self.begin(request)
        await answer.write(ROLE + OVERLOAD + DONE)
        return answer

    async def reject(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        error = {"message": "top_p must be at most 1", "type": "BadRequestError", "param": "top_p", "code": 400}
        return web.json_response({"error": error}, status=400)

    async def garbage(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        return web.Response(body=b"\x00\xff<html>", content_type="text/html")

    async def noise(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        answer = await self.begin(request)
        await answer.write(b"\x00\xff" * 4_000_000)
        return answer

    async def cut(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        """Two tokens and half an event, then the connection is gone."""
        answer = await self.begin(request)
        await answer.write(ROLE + chunk("a") + chunk(" b")[:20])
        await asyncio.sleep(0.02)
        assert request.transport is not None
        request.transport.close()
        return answer

    async def ends_early(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        """A tidy end of the body, but no end of the stream in it."""
        answer = await self.begin(request)
        await answer.write(ROLE + chunk("a"))
        return answer

    async def error_later(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        answer = await self.begin(request)
        await answer.write(ROLE + chunk("a") + OVERLOAD + DONE)
        return answer

    async def stall(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        answer = await self.begin(request)
        await answer.write(ROLE + chunk("a"))
        await asyncio.Event().wait()
        return answer

    async def silent(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async def wait(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        """Good, after the test releases it."""
        await self.release.wait()
        return await self.good(request, body)

    async def flood(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        """Far more than anybody reads."""
        answer = await self.begin(request)
        event = chunk("x" * 8_000)
        for _ in range(8_000):
            await answer.write(event)
            self.sent_bytes += len(event)
        await answer.write(chunk("", "stop") + DONE)
        return answer

    async def comments(self, request: web.BaseRequest, body: dict[str, object]) -> web.StreamResponse:
        """Comments by the megabyte before the first token."""
        answer = await self.begin(request)
        comment = b": " + b"x" * 8_000 + b"\n\n"
        for _ in range(2_000):
            await answer.write(comment)
            self.sent_bytes += len(comment)
        for event in self.script:
            await answer.write(event)
        return answer


_GENERATES = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
}
_Behaviour = Callable[[Engine, web.BaseRequest, dict[str, object]], Awaitable[web.StreamResponse]]
_NAMES = (
    *("good", "role_first", "overload", "overload_in_stream", "reject", "garbage", "noise", "cut", "ends_early"),
    *("error_later", "stall", "silent", "wait", "flood", "first_then_wait", "comments"),
)
_BEHAVIOURS: dict[str, _Behaviour] = {name: getattr(Engine, name) for name in _NAMES}


@contextlib.asynccontextmanager
async def engine() -> AsyncIterator[Engine]:
    """A scripted engine on a free port."""
    made = Engine()
    runner = web.ServerRunner(made.server, handle_signals=False, shutdown_timeout=0.05)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.port = int(runner.addresses[0][1])
    try:
        yield made
    finally:
        made.release.set()
        await runner.cleanup()


def settings_for(*engines: Engine, **more: object) -> Settings:
    """Settings with these engines, quick to notice things, and a policy that spreads."""
    limits = more.pop("engine_limits", LimitSettings())
    assert isinstance(limits, LimitSettings)
    backends = [
        BackendSettings(url=made.url, name=f"e{index}", profile=PROFILE, limits=limits)
        for index, made in enumerate(engines)
    ]
    base: dict[str, object] = {"port": 0, "backends": backends, "admin_token": "secret", "tick_ms": 20}
    return Settings.model_validate(base | more)


@contextlib.asynccontextmanager
async def gateway(
    settings: Settings,
    up: int | None = None,
    write_log: Callable[[bytes], None] | None = None,
    policy: PolicySource | None = None,
    store: Store | None = None,
) -> AsyncIterator[Gateway]:
    """A running gateway whose backends are up."""
    wiring = await asyncio.to_thread(wire, settings)
    if write_log is not None:
        wiring = replace(wiring, write_log=write_log)
    if policy is not None:
        wiring = replace(wiring, policy=policy)
    if store is not None:
        wiring = replace(wiring, store=store)
    async with running(settings, wiring) as made:
        wanted = len(settings.backends) if up is None else up
        await until(lambda: made.fleet.up >= wanted)
        yield made


class Client:
    """A client of one gateway."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self.session = session
        self.base = f"http://127.0.0.1:{port}"

    def chat(
        self, behave: str = "good", *, stream: bool = True, headers: dict[str, str] | None = None, **more: object
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}], "stream": stream} | more
        sent = {BEHAVIOUR: behave} | (headers or {})
        return self.session.post(f"{self.base}/v1/chat/completions", json=body, headers=sent)

    async def read_chat(
        self, behave: str = "good", *, stream: bool = True, headers: dict[str, str] | None = None, **more: object
    ) -> tuple[int, bytes]:
        async with self.chat(behave, stream=stream, headers=headers, **more) as answer:
            return answer.status, await answer.read()


@contextlib.asynccontextmanager
async def client(made: Gateway) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, made.port)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is sure to come; a test that waits in vain fails."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event of its own)
            await asyncio.sleep(0.005)


async def until_told(condition: Callable[[], Awaitable[bool]]) -> None:
    """`until`, for something that must be asked for."""
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110  (another process has no event to wait for)
            await asyncio.sleep(0.05)


async def settled(made: Gateway) -> None:
    """Wait until no request is left in the gateway, and its load is zero."""
    async with asyncio.timeout(10):
        await made.shell.wait_empty()
        await made.shell.settle()


def idle(made: Gateway) -> bool:
    """Conservation, and no load anywhere."""
    return (
        made.view.conserved()
        and made.shell.pace.openings == 0
        and all(
            numbers.decodes == numbers.peak_kv_tokens == numbers.queued_prefill_tokens == 0
            for numbers in made.view.numbers()
        )
    )
