"""The contract between gateway and plug-ins: what is sent is what is read, and what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import profiles
from tiergate_engine.control import (
    ControlError,
    EngineState,
    Mode,
    Orders,
    Promise,
    SchedulerKind,
    StepFact,
    StepFacts,
)
from tiergate_engine.drive import Rules
from tiergate_engine.step import Step, StepTime
from tiergate_engine.steptime import RooflineStepTime, ScaledStepTime, ShiftedStepTime
from tiergate_engine.wire import step_time_from_json, step_time_to_json

ROOFLINE = RooflineStepTime(c0_s=0.01, weights_s=0.002, per_token_s=1e-5, sharpness=4.0, per_kv_s=1e-7)
TABLE = profiles.load("h200-llama-3.1-8b-bf16").step_time
DRIVEN = Orders(
    Mode.DRIVEN,
    ScaledStepTime(TABLE, 1.1, 1.2),
    Rules(margin=1.1, skip=False, longest_s=0.25),
    512,
    64,
    lapse_s=3.0,
)
STATE = EngineState(
    run_id="a1",
    engine="vllm",
    engine_version="0.32.0",
    tested=True,
    scheduler=SchedulerKind.ASYNC,
    mode=Mode.DRIVEN,
    orders_digest=DRIVEN.digest,
    orders_age_s=0.5,
    steps=7,
    running=3,
    waiting=1,
    kv_usage=0.25,
    budget_tokens=515,
    max_batched_tokens=8192,
    max_running_seqs=256,
    plan_us=31.5,
    failures=2,
    note="why not",
)


def changed(text: str, **fields: object) -> str:
    return json.dumps({**json.loads(text), **fields})


def without(text: str, name: str) -> str:
    given = json.loads(text)
    del given[name]
    return json.dumps(given)


# --- step times ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step_time",
    [ROOFLINE, TABLE, ScaledStepTime(TABLE, 1.1, 0.9), ShiftedStepTime(ScaledStepTime(ROOFLINE), 0.001)],
    ids=["roofline", "table", "scaled", "shifted"],
)
def test_a_step_time_comes_back_as_it_was(step_time: StepTime) -> None:
    text = json.dumps(step_time_to_json(step_time))
    back = step_time_from_json(json.loads(text))
    assert back == step_time
    step = Step.decode(20, 9000) + Step.chunk(300, 100)
    assert back.seconds(step) == step_time.seconds(step)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "profile must be a JSON object"),
        ({}, r"profile.kind is missing"),
        ({"kind": "magic"}, "roofline, table, scaled or shifted"),
        ({"kind": "roofline", "c0_s": "x"}, "profile.c0_s must be a finite number"),
        ({"kind": "roofline", "c0_s": -1}, "c0_s"),
        ({"kind": "scaled", "base": {"kind": "roofline", "c0_s": True}}, "profile.base.c0_s"),
        ({"kind": "scaled"}, "profile.base is missing"),
        ({"kind": "shifted", "base": {"kind": "roofline"}, "extra_s": -1}, "profile: extra_s"),
        (
            {"kind": "table", "decode": {"seqs": [1], "kv_tokens": [0, 1], "seconds": [["a"]]}},
            r"seconds\[0\]\[0\]",
        ),
    ],
)
def test_a_step_time_that_cannot_be_is_named(given: object, message: str) -> None:
    with pytest.raises(ControlError, match=message):
        step_time_from_json(given)


def test_corrections_nest_only_so_deep() -> None:
    step_time: StepTime = ROOFLINE
    for _ in range(20):
        step_time = ShiftedStepTime(step_time, 0.001)
    with pytest.raises(ControlError, match="nested"):
        step_time_from_json(step_time_to_json(step_time))


def test_a_step_time_of_another_kind_cannot_be_sent() -> None:
    class Own(RooflineStepTime):
        pass

    assert step_time_to_json(Own(c0_s=1.0))["kind"] == "roofline"
    with pytest.raises(ControlError, match="no JSON form"):
        step_time_to_json(Rules())  # type: ignore[arg-type]  # anything else


# --- orders and state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", [Orders(), DRIVEN, Orders(chunk_tokens=1, running_cap=0)])
def test_orders_come_back_as_they_were(orders: Orders) -> None:
    assert Orders.from_json(orders.to_json()) == orders
    assert Orders.from_json(orders.to_json().encode()).digest == orders.digest


def test_a_digest_tells_orders_apart() -> None:
    assert replace(DRIVEN, chunk_tokens=513).digest != DRIVEN.digest
    assert Orders(lapse_s=3).digest == Orders(lapse_s=3.0).digest


def test_the_state_comes_back_as_it_was() -> None:
    assert EngineState.from_json(STATE.to_json()) == STATE
    quiet = replace(STATE, orders_digest=None, orders_age_s=None, plan_us=None, note=None, mode=Mode.STOCK)
    assert EngineState.from_json(quiet.to_json()) == quiet


def test_what_is_not_needed_may_be_missing_and_what_is_not_known_is_ignored() -> None:
    assert Orders.from_json('{"version": 1, "mode": "stock", "colour": "red", "rules": {"speed": 3}}') == Orders()
    assert EngineState.from_json(changed(without(STATE.to_json(), "plan_us"), mood="good")).plan_us is None


READERS: list[tuple[Callable[[str], object], str]] = [
    (Orders.from_json, DRIVEN.to_json()),
    (EngineState.from_json, STATE.to_json()),
    (StepFacts.from_json, StepFacts("a", 0).to_json()),
]


@pytest.mark.parametrize(("read", "text"), READERS)
def test_another_version_is_refused_with_a_remedy(read: Callable[[str], object], text: str) -> None:
    for version in (2, 0, "1", True, None):
        with pytest.raises(ControlError, match=r"version is .*this side knows 1"):
            read(changed(text, version=version))
    with pytest.raises(ControlError, match="version is missing"):
        read(without(text, "version"))


@pytest.mark.parametrize(("read", "text"), READERS)
def test_what_is_no_document_is_refused(read: Callable[[str], object], text: str) -> None:
    for wrong in ("", "[1]", "{", "[" * 100_000, "NaN"):
        with pytest.raises(ControlError):
            read(wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "fast"}, "mode is 'fast': it must be stock or driven"),
        ({"mode": ["driven"]}, "mode must be a text"),
        ({"profile": None}, "profile is missing"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"chunk_tokens": 1.5}, "chunk_tokens must be a whole number"),
        ({"running_cap": -1}, "running_cap must be at least 0"),
        ({"lapse_s": 0}, "lapse_s must be a positive number"),
        ({"lapse_s": float("inf")}, "lapse_s must be a finite number"),
        ({"rules": {"margin": 0.5}}, "rules: margin"),
        ({"rules": {"skip": 1}}, "rules.skip must be true or false"),
        ({"rules": {"floor_tokens": 0}}, "rules.floor_tokens"),
        ({"rules": {"longest_s": 0}}, "rules: longest_s"),
    ],
)
def test_orders_that_cannot_be_obeyed_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ControlError, match=message):
        Orders.from_json(changed(DRIVEN.to_json(), **fields))


def test_orders_are_checked_where_they_are_made_too() -> None:
    with pytest.raises(ControlError, match="profile is missing"):
        Orders(Mode.DRIVEN)
    with pytest.raises(ControlError, match="running_cap"):
        Orders(running_cap=-1)
    with pytest.raises(ControlError, match="lapse_s"):
        Orders(lapse_s=float("nan"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheduler": "turbo"}, "scheduler is 'turbo': it must be sync or async"),
        ({"tested": 1}, "tested must be true or false"),
        ({"kv_usage": -0.1}, "kv_usage must be at least 0"),
        ({"steps": "many"}, "steps must be a finite number"),
        ({"note": 5}, "note must be a text"),
    ],
)
def test_a_state_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ControlError, match=message):
        EngineState.from_json(changed(STATE.to_json(), **fields))


# --- steps --------------------------------------------------------------------------------------------------

counts = st.integers(0, 10**6)
facts = st.builds(
    StepFact,
    st.builds(Step, counts, counts, counts, st.floats(0, 1e12), counts, counts),
    st.floats(0, 100.0),
    counts,
    counts,
)


@given(st.lists(facts, max_size=5), st.integers(0, 10**9))
def test_steps_come_back_as_they_were(some: list[StepFact], first: int) -> None:
    sent = StepFacts("run", first, tuple(some))
    back = StepFacts.from_json(sent.to_json())
    assert back == sent
    assert back.next == first + len(some)


def test_columns_of_unequal_length_are_refused() -> None:
    text = StepFacts("run", 0, (StepFact(Step.decode(1, 5), 0.1, 10),)).to_json()
    steps = json.loads(text)["steps"]
    with pytest.raises(ControlError, match=r"steps.skipped has 2 values, steps.seconds has 1"):
        StepFacts.from_json(changed(text, steps={**steps, "skipped": [0, 0]}))
    with pytest.raises(ControlError, match=r"steps.seconds\[0\] must be at least 0"):
        StepFacts.from_json(changed(text, steps={**steps, "seconds": [-1]}))


# --- what a request brings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "promise",
    [Promise(), Promise(0.25, 0.02), Promise(-0.1, 0.05), Promise(1.0, 0.05, relegated=True), Promise(2.0)],
)
def test_a_promise_comes_back_as_it_was(promise: Promise) -> None:
    assert Promise.from_xargs(json.loads(json.dumps(promise.to_xargs()))) == promise


def test_a_promise_travels_in_milliseconds() -> None:
    assert Promise(0.25, 0.02, relegated=True).to_xargs() == {
        "tiergate_ttft_ms": 250.0,
        "tiergate_tpot_ms": 20.0,
        "tiergate_relegated": 1,
    }
    assert Promise().to_xargs() == {}
    assert Promise.from_xargs(None) == Promise()
    assert Promise.from_xargs({"other": [1]}) == Promise()


@pytest.mark.parametrize(
    "xargs",
    [
        {"tiergate_ttft_ms": "soon"},
        {"tiergate_ttft_ms": [1]},
        {"tiergate_ttft_ms": float("nan")},
        {"tiergate_tpot_ms": 0},
        {"tiergate_tpot_ms": -5},
        {"tiergate_relegated": 2},
        {"tiergate_relegated": [0]},
    ],
)
def test_a_promise_that_cannot_be_is_named(xargs: dict[str, object]) -> None:
    with pytest.raises(ControlError, match=next(iter(xargs))):
        Promise.from_xargs(xargs)
