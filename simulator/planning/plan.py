"""A capacity plan: from a demand and an engine to backends over the day."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scheduling.tiers import Slo
from simulator.build import kinds_of
from simulator.campaign.address import Addresser
from simulator.campaign.plan import Known, Plan
from simulator.campaign.run import CampaignResult, Pool, Progress, run_plans
from simulator.campaign.store import Store
from simulator.contenders import setup_for
from simulator.outcome import CellOutcome
from simulator.planning.costs import Change, Costs
from simulator.planning.curve import Curve, Served, backends_at, fleet_for, top_fleet
from simulator.planning.demand import (
    Day,
    Demand,
    Window,
    WrongUse,
    day_of,
    default_window_s,
    reference_cost_s,
    shortest_window_s,
    usual_window,
    write_rows,
)
from simulator.planning.result import Asked, CapacityPlan, Held, Level, PlannedWindow, Priced, Silos
from simulator.planning.sizing import Forgiven, Judge, Runs, Subject
from simulator.scenario import Cell, Contender, Form, Workload
from workloads.traces import TraceRequest

POOL = "pool"
PREFILL = "prefill"
SILO = Contender("qoserve_silo")
_NEGLIGIBLE = 0.05  # backends
_SIMULATED_BACKENDS = 8.0  # of the reference; a greater load is scaled up from here
_LEAST_SIMULATED = 4.0  # however long its requests stay
_MOST_REQUESTS = 12_000  # of a run, unless that would leave fewer than those backends
_MOST_MEASURED = 6_000
_MISSES = 2.0  # so many requests of the smallest tier may miss, over all seeds, at least
_COST_BACKENDS = 4  # on which promises are priced, at least one for each tier and one more


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is to run, and how it is put together again."""

    day: Day
    window_s: float
    curves: tuple[Curve, ...]
    silo: Curve | None
    costs: Costs | None
    runs: Runs


def make_plan(
    asked: Asked,
    store: Store,
    pool: Pool,
    progress: Progress | None = None,
    addresser: Addresser | None = None,
) -> tuple[CapacityPlan | None, CampaignResult]:
    """Simulate what the plan needs (stored runs do not run again) and put it together.

    None in place of a plan when runs failed: the result says which. Raises PlanningError, OSError, and what runs
    raise for a trace or profile that cannot be read.
    """
    addresser = addresser or Addresser.of_this_code()
    prepared = _prepare(asked, store.folder / "traces")
    plans: list[Plan] = [*prepared.curves]
    plans += [plan for plan in (prepared.silo, prepared.costs) if plan is not None]
    result = run_plans(plans, store, pool, progress=progress, addresser=addresser)
    if result.failures:
        return None, result

    def whole(cell: Cell) -> CellOutcome:
        return store.get(addresser.address(cell), cell) or result.outcomes[cell]

    return _together(asked, prepared, result.outcomes, whole), result


# --- before the runs ---------------------------------------------------------------------------------------


def _prepare(asked: Asked, folder: Path) -> _Prepared:
    demand = asked.demand
    if len(asked.fleet.engines) != 1:
        raise WrongUse("--profile: a plan is for one kind of engine")
    window_s = asked.window_s or default_window_s(demand)
    least_s = shortest_window_s(demand)
    if asked.window_s is not None and window_s < least_s:
        raise WrongUse(
            f"--window: {window_s:g} s is too short: a request stays {demand.residence_s:.3g} s on average, and "
            f"loads are steady only over several of those; take at least {math.ceil(least_s)} s, such as --window "
            f"{usual_window(least_s)}"
        )
    day = day_of(demand, asked.fleet, window_s, asked.rate_factor)
    runs = _runs(asked)
    judge = Judge(asked.target, demand.promised)
    curves = []
    for number, group in enumerate(day.groups):
        subject = Subject(
            _workload(asked, group.rows, folder, demand),
            asked.fleet,
            asked.contender,
            asked.seeds,
            judge,
            least=_least(asked.contender),
        )
        rates = {one.load / group.cost_s for one in day.windows if one.group == number and one.load > 0}
        most = _most_rate(runs, group.cost_s)
        kept = sorted({min(float(f"{rate:.5g}"), most) for rate in rates})
        curves.append(Curve(subject, tuple(kept), group.cost_s, runs, asked.contender))
    peak = max(range(len(curves)), key=lambda number: curves[number].rates_rps[-1] * day.groups[number].cost_s)
    top = curves[peak]
    silo = None
    if asked.silos and asked.contender != SILO and setup_for(asked.contender).form is Form.COLOCATED:
        subject = replace(top.subject, contender=SILO, least=len(demand.tiers))
        silo = replace(top, subject=subject, rates_rps=top.rates_rps[-1:], more=len(demand.tiers) - 1)
    costs = _costs(asked, day, peak, top, folder) if asked.costs else None
    return _Prepared(day, window_s, tuple(curves), silo, costs, runs)


