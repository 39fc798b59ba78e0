"""What operators ask: health, metrics, the state of the fleet, decisions, and the tiers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import orjson
from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from gateway.api import Api, Gate
from gateway.body import BodyBound, read_body
from gateway.carried import CarriedView
from gateway.client import bearer, whole
from gateway.config import ConfigError, TierSettings, make_tiers
from gateway.errors import ApiError
from gateway.fleet import GatewayFleet
from gateway.live import Live
from gateway.policy import FleetPolicy
from gateway.recent import Decisions
from gateway.shared import PolicyConflict, SharedPolicy
from gateway.siblings import Siblings
from gateway.telemetry import Exposition
from gateway.view import FleetView, Json
from gateway.words import cut, quoted
from state.contract import StoreUnavailable

_JSON = {"content-type": "application/json"}
_PROBLEM = {"content-type": "application/problem+json"}
_METRICS = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}
_ADMIN = "/admin/v1/"
_TIERS = TypeAdapter(tuple[TierSettings, ...])
_BODY_BYTES = 1 << 20
_TITLES = {400: "Bad Request", 413: "Content Too Large", 415: "Unsupported Media Type"}


class Problem(Exception):
    """An answer other than success on an admin path (RFC 9457)."""

    def __init__(
        self, status: int, title: str, detail: str, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(detail)
        self.headers = headers
        self.status = status
        self.title = title
        self.detail = detail

    def answer(self) -> web.Response:
        body = {"type": "about:blank", "title": self.title, "status": self.status, "detail": self.detail}
        return whole(self.status, {**_PROBLEM, **self.headers}, orjson.dumps(body))


@dataclass(frozen=True, slots=True)
class Watched:
    """What the admin API looks at, and the one thing it changes."""

    live: Live
    view: FleetView
    fleet: GatewayFleet
    gate: Gate
    exposition: Exposition
    decisions: Decisions
    policy: SharedPolicy
    clock: Callable[[], float]
    carried: CarriedView
    siblings: Siblings | None = None


class Admin:
    """The operators' routes."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def attach(self, api: Api) -> None:
        """Serve these routes from the same socket."""
        api.add("/healthz", self._health)
        api.add("/readyz", self._ready)
        api.add("/metrics", self._metrics)
        api.add_prefix("/admin/", self._admin)

    async def _health(self, http: web.BaseRequest) -> web.StreamResponse:
        return whole(200, _JSON, b'{"status":"ok"}')

    async def _ready(self, http: web.BaseRequest) -> web.StreamResponse:
        watched = self._watched
        members = watched.fleet.members()
        up = watched.fleet.up
        if not watched.gate.open:
            status, word = 503, "draining"
        elif not up:
            status, word = 503, "no backend is up"
        else:
            status, word = 200, "ok"
        store = watched.fleet.store_mode.value
        body = {"status": word, "backends_up": up, "backends": len(members), "store": store}
        return whole(status, _JSON, orjson.dumps(body))

    async def _metrics(self, http: web.BaseRequest) -> web.StreamResponse:
        text, siblings = self._watched.exposition.text(), self._watched.siblings
        return whole(200, _METRICS, text if siblings is None else await siblings.metrics(text))

    async def _admin(self, http: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._answer(http)
        except Problem as problem:
            return problem.answer()

    async def _answer(self, http: web.BaseRequest) -> web.StreamResponse:
        live = self._watched.live
        if live.now.settings.admin_token is None:
            raise Problem(403, "Forbidden", "the admin API is closed: configure admin_token to open it")
        if not live.is_admin(bearer(http)):
            raise Problem(401, "Unauthorized", "a valid admin token is needed: Authorization: Bearer TOKEN")
        what = http.path.removeprefix(_ADMIN)
        if what == "tiers":
            if http.method == "GET":
                return self._tiers()
            if http.method == "PUT":
                return await self._put_tiers(http)
            raise Problem(405, "Method Not Allowed", "tiers takes GET and PUT")
        if http.method != "GET":
            raise Problem(405, "Method Not Allowed", f"{quoted(http.path)} takes GET")
        if what == "state":
            return whole(200, _JSON, orjson.dumps(self._watched.view.state(self._watched.clock())))
        if what == "carried":
            return whole(200, _JSON, await self._carried())
        if what.startswith("decisions/"):
            name = what.removeprefix("decisions/")
            found = self._watched.decisions.get(name)
            if found is None and self._watched.siblings is not None:
                found = await self._watched.siblings.decision(name)
            if found is not None:
                return whole(200, _JSON, found)
        raise Problem(404, "Not Found", f"there is nothing at {quoted(http.path)}")

    async def _carried(self) -> bytes:
        """What each process behind this port carries."""
        own, siblings = orjson.dumps(self._watched.carried.state()), self._watched.siblings
        told = [own] if siblings is None else await siblings.carried(own)
        return b'{"replicas":[' + b",".join(told) + b"]}"

    def _tiers(self) -> web.Response:
        body = _tiers_json(self._watched.policy.policy)
        return whole(200, {**_JSON, "etag": _etag(body)}, body)

    async def _read(self, http: web.BaseRequest) -> bytes:
        """The body. Raises Problem."""
        within_s = self._watched.live.now.settings.timeouts.body_s
        try:
            return await read_body(http, BodyBound(_BODY_BYTES, within_s, ""))
        except ApiError as error:
            raise Problem(error.status, _TITLES[error.status], error.message, error.headers()) from None

    async def _put_tiers(self, http: web.BaseRequest) -> web.Response:
        """Replace all tiers on all replicas: `{"tiers": [...], "default_tier": NAME}`, under If-Match when it is
        given. Without it, another change that comes between is a conflict all the same."""
        policy = self._watched.policy
        asked = http.headers.get("if-match")
        seen = _etag(_tiers_json(policy.policy))
        if asked not in {None, "*", seen}:
            raise Problem(412, "Precondition Failed", "the tiers have changed; read them again")
        tiers, default = await self._read_tiers(http)

        def edit(now: FleetPolicy) -> FleetPolicy:
            if _etag(_tiers_json(now)) != seen:
                status, title = (409, "Conflict") if asked in {None, "*"} else (412, "Precondition Failed")
                raise Problem(status, title, "the tiers were changed at the same time; read them again")
            return now.model_copy(update={"tiers": tiers, "default_tier": default})

        try:
            await policy.change(edit, "PUT /admin/v1/tiers")
        except ConfigError as error:
            raise Problem(422, "Unprocessable Content", str(error)) from None
        except PolicyConflict as error:
            raise Problem(409, "Conflict", str(error)) from None
        except StoreUnavailable:
            detail = "the store does not answer; whether the change was made shows when it does"
            raise Problem(503, "Service Unavailable", detail, {"retry-after": "1"}) from None
        return self._tiers()

    async def _read_tiers(self, http: web.BaseRequest) -> tuple[tuple[TierSettings, ...], str]:
        """What a PUT asks for. Raises Problem."""
        given = await self._read(http)
        try:
            body = orjson.loads(given)
            if not isinstance(body, dict) or not {"tiers", "default_tier"} >= set(body) >= {"tiers"}:
                raise Problem(400, "Bad Request", "the body must have `tiers` and may have `default_tier`")
            tiers = _TIERS.validate_python(body["tiers"])
            default = body.get("default_tier", self._watched.live.now.settings.default_tier)
            if not isinstance(default, str) or default not in {tier.name for tier in tiers}:
                raise ValueError(f"default_tier: must be one of the tiers' names, not {quoted(default)}")
            make_tiers(tiers, default)
        except orjson.JSONDecodeError as error:
            raise Problem(400, "Bad Request", f"not valid JSON: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise Problem(422, "Unprocessable Content", f"tiers.{cut(place)}: {first['msg']}") from None
        except ValueError as error:
            raise Problem(422, "Unprocessable Content", str(error)) from None
        return tiers, default


def _tiers_json(policy: FleetPolicy) -> bytes:
    tiers: list[Json] = [
        {
            "name": tier.name,
            "ttft_ms": tier.ttft_ms,
            "tpot_ms": tier.tpot_ms,
            "on_miss": tier.on_miss.value,
        }
        for tier in policy.tiers
    ]
    return orjson.dumps({"tiers": tiers, "default_tier": policy.default_tier})


def _etag(body: bytes) -> str:
    return f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'
