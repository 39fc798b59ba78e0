"""Seeds become intervals and rates become curves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduling.tiers import Slo
from simulator.report.summary import compare, profile_notes
from simulator.report.values import Run, Setting
from tests.simulator.report.conftest import CONTENDERS, TIERS, made_cell, made_outcome, made_runs
from workloads.mix import TierShare


def test_runs_are_grouped_by_setting_contender_and_rate() -> None:
    (comparison,) = compare(made_runs((30.0, 50.0), seeds=3))
    assert comparison.contenders == tuple(contender.label for contender in CONTENDERS)
    assert comparison.rates_rps == (30.0, 50.0)
    assert comparison.seeds == (0, 1, 2)
    assert [point.rate_rps for point in comparison.curve("random")] == [30.0, 50.0]
    assert len(comparison.points) == 6


def test_another_fleet_is_another_comparison() -> None:
    near, far = made_cell(), made_cell(seed=1)
    far = replace(far, fleet=replace(far.fleet, view_age_s=0.1))
    found = compare([Run(near, made_outcome(near)), Run(far, made_outcome(far))])
    assert [comparison.setting for comparison in found] == [Setting.of(near), Setting.of(far)]


def test_order_of_runs_does_not_matter_within_a_contender() -> None:
    runs = made_runs()
    shuffled = [*runs[::-1]]
    by_name = {point.contender + str(point.rate_rps): point for point in compare(runs)[0].points}
    assert {point.contender + str(point.rate_rps): point for point in compare(shuffled)[0].points} == by_name


def test_the_same_cell_twice_counts_once() -> None:
    runs = made_runs((40.0,), seeds=2)
    assert compare((*runs, *runs))[0].points == compare(runs)[0].points


def test_an_interval_over_seeds_is_students_t() -> None:
    cells = [made_cell(seed=seed) for seed in range(3)]
    attained = (1800, 1900, 1850)
    runs = []
    for cell, count in zip(cells, attained, strict=True):
        outcome = made_outcome(cell)
        overall = replace(outcome.overall, offered=2000, attained=count)
        runs.append(Run(cell, replace(outcome, overall=overall)))
    share = compare(runs)[0].points[0].overall.attainment
    assert share is not None
    assert share.low is not None
    assert share.mean == pytest.approx(0.925)
    assert share.mean - share.low == pytest.approx(4.3027 * 0.025 / 3**0.5, rel=1e-3)


def test_one_seed_has_no_interval() -> None:
    share = compare(made_runs((40.0,), seeds=1))[0].points[0].overall.attainment
    assert share is not None
    assert (share.low, share.high) == (None, None)


def test_an_interval_stays_possible() -> None:
    shares = [point.overall.attainment for point in compare(made_runs((30.0,)))[0].points]
    assert all(share is not None and share.high is not None and share.high <= 1.0 for share in shares)


def test_the_worst_tier_is_the_one_that_fares_worst_over_all_seeds() -> None:
    point = compare(made_runs((60.0,)))[0].curve("random")[0]
    assert point.worst is not None
    assert point.worst.tier == "20ms"
    assert all(
        tier.attainment is not None and tier.attainment.mean >= point.worst.attainment.mean  # type: ignore[union-attr]
        for tier in point.tiers
    )


def test_best_effort_can_neither_attain_nor_miss() -> None:
    cell = made_cell()
    free = TierShare("100ms", Slo(None, None), 0.4)
    cell = replace(cell, workload=replace(cell.workload, tiers=(*TIERS[:3], free), ttft_s=()))
    point = compare([Run(cell, made_outcome(cell))])[0].points[0]
    assert point.tiers[-1].attainment is None
    assert point.worst is not None
    assert point.worst.tier != "100ms"


def test_refusals_are_summed_and_the_most_frequent_comes_first() -> None:
    runs = [
        Run(run.cell, replace(run.outcome, refusals={"late": 1, "full": 5}))
        for run in made_runs((40.0,), seeds=2)[:2]
    ]
    assert compare(runs)[0].points[0].refusals == (("full", 10), ("late", 2))


def test_profiles_are_told_once_with_their_origin() -> None:
    (note,) = profile_notes(made_runs((30.0,)))
    assert note.name == "h200-llama-3.1-8b-bf16"
    assert note.origin
    assert note.licence
