"""The routes: what is asked for by which path, and errors in the words of the one who asks."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

import orjson
from aiohttp import web
from multidict import CIMultiDict

from adapters.contract import OutgoingRequest, UpstreamError
from gateway.body import BodyBound, read_body
from gateway.client import bearer, forwarded, whole, without_keys
from gateway.errors import (
    ApiError,
    Dialect,
    NotFound,
    Unavailable,
    UpstreamFailed,
    WrongMethod,
)
from gateway.fleet import GatewayFleet
from gateway.generate import Generator, Parts
from gateway.request import decode
from gateway.routes import ROUTES, Route
from gateway.words import quoted

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_GENERATING: Mapping[str, Route] = {route.path: route for route in ROUTES}
_PLAIN = frozenset(
    {"/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize", "/v1/rerank", "/rerank", "/v1/score"}
)
_JSON = {"content-type": "application/json"}

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Gate:
    """Whether requests are let in; shut while the gateway goes down."""

    open: bool = True


class Api:
    """Everything under /v1, and whatever else was added by path."""

    def __init__(self, parts: Parts, fleet: GatewayFleet, generator: Generator, gate: Gate) -> None:
        self._parts = parts
        self._fleet = fleet
        self._generator = generator
        self._gate = gate
        self._more: dict[str, Handler] = {}
        self._prefixes: list[tuple[str, Handler]] = []

    def add(self, path: str, handler: Handler) -> None:
        """Serve one more path."""
        self._more[path] = handler

    def add_prefix(self, prefix: str, handler: Handler) -> None:
        """Serve everything below a path."""
        self._prefixes.append((prefix, handler))

    async def handle(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answer one HTTP request; never raises but for a connection that is gone."""
        route = _GENERATING.get(http.path)
        try:
            if route is not None:
                return await self._generate(http, route)
            return await self._other(http)
        except ApiError as error:
            return self._failed(error, Dialect.OPENAI if route is None else route.dialect, http)

    def _failed(self, error: ApiError, dialect: Dialect, http: web.BaseRequest) -> web.Response:
        self._parts.telemetry.failed_request(error.code or error.kind)
        headers = {**_JSON, **error.headers(), "x-request-id": self._public_id(http)}
        return whole(error.status, headers, error.body(dialect))

    def _public_id(self, http: web.BaseRequest) -> str:
        return _given_id(http) or self._generator.new_id()

    async def _generate(self, http: web.BaseRequest, route: Route) -> web.StreamResponse:
        if http.method != "POST":
            raise WrongMethod(f"{route.path} takes POST, not {http.method}")
        if not self._gate.open:
            raise Unavailable("the gateway is going down; ask another one", code="draining")
        caller = self._parts.live.caller(bearer(http))
        body = await self._read(http)
        return await self._generator.handle(http, route, body, caller, _given_id(http))

    async def _read(self, http: web.BaseRequest) -> bytes:
        """The body. Raises ApiError."""
        settings = self._parts.live.now.settings
        limit_bytes, within_s = settings.limits.body_bytes, settings.timeouts.body_s
        return await read_body(http, BodyBound(limit_bytes, within_s, " (limits.body_bytes)"))

    async def _other(self, http: web.BaseRequest) -> web.StreamResponse:
        path = http.path
        more = self._more.get(path)
        if more is not None:
            return await more(http)
        for prefix, handler in self._prefixes:
            if path.startswith(prefix):
                return await handler(http)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            self._parts.live.caller(bearer(http))
            return self._models(http)
        if path in _PLAIN:
            self._parts.live.caller(bearer(http))
            return await self._pass(http)
        raise NotFound(f"there is nothing at {http.method} {quoted(path)}", code="unknown_path")

    def _models(self, http: web.BaseRequest) -> web.Response:
        if http.method != "GET":
            raise WrongMethod(f"/v1/models takes GET, not {http.method}")
        cards = {name: self._model_card(name) for name in self._fleet.names()}
        wanted = http.path.removeprefix("/v1/models").strip("/")
        if not wanted:
            return whole(200, _JSON, orjson.dumps({"object": "list", "data": list(cards.values())}))
        if wanted not in cards:
            raise _no_model(wanted)
        return whole(200, _JSON, orjson.dumps(cards[wanted]))

    def _model_card(self, name: str) -> dict[str, str | int | None]:
        longest = self._fleet.max_model_tokens(name)
        return {"id": name, "object": "model", "created": 0, "owned_by": "tiergate", "max_model_len": longest}

    async def _pass(self, http: web.BaseRequest) -> web.StreamResponse:
        """Pass a small question to any engine that serves its model; it takes no place."""
        body = await self._read(http)
        model = decode(body).get("model")
        if model is not None and not (isinstance(model, str) and self._fleet.serves(model)):
            raise _no_model(model)
        member = self._fleet.any_up(model)
        if member is None or member.adapter is None:
            raise Unavailable("no backend is up for this request", code="no_backend")
        settings = self._parts.live.now.settings
        headers = without_keys(http.headers) if settings.keys else http.headers
        call = member.adapter.prepare(OutgoingRequest(http.path, headers, body, self._public_id(http), False))
        try:
            answer = await member.adapter.upstream.open(replace(call, timeout_s=settings.timeouts.head_s))
            try:
                text = await answer.read_all(settings.limits.answer_bytes)
            except BaseException:
                answer.abort()
                raise
            answer.release()
        except UpstreamError as error:
            raise UpstreamFailed(str(error), code=error.failure.value) from None
        told = CIMultiDict(forwarded(answer.headers))
        told["x-tiergate-backend"] = member.name
        return whole(answer.status, told, text)


def _no_model(name: object) -> NotFound:
    return NotFound(f"The model {quoted(name)} does not exist here", param="model", code="model_not_found")


def _given_id(http: web.BaseRequest) -> str | None:
    """The client's own request id, if it can be told on."""
    given = http.headers.get("x-request-id")
    return given if given is not None and _SAFE_ID.fullmatch(given) else None
