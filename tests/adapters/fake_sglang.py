"""A fake SGLang server: the routes, streams, errors and load reports of version 0.5.23, with no model inside.

It is a fake. The shapes were written after the source of the server (`entrypoints/http_server.py`, `v1_loads.py`,
`entrypoints/openai/`, `managers/scheduler.py`); nothing here was compared with a live server. Times are those of
the emulated engine (`adapters.emulated.driver`), words those of the emulated model, so they say nothing of SGLang.

Prompts go first: without mixed chunks, no decode runs while there is one to compute, but for the decodes of the
interval behind a chunk. Not reproduced: `n`, tools, and preemption by priority.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from adapters.emulated.driver import EngineDriver
from adapters.emulated.tokens import encode
from tests.adapters.fake_parts import Json, chat_words, served
from tests.adapters.fake_sglang_run import Refused, Run
from tiergate_engine.lockstep import State
from tiergate_engine.model import EngineConfig, EngineModel, PlannedStep
from tiergate_engine.step import Step, StepTime
from tiergate_engine.steptime import RooflineStepTime

VERSION = "0.5.23"
PUBLISH_STEPS = 15  # a busy scheduler tells its load this often
_PAGE_TOKENS = 16
_LOAD_KEYS_OF_0_5_9 = frozenset(
    {"dp_rank", "num_running_reqs", "num_waiting_reqs", "num_used_tokens", "token_usage", "max_total_num_tokens"}
)


@dataclass(frozen=True, slots=True)
class Habits:
    """What it was started with, and what it does wrong.

    Attributes:
        version: what it says it is; before 0.5.20 there is no /ready.
        plugin: whether Tiergate's plug-in is in it; `mixed`: `--enable-mixed-chunk`; `interval`:
            `--prefill-decode-interval`.
        says_mixed: its arguments say `--enable-mixed-chunk`, whatever its scheduler does; None: what it does.
        says_true: a refused setting is answered with `[true]`, as 0.5.12 does.
        loads: whether there is /v1/loads (since 0.5.9); `old_loads`: with the keys of its first version only.
        metrics: `--enable-metrics`.
        priority: `--enable-priority-scheduling`, with `threshold` for preemption, or None when that is off.
        low_first: `--schedule-low-priority-values-first`.
        aborts_priority: `--abort-on-priority-when-disabled`.
        admin_only: settings and aborts want an admin key that we do not have.
        merged: up to this many tokens in one event, as when the writer lags behind.
        overloaded: the queue is full.
        fails_after: every generation fails after this many tokens.
        ready: what /ready says.
        lingers: a request whose client left goes on until it is aborted. (SGLang aborts it after two seconds.)
    """

    version: str = VERSION
    plugin: bool = False
    mixed: bool = False
    interval: int = 0
    says_mixed: bool | None = None
    says_true: bool = False
    loads: bool = True
    old_loads: bool = False
    metrics: bool = True
    priority: bool = False
    threshold: int | None = 10
    low_first: bool = False
    aborts_priority: bool = False
    admin_only: bool = False
    merged: int = 1
    overloaded: bool = False
    fails_after: int | None = None
    ready: bool = True
    lingers: bool = False

    @property
    def has_ready(self) -> bool:
        return tuple(map(int, self.version.split("."))) >= (0, 5, 20)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a launcher's flags set, for one rank."""

    max_running_requests: int = 128
    max_queued_requests: int | None = None
    chunked_prefill_size: int = 2048
    context_tokens: int = 4096
    kv_tokens: int = 65_536
    ranks: int = 1
    stages: int = 1


