"""Capacity planning: windows of a day, fleet sizes, the price of promises. About 20 s, most of it real runs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.scoring import PredictionScore
from scheduling.tiers import Slo
from simulator.build import kinds_of
from simulator.campaign.address import Addresser
from simulator.campaign.interval import Interval
from simulator.campaign.run import Pool
from simulator.campaign.store import Store
from simulator.cell import run_cell
from simulator.outcome import CellOutcome, Sample, TierOutcome
from simulator.planning.costs import Change, Costs
from simulator.planning.curve import MOST_RATES, Curve, Served, backends_at, top_fleet
from simulator.planning.demand import (
    Demand,
    PlanningError,
    WrongUse,
    day_of,
    default_window_s,
    demand_of,
    reference_cost_s,
    tiers_of_log,
    write_rows,
)
from simulator.planning.plan import held_of, is_borderline, make_plan
from simulator.planning.result import Asked, CapacityPlan
from simulator.planning.sizing import Forgiven, Judge, Runs, Sizing, Subject
from simulator.scenario import Cell, Contender, Engines, FleetSpec, Workload
from simulator.workload import offered
from workloads.mix import TierShare, WorkloadError
from workloads.traces import Trace, TraceRequest, load_trace

PROFILE = "h200-llama-3.1-8b-bf16"
FLEET = FleetSpec((Engines(PROFILE, 1),))
TIERS = (TierShare("tight", Slo(0.5, 0.02), 0.25), TierShare("loose", Slo(1.0, 0.1), 0.75))


def day(seconds: int = 400) -> Trace:
    """A trace with a quiet first half and a busy second."""
    rng = random.Random(5)
    rows = []
    at_s = 0.0
    while at_s < seconds:
        rows.append(TraceRequest(round(at_s, 3), rng.randint(1000, 3000), rng.randint(2, 10)))
        at_s += rng.expovariate(2.0 if at_s < seconds / 2 else 4.0)
    return Trace("day", tuple(rows))


# --- what a day asks for -----------------------------------------------------------------------------------


def test_windows_hold_every_request_and_their_load_is_rate_times_cost() -> None:
    demand = demand_of(day(), TIERS, FLEET)
    found = day_of(demand, FLEET, 100.0, 3.0)
    assert [one.start_s for one in found.windows] == [0.0, 100.0, 200.0, 300.0]
    assert sum(one.requests for one in found.windows) == len(demand.trace.requests)
    for one in found.windows:
        assert one.rate_rps == pytest.approx(3.0 * one.requests / one.duration_s)
    busy, quiet = found.windows[-1], found.windows[0]
    assert busy.load / quiet.load == pytest.approx(busy.rate_rps / quiet.rate_rps, rel=0.15)
    assert len(found.groups) == 1


def test_windows_whose_requests_cost_otherwise_are_another_group() -> None:
    rows = tuple(
        replace(row, output_tokens=row.output_tokens * 100) if row.arrival_s >= 200 else row
        for row in day().requests
    )
    demand = demand_of(Trace("two", rows), TIERS, FLEET)
    found = day_of(demand, FLEET, 100.0, 1.0)
    assert [one.group for one in found.windows] == [0, 0, 1, 1]
    assert found.groups[1].cost_s > 2 * found.groups[0].cost_s


def test_a_window_in_which_nothing_arrived_asks_for_nothing() -> None:
    rows = tuple(row for row in day().requests if not 100 <= row.arrival_s < 200)
    found = day_of(demand_of(Trace("hole", rows), TIERS, FLEET), FLEET, 100.0, 1.0)
    assert (found.windows[1].requests, found.windows[1].load, found.windows[1].group) == (0, 0.0, None)


def test_the_default_window_holds_enough_requests_and_several_residence_times() -> None:
    demand = demand_of(day(), TIERS, FLEET)
    window_s = default_window_s(demand)
    assert window_s in (60, 120, 300)
    assert window_s >= 5 * demand.residence_s
    assert len(demand.trace.requests) * window_s / demand.trace.duration_s >= 200


def test_a_trace_of_lengths_only_has_no_day() -> None:
    trace = Trace("lengths", (TraceRequest(0.0, 10, 10), TraceRequest(0.0, 20, 10)))
    with pytest.raises(WrongUse, match="needs arrivals"):
        day_of(demand_of(trace, TIERS, FLEET), FLEET, 60.0, 1.0)


def test_a_trace_without_tiers_needs_them() -> None:
    with pytest.raises(WrongUse, match="--tiers: is needed"):
        demand_of(day(), None, FLEET)
    with pytest.raises(PlanningError, match="no tier has a TPOT"):
        demand_of(day(), (TierShare("best", Slo(None, None), 1.0),), FLEET)


def test_what_no_engine_can_do_is_told_by_tier_and_left_out() -> None:
    impossible = TierShare("instant", Slo(0.5, 0.0001), 0.5)
    some = TierShare("some", Slo(0.06, 0.02), 0.5)
    demand = demand_of(day(), (impossible, some, *TIERS), FLEET)
    found = {one.tier: one.share for one in demand.impossible}
    assert found["instant"] == 1.0
    assert 0.0 < found["some"] < 1.0
    assert found["loose"] == 0.0
    assert [tier.name for tier in demand.tiers] == ["some", "tight", "loose"]
    with pytest.raises(PlanningError, match="no number of backends"):
        demand_of(day(), (impossible,), FLEET)


LOG = (
    TraceRequest(0.0, 900, 20, tier="chat", slo=Slo(1.0, 0.05)),
    TraceRequest(1.0, 900, 20, tier="chat", slo=Slo(1.0, 0.06)),
    TraceRequest(2.0, 90, 5, tier="code", slo=Slo(0.5, 0.02)),
    TraceRequest(3.0, 90, 5, tier="free", slo=Slo(None, None)),
)


def test_a_log_keeps_tiers_and_promises() -> None:
    tiers = tiers_of_log(Trace("log", LOG))
    assert [(tier.name, tier.slo, tier.share) for tier in tiers] == [
        ("code", Slo(0.5, 0.02), 0.25),
        ("chat", Slo(1.0, 0.05), 0.5),
        ("free", Slo(None, None), 0.25),
    ]
    demand = demand_of(Trace("log", LOG), None, FLEET)
    assert demand.own_tiers
    assert demand.promised == ("code", "chat")
    assert demand.trace.requests == LOG


def test_tiers_given_for_a_log_replace_promises_or_everything() -> None:
    log = Trace("log", LOG)
    every = (*TIERS, *(TierShare(name, Slo(2.0, 0.2), 1.0) for name in ("chat", "code", "free")))
    kept = demand_of(log, every, FLEET)
    assert kept.own_tiers
    assert {(row.tier, row.slo) for row in kept.trace.requests} == {
        (name, Slo(2.0, 0.2)) for name in ("chat", "code", "free")
    }
    drawn = demand_of(log, TIERS, FLEET)
    assert not drawn.own_tiers
    assert [tier.name for tier in drawn.tiers] == ["tight", "loose"]


def test_a_written_group_is_offered_with_its_own_tiers(tmp_path: Path) -> None:
    demand = demand_of(Trace("log", LOG), None, FLEET)
    path = write_rows(demand.trace.requests, tmp_path, lambda row: row.slo)
    assert path == write_rows(demand.trace.requests, tmp_path, lambda row: row.slo)
    assert [replace(row, model=None) for row in load_trace(path).requests] == list(LOG)
    workload = Workload(str(path), demand.tiers, own_tiers=True)
    cell = Cell(workload, FLEET, Contender("random"), 1.0, 1, 0, 200, 0)
    pairs = {(sim.request.tier, sim.request.prompt_tokens, sim.request.slo) for sim in offered(cell)}
    assert pairs == {(row.tier, row.prompt_tokens, row.slo) for row in LOG}
    with pytest.raises(WorkloadError, match="tiers not listed: free"):
        offered(replace(cell, workload=replace(workload, tiers=demand.tiers[:2])))


# --- sizing, with runs whose results are made up -----------------------------------------------------------

JUDGE = Judge(0.99, ("tight", "loose"))
SUBJECT = Subject(Workload("none", TIERS), FLEET, Contender("random"), (1, 2), JUDGE)
RUNS = Runs(1.0, 100)


def outcome(tight: float, loose: float, samples: tuple[Sample, ...] = ()) -> CellOutcome:
    def tier(name: str, offered: int, part: float) -> TierOutcome:
        kept = round(part * offered)
        return TierOutcome(name, offered, kept, kept, offered, 0, 0, None, None, None, None)

    nothing = PredictionScore(0, None, None, None)
    tiers = (tier("tight", 1000, tight), tier("loose", 3000, loose))
    whole = tier("overall", 4000, (tight + 3 * loose) / 4)
    return CellOutcome(
        tiers, whole, {}, {}, 0.0, 0.0, None, 1.0, 1.0, 0, 0, 0.0, nothing, nothing, samples
    )  # fmt: skip


class Made(dict[Cell, CellOutcome]):
    """Results as a function of the cell, made when a plan asks for them."""

    def __init__(self, attains: Callable[[int, float], float]) -> None:
        super().__init__()
        self._attains = attains

    def run(self, plan: Sizing | Curve | Costs) -> None:
        for _ in range(200):
            wanted = plan.wanted(self)
            if not wanted:
                return
            assert plan.ahead(self) > 0
            for cell in wanted:
                self[cell] = outcome(self._attains(cell.fleet.backends, cell.rate_rps), 1.0)
        raise AssertionError("a plan has no end")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_sizing_finds_the_smallest_fleet_wherever_it_starts(needed: int, guess: int) -> None:
    if needed > max(4 * guess, guess + 8):
        return
    known = Made(lambda backends, _rate: 1.0 if backends >= needed else 0.9)
    sizing = Sizing(SUBJECT, 10.0, RUNS.length(10.0), guess)
    known.run(sizing)
    found = sizing.sized(known)
    assert found is not None
    assert found.backends == needed
    tried = dict(found.tried)
    assert needed == 1 or tried[needed - 1] == pytest.approx(0.9)
    assert len(tried) <= 2 * math.ceil(math.log2(needed + guess)) + 3


def test_a_target_out_of_reach_ends_without_an_answer() -> None:
    known = Made(lambda _backends, _rate: 0.9)
    sizing = Sizing(SUBJECT, 10.0, RUNS.length(10.0), 3)
    known.run(sizing)
    found = sizing.sized(known)
    assert found is not None
    assert found.backends is None
    assert max(dict(found.tried)) == 12


def test_what_a_fleet_without_load_misses_is_forgiven_seed_by_seed() -> None:
    cells = SUBJECT.cells(1.0, 8, RUNS.length(1.0))
    loaded = SUBJECT.cells(9.0, 2, RUNS.length(1.0))
    known = dict(zip(cells, (outcome(0.90, 1.0), outcome(0.80, 1.0)), strict=True))
    known |= zip(loaded, (outcome(0.895, 1.0), outcome(0.78, 1.0)), strict=True)
    forgiven = Forgiven.of(JUDGE, cells, known)
    assert dict(forgiven.unloaded) == {"tight": pytest.approx(0.85), "all": pytest.approx(0.9625)}
    seen = forgiven.seen(known)
    assert [JUDGE.score([seen[cell]]) for cell in loaded] == pytest.approx([0.995, 0.98])
    assert JUDGE.score([seen[cell] for cell in cells]) == 1.0
    assert JUDGE.score([known[cell] for cell in loaded]) == pytest.approx(0.8375)
    good = {cell: outcome(0.99, 1.0) for cell in cells}
    assert not Forgiven.of(JUDGE, cells, good).misses


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.5, 60.0), min_size=1, max_size=24), st.lists(st.floats(0.5, 4.0), min_size=60))
def test_each_window_gets_the_smallest_fleet_that_serves_its_rate(rates: list[float], more: list[float]) -> None:
    """However unevenly what a fleet serves grows with its size. Rates within 3 % of each other count as one."""
    serves = [math.fsum(more[:backends]) for backends in range(len(more) + 1)]

    def needed(rate: float) -> int:
        return next((backends for backends, most in enumerate(serves) if most >= rate), len(more))

    known = Made(lambda backends, rate: 1.0 if backends >= needed(rate) else 0.9)
    kept = tuple(sorted({float(f"{rate:.5g}") for rate in rates}))
    curve = Curve(SUBJECT, kept, 0.5, RUNS, SUBJECT.contender)
    # A fleet without load keeps every promise, whatever this fleet of eight may serve.
    known.update({cell: outcome(1.0, 1.0) for cell in curve.unloaded})
    known.run(curve)
    fleets = curve.fleets(known)
    planned = [backends_at(rate, fleets) or 0 for rate in kept]
    assert all(low <= high for low, high in pairwise(planned))
    settled = {one.backends: one for one in fleets}
    for rate, backends in zip(kept, planned, strict=True):
        step = min(each for each in curve.steps_rps if each >= rate)
        assert step <= rate * 1.031
        assert needed(rate) <= backends
        if len(settled[backends - 1].tried if backends - 1 in settled else ()) < MOST_RATES:
            assert backends <= needed(step)
    assert (backends_at(kept[-1], fleets) or 0) == needed(kept[-1])
    # Two searches for the ends, and a bounded number of rates for each fleet between them.
    assert all(len(one.tried) <= MOST_RATES + 2 for one in fleets)


def test_one_backend_is_planned_up_to_the_rate_it_serves() -> None:
    """Where one backend serves 16/s and two are needed at 27.13, the windows at 8 to 10 get one."""
    known = Made(lambda backends, rate: 1.0 if rate <= 16.0 * backends else 0.9)
    rates = (8.197, 8.26, 9.1, 10.1, 15.9, 16.6, 27.13)
    curve = Curve(SUBJECT, rates, 0.05, RUNS, SUBJECT.contender)
    known.update({cell: outcome(1.0, 1.0) for cell in curve.unloaded})
    known.run(curve)
    fleets = curve.fleets(known)
    assert [backends_at(rate, fleets) for rate in rates] == [1, 1, 1, 1, 1, 2, 2]
    one, two = fleets
    assert (one.rate_rps, one.over_rps) == (15.9, 16.6)
    assert (two.rate_rps, two.over_rps) == (27.13, None)


def test_rates_that_no_fleet_serves_have_no_answer() -> None:
    known = Made(lambda _backends, _rate: 0.9)
    curve = Curve(SUBJECT, (2.0, 9.0), 0.3, RUNS, SUBJECT.contender)
    known.update({cell: outcome(1.0, 1.0) for cell in curve.unloaded})
    known.run(curve)
    fleets = curve.fleets(known)
    assert top_fleet(fleets) is None
    assert [backends_at(rate, fleets) for rate in (2.0, 9.0, 20.0)] == [None, None, None]


def test_beyond_the_greatest_rate_is_in_proportion() -> None:
    fleets = (Served(4, 10.0, (), 20.0, None, ((10.0, 1.0),)), Served(8, 20.0, (), None, None, ((20.0, 1.0),)))
    assert [backends_at(rate, fleets) for rate in (1, 10, 10.1, 20, 21, 40)] == [4, 4, 8, 8, 9, 16]


def test_a_miss_within_its_interval_is_borderline() -> None:
    near, far = Interval(0.985, 0.975, 0.995, 3), Interval(0.95, 0.945, 0.955, 3)
    eight = Served(8, 20.0, (), None, None, ())
    for over, told in ((near, True), (far, False)):
        fleets = (Served(7, 10.0, (), 15.0, over, ()), eight)
        assert is_borderline(15.0, 8, fleets, 0.99) is told
        assert not is_borderline(18.0, 8, fleets, 0.99)  # that rate is further off
        assert not is_borderline(9.0, 7, fleets, 0.99)  # six were not tried


def test_promises_are_priced_by_what_a_fleet_serves_with_and_without_them() -> None:
    """As it is 5 backends serve 50/s; with the tight tier relaxed 62.5; 54.5 of the others where it is gone."""
    top = {"base": 50.0, "relaxed": 62.5, "without": 54.5}
    known: dict[Cell, CellOutcome] = {}
    curve = Curve(replace(SUBJECT, workload=Workload("base", TIERS)), (10.0,), 0.08, RUNS, SUBJECT.contender)
    known.update({cell: outcome(1.0, 1.0) for cell in curve.unloaded})
    changes = (
        Change("tight", "loose", Workload("relaxed", TIERS), 1.0, 0.07),
        Change("tight", None, Workload("without", TIERS), 0.75, 0.07),
    )
    costs = Costs(curve, 0.08, changes, (("tight", 0.25), ("loose", 0.75)), 5, (1, 2))
    for _ in range(50):
        for cell in costs.wanted(known):
            known[cell] = outcome(1.0 / (1.0 + math.exp(cell.rate_rps - top[cell.workload.trace] - 4.6)), 1.0)
    relaxed, without = costs.savings(known)
    assert costs.request_cost_s(known).mean == pytest.approx(0.1, rel=0.03)
    assert relaxed.per_request_s.mean == pytest.approx(0.1 - 0.08, abs=0.004)
    assert without.per_request_s.mean == pytest.approx(0.1 - 0.75 * 5 / 54.5, abs=0.004)
    assert without.per_thousand_s == pytest.approx(4000 * without.per_request_s.mean)
    assert relaxed.exact
    assert without.exact
    assert relaxed.measurable
    assert not replace(relaxed, per_request_s=Interval(0.02, -0.01, 0.05, 2)).measurable
    assert not replace(relaxed, per_request_s=Interval(-0.02, -0.03, -0.01, 2)).measurable


def test_the_split_by_tier_is_the_mean_over_the_measured_window() -> None:
    cell = Cell(Workload("none", TIERS), FLEET, Contender("random"), 1.0, 1, 10, 20, 10)
    samples = (
        Sample(5.0, 0, {"tight": (0.1,) * 9}),  # while warming up
        Sample(15.0, 0, {"tight": (0.5,), "loose": (0.5, 0.1), "pool": (0.0,)}),
        Sample(25.0, 0, {"tight": (0.5, 0.3), "loose": (0.5, 0.1)}),
    )
    held = held_of([cell], [outcome(1.0, 1.0, samples)])
    assert held.tiers == (("tight", 1.5), ("loose", 2.0))
    assert held.pool == 0.5
    six = replace(cell, fleet=replace(FLEET, engines=(Engines(PROFILE, 6),)))
    assert held_of([six], [outcome(1.0, 1.0, samples)]).tiers[-1] == ("prefill", 2.0)


# --- whole plans, really simulated ---------------------------------------------------------------------------


class Planner:
    """Plans of one demand, their runs kept together."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.demand: Demand = demand_of(day(), TIERS, FLEET)
        self._addresser = Addresser.of_this_code()

    def asked(self, target: float, factor: float) -> Asked:
        asked = Asked(self.demand, FLEET, Contender("polyserve_co"), target, (1, 2), 200.0, factor, measured=200)
        return replace(asked, silos=False, costs=False)

    def plan(self, asked: Asked) -> CapacityPlan:
        plan, result = make_plan(asked, self.store, Pool(1), addresser=self._addresser)
        assert plan is not None, result.failures
        return plan


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    return Planner(tmp_path_factory.mktemp("plans"))


