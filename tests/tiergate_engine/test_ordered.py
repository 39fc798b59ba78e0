"""A model that takes orders: stock until somebody speaks to it, and again when the orders have lapsed."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tiergate_engine.control import Mode, Orders
from tiergate_engine.drive import Rules
from tiergate_engine.model import EngineConfig, EngineModel, PlannedStep, SequenceSpec
from tiergate_engine.ordered import Ordered
from tiergate_engine.steptime import RooflineStepTime

STEP_TIME = RooflineStepTime(c0_s=0.01, per_token_s=1e-4, per_kv_s=1e-7)
STOCK = EngineConfig(100_000, 10_000, max_running_seqs=8, max_batched_tokens=512)
DRIVABLE = replace(STOCK, drive=Rules())
DRIVEN = Orders(Mode.DRIVEN, STEP_TIME, lapse_s=30.0)


def ordered(config: EngineConfig = DRIVABLE) -> tuple[EngineModel, Ordered]:
    model = EngineModel(config, STEP_TIME)
    return model, Ordered(model)


def step(model: EngineModel, orders: Ordered | None, now_s: float) -> PlannedStep | None:
    if orders is not None:
        orders.before(now_s)
    planned = model.next_step(now_s)
    if planned is not None:
        model.finish_step(planned.ends_s)
    return planned


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 900), st.integers(1, 30)), min_size=1, max_size=12))
def test_whom_nobody_has_spoken_to_runs_as_stock(sizes: list[tuple[int, int]]) -> None:
    model, orders = ordered()
    stock = EngineModel(STOCK, STEP_TIME)
    for index, (prompt, output) in enumerate(sizes):
        for one in (model, stock):
            one.submit(SequenceSpec(f"s{index}", prompt, output), 0.0)
    now_s = 0.0
    while not stock.idle:
        expected = step(stock, None, now_s)
        assert step(model, orders, now_s) == expected
        now_s = now_s if expected is None else expected.ends_s
    assert model.idle


def test_a_set_chunk_comes_on_top_of_the_decodes_and_a_cap_holds() -> None:
    model, orders = ordered(STOCK)
    for index in range(4):
        model.submit(SequenceSpec(f"s{index}", 16, 200), 0.0)
    step(model, orders, 0.0)
    assert model.decodes == 4
    model.submit(SequenceSpec("long", 300, 5), 1.0)
    model.submit(SequenceSpec("more", 300, 5), 1.0)
    orders.give(Orders(chunk_tokens=50, running_cap=5), 1.0)
    planned = step(model, orders, 1.0)
    assert planned is not None
    assert (planned.step.decode_seqs, planned.step.prefill_tokens) == (4, 50)
    assert orders.budget_tokens == 54
    for _ in range(5):
        planned = step(model, orders, 2.0)
    assert planned is not None
    assert model.running == 5, "a slot is left, and the cap keeps it"
    assert model.waiting == 1
    orders.give(Orders(), 3.0)
    planned = step(model, orders, 3.0)
    assert planned is not None
    assert planned.step.prefill_tokens == 300, "taken back: the engine's own budget and cap"


def test_orders_lapse_unless_they_are_said_again() -> None:
    _, orders = ordered()
    digests = [orders.digest]
    orders.give(DRIVEN, 10.0)
    digests.append(orders.digest)
    assert (orders.holding(40.0).mode, orders.holding(40.1).mode) == (Mode.DRIVEN, Mode.STOCK)
    orders.give(DRIVEN, 35.0)
    assert orders.holding(60.0).mode is Mode.DRIVEN
    orders.forget()
    digests.append(orders.digest)
    assert digests == [None, DRIVEN.digest, None]
    assert orders.holding(60.0).mode is Mode.STOCK


def test_chunks_are_cut_for_promises_while_the_orders_hold_and_not_behind() -> None:
    model, orders = ordered()
    orders.give(DRIVEN, 0.0)
    model.submit(SequenceSpec("tight", 1, 200, first_due_s=0.02, pace_s=0.02), 0.0)
    step(model, orders, 0.0)
    model.submit(SequenceSpec("loose", 4000, 5), 0.02)
    cut = step(model, orders, 0.02)
    free = step(model, orders, 31.0)
    assert cut is not None
    assert free is not None
    assert 0 < cut.step.prefill_tokens < 200
    assert cut.duration_s <= 0.02
    assert free.step.prefill_tokens == 511


def test_an_engine_made_stock_or_one_that_refuses_is_not_driven() -> None:
    _, stock = ordered(STOCK)
    stock.give(DRIVEN, 0.0)
    assert stock.holding(0.0).mode is Mode.STOCK
    _, refusing = ordered()
    refusing.refuses = "its plans fail"
    refusing.give(DRIVEN, 0.0)
    assert refusing.holding(0.0).mode is Mode.STOCK
    refusing.give(Orders(chunk_tokens=64), 0.0)
    assert refusing.holding(0.0).chunk_tokens == 64
