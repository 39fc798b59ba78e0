"""The gateway's way to the engine: HTTP routes in vLLM's API server, and its utility calls behind them.

The API server and the engine are processes of their own; `calls` is the other end. The routes lie under /v1, so
that vLLM's ``--api-key`` guards them. With several data-parallel engines behind one server all of them get the
orders; the state and the facts told are the first one's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from tiergate_engine.control import ORDERS_PATH, STATE_PATH, STEPS_PATH, ControlError, Orders
from tiergate_engine.vllm.versions import SCHEDULER, UTILITY

if TYPE_CHECKING:
    from argparse import Namespace

    from starlette.applications import Starlette
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger("vllm.tiergate")

_Message = MutableMapping[str, Any]
_Application = Callable[[_Message, Callable[[], Awaitable[_Message]], Callable[[_Message], Awaitable[None]]], Any]


class ControlEndpoint:
    """vLLM's endpoint plug-in: the control routes. Loaded when VLLM_PLUGINS names `tiergate`."""

    name = "tiergate"
    required_tasks = ("generate",)

    def attach_router(self, app: Starlette) -> None:
        """Add the routes to vLLM's application."""
        attach(app)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Nothing is kept: the routes find vLLM's engine client where vLLM's own routes do."""


class ControlMiddleware:
    """The same routes for versions of vLLM without endpoint plug-ins: ``--middleware`` names this class.

    It only adds the routes, when the first request comes, and lets everything pass: vLLM puts a given middleware
    outside of its check of the API key, so answering here would answer anybody.
    """

    def __init__(self, app: _Application) -> None:
        self._app = app

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        app = scope.get("app")
        if scope["type"] == "http" and app is not None and not getattr(app.state, "tiergate_routes", False):
            attach(app)
        await self._app(scope, receive, send)


def attach(app: Starlette) -> None:
    """Add the routes of `tiergate_engine.control`."""
    app.state.tiergate_routes = True
    app.router.add_route(STATE_PATH, _state, methods=["GET"], include_in_schema=False)
    app.router.add_route(ORDERS_PATH, _orders, methods=["PUT"], include_in_schema=False)
    app.router.add_route(STEPS_PATH, _steps, methods=["GET"], include_in_schema=False)


async def _state(request: Request) -> Response:
    return await _answer(request, "state", "")


async def _orders(request: Request) -> Response:
    body = await request.body()
    try:
        Orders.from_json(body)
        text = body.decode()
    except (ControlError, UnicodeDecodeError) as error:
        return _error(400, str(error))
    return await _answer(request, "orders", text)


async def _steps(request: Request) -> Response:
    since = request.query_params.get("since", "0")
    if not (since.isascii() and since.isdecimal()):
        return _error(400, f"since must be the number of a step, not {since!r:.40}")
    return await _answer(request, "steps", json.dumps({"since": int(since)}))


async def _answer(request: Request, verb: str, text: str) -> Response:
    client: EngineClient = request.app.state.engine_client
    if client.vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
        return _error(501, f"this engine cannot be driven: start it with --scheduler-cls {SCHEDULER}")
    engines = client.engine_core
    try:
        if hasattr(engines, "call_utility_all_async"):
            answers = await engines.call_utility_all_async(UTILITY, verb, text)
            answer: str = answers[0]
        else:
            answer = await engines.call_utility_async(UTILITY, verb, text)
    except Exception as error:  # noqa: BLE001 (vLLM raises its own errors and bare ones; each is the engine's)
        logger.warning("tiergate: the engine did not answer %s: %s", verb, error)
        return _error(503, f"the engine did not answer: {error}")
    return Response(answer, media_type="application/json")


def _error(status: int, message: str) -> Response:
    """As vLLM's own errors look."""
    kind = {400: "BadRequestError", 501: "NotImplementedError"}.get(status, "ServiceUnavailableError")
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return Response(json.dumps(body), status, media_type="application/json")