@pytest.fixture(scope="module")
def plan(planner: Planner) -> CapacityPlan:
    return planner.plan(planner.asked(0.95, 30.0))


def test_a_plan_follows_the_load_and_is_near_the_reference(plan: CapacityPlan) -> None:
    sizes = [one.backends or 0 for one in plan.windows]
    assert sizes[0] < sizes[1]
    for one in plan.windows:
        assert one.window.load <= (one.backends or 0) <= 2 * one.window.load + 2
    assert plan.peak == max(sizes)
    assert plan.backend_hours == pytest.approx(
        sum((one.backends or 0) * one.window.duration_s for one in plan.windows) / 3600
    )
    assert plan.reached
    for level in plan.levels:
        held = sum(value for _, value in level.held.tiers) + level.held.pool
        assert held == pytest.approx(level.backends)


def test_the_planned_fleet_keeps_the_target_with_another_seed(planner: Planner, plan: CapacityPlan) -> None:
    """The peak's fleet with requests that the plan never saw, in a run twice as long; one fewer does not do."""
    level = max(plan.levels, key=lambda level: level.rate_rps)
    assert level.backends is not None
    (cell, *_) = [
        stored.cell for stored in planner.store.stored() if stored.cell.rate_rps == level.rate_rps
    ]  # any of that load
    attained = {}
    for backends in (level.backends, level.backends - 2):
        fleet = replace(FLEET, engines=(Engines(PROFILE, backends),))
        fresh = replace(cell, fleet=fleet, seed=90, measured_requests=2 * cell.measured_requests)
        attained[backends] = run_cell(fresh).worst_tier_attainment or 0.0
    # The tight tier has some 300 requests: one standard error is 1.3 %.
    assert attained[level.backends] >= 0.95 - 0.03
    assert attained[level.backends - 2] < 0.95


