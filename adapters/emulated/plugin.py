"""Tiergate's plug-in as an emulated engine has it: the same HTTP contract, around a model that can be driven.

It emulates. Its model plans by the orders' rules and profile while they hold; a step takes as long as the engine's
own step times say. Of a real plug-in it differs in one thing: a promise counts only when the engine was driven as
its request came.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web

from adapters.emulated.errors import bad_request
from adapters.emulated.settings import EMULATES_VERSION
from tiergate_engine.control import (
    ORDERS_PATH,
    STATE_PATH,
    STEPS_PATH,
    ControlError,
    EngineState,
    Mode,
    Orders,
    Promise,
    SchedulerKind,
    StepFact,
    StepFacts,
)
from tiergate_engine.model import EngineModel, PlannedStep
from tiergate_engine.ordered import Ordered

_KEPT_STEPS = 4096


@dataclass(frozen=True, slots=True)
class Urgency:
    """How one request wants to be served; times are of the event loop's clock."""

    priority: int = 0
    first_due_s: float = math.inf
    pace_s: float = math.inf
    relegated: bool = False


class EmulatedPlugin:
    """What has been ordered, and the facts of the steps. Hears of each step from the engine's driver."""

    def __init__(self, model: EngineModel) -> None:
        self.run_id = uuid.uuid4().hex[:8]
        self.puts = 0
        self._model = model
        self._ordered = Ordered(model)
        self._facts: deque[StepFact] = deque(maxlen=_KEPT_STEPS)
        self._steps = 0

    @property
    def orders(self) -> Orders:
        """Given last, whether they hold or not."""
        return self._ordered.orders

    @property
    def refuses(self) -> str | None:
        """A fault on purpose: why it is not driven whatever the orders say."""
        return self._ordered.refuses

    @refuses.setter
    def refuses(self, why: str | None) -> None:
        self._ordered.refuses = why

    # --- for the engine --------------------------------------------------------------------------------------

    def before(self, now_s: float) -> None:
        """Set the knobs for the next step."""
        self._ordered.before(_now_s())

    def after(self, planned: PlannedStep, seconds: float) -> None:
        """A step ended."""
        self._facts.append(StepFact(planned.step, seconds, self._ordered.budget_tokens, self._model.held_up))
        self._steps += 1

    def urgency(self, priority: int, xargs: Mapping[str, object] | None) -> Urgency:
        """What a request was promised, while the engine is driven. Raises ControlError."""
        promise = Promise.from_xargs(xargs)
        if self._ordered.holding(_now_s()).mode is not Mode.DRIVEN or promise.ttft_s is None:
            return Urgency(priority)
        pace_s = math.inf if promise.tpot_s is None else promise.tpot_s
        return Urgency(priority, _now_s() + promise.ttft_s, pace_s, promise.relegated)

    # --- for the gateway -------------------------------------------------------------------------------------

    def routes(self) -> Sequence[web.RouteDef]:
        """The contract's routes."""
        return [
            web.get(STATE_PATH, self._tell_state),
            web.put(ORDERS_PATH, self._take_orders),
            web.get(STEPS_PATH, self._tell_steps),
        ]

    def facts(self) -> tuple[StepFact, ...]:
        """The latest steps."""
        return tuple(self._facts)

    def state(self) -> EngineState:
        """What `GET /v1/tiergate/state` tells."""
        model, config, ordered, now_s = self._model, self._model.config, self._ordered, _now_s()
        age_s = ordered.age_s(now_s)
        return EngineState(
            run_id=self.run_id,
            engine="vllm",
            engine_version=EMULATES_VERSION,
            tested=True,
            scheduler=SchedulerKind.ASYNC if config.async_scheduling else SchedulerKind.SYNC,
            mode=ordered.holding(now_s).mode,
            orders_digest=ordered.digest,
            orders_age_s=age_s,
            steps=self._steps,
            running=model.running,
            waiting=model.waiting,
            kv_usage=model.kv_used_tokens / model.kv_capacity_tokens,
            budget_tokens=ordered.budget_tokens,
            max_batched_tokens=config.max_batched_tokens,
            max_running_seqs=config.max_running_seqs,
            note=ordered.refuses,
        )

    def forget(self) -> None:
        """As after a restart: nobody has spoken to it, and its steps count from zero."""
        self.run_id = uuid.uuid4().hex[:8]
        self._ordered.forget()
        self._steps = 0
        self._facts.clear()

    async def _tell_state(self, _: web.Request) -> web.Response:
        return _document(self.state().to_json())

    async def _take_orders(self, request: web.Request) -> web.Response:
        try:
            orders = Orders.from_json(await request.read())
        except ControlError as error:
            raise bad_request(str(error)) from error
        self._ordered.give(orders, _now_s())
        self.puts += 1
        return _document(self.state().to_json())

    async def _tell_steps(self, request: web.Request) -> web.Response:
        since = request.query.get("since", "0")
        if not (since.isascii() and since.isdecimal()):
            raise bad_request(f"since must be the number of a step, not {since!r:.40}")
        oldest = self._steps - len(self._facts)
        first = min(max(int(since), oldest), self._steps)
        return _document(StepFacts(self.run_id, first, tuple(self._facts)[first - oldest :]).to_json())


def _now_s() -> float:
    """The clock by which the engine's model runs."""
    return asyncio.get_running_loop().time()


def _document(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json")