def _least(contender: Contender) -> int:
    return 2 if setup_for(contender).form is Form.DISAGGREGATED else 1


def _runs(asked: Asked) -> Runs:
    smallest = min(tier.share for tier in asked.demand.tiers if tier.slo.promised)
    needed = _MISSES / ((1 - asked.target) * smallest * len(asked.seeds)) if asked.target < 1 else math.inf
    measured = int(min(max(needed, asked.measured), max(_MOST_MEASURED, asked.measured)))
    return Runs(asked.demand.residence_s, measured)


def _most_rate(runs: Runs, cost_s: float) -> float:
    """The greatest rate that is simulated: larger fleets are scaled up from it."""
    per_rps = (runs.warmup + runs.measured + runs.cooldown) * runs.residence_s
    rate_rps = max(min(_SIMULATED_BACKENDS / cost_s, _MOST_REQUESTS / per_rps), _LEAST_SIMULATED / cost_s)
    return float(f"{rate_rps:.5g}")


def _workload(asked: Asked, rows: Sequence[TraceRequest], folder: Path, demand: Demand) -> Workload:
    path = write_rows(rows, folder, _promise_of(demand))
    return Workload(str(path), demand.tiers, arrivals=asked.arrivals, own_tiers=demand.own_tiers)


def _promise_of(demand: Demand) -> Callable[[TraceRequest], Slo | None]:
    """What is written of a row's promise: its own, nothing where tiers are drawn, None for a tier that is gone."""
    names = {tier.name for tier in demand.tiers}
    paces = {tier.name: tier.slo.tpot_s for tier in demand.tiers}

    def promise(row: TraceRequest) -> Slo | None:
        if not demand.own_tiers:
            return Slo(None, None)
        if row.tier not in names or row.slo is None:
            return None
        pace_s = paces[row.tier]
        if row.slo.tpot_s is not None and pace_s is not None and row.slo.tpot_s < pace_s:
            return replace(row.slo, tpot_s=pace_s)  # the tier was relaxed
        return row.slo

    return promise


def _costs(asked: Asked, day: Day, number: int, curve: Curve, folder: Path) -> Costs | None:
    """The pricing of promises with the lengths of the group that has the greatest load."""
    demand, group, kind = asked.demand, day.groups[number], kinds_of(asked.fleet)[0]
    rows = group.rows
    shares = {tier.name: tier.share for tier in demand.tiers}
    if demand.own_tiers:
        shares = {name: sum(row.tier == name for row in rows) / len(rows) for name in shares}
    changes = []
    paced = [tier for tier in demand.tiers if tier.slo.tpot_s is not None and shares[tier.name] > 0]
    for place, tier in enumerate(paced):
        looser = next((one for one in paced[place + 1 :] if one.slo.tpot_s != tier.slo.tpot_s), None)
        if looser is not None:
            slo = Slo(tier.slo.ttft_s, looser.slo.tpot_s)
            tiers = tuple(replace(one, slo=slo) if one is tier else one for one in demand.tiers)
            changes.append(
                _change(asked, replace(demand, tiers=tiers), (tier.name, looser.name), rows, folder, 1.0)
            )
        if len(paced) > 1:
            tiers = tuple(one for one in demand.tiers if one is not tier)
            left = replace(demand, tiers=tiers)
            changes.append(_change(asked, left, (tier.name, None), rows, folder, 1 - shares[tier.name]))
    backends = max(_COST_BACKENDS, len(demand.tiers) + 1)
    return Costs(
        curve,
        reference_cost_s(demand, rows, kind, asked.fleet),
        tuple(changes),
        tuple(shares.items()),
        backends,
        asked.seeds,
    )


