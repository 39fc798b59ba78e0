"""Records of earlier campaigns: searches begin there, and short ones are guided by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.campaign import recorded
from simulator.campaign.curve import Bound, Crossing, Point, shifted
from simulator.campaign.goodput import EVERY_TIER, MAIN, Guide, Search
from simulator.campaign.knobs import Searched, Trial
from simulator.campaign.results import results
from simulator.campaign.table import SWEPT, Section, full, quick, table
from simulator.outcome import CellOutcome
from simulator.scenario import Cell
from tests.simulator.campaign.fakes import Knee, outcome
from tests.simulator.campaign.test_goodput import SETTINGS, carried_out, search
from tests.simulator.campaign.test_table import PARTS, azure, found_in

CURVE = tuple(Point(part, Knee(1.0).attainment(part, 2), 10_000) for part in (0.6, 0.8, 0.9, 1.0, 1.2))
WORST = tuple(Point(point.rate, Knee(1.0).attainment(1.1 * point.rate, 2), 1_000) for point in CURVE)
GUIDE = Guide(((MAIN, CURVE), (EVERY_TIER, WORST)))


def guided(knee: Knee) -> tuple[Search, dict[Cell, CellOutcome]]:
    plan = search(of=replace(SETTINGS, targets=(MAIN,)).guided(GUIDE))
    return plan, carried_out(plan, knee)


@pytest.mark.parametrize("capacity_rps", [9.8, 10.0, 10.3])
def test_one_rate_a_seed_tells_how_far_a_curve_has_moved(capacity_rps: float) -> None:
    knee = Knee(capacity_rps)
    plan, known = guided(knee)
    assert len(known) == 3
    assert plan.is_guided(known)
    found = plan.goodput(MAIN, known)
    assert found.bound is Bound.EXACT
    assert found.resolution_rps is None
    for seed, one in zip(SETTINGS.seeds, found.by_seed, strict=True):
        assert one.rate == pytest.approx(knee.crossing_rps(0.9, seed), rel=0.01)
    every = plan.goodput(EVERY_TIER, known)
    assert every.estimate.mean == pytest.approx(knee.crossing_rps(0.9, 2) / 1.1, rel=0.02)


@pytest.mark.parametrize("capacity_rps", [6.0, 8.0, 11.5])
def test_a_guide_that_no_longer_holds_is_not_used(capacity_rps: float) -> None:
    knee = Knee(capacity_rps)
    plan, known = guided(knee)
    assert not plan.is_guided(known)
    found = plan.goodput(MAIN, known)
    assert found.bound is Bound.EXACT
    assert found.estimate.mean == pytest.approx(knee.crossing_rps(0.9, 2), rel=0.01)


def test_a_guide_that_never_crosses_guides_nothing() -> None:
    assert SETTINGS.guided(Guide(((MAIN, CURVE[:2]),))) == SETTINGS
    assert SETTINGS.guided(Guide(())) == SETTINGS


def test_the_end_of_a_known_curve_bounds() -> None:
    assert shifted(CURVE, Point(0.5, 0.9, 100), 0.9).rate == pytest.approx(0.5)
    at_most = shifted(CURVE, Point(0.5, 0.0, 100), 0.9)
    at_least = shifted(CURVE, Point(0.5, 1.0, 100), 0.9)
    assert (at_most.bound, at_least.bound) == (Bound.AT_MOST, Bound.AT_LEAST)
    assert at_most.rate < 0.5 < at_least.rate
    assert shifted(CURVE[:2], Point(0.5, 0.99, 100), 0.9).bound is Bound.AT_LEAST


@given(st.floats(0.5, 2.0), st.floats(0.05, 0.95))
def test_a_stretched_curve_is_found_again(by: float, level: float) -> None:
    points = [Point(point.rate * by, point.attainment, point.offered) for point in CURVE]
    crossings = {round(shifted(CURVE, point, level).rate, 6) for point in points[1:4]}
    assert len(crossings) == 1
    assert isinstance(shifted(CURVE, points[1], level), Crossing)


def test_a_record_is_written_and_read(tmp_path: Path) -> None:
    entries = azure()
    known = found_in(entries)
    record = recorded.found_by(results(entries, known).lines, known)
    path = tmp_path / "record.json"
    assert recorded.read(path) == {}
    recorded.write(path, record)
    assert recorded.read(path) == record
    assert set(record) == {f"main/azure2023_conv/{name}" for name in PARTS}
    assert record["main/azure2023_conv/co_chunk"].chunk == 512
    assert record["main/azure2023_conv/minimal"].chunk is None
    path.write_text("{")
    with pytest.raises(recorded.RecordError, match=r"record\.json"):
        recorded.read(path)


def test_a_guided_campaign_runs_one_rate_and_no_sweep() -> None:
    entries = azure()
    whole = found_in(entries)
    record = recorded.found_by(results(entries, whole).lines, whole)
    begun = tuple(recorded.begun(entry, record, guided=True) for entry in entries)
    known = found_in(begun)
    assert len(known) == 3 * len(entries)
    before = {line.entry.name: line for line in results(entries, whole).lines}
    for line in results(begun, known).lines:
        assert line.guided
        assert line.label == before[line.entry.name].label
        assert line.main.estimate.mean == pytest.approx(before[line.entry.name].main.estimate.mean, rel=0.01)
    (burst,) = azure(Section.BURST, ("co_chunk",))
    trial = recorded.begun(burst, record, guided=True).plan
    assert isinstance(trial, Trial)
    assert trial.sweep is None
    assert dict(trial.of.contender.knobs) == {"chunk_tokens": 512}


def test_a_full_campaign_begins_where_another_ended_and_still_sweeps() -> None:
    entries = tuple(
        entry for entry in table(full()) if entry.row.title == "azure2023_conv" and entry.name in PARTS
    )
    known = found_in(entries)
    record = recorded.found_by(results(entries, known).lines, known)
    begun = tuple(recorded.begun(entry, record, guided=False) for entry in entries)
    for entry in begun:
        assert isinstance(entry.plan, Searched)
        assert len(entry.plan.of.settings.grid) == 2
        assert (entry.plan.sweep is not None) is (entry.name in SWEPT)
        assert entry.confirm is None or entry.confirm.searched == entry.plan
    assert recorded.begun(entries[0], {}, guided=False) == entries[0]
    assert len(found_in(begun)) <= len(known)


def test_nothing_of_the_range_is_lost_when_the_guide_is_wrong() -> None:
    plan = search(of=replace(SETTINGS, targets=(MAIN,)).guided(GUIDE))
    known = carried_out(plan, lambda _: outcome(1.0))
    assert plan.goodput(MAIN, known).bound is Bound.AT_LEAST
    assert quick().settings.guide is None