class SglangModel(EngineModel):
    """The emulated engine with SGLang's order of steps, and the sums that it keeps of them.

    Attributes:
        mixed: chunks and decodes share a step.
        interval: steps of decodes behind each chunk.
        full_at: so many ran when the cap was raised; nobody is let in until one of them is gone.
    """

    moments: tuple[float, ...] = (0.0,) * 6
    prefill_us = 0
    prefill_tokens = 0
    mixed = False
    interval = 0
    full_at: int | None = None
    _owed = 0  # steps of decodes until the next chunk

    @property
    def prompts(self) -> int:
        """Prompts that are being computed."""
        return len(self._partial)

    def set_running_cap(self, sequences: int | None) -> None:
        """One that is raised while others wait for a place shows when somebody leaves."""
        if self.waiting and self.running >= self._cap:
            self.full_at = self.running
        super().set_running_cap(sequences)

    def _seat_running(self) -> bool:
        decodes = {key: one for key, one in self._running.items() if one.state is State.DECODE}
        if self.full_at is not None and self.running < self.full_at:
            self.full_at = None
        if decodes and not self.mixed and self._owed == 0 and self._has_prompt():
            self._held_up = decodes
        return super()._seat_running()

    def _seat_prefills(self, step: Step, admit: bool, now_s: float) -> Step:
        if not self.mixed and step.decode_seqs:
            self._owed = max(self._owed - 1, 0)
            return step
        found = super()._seat_prefills(step, admit and self.full_at is None, now_s)
        self._owed = self.interval if found.prefill_tokens else 0
        return found

    def _has_prompt(self) -> bool:
        """Whether a step without decodes would have something to do."""
        room = self.kv_capacity_tokens - self.kv_used_tokens >= self.config.max_model_tokens
        return bool(self._partial) or (
            self.waiting > 0 and self.running < self._cap and self.full_at is None and room
        )

    def next_step(self, now_s: float) -> PlannedStep | None:
        planned = super().next_step(now_s)
        if planned is None:
            return None
        step, time_us = planned.step, planned.duration_s * 1e6
        if step.prefill_tokens:
            self.prefill_us += round(time_us)
            self.prefill_tokens += step.prefill_tokens
        else:
            seqs = float(step.decode_seqs)
            sums = (1.0, seqs, time_us, seqs**2, seqs * time_us, seqs)
            self.moments = tuple(old + new for old, new in zip(self.moments, sums, strict=True))
        return planned


