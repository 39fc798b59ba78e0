"""Runs as flat rows: one a cell, one a cell and tier. What the parquet files hold, and the JSON beside them.

Timings are left out: they differ from run to run, and the same cells shall give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import orjson

from simulator.outcome import CellOutcome, TierOutcome
from simulator.report.summary import OVERALL
from simulator.report.values import Run, engines_text
from simulator.scenario import Cell


@dataclass(frozen=True, slots=True)
class CellRow:
    """One cell: what was run, and what it gave. `cell` is the whole of it, as JSON.

    Attributes:
        t0_ms: the fixed part of a step, where it was set for all engines alike.
        refusals: by reason, as JSON.
        outcomes: by the rung of the ladder, as JSON.
    """

    cell: str
    trace: str
    arrivals: str
    engines: str
    backends: int
    t0_ms: float | None
    replicas: int
    view_age_s: float
    contender: str
    rate_rps: float
    seed: int
    measured_requests: int
    offered: int
    attained: int
    attainment: float | None
    attainment_one_based: float | None
    attainment_admitted: float | None
    worst_tier_attainment: float | None
    refused: int
    failed: int
    refusals: str
    outcomes: str
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    instance_s_per_request: float | None
    backend_seconds: float
    backend_seconds_busy: float
    window_s: float
    ended_s: float
    preemptions: int
    decisions: int
    left_out: float
    predicted_ttft_p50: float | None
    predicted_ttft_bias: float | None
    predicted_tpot_p50: float | None
    predicted_tpot_bias: float | None


@dataclass(frozen=True, slots=True)
class TierRow:
    """One tier of one cell; the tier named `all` is all of them together."""

    trace: str
    engines: str
    contender: str
    rate_rps: float
    seed: int
    tier: str
    offered: int
    admitted: int
    attained: int
    attained_one_based: int
    finished: int
    refused: int
    failed: int
    attainment: float | None
    attainment_admitted: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    cell: str


def cell_rows(runs: Iterable[Run]) -> tuple[CellRow, ...]:
    """One row a cell, in the order of the runs."""
    return tuple(_cell_row(run.cell, run.outcome) for run in runs)


def tier_rows(runs: Iterable[Run]) -> tuple[TierRow, ...]:
    """One row a cell and tier, tight to loose, then `all`."""
    rows: list[TierRow] = []
    for run in runs:
        rows += [_tier_row(run.cell, tier, tier.tier) for tier in run.outcome.tiers]
        rows.append(_tier_row(run.cell, run.outcome.overall, OVERALL))
    return tuple(rows)


def _text(value: object) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _t0_ms(cell: Cell) -> float | None:
    floors = {kind.step_floor_s for kind in cell.fleet.engines}
    (only, *others) = floors
    return None if others or only is None else 1e3 * only


def _cell_row(cell: Cell, outcome: CellOutcome) -> CellRow:
    overall = outcome.overall
    return CellRow(
        cell=_text(cell),
        trace=cell.workload.trace,
        arrivals=cell.workload.arrivals.value,
        engines=engines_text(cell.fleet),
        backends=cell.fleet.backends,
        t0_ms=_t0_ms(cell),
        replicas=cell.fleet.replicas,
        view_age_s=cell.fleet.view_age_s,
        contender=cell.contender.label,
        rate_rps=cell.rate_rps,
        seed=cell.seed,
        measured_requests=cell.measured_requests,
        offered=overall.offered,
        attained=overall.attained,
        attainment=overall.attainment,
        attainment_one_based=overall.attained_one_based / overall.offered if overall.offered else None,
        attainment_admitted=overall.attainment_admitted,
        worst_tier_attainment=outcome.worst_tier_attainment,
        refused=overall.refused,
        failed=overall.failed,
        refusals=_text(dict(outcome.refusals)),
        outcomes=_text(dict(outcome.outcomes)),
        ttft_p50_s=overall.ttft_p50_s,
        ttft_p99_s=overall.ttft_p99_s,
        tpot_p50_s=overall.tpot_p50_s,
        tpot_p99_s=overall.tpot_p99_s,
        instance_s_per_request=outcome.instance_s_per_request,
        backend_seconds=outcome.backend_seconds,
        backend_seconds_busy=outcome.backend_seconds_busy,
        window_s=outcome.window_s,
        ended_s=outcome.ended_s,
        preemptions=outcome.preemptions,
        decisions=outcome.decisions,
        left_out=outcome.left_out,
        predicted_ttft_p50=outcome.predicted_ttft.p50,
        predicted_ttft_bias=outcome.predicted_ttft.bias,
        predicted_tpot_p50=outcome.predicted_tpot.p50,
        predicted_tpot_bias=outcome.predicted_tpot.bias,
    )


def _tier_row(cell: Cell, tier: TierOutcome, name: str) -> TierRow:
    return TierRow(
        trace=cell.workload.trace,
        engines=engines_text(cell.fleet),
        contender=cell.contender.label,
        rate_rps=cell.rate_rps,
        seed=cell.seed,
        tier=name,
        offered=tier.offered,
        admitted=tier.admitted,
        attained=tier.attained,
        attained_one_based=tier.attained_one_based,
        finished=tier.finished,
        refused=tier.refused,
        failed=tier.failed,
        attainment=tier.attainment,
        attainment_admitted=tier.attainment_admitted,
        ttft_p50_s=tier.ttft_p50_s,
        ttft_p99_s=tier.ttft_p99_s,
        tpot_p50_s=tier.tpot_p50_s,
        tpot_p99_s=tier.tpot_p99_s,
        cell=_text(cell),
    )
