"""vLLM's scheduler with a plan around its `schedule`. The only file that stands on vLLM's insides.

Before vLLM fills a step, the step is planned, and four attributes are set that vLLM reads anew in every step:
who runs and in which order, the token budget, the most sequences that may run, and the waiting queue. Behind the
step they are put back. vLLM's own code then fills the step as always: memory, prefix cache, structured output and
all the rest. When planning fails, nothing is set for that step, and it is said once.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from tiergate_engine.control import ControlError, EngineState, SchedulerKind
from tiergate_engine.vllm.calls import engine_call
from tiergate_engine.vllm.facts import FactsRing
from tiergate_engine.vllm.pilot import Pilot, Situation, Turn
from tiergate_engine.vllm.promises import NO_PROMISE, due_of, promise
from tiergate_engine.vllm.versions import STRICT_SWITCH, TESTED, UTILITY, plain_version
from tiergate_engine.vllm.waiting import DeadlineQueue

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.tiergate")
_SMOOTHING = 0.02  # of the plan's cost: a mean over about the last 50 steps


def make(settings: Mapping[str, Any]) -> SchedulerInterface:
    """The scheduler for these settings of vLLM's; see `tiergate_engine.vllm.Scheduler`."""
    setattr(EngineCore, UTILITY, engine_call)  # by this name the API server reaches the engine's process
    asynchronous = settings["vllm_config"].scheduler_config.async_scheduling
    version = plain_version(vllm.__version__)
    if version not in TESTED:
        known = ", ".join(sorted(TESTED))
        said = f"tiergate_engine.vllm was not tested with vLLM {version}, but with {known}"
        if os.environ.get(STRICT_SWITCH) == "1":
            raise RuntimeError(f"{said}. Install a tested version, or unset {STRICT_SWITCH} to run it undriven.")
        logger.warning("%s: the engine schedules as vLLM does, undriven", said)
        return AsyncScheduler(**settings) if asynchronous else Scheduler(**settings)
    return DrivenAsyncScheduler(**settings) if asynchronous else DrivenScheduler(**settings)


