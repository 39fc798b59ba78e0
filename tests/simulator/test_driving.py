"""The controller on virtual time: simulated engines obey it, its knobs are calm, and without it engines go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from scheduling.backends import BackendState
from scheduling.knobs import ControlOptions, Means
from simulator.cell import run_cell
from simulator.contenders import setup_for
from simulator.driving import CARRY_S, SimDriving
from simulator.fleet import FleetOptions, SimFleet
from simulator.scenario import Contender, Fault, FaultKind
from tests.simulator.test_cell import cell, plain
from tests.simulator.test_fleet import PROFILE, dispatcher, requests
from tiergate_engine.control import Mode
from tiergate_engine.drive import Rules
from tiergate_engine.model import EngineConfig, EngineModel, PlannedStep

CHUNK = Means(chunk_budget=True, running_cap=True)
PLUGIN = Means(orders=True, chunk_budget=True, running_cap=True)
OWN_BUDGET = 2048


class Watched(EngineModel):
    """Writes its steps down."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, PROFILE.step_time)
        self.planned: list[tuple[PlannedStep, int | None]] = []
        self.chunk: Callable[[], int | None] = lambda: None

    def next_step(self, now_s: float) -> PlannedStep | None:
        planned = super().next_step(now_s)
        if planned is not None:
            self.planned.append((planned, self.chunk()))
        return planned


def fleet(means: Means, faults: tuple[Fault, ...] = ()) -> SimFleet:
    """Four engines (emulated) that take what `means` says."""
    config = EngineConfig(
        80_000,
        16_000,
        max_running_seqs=128,
        max_batched_tokens=OWN_BUDGET,
        drive=Rules() if means.orders else None,
    )
    makers = {f"e{index}": lambda: Watched(config) for index in range(4)}
    return SimFleet([dispatcher("polyserve", 1)], makers, FleetOptions(means=means, faults=faults))


def again(driving: SimDriving, sim: SimFleet, options: ControlOptions) -> SimDriving:
    """The same controller with other constants, in its place."""
    driving.stop()
    assert sim.options.means is not None
    return SimDriving(sim.replicas[0], sim.engines, sim.agenda, sim.options.means, options)


def test_the_chunk_that_is_set_is_the_chunk_of_the_models_steps() -> None:
    sim = fleet(CHUNK)
    for engine in sim.engines.values():
        assert isinstance(engine.model, Watched)
        ordered = engine.ordered
        assert ordered is not None
        engine.model.chunk = lambda ordered=ordered: ordered.orders.chunk_tokens  # type: ignore[misc]
    result = sim.run(requests(1, 8.0))
    kept = [
        one for engine in sim.engines.values() if isinstance(engine.model, Watched) for one in engine.model.planned
    ]
    limited = [(planned, chunk) for planned, chunk in kept if chunk is not None]
    assert len({chunk for _, chunk in limited}) > 3, "it follows what is on board"
    assert all(planned.step.prefill_tokens <= chunk for planned, chunk in limited)
    assert any(planned.step.prefill_tokens == chunk for planned, chunk in limited), "and is used"
    assert result.control["chunk_budget"] == sum(result.control.values())


def test_a_chunk_is_raised_once_in_three_seconds_at_most_and_hysteresis_spares_most_changes() -> None:
    def changes(calm: bool) -> tuple[int, list[float]]:
        sim = fleet(CHUNK)
        options = ControlOptions(kept=100_000)
        if not calm:
            options = replace(options, raise_after_s=0.0, raise_step=0.0)
        driving = again(sim.driving[0], sim, options)
        sim.run(requests(1, 8.0))
        apart: list[float] = []
        for name in sim.engines:
            told = [(one.at_s, one.chunk_tokens or OWN_BUDGET) for one in driving.controller.decisions(name)]
            raised = [at_s for (_, before), (at_s, chunk) in pairwise(told) if chunk > before]
            apart += [after - before for before, after in pairwise(raised)]
        return driving.decisions["chunk_budget"], apart

    calm, apart = changes(True)
    nervous, _ = changes(False)
    assert min(apart) >= 3.0
    assert calm < 0.6 * nervous
    minutes = 40.0 / 60 * 4
    assert calm / minutes < 40


