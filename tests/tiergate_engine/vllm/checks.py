"""Checks of the driven schedulers in vLLM's environment. `tests/real_engine/test_vllm_schedulers.py` runs them.

`python -m tests.tiergate_engine.vllm.checks` runs all and prints one JSON object: by name, null for one that
passed, else what went wrong. Every check gets the kind of scheduler it is for. `made_up` says what is real here:
vLLM's schedulers, and no model.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from tests.tiergate_engine.vllm.made_up import MODEL, STEP_TIME, Engine, Size, settings
from tiergate_engine import vllm as plugin
from tiergate_engine.control import EngineState, Mode, Orders, Promise, StepFacts, digest_of
from tiergate_engine.drive import Rules
from tiergate_engine.vllm import pilot, scheduler
from tiergate_engine.vllm.channel import ControlEndpoint, ControlMiddleware
from tiergate_engine.vllm.versions import SCHEDULER
from tiergate_engine.vllm.waiting import DeadlineQueue

DRIVEN = Orders(Mode.DRIVEN, STEP_TIME, Rules(margin=1.05))
KINDS = {"sync": False, "async": True}
Check = Callable[[bool], None]


def order(engine: Engine, orders: Orders) -> None:
    """Give orders as the channel does."""
    engine.scheduler.tiergate.order(orders, engine.clock.now_s)


def offer(engine: Engine, seed: int, count: int, promised: bool) -> None:
    """Requests of all sizes come while the engine runs; some are aborted. Runs until all are done."""
    chance = random.Random(seed)
    names = [f"r{number}" for number in range(count)]
    for name in names:
        ttft_s = chance.choice([None, 0.05, 0.2, 1.0, -0.1]) if promised else None
        promise = Promise(ttft_s, chance.choice([0.01, 0.03, 0.1]), chance.random() < 0.1)
        prompt, output = chance.choice([1, 20, 300, 2000]), chance.choice([1, 5, 60])
        engine.add(name, prompt, output, promise if ttft_s is not None else None)
        for _ in range(chance.randrange(4)):
            engine.step()
        if chance.random() < 0.1:
            engine.abort(chance.choice(names[: names.index(name) + 1]))
    engine.run()


def undriven_it_fills_steps_as_vllm_does(asynchronous: bool) -> None:
    for seed in range(3):
        both = [
            Engine(asynchronous=asynchronous, driven=driven, size=Size(blocks=400)) for driven in (False, True)
        ]
        for engine in both:
            offer(engine, seed, 30, promised=True)
        own, ours = both
        assert ours.steps == own.steps
        assert ours.finished == own.finished
        assert len(ours.steps) > 50


def the_chunk_ordered_is_the_chunk_obeyed_on_top_of_decodes(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    for number in range(4):
        engine.add(f"d{number}", 5, 200)
    for _ in range(6):
        engine.step()
    order(engine, Orders(chunk_tokens=64))
    engine.add("long", 300, 3)
    done = len(engine.steps)
    for _ in range(8):
        engine.step()
    chunks = [(held.get("long", 0), len(held)) for held in engine.steps[done:]]
    assert chunks[:5] == [(64, 5)] * 4 + [(44, 5)], chunks
    order(engine, Orders())
    engine.add("next", 300, 3)
    done = len(engine.steps)
    for _ in range(3):
        engine.step()
    assert next(held["next"] for held in engine.steps[done:] if "next" in held) == 300


def nobody_is_admitted_beyond_the_cap(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    order(engine, Orders(running_cap=3))
    for number in range(10):
        engine.add(f"r{number}", 20, 20)
    engine.run()
    assert max(len(held) for held in engine.steps) == 3
    assert len(engine.finished) == 10


def queued_prompts_are_served_by_deadline_and_relegated_ones_last(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    order(engine, replace(DRIVEN, running_cap=1))
    engine.add("running", 20, 5, Promise(1.0, 0.1))
    engine.step()
    engine.add("free", 20, 2)
    engine.add("lost", 20, 2, Promise(2.0, 0.1, relegated=True))
    for name, ttft_s in (("b", 8.0), ("c", 7.0), ("d", 3.0), ("e", 5.0), ("late", 0.001)):
        engine.add(name, 20, 2, Promise(ttft_s, 0.1))
    engine.run()
    assert engine.finished[:6] == ["running", "d", "e", "c", "b", "free"], engine.finished
    assert set(engine.finished[6:]) == {"lost", "late"}, engine.finished


def time_on_the_way_to_the_engine_counts(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    engine.add("r", 20, 2, Promise(0.5, 0.1), age_s=0.2)
    due = engine.scheduler.requests["r"].tiergate_due
    assert abs(due.first_s - (engine.clock.now_s + 0.3)) < 1e-6


def an_urgent_prompt_overtakes_one_that_is_being_served(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    order(engine, DRIVEN)
    engine.add("long", 5000, 2, Promise(10.0, 0.1))
    for _ in range(3):
        engine.step()
    came_s = engine.clock.now_s
    engine.add("urgent", 400, 2, Promise(0.06, 0.1))
    engine.run()
    assert engine.tokens_s["urgent"][0] - came_s <= 0.06
    assert len(engine.tokens_s["long"]) == 2


def decodes_keep_their_promise_beside_a_long_prompt(asynchronous: bool) -> None:
    late = {}
    for name, orders in (("stock", Orders()), ("driven", DRIVEN)):
        engine = Engine(asynchronous=asynchronous)
        order(engine, orders)
        starts_s = engine.clock.now_s
        for number in range(4):
            engine.add(f"d{number}", 10, 100, Promise(0.1, 0.012))
        for _ in range(10):
            engine.step()
        engine.add("long", 6000, 2, Promise(60.0, 0.1))
        engine.run()
        late[name] = sum(
            at_s > starts_s + 0.1 + index * 0.012 + 1e-9
            for number in range(4)
            for index, at_s in enumerate(engine.tokens_s[f"d{number}"])
        )
        assert len(engine.tokens_s["long"]) == 2
    assert late["driven"] == 0, late


def loose_decodes_are_left_out_and_stay_on_time(asynchronous: bool) -> None:
    late = {}
    for skip in (False, True):
        engine = Engine(asynchronous=asynchronous, size=Size(seqs=64))
        order(engine, replace(DRIVEN, rules=replace(DRIVEN.rules, skip=skip)))
        starts_s = engine.clock.now_s
        for number in range(50):
            engine.add(f"loose{number}", 10, 40, Promise(0.3, 0.2))
        for _ in range(4):
            engine.step()
        tight_s = engine.clock.now_s
        engine.add("tight", 10, 60, Promise(0.03, 0.0068))  # a step of 51 decodes takes 8.6 ms
        engine.run()
        late[skip] = sum(
            at_s > tight_s + 0.03 + index * 0.0068 + 1e-9 for index, at_s in enumerate(engine.tokens_s["tight"])
        )
        for number in range(50):
            due = [starts_s + 0.3 + index * 0.2 for index in range(40)]
            times = engine.tokens_s[f"loose{number}"]
            assert len(times) == 40
            assert all(at_s <= due_s for at_s, due_s in zip(times, due, strict=True)), f"loose{number} was late"
        skipped = sum(fact.skipped for fact in engine.scheduler.tiergate.facts.since(0).facts)
        assert (skipped > 0) is skip
    assert late[True] < late[False] / 4, late


def a_plan_that_fails_leaves_vllms_own_step_and_is_said_once(asynchronous: bool) -> None:
    own = Engine(asynchronous=asynchronous, driven=False)
    offer(own, 7, 20, promised=True)
    with mock.patch.object(pilot, "plan_decodes", side_effect=ZeroDivisionError("a broken plan")):
        engine = Engine(asynchronous=asynchronous)
        order(engine, replace(DRIVEN, rules=replace(DRIVEN.rules, deadline_order=False)))
        offer(engine, 7, 20, promised=True)
    assert engine.steps == own.steps
    assert len([line for line in engine.said.lines if "failed" in line]) == 1
    assert engine.scheduler.tiergate_state().failures > 10


def orders_that_lapse_leave_vllms_own_queue(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    order(engine, replace(DRIVEN, lapse_s=0.5, running_cap=1))
    for number in range(5):
        engine.add(f"r{number}", 20, 40, Promise(5.0 - number, 0.5))
    for _ in range(4):
        engine.step()
    assert isinstance(engine.scheduler.waiting, DeadlineQueue)
    engine.clock.now_s += 0.6
    engine.step()
    engine.step()
    assert isinstance(engine.scheduler.waiting, RequestQueue)
    state = engine.scheduler.tiergate_state()
    assert (state.mode, state.running) == (Mode.STOCK, 5)
    assert state.note is not None
    assert state.orders_digest is not None
    engine.run()
    assert len(engine.finished) == 5


def whatever_comes_everybody_gets_all_tokens(asynchronous: bool) -> None:
    for seed in range(6):
        tight_memory = seed % 2 == 1
        engine = Engine(asynchronous=asynchronous, size=Size(seqs=8, blocks=160 if tight_memory else 2000))
        order(engine, replace(DRIVEN, chunk_tokens=100 if seed % 3 == 0 else None))
        offer(engine, seed, 40, promised=True)
        assert not engine.scheduler.requests
        assert not engine.scheduler.running
        assert not engine.scheduler.waiting
        assert engine.scheduler.tiergate_failures == 0, engine.said.lines
        for held in engine.steps:
            assert len(held) <= 8
            assert sum(held.values()) <= 512


def facts_tell_each_step_and_its_time(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    order(engine, DRIVEN)
    for number in range(3):
        engine.add(f"r{number}", 700, 30, Promise(5.0, 0.5))
    engine.run()
    facts = engine.scheduler.tiergate.facts.since(0)
    held = [step for step in engine.steps if step]
    assert [fact.step.tokens for fact in facts.facts] == [sum(step.values()) for step in held]
    for fact in facts.facts:
        assert abs(fact.seconds - STEP_TIME.seconds(fact.step)) < 1e-9, fact
        assert fact.step.tokens <= fact.budget_tokens
    assert engine.scheduler.tiergate.facts.since(len(held) - 1).first == len(held) - 1
    assert len(engine.scheduler.tiergate.facts.since(len(held) - 1).facts) == 1


def the_cost_that_is_told_is_what_was_spent_around_vllms_own_schedule(asynchronous: bool) -> None:
    """Each part takes a time of its own by a made-up clock; vLLM's own part is not the plug-in's."""
    engine = Engine(asynchronous=asynchronous)
    order(engine, replace(DRIVEN, chunk_tokens=64))
    spent_s = 0.0

    def thread_time() -> float:
        return spent_s

    def costs(owner: object, name: str, seconds: float) -> mock._patch[Callable[..., object]]:
        own: Callable[..., object] = getattr(owner, name)

        def call(*args: object, **named: object) -> object:
            nonlocal spent_s
            answer = own(*args, **named)
            spent_s += seconds
            return answer

        return mock.patch.object(owner, name, call)

    scheduler_class = AsyncScheduler if asynchronous else Scheduler
    pilot_class = pilot.Pilot
    with (
        mock.patch.object(engine.clock, "thread_time", thread_time),
        costs(scheduler_class, "schedule", 1.0),
        costs(pilot_class, "turn", 50e-6),
        costs(type(engine.scheduler), "_put_back", 7e-6),
        costs(pilot_class, "scheduled", 20e-6),
    ):
        engine.add("long", 2000, 2, Promise(60.0, 1.0))
        for _ in range(10):
            engine.step()
    told_us = engine.scheduler.tiergate_state().plan_us
    assert abs(told_us - 77.0) < 1e-3, told_us


def an_untested_version_runs_vllms_own_scheduler_or_refuses(asynchronous: bool) -> None:
    with mock.patch.object(scheduler, "TESTED", frozenset({"0.0.1"})):
        made = plugin.Scheduler(**settings(asynchronous, Size()))
        assert type(made) is (AsyncScheduler if asynchronous else Scheduler)
        with mock.patch.dict(os.environ, {"TIERGATE_STRICT": "1"}):
            refusal = _error_of(lambda: plugin.Scheduler(**settings(asynchronous, Size())))
        assert refusal is not None
        assert "0.0.1" in str(refusal)


def _error_of(call: Callable[[], object]) -> RuntimeError | None:
    try:
        call()
    except RuntimeError as error:
        return error
    return None


def the_control_routes_stand_behind_the_api_key(asynchronous: bool) -> None:
    """Both ways to add them: the endpoint plug-in, and the middleware, which stands outside of vLLM's check."""
    engine = Engine(asynchronous=asynchronous)
    for add in (
        lambda app: ControlEndpoint().attach_router(app),
        lambda app: app.add_middleware(ControlMiddleware),
    ):
        app = FastAPI()
        app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
        add(app)
        app.state.engine_client = _Client(engine)
        browser = TestClient(app)
        for method, path in (("GET", "state"), ("PUT", "orders"), ("GET", "steps")):
            assert browser.request(method, f"/v1/tiergate/{path}").status_code == 401, path
        browser.headers["authorization"] = "Bearer secret"
        told = browser.put("/v1/tiergate/orders", content=Orders(chunk_tokens=77).to_json())
        assert EngineState.from_json(told.content).orders_digest == Orders(chunk_tokens=77).digest
        assert engine.scheduler.tiergate.orders.chunk_tokens == 77
        assert EngineState.from_json(browser.get("/v1/tiergate/state").content).tested
        newer = Orders(chunk_tokens=78).to_json().replace("{", '{"field_of_the_future":1,', 1)
        told = browser.put("/v1/tiergate/orders", content=newer)
        assert EngineState.from_json(told.content).orders_digest == digest_of(newer)
        assert StepFacts.from_json(browser.get("/v1/tiergate/steps?since=3").content).facts == ()
        assert browser.get("/v1/tiergate/steps?since=-1").status_code == 400
        assert browser.put("/v1/tiergate/orders", content='{"version":9}').status_code == 400
        app.state.engine_client.vllm_config.scheduler_config.scheduler_cls = None
        assert browser.get("/v1/tiergate/state").status_code == 501