class _Driven(Scheduler):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """What both of vLLM's schedulers get."""

    kind = SchedulerKind.SYNC
    # vLLM's own, which are set here for a step
    running: list[Any]
    waiting: Any
    max_num_scheduled_tokens: int
    max_num_active_reqs: int

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.tiergate = Pilot(FactsRing(uuid.uuid4().hex[:12]))
        self.tiergate_failures = 0
        self.tiergate_plan_s: float | None = None
        self._own_budget_tokens = self.max_num_scheduled_tokens
        self._own_running_cap = self.max_num_active_reqs
        logger.info("tiergate: process %d drives vLLM's %s scheduler", os.getpid(), self.kind.value)

    def add_request(self, request: Request) -> None:
        """Take a request in, and note what it was promised."""
        promise(request, NO_PROMISE)
        xargs = None if request.sampling_params is None else request.sampling_params.extra_args
        if xargs:
            try:
                promise(request, due_of(xargs, time.time() - request.arrival_time, time.monotonic()))
            except ControlError as error:
                logger.warning("tiergate: request %s runs without a promise: %s", request.request_id, error)
        super().add_request(request)

    def schedule(self, *args: Any, **named: Any) -> SchedulerOutput:
        """Fill a step: vLLM's own, with what was planned around it."""
        # A thread's own time: others' turns on its core are not the plug-in's work.
        began_s, work_from_s = time.monotonic(), time.thread_time()
        turn = self._begin(began_s)
        cost_s = time.thread_time() - work_from_s
        try:
            output = super().schedule(*args, **named)
        finally:
            work_from_s = time.thread_time()
            if turn is not None:
                self._put_back(turn)
        watched = self.tiergate.watching(began_s)
        if watched:
            self._note_scheduled(output, turn, began_s)
        cost_s += time.thread_time() - work_from_s
        if watched:
            before_s = cost_s if self.tiergate_plan_s is None else self.tiergate_plan_s
            self.tiergate_plan_s = before_s + _SMOOTHING * (cost_s - before_s)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take a step's outputs in, and note how long it took."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        self.tiergate.came_back(scheduler_output, time.monotonic())
        return outputs

    # --- a turn

    def _begin(self, now_s: float) -> Turn | None:
        try:
            pilot = self.tiergate
            if pilot.by_deadline(now_s) != isinstance(self.waiting, DeadlineQueue):
                self._swap_queue()
            if not pilot.commands(now_s):
                return None
            nobody_waits = not self.waiting and not self.kv_holding_waiting
            if nobody_waits and (not self.running or pilot.nothing_to_weigh(len(self.running), now_s)):
                return None
            turn = pilot.turn(self._situation(), now_s)
        except Exception as error:  # noqa: BLE001 (a failed plan must not end the engine: it schedules undriven)
            self.tiergate.look_again()
            self._failed("the step's plan", error)
            return None
        if turn.left_out:
            self.running = [one for one in turn.running if one not in turn.left_out]
        else:
            self.running = turn.running
        self.max_num_scheduled_tokens = turn.budget_tokens
        self.max_num_active_reqs = turn.running_cap
        return turn

    def _situation(self) -> Situation:
        pool = getattr(self.kv_cache_manager, "block_pool", None)
        return Situation(
            running=self.running,
            holding=self.kv_holding_waiting,
            queue=self.waiting,
            budget_tokens=self._own_budget_tokens,
            running_cap=self._own_running_cap,
            held_slots=self.num_waiting_for_streaming_input,
            free_blocks=None if pool is None else pool.get_num_free_blocks(),
            block_tokens=self.block_size,
            whole_prompt=self.scheduler_reserve_full_isl,
            drafts=self.num_spec_tokens > 0,
        )

    def _put_back(self, turn: Turn) -> None:
        self.max_num_scheduled_tokens = self._own_budget_tokens
        self.max_num_active_reqs = self._own_running_cap
        if turn.left_out:
            staying = set(self.running)
            before = set(turn.running)
            returning = [one for one in turn.running if one in staying or one in turn.left_out]
            self.running = returning + [one for one in self.running if one not in before]

    def _swap_queue(self) -> None:
        """Put the waiting requests into the queue of the present mode."""
        waiting = list(self.waiting)
        if isinstance(self.waiting, DeadlineQueue):
            own = create_request_queue(self.policy)
            for request in sorted(waiting, key=lambda one: one.arrival_time):
                own.add_request(request)
            self.waiting = own
        else:
            self.waiting = DeadlineQueue(waiting)

    def _note_scheduled(self, output: SchedulerOutput, turn: Turn | None, began_s: float) -> None:
        set_to = (self._own_budget_tokens, 0) if turn is None else (turn.budget_tokens, turn.skipped)
        try:
            self.tiergate.scheduled(output, self.requests, set_to, began_s, None if turn is None else turn.held)
        except Exception as error:  # noqa: BLE001 (facts are for others: the engine goes on without them)
            self._failed("what the step held", error)

    def _failed(self, what: str, error: Exception) -> None:
        self.tiergate_failures += 1
        if self.tiergate_failures == 1:
            said = "tiergate: %s failed, and vLLM goes on by itself. It is said once, and counted."
            logger.error(said, what, exc_info=error)

    # --- what the gateway is told

    def tiergate_state(self) -> EngineState:
        """What stands in `EngineState`."""
        now_s = time.monotonic()
        pilot = self.tiergate
        driven = pilot.commands(now_s)
        budget = pilot.last_budget_tokens if driven else None
        running, waiting = self.get_request_counts()
        note = None
        if pilot.given_s is not None and pilot.lapsed(now_s):
            note = "the orders have lapsed: nobody has renewed them"
        return EngineState(
            run_id=pilot.facts.run_id,
            engine="vllm",
            engine_version=plain_version(vllm.__version__),
            tested=True,
            scheduler=self.kind,
            mode=pilot.mode(now_s),
            orders_digest=pilot.digest,
            orders_age_s=None if pilot.given_s is None else now_s - pilot.given_s,
            steps=pilot.facts.steps,
            running=running,
            waiting=waiting,
            kv_usage=self.get_kv_cache_usage(),
            budget_tokens=self._own_budget_tokens if budget is None else budget,
            max_batched_tokens=self._own_budget_tokens,
            max_running_seqs=self._own_running_cap,
            plan_us=None if self.tiergate_plan_s is None else self.tiergate_plan_s * 1e6,
            failures=self.tiergate_failures,
            note=note,
        )


class DrivenScheduler(_Driven):
    """vLLM's synchronous scheduler, driven."""


class DrivenAsyncScheduler(_Driven, AsyncScheduler):  # type: ignore[misc]  # as above
    """vLLM's asynchronous scheduler, driven: the next step is planned while one runs. Not run on a GPU."""

    kind = SchedulerKind.ASYNC