def test_driven_engines_go_on_alone_when_the_gateway_is_gone() -> None:
    sim = fleet(PLUGIN)
    modes: list[tuple[float, Mode, bool]] = []
    gone_s = 5.0
    sim.agenda.at(gone_s, sim.driving[0].stop)

    def look() -> None:
        engine = sim.engines["e0"]
        assert engine.ordered is not None
        modes.append((sim.agenda.now_s, engine.ordered.holding(sim.agenda.now_s).mode, engine.hears_promises))

    result = sim.run(requests(1, 5.0), look)
    first_s, last_s = 0.5 + CARRY_S, gone_s + 30.0
    assert {(mode, hears) for at_s, mode, hears in modes if at_s < first_s} == {(Mode.STOCK, False)}
    assert {(mode, hears) for at_s, mode, hears in modes if first_s < at_s <= gone_s + 25} == {(Mode.DRIVEN, True)}
    assert {(mode, hears) for at_s, mode, hears in modes if at_s > last_s} == {(Mode.STOCK, False)}
    assert len(result.served) == len(requests(1, 5.0))
    assert result.control == {"driven": 4}


def test_an_engine_that_was_started_anew_is_told_again() -> None:
    sim = fleet(PLUGIN, faults=(Fault(1, FaultKind.DOWN, 10.0, 5.0),))
    alone: list[float] = []

    def look() -> None:
        ordered = sim.engines["e1"].ordered
        assert ordered is not None
        up = sim.dispatcher.fleet["e1"].backend.state is BackendState.UP and sim.engines["e1"].alive
        if up and ordered.holding(sim.agenda.now_s).mode is Mode.STOCK:
            alone.append(sim.agenda.now_s)

    sim.run(requests(1, 5.0), look)
    assert any(at_s > 15.0 for at_s in alone), "it comes back as stock"
    began_s = min(at_s for at_s in alone if at_s > 15.0)
    assert max(alone) <= began_s + 0.5 + CARRY_S + 1e-9
    assert sim.dispatcher.fleet["e1"].backend.dynamic_chunk


def test_placements_count_on_the_chunk_that_is_set() -> None:
    """A chunk that was lowered is raised late: prompts taken to come in the chunk of the pace would be late."""
    busy = replace(
        cell("polyserve_co", 90.0, 1, controlled="chunk_budget"), warmup_requests=700, measured_requests=900
    )
    outcome = run_cell(busy)
    assert outcome.overall.refused > 50, "there is more than the fleet can do"
    assert outcome.overall.finished - outcome.overall.attained <= 0.02 * outcome.overall.finished


@pytest.mark.parametrize("name", ["polyserve_co", "minimal"])
def test_a_controller_that_can_set_nothing_changes_nothing(name: str) -> None:
    knobs = {"driven": False} if name == "polyserve_co" else {}
    bare = run_cell(cell(name, 75.0, 1, **knobs))
    watched = run_cell(cell(name, 75.0, 1, controlled="stock", **knobs))
    assert watched.control == {"unset": 3}
    assert plain(replace(watched, control={})) == plain(bare)
    assert bare.control == {}


def test_the_controllers_orders_do_what_a_driven_engine_was_made_with() -> None:
    """A router that looks at nobody's pace: what its engines keep is theirs."""
    stock = run_cell(cell("lmetric", 90.0, 1, refusal=False))
    driven = run_cell(cell("lmetric", 90.0, 1, refusal=False, controlled="driven"))
    assert driven.control == {"driven": 3}
    assert driven.overall.attained > 1.05 * stock.overall.attained


@pytest.mark.parametrize(
    ("told", "rungs"),
    [
        ("chunk_budget", {"chunk_budget"}),
        ("running_cap", {"running_cap"}),
        ("prefill_pacing", {"prefill_pacing", "concurrency_cap"}),
    ],
)
def test_each_rung_can_be_asked_for(told: str, rungs: set[str]) -> None:
    control = run_cell(cell("polyserve_co", 75.0, 1, controlled=told)).control
    assert set(control) <= rungs
    assert told in control


def test_a_controlled_setup_is_made_stock_and_paced_only_by_the_controller() -> None:
    setup = setup_for(Contender("polyserve_co", (("chunk_from_slack", True), ("controlled", "driven"))))
    assert (setup.driven, setup.paced, setup.drive, setup.means) == (False, False, None, PLUGIN)
    paced = setup_for(Contender("minimal", (("controlled", "prefill_pacing"),)))
    assert paced.options.paces_prefill
    assert not setup.options.paces_prefill
    assert setup_for(Contender("minimal")).means is None