class _Client:
    """Stands in for vLLM's engine client and its utility calls."""

    def __init__(self, engine: Engine) -> None:
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=SCHEDULER))
        self.engine_core = self
        self.core = SimpleNamespace(scheduler=engine.scheduler)

    async def call_utility_all_async(self, name: str, verb: str, text: str) -> list[str]:
        call: Callable[..., str] = getattr(EngineCore, name)
        return [call(self.core, verb, text)]


CHECKS: tuple[Check, ...] = (
    undriven_it_fills_steps_as_vllm_does,
    the_chunk_ordered_is_the_chunk_obeyed_on_top_of_decodes,
    nobody_is_admitted_beyond_the_cap,
    queued_prompts_are_served_by_deadline_and_relegated_ones_last,
    time_on_the_way_to_the_engine_counts,
    an_urgent_prompt_overtakes_one_that_is_being_served,
    decodes_keep_their_promise_beside_a_long_prompt,
    loose_decodes_are_left_out_and_stay_on_time,
    a_plan_that_fails_leaves_vllms_own_step_and_is_said_once,
    orders_that_lapse_leave_vllms_own_queue,
    whatever_comes_everybody_gets_all_tokens,
    facts_tell_each_step_and_its_time,
    the_cost_that_is_told_is_what_was_spent_around_vllms_own_schedule,
    an_untested_version_runs_vllms_own_scheduler_or_refuses,
    the_control_routes_stand_behind_the_api_key,
)


def main() -> None:
    assert MODEL.exists(), f"make the tiny model first: {MODEL}"
    wanted = set(sys.argv[1:])
    results: dict[str, str | None] = {}
    for check in CHECKS:
        for kind, asynchronous in KINDS.items():
            name = f"{check.__name__}[{kind}]"
            if wanted and not wanted & {name, check.__name__}:
                continue
            try:
                check(asynchronous)
                results[name] = None
            except Exception:  # noqa: BLE001 (each check's failure is a result)
                results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