def _change(
    asked: Asked,
    demand: Demand,
    names: tuple[str, str | None],
    rows: Sequence[TraceRequest],
    folder: Path,
    share: float,
) -> Change:
    kind = kinds_of(asked.fleet)[0]
    left = {tier.name for tier in demand.tiers}
    kept = [row for row in rows if row.tier in left] if demand.own_tiers else rows
    workload = _workload(asked, kept, folder, demand)
    return Change(*names, workload, share, reference_cost_s(demand, kept, kind, asked.fleet))


# --- after the runs ----------------------------------------------------------------------------------------


def _together(
    asked: Asked, prepared: _Prepared, known: Known, whole: Callable[[Cell], CellOutcome]
) -> CapacityPlan:
    fleets = [curve.fleets(known) for curve in prepared.curves]
    judge = prepared.curves[0].subject.judge
    forgiven = [curve.forgiven(known) for curve in prepared.curves]
    levels: list[Level] = []
    places: dict[tuple[int, int], int] = {}
    for number, group in enumerate(fleets):
        seen = forgiven[number].seen(known)
        for one in _shown(group):
            places[number, one.backends] = len(levels)
            judged = [seen[cell] for cell in one.cells]
            levels.append(_level(number, one, judge, judged, [whole(cell) for cell in one.cells]))
    windows = tuple(
        _window(one, prepared.day, fleets, levels, places, asked.target) for one in prepared.day.windows
    )
    rates = [
        one.load / prepared.day.groups[one.group].cost_s for one in prepared.day.windows if one.group is not None
    ]
    return CapacityPlan(
        asked,
        prepared.window_s,
        windows,
        tuple(levels),
        _silos(prepared, known),
        _priced(prepared.costs, known),
        _unloaded(forgiven),
        max(rates),
        prepared.runs,
        len(known),
        sum(cell.requests for cell in known),
    )


def _unloaded(forgiven: Sequence[Forgiven]) -> tuple[tuple[str, float], ...]:
    """The least of the groups."""
    found: dict[str, float] = {}
    for each in forgiven:
        for name, value in each.unloaded:
            found[name] = min(value, found.get(name, 1.0))
    return tuple(found.items())


def _shown(group: Sequence[Served]) -> tuple[Served, ...]:
    """Fleets that serve some rate, or the largest where none does."""
    return tuple(one for one in group if one.rate_rps is not None) or tuple(group[-1:])


def _level(
    number: int, one: Served, judge: Judge, judged: Sequence[CellOutcome], outcomes: Sequence[CellOutcome]
) -> Level:
    shown_rps = one.rate_rps if one.rate_rps is not None else one.over_rps
    return Level(
        number,
        shown_rps or 0.0,
        None if one.rate_rps is None else one.backends,
        tuple(judge.attainments(outcomes).items()),
        judge.interval(judged),
        sum(judge.reached([outcome]) for outcome in judged),
        held_of(one.cells, outcomes),
        one.over_rps,
        one.over,
        tuple((one.backends, rate_rps, worst) for rate_rps, worst in one.tried),
    )


