"""The engine's end of the channel: one method of vLLM's EngineCore, called by name from the API server.

vLLM answers such a call in the engine's process between two steps. What goes and comes is JSON text of
`tiergate_engine.control`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import vllm

from tiergate_engine.control import EngineState, Mode, Orders, SchedulerKind, StepFacts, digest_of
from tiergate_engine.vllm.versions import UNTESTED_NOTE, plain_version
from tiergate_engine.wire import as_count, document, required

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore


def engine_call(core: EngineCore, verb: str, text: str) -> str:
    """Answer "state", "orders" or "steps". Raises ControlError for a document that cannot be read."""
    scheduler: Any = core.scheduler
    pilot = getattr(scheduler, "tiergate", None)
    now_s = time.monotonic()
    if verb == "steps":
        since = as_count(required(document(text), "since"), "since")
        if pilot is None:
            return StepFacts("undriven", 0).to_json()
        pilot.watch(now_s)
        facts: StepFacts = pilot.facts.since(since)
        return facts.to_json()
    orders = Orders.from_json(text) if verb == "orders" else None
    if pilot is None:
        return _undriven(core).to_json()
    if orders is not None:
        pilot.order(orders, now_s, digest_of(text))
    state: EngineState = scheduler.tiergate_state()
    return state.to_json()


def _undriven(core: EngineCore) -> EngineState:
    """The state of an engine of an untested version: it runs vLLM's own scheduler and obeys no orders."""
    scheduler: Any = core.scheduler
    config = core.vllm_config.scheduler_config
    running, waiting = scheduler.get_request_counts()
    return EngineState(
        run_id="undriven",
        engine="vllm",
        engine_version=plain_version(vllm.__version__),
        tested=False,
        scheduler=SchedulerKind.ASYNC if config.async_scheduling else SchedulerKind.SYNC,
        mode=Mode.STOCK,
        orders_digest=None,
        orders_age_s=None,
        steps=0,
        running=running,
        waiting=waiting,
        kv_usage=0.0,
        budget_tokens=config.max_num_batched_tokens,
        max_batched_tokens=config.max_num_batched_tokens,
        max_running_seqs=config.max_num_seqs,
        note=UNTESTED_NOTE,
    )