def test_more_load_or_a_higher_target_never_needs_fewer(planner: Planner, plan: CapacityPlan) -> None:
    easier = planner.plan(planner.asked(0.8, 30.0))
    fewer = planner.plan(planner.asked(0.95, 8.0))
    for one, target, rate in zip(plan.windows, easier.windows, fewer.windows, strict=True):
        assert (target.backends or 0) <= (one.backends or 0)
        assert (rate.backends or 0) <= (one.backends or 0)
    assert (fewer.peak or 0) < (plan.peak or 0)


def test_the_same_plan_again_runs_nothing(planner: Planner, plan: CapacityPlan) -> None:
    again, result = make_plan(planner.asked(0.95, 30.0), planner.store, Pool(1))
    assert result.status.ran == 0
    assert again == plan


def test_a_load_beyond_what_is_simulated_is_scaled_up(planner: Planner, plan: CapacityPlan) -> None:
    """Nothing is run for more than some backends; what is above is in proportion, and told."""
    assert not any(one.scaled for one in plan.windows)
    levels = (Served(4, 10.0, (), None, None, ((10.0, 1.0),)),)
    found = day_of(planner.demand, FLEET, 100.0, 900.0)
    group = found.groups[0]
    rates = [one.load / group.cost_s for one in found.windows]
    assert max(rates) * group.cost_s > 8
    assert [backends_at(rate, levels) for rate in rates] == [math.ceil(4 * rate / 10.0 - 1e-9) for rate in rates]


def test_a_window_of_a_few_residence_times_is_refused(planner: Planner) -> None:
    asked = replace(planner.asked(0.95, 30.0), window_s=1.0)
    with pytest.raises(WrongUse, match=r"--window: 1 s is too short: a request stays \d\.\d+ s .* --window 1m"):
        make_plan(asked, planner.store, Pool(1))


def test_the_reference_cost_counts_every_tier(planner: Planner) -> None:
    kind = kinds_of(FLEET)[0]
    rows = planner.demand.trace.requests
    whole = reference_cost_s(planner.demand, rows, kind, FLEET)
    parts = [
        tier.share
        * reference_cost_s(replace(planner.demand, tiers=(replace(tier, share=1.0),)), rows, kind, FLEET)
        for tier in planner.demand.tiers
    ]
    assert whole == pytest.approx(sum(parts))