def held_of(cells: Sequence[Cell], outcomes: Sequence[CellOutcome]) -> Held:
    """Backends by tier, mean over the samples while measured requests arrived."""
    sums: dict[str, float] = {}
    count = 0
    for cell, outcome in zip(cells, outcomes, strict=True):
        begin_s = cell.warmup_requests / cell.rate_rps
        end_s = begin_s + cell.measured_requests / cell.rate_rps
        for sample in outcome.samples:
            if begin_s <= sample.at_s <= end_s:
                count += 1
                for name, loads in sample.backends.items():
                    sums[name] = sums.get(name, 0.0) + len(loads)
    pool = sums.pop(POOL, 0.0) / max(count, 1)
    tiers = {tier.tier for tier in outcomes[0].tiers} if outcomes else set()
    names = [tier.tier for tier in outcomes[0].tiers] if outcomes else []
    kept = tuple((name, sums[name] / count) for name in names if name in sums)
    others = math.fsum(value for name, value in sums.items() if name not in tiers) / max(count, 1)
    held = Held(kept, pool + others)
    # Samples of a disaggregated fleet are of its decode half.
    rest = cells[0].fleet.backends - held.pool - math.fsum(value for _, value in kept) if count else 0.0
    return replace(held, tiers=(*kept, (PREFILL, rest))) if rest > _NEGLIGIBLE else held


def _window(
    window: Window,
    day: Day,
    fleets: Sequence[Sequence[Served]],
    levels: Sequence[Level],
    places: Mapping[tuple[int, int], int],
    target: float,
) -> PlannedWindow:
    if window.group is None or not window.load:
        return PlannedWindow(window, 0, Held((), 0.0), None, scaled=False, borderline=False)
    own = fleets[window.group]
    rate_rps = float(f"{window.load / day.groups[window.group].cost_s:.5g}")
    backends, found = backends_at(rate_rps, own), fleet_for(rate_rps, own)
    given = found or top_fleet(own)
    if backends is None or given is None:
        return PlannedWindow(window, None, Held((), 0.0), None, scaled=False, borderline=False)
    place = places[window.group, given.backends]
    scaled = found is None
    return PlannedWindow(
        window,
        backends,
        _shared_out(levels[place], backends),
        place,
        scaled,
        not scaled and is_borderline(rate_rps, backends, own, target),
    )


def is_borderline(rate_rps: float, backends: int, fleets: Sequence[Served], target: float) -> bool:
    """Whether one backend fewer misses the target at a rate by less than the interval over seeds."""
    return any(one.backends == backends - 1 and one.nearly(rate_rps, target) for one in fleets)


def _shared_out(level: Level, backends: int | None) -> Held:
    """The fleet of a window split as that of its level was."""
    if backends is None or not level.backends:
        return Held((), 0.0)
    part = backends / level.backends
    return Held(tuple((name, part * value) for name, value in level.held.tiers), part * level.held.pool)


def _silos(prepared: _Prepared, known: Known) -> Silos | None:
    if prepared.silo is None:
        return None
    silo = prepared.silo
    fleets, rate_rps = silo.fleets(known), silo.rates_rps[-1]
    group = prepared.curves[[curve.subject.workload for curve in prepared.curves].index(silo.subject.workload)]
    rates = [
        window.load / group.backends_per_rps
        for window in prepared.day.windows
        if window.group is not None and prepared.curves[window.group] is group
    ]
    scale = max(max(rates) / rate_rps, 1.0)
    top = top_fleet(fleets)
    shown = top or fleets[-1]
    backends = None if top is None else math.ceil(top.backends * scale - 1e-3)
    seen = silo.forgiven(known).seen(known)
    judge = silo.subject.judge
    score = judge.score([seen[cell] for cell in shown.cells])
    borderline = top is not None and is_borderline(rate_rps, top.backends, fleets, judge.target)
    return Silos(backends, rate_rps, scale, score, borderline)


def _priced(costs: Costs | None, known: Known) -> Priced | None:
    if costs is None:
        return None
    return Priced(costs.backends, costs.request_cost_s(known), costs.savings(known))