@dataclass(slots=True)
class FakeSglang:
    """The fake's state and handlers. One engine stands for all ranks, whose settings are told one by one."""

    model: str
    limits: Limits
    habits: Habits
    driver: EngineDriver
    engine: SglangModel
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    seen: list[Json] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    sets: list[Json] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    written: list[bytearray] = field(default_factory=list)
    requests: dict[str, Run] = field(default_factory=dict)  # by rid, while they are there
    disconnects: int = 0
    cap: int = 0
    chunk: int = 0
    interval: int = 0
    snapshot: Json = field(default_factory=dict)
    told_at: tuple[int, bool] = (-1, True)  # the step of the snapshot, and whether the engine was idle

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self.middleware()])
        app.router.add_routes(
            [
                web.get("/health", self.health),
                web.get("/ready", self.ready),
                web.get("/v1/models", self.models),
                web.get("/server_info", self.server_info),
                web.get("/v1/loads", self.loads),
                web.get("/metrics", self.metrics),
                web.post("/tokenize", self.tokenize),
                web.post("/set_internal_state", self.set_internal_state),
                web.post("/abort_request", self.abort_request),
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
            ]
        )
        return app

    def middleware(self) -> Middleware:
        @web.middleware
        async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.asked.append(request.path)
            try:
                return await handler(request)
            except Refused as error:
                return web.json_response(error.body(), status=error.status)
            except web.HTTPNotFound:
                return web.json_response({"detail": "Not Found"}, status=404)

        return note

    def behave(self, **habits: object) -> None:
        """Change some habits."""
        self.habits = replace(self.habits, **habits)  # type: ignore[arg-type]  # names and types vary by test

    # --- what it says of itself ----------------------------------------------------------------------------

    async def health(self, _: web.Request) -> web.Response:
        raise AssertionError("it would generate a token, and take a second")

    async def ready(self, _: web.Request) -> web.Response:
        if not self.habits.has_ready:
            raise web.HTTPNotFound
        return web.Response(status=200 if self.habits.ready else 503)

    async def models(self, _: web.Request) -> web.Response:
        card: Json = {"id": self.model, "object": "model", "owned_by": "sglang", "root": self.model}
        card["max_model_len"] = self.limits.context_tokens
        return web.json_response({"object": "list", "data": [card]})

    async def server_info(self, _: web.Request) -> web.Response:
        limits, habits = self.limits, self.habits
        settings: Json = {
            "model_path": self.model,
            "chunked_prefill_size": limits.chunked_prefill_size,
            "max_prefill_tokens": 16_384,
            "max_running_requests": None,
            "enable_mixed_chunk": habits.mixed if habits.says_mixed is None else habits.says_mixed,
            "prefill_decode_interval": habits.interval,
            "page_size": _PAGE_TOKENS,
            "pp_size": limits.stages,
            "dp_size": limits.ranks,
            "pp_max_micro_batch_size": None,
            "enable_priority_scheduling": habits.priority,
            "disable_priority_preemption": habits.threshold is None,
            "priority_scheduling_preemption_threshold": habits.threshold or 0,
            "schedule_low_priority_values_first": habits.low_first,
        }
        state: Json = {
            **settings,
            "pp_max_micro_batch_size": self.cap,
            "effective_max_running_requests_per_dp": limits.max_running_requests,
            "memory_usage": {"token_capacity": limits.kv_tokens},
        }
        if habits.plugin:
            most = limits.chunked_prefill_size
            sizes = {"now": self.chunk, "least": _PAGE_TOKENS, "most": most, "multiple": _PAGE_TOKENS}
            told: Json = {"version": 1, "mixed": habits.mixed, "chunked_prefill_size": sizes}
            if habits.has_ready:  # the interval came with the same version
                told["prefill_decode_interval"] = {"now": self.interval, "launched": habits.interval}
            state["tiergate"] = told
        info = {
            **settings,
            "max_total_num_tokens": limits.kv_tokens,
            "version": habits.version,
            "internal_states": [state] * limits.ranks,
        }
        return web.json_response(info)

    async def loads(self, request: web.Request) -> web.Response:
        """As old as the last snapshot: a busy scheduler writes one every 15 decode steps."""
        if not self.habits.loads:
            raise web.HTTPNotFound
        engine = self.engine
        step, idle = engine.steps, engine.idle
        told_step, told_idle = self.told_at
        if not self.snapshot or step - told_step >= PUBLISH_STEPS or (idle and not told_idle):
            self.told_at = (step, idle)
            self.snapshot = self._load()
        ranks = [{**self.snapshot, "dp_rank": rank} for rank in range(self.limits.ranks)]
        if self.habits.old_loads:
            ranks = [{name: rank[name] for name in _LOAD_KEYS_OF_0_5_9} for rank in ranks]
        stamp = datetime.now(UTC).isoformat()
        return web.json_response({"timestamp": stamp, "version": self.habits.version, "loads": ranks})

    def _load(self) -> Json:
        engine = self.engine
        moments = engine.moments
        return {
            "timestamp": time.time(),
            "num_running_reqs": engine.running,
            "num_waiting_reqs": engine.waiting,
            "num_waiting_uncached_tokens": sum(
                plan.prompt_tokens for run in self.requests.values() for plan in run.waiting()
            ),
            "num_used_tokens": engine.kv_used_tokens,
            "max_total_num_tokens": self.limits.kv_tokens,
            "max_running_requests": self.limits.max_running_requests,
            "token_usage": round(engine.kv_used_tokens / self.limits.kv_tokens, 4),
            "total_prefill_uncached_tokens": engine.prefill_tokens,
            "total_prefill_busy_us": engine.prefill_us,
            "decode_moments": list(moments) if moments[0] else None,
        }

    async def metrics(self, _: web.Request) -> web.Response:
        """With priorities, the queue is there once in all and again for each priority that was ever seen."""
        if not self.habits.metrics:
            raise web.HTTPNotFound
        engine = self.engine
        lines = [f'sglang:num_running_reqs{{model_name="m"{self._all()}}} {engine.running}']
        lines += [f'sglang:num_queue_reqs{{model_name="m"{self._all()}}} {engine.waiting}']
        if self.habits.priority:
            for value in {body.get("priority") for body in self.seen}:
                lines.append(f'sglang:num_queue_reqs{{model_name="m",priority="{value}"}} {engine.waiting}')
        lines += [f'sglang:token_usage{{model_name="m"}} {engine.kv_used_tokens / self.limits.kv_tokens}']
        return web.Response(text="\n".join(lines) + "\n")

    def _all(self) -> str:
        return ',priority=""' if self.habits.priority else ""

    async def tokenize(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        if ("prompt" in body) == ("messages" in body):
            raise Refused(400, "BadRequestError", "Exactly one of 'prompt' or 'messages' must be provided.")
        ids = encode(chat_words(body) if "messages" in body else str(body["prompt"]).split())
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": self.limits.context_tokens})

    # --- what it can be told -------------------------------------------------------------------------------

    async def set_internal_state(self, request: web.Request) -> web.Response:
        """200 whether it was taken or not."""
        self._need_admin()
        settings = orjson.loads(await request.read())["server_args"]
        self.sets.append(settings)
        taken = all(self._takes(name, value) for name, value in settings.items())
        if taken:
            for name, value in settings.items():
                if name == "pp_max_micro_batch_size":
                    self.cap = value
                    self.engine.set_running_cap(value)
                elif name == "prefill_decode_interval":
                    self.interval = self.engine.interval = value
                else:
                    self.chunk = value
                    self.engine.set_budget(value)
        return web.json_response([taken or self.habits.says_true] * self.limits.ranks)

    def _takes(self, name: str, value: object) -> bool:
        limits = self.limits
        if not isinstance(value, int):
            return False
        if name == "pp_max_micro_batch_size":
            return 1 <= value <= limits.max_running_requests // limits.stages
        if name == "chunked_prefill_size" and self.habits.plugin:
            return _PAGE_TOKENS <= value <= limits.chunked_prefill_size and value % _PAGE_TOKENS == 0
        return name == "prefill_decode_interval" and self.habits.plugin and self.habits.has_ready

    async def abort_request(self, request: web.Request) -> web.Response:
        """A known id aborts every id that begins with it; an unknown or empty one does nothing."""
        self._need_admin()
        rid = orjson.loads(await request.read()).get("rid") or ""
        self.aborts.append(rid)
        if rid in self.requests:
            for known, run in list(self.requests.items()):
                if known.startswith(rid):
                    run.end_by_abort()
                    if self.habits.lingers:
                        self.requests.pop(known)
        return web.Response()

    def _need_admin(self) -> None:
        if self.habits.admin_only:
            raise web.HTTPUnauthorized

    # --- generations ---------------------------------------------------------------------------------------

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await self._generate(request, body, [chat_words(body)], chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        if isinstance(body["prompt"], list) and isinstance(body.get("rid"), str):
            raise Refused(400, "BadRequestError", "The rid should be a list for batch processing.")
        return await self._generate(request, body, [str(one).split() for one in prompts], chat=False)

    async def _body(self, request: web.Request) -> Json:
        raw = await request.read()
        body = orjson.loads(raw)
        self.bodies.append(raw)
        self.seen.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        return dict(body)

    async def _generate(
        self, request: web.Request, body: Json, prompts: Sequence[Sequence[str]], *, chat: bool
    ) -> web.StreamResponse:
        run = Run(self, body, prompts, chat=chat)
        if run.rid in self.requests:
            raise Refused(400, "BadRequestError", f"Duplicate request ID detected: {run.rid}")
        self.requests[run.rid] = run
        left = False
        try:
            return await (run.stream(request) if body.get("stream") is True else run.whole())
        except (asyncio.CancelledError, ConnectionError):
            self.disconnects += 1
            left = self.habits.lingers
            raise
        finally:
            if not left:
                run.close()
                self.requests.pop(run.rid, None)


@contextlib.asynccontextmanager
async def fake_sglang(
    model: str = "test-model",
    *,
    limits: Limits = Limits(),
    habits: Habits = Habits(),
    step_s: float = 0.002,
    step_time: StepTime | None = None,
) -> AsyncIterator[FakeSglang]:
    """A fake SGLang on a free port; every step takes about `step_s`, or what `step_time` says."""
    config = EngineConfig(
        kv_tokens=limits.kv_tokens,
        max_model_tokens=limits.context_tokens,
        max_batched_tokens=limits.chunked_prefill_size,
        max_running_seqs=limits.max_running_requests,
    )
    engine = SglangModel(config, step_time or RooflineStepTime(c0_s=step_s))
    engine.mixed, engine.interval = habits.mixed, habits.interval
    driver = EngineDriver(engine)
    fake = FakeSglang(model, limits, habits, driver, engine)
    fake.cap = limits.max_running_requests // limits.stages
    fake.chunk, fake.interval = limits.chunked_prefill_size, habits.interval
    async with served(fake.application(), driver) as fake.url:
        yield fake
