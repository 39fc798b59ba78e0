"""The HTTP face of an emulated engine: vLLM's routes around an `EngineDriver`.

It emulates, and says so in the header `x-tiergate-emulated`, in /version, in /v1/models' `owned_by`, in
/metrics and in the first line it prints.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket

from aiohttp import web
from aiohttp.typedefs import Handler

from adapters.emulated import exposition
from adapters.emulated.driver import EngineDriver
from adapters.emulated.errors import ApiError, bad_request
from adapters.emulated.generation import Generations, json_answer, read_json
from adapters.emulated.journal import Journal
from adapters.emulated.lag import LoopLag
from adapters.emulated.plugin import EmulatedPlugin
from adapters.emulated.prompts import chat_units
from adapters.emulated.protocol import DetokenizeBody, TokenizeBody, parse
from adapters.emulated.settings import EMULATED_HEADER, OWNER, VERSION, EmulatedSettings
from adapters.emulated.tokens import decode, encode
from tiergate_engine.drive import Rules
from tiergate_engine.model import EngineModel
from tiergate_engine.step import StepTime

_CLIENT_LEFT = 499


class EmulatedEngine:
    """One emulated engine: its settings, its driver, and the handlers of its routes."""

    def __init__(self, settings: EmulatedSettings, step_time: StepTime, journal: Journal | None = None) -> None:
        self.settings = settings
        engine = settings.engine
        if settings.plugin and engine.drive is None:
            engine = replace(engine, drive=Rules())
        model = EngineModel(engine, step_time)
        self.driver = EngineDriver(model, settings.noise_sigma, settings.seed, journal)
        self.lag: LoopLag | None = None  # the process's, while it is served
        self._started_s = int(time.time())
        self._generations = Generations(settings, self.driver)
        self.plugin: EmulatedPlugin | None = None
        if settings.plugin:
            self.plugin = self._generations.plugin = self.driver.watch = EmulatedPlugin(model)

    def application(self) -> web.Application:
        """The aiohttp application with vLLM's routes."""
        app = web.Application(client_max_size=self.settings.max_body_bytes, middlewares=[_errors])
        app.on_response_prepare.append(_say_emulated)
        if self.plugin is not None:
            app.router.add_routes(self.plugin.routes())
        app.router.add_routes(
            [
                web.post("/v1/chat/completions", self._generations.chat),
                web.post("/v1/completions", self._generations.completion),
                web.post("/v1/messages", self._generations.messages),
                web.post("/v1/messages/count_tokens", self._generations.count_tokens),
                web.post("/v1/embeddings", self._generations.embeddings),
                web.get("/v1/models", self.models),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.post("/ping", self.health),
                web.get("/version", self.version),
                web.get("/load", self.load),
                web.get("/metrics", self.metrics),
            ]
        )
        return app

    async def models(self, _request: web.Request) -> web.StreamResponse:
        """GET /v1/models."""
        card = {
            "id": self.settings.model,
            "object": "model",
            "created": self._started_s,
            "owned_by": OWNER,
            "root": self.settings.model,
            "parent": None,
            "max_model_len": self.settings.engine.max_model_tokens,
            "permission": [],
        }
        return json_answer({"object": "list", "data": [card]})

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        """POST /tokenize: the rule of `adapters.emulated.tokens`, the same that usage counts by."""
        body = parse(TokenizeBody, await read_json(request))
        self._generations.check_model(body.model)
        units = (body.prompt or "").split() if body.messages is None else chat_units(body.messages)
        return json_answer(
            {
                "count": len(units),
                "max_model_len": self.settings.engine.max_model_tokens,
                "tokens": encode(units),
                "token_strs": units if body.return_token_strs else None,
            }
        )

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        """POST /detokenize."""
        body = parse(DetokenizeBody, await read_json(request))
        self._generations.check_model(body.model)
        return json_answer({"prompt": decode(body.tokens)})

    async def health(self, _request: web.Request) -> web.StreamResponse:
        """GET /health, GET and POST /ping: 200 and nothing else."""
        return web.Response()

    async def version(self, _request: web.Request) -> web.StreamResponse:
        """GET /version."""
        return json_answer({"version": VERSION, "emulated": True, "profile": self.settings.profile})

    async def load(self, _request: web.Request) -> web.StreamResponse:
        """GET /load: generations in progress."""
        return json_answer({"server_load": self._generations.in_progress})

    async def metrics(self, _request: web.Request) -> web.StreamResponse:
        """GET /metrics."""
        page = exposition.render(self.settings, self.driver, self.lag)
        return web.Response(body=page, headers={"content-type": exposition.CONTENT_TYPE})


@dataclass(frozen=True, slots=True)
class Served:
    """An engine that listens, and where."""

    engine: EmulatedEngine
    url: str


@asynccontextmanager
async def serving(
    engines: Sequence[EmulatedEngine],
    host: str = "127.0.0.1",
    ports: Sequence[int] | None = None,
    grace_s: float = 0.0,
) -> AsyncIterator[tuple[Served, ...]]:
    """Serve engines, one port each (0, or no ports: any free one), until the block is left.

    Leaving it closes the ports, lets open requests go on for up to `grace_s`, then cuts what is left.
    Raises OSError when a port is taken.
    """
    with ExitStack() as listening:
        sockets = [listening.enter_context(_listen(host, port)) for port in (ports or [0] * len(engines))]
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
            lag = LoopLag()
            stack.callback(tasks.create_task(lag.run()).cancel)
            served: list[Served] = []
            sites: list[web.SockSite] = []
            for engine, one in zip(engines, sockets, strict=True):
                engine.lag = lag
                shown = f"[{host}]" if ":" in host else host
                url = f"http://{shown}:{one.getsockname()[1]}"
                stack.callback(tasks.create_task(engine.driver.run()).cancel)
                runner = _runner(engine)
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                sites.append(web.SockSite(runner, one))
                await sites[-1].start()
                served.append(Served(engine, url))
            yield tuple(served)
            for site in sites:
                await site.stop()
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    for engine in engines:
                        await engine.driver.drained()


def _runner(engine: EmulatedEngine) -> web.AppRunner:
    return web.AppRunner(
        engine.application(),
        access_log=None,
        handler_cancellation=True,  # a client that leaves frees its sequences at once
        keepalive_timeout=engine.settings.keep_alive_s,
        shutdown_timeout=0.1,
    )


def _listen(host: str, port: int) -> socket:
    listening = socket(AF_INET6 if ":" in host else AF_INET, SOCK_STREAM)
    try:
        listening.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listening


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return _refusal(error)
    except web.HTTPException as error:
        return _refusal(ApiError(error.status, error.reason))
    except web.RequestPayloadError:
        answer = _refusal(bad_request("There was an error parsing the body"))
        answer.force_close()  # where the next request would begin is unknown
        return answer
    except ConnectionResetError:
        return web.Response(status=_CLIENT_LEFT)  # nobody reads it: the client left before the first byte


def _refusal(error: ApiError) -> web.Response:
    return web.Response(status=error.status, body=error.body(), headers={"content-type": "application/json"})


async def _say_emulated(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers[EMULATED_HEADER] = "1"
    response.headers["server"] = OWNER
