"""The published table: its rows, what they cost, and what is read from them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.campaign.curve import Bound
from simulator.campaign.goodput import EVERY_TIER, MAIN
from simulator.campaign.knobs import Trial
from simulator.campaign.results import results, runs_of
from simulator.campaign.scale import UnevenFleet, ceilings_of, scale_of
from simulator.campaign.study import study_of, with_samples
from simulator.campaign.table import (
    ABLATIONS,
    AZURE,
    CHUNKS,
    CO,
    PD,
    RIVALS,
    TRACES,
    Entry,
    Section,
    fleet,
    full,
    quick,
    rows,
    size_named,
    table,
    tiers,
)
from simulator.campaign.text import report_text, table_text
from simulator.contenders import names, setup_for
from simulator.outcome import CellOutcome
from simulator.report.values import Run
from simulator.scenario import Cell, Contender, Engines, FleetSpec, Form
from tests.simulator.campaign.fakes import Knee, outcome
from tests.simulator.campaign.test_goodput import carried_out

# Capacity as a part of the reference; chunks of 512 are the best.
PARTS = {"random": 0.6, "minimal": 0.8, "co_chunk": 0.7, "polyserve_co": 1.0}


def fake(cell: Cell) -> CellOutcome:
    part = PARTS.get(cell.contender.name, 0.5)
    if dict(cell.contender.knobs).get("chunk_tokens") == 512:
        part = 0.9
    scale = scale_of(replace(cell.workload, invert_at=None), cell.fleet)
    return Knee(part * scale.optimal_rps)(cell)


def azure(section: Section = Section.MAIN, only: tuple[str, ...] = tuple(PARTS)) -> tuple[Entry, ...]:
    entries = table(quick(), section)
    return tuple(entry for entry in entries if entry.row.workload.trace == AZURE.trace and entry.name in only)


def found_in(entries: tuple[Entry, ...]) -> dict[Cell, CellOutcome]:
    known: dict[Cell, CellOutcome] = {}
    for entry in entries:
        known |= carried_out(entry.confirm or entry.plan, fake, 100)
    return known


def test_papers_set_up() -> None:
    assert [tier.share for tier in tiers()] == [0.1, 0.2, 0.3, 0.4]
    assert [tier.slo.tpot_s for tier in tiers()] == [0.02, 0.03, 0.05, 0.1]
    assert AZURE.ttft_s == (0.3, 0.5, 1.0)
    assert fleet().backends == 20
    assert {trace.trace for trace in TRACES if trace.prefixes} == {"mooncake_conversation"}
    assert len(TRACES) == 6
    assert min(CHUNKS) == 128
    assert max(CHUNKS) == 4096


def test_all_contenders_exist() -> None:
    assert set(CO) | set(PD) <= set(names())
    assert {setup_for(Contender(name)).form for name in PD} == {Form.DISAGGREGATED}
    for _, knob in ABLATIONS:
        setup_for(Contender("polyserve_co", (knob,)))


def test_both_sizes_have_the_same_rows() -> None:
    named = [{row.name for listed in rows(size).values() for row in listed} for size in (full(), quick())]
    assert named[0] == named[1]
    assert len(named[0]) == len(TRACES) + 3 + 1 + 1 + 3 + 1


def test_full_is_confirmed_with_300_000_requests() -> None:
    confirmed = [entry.confirm for entry in table(full(), Section.MAIN) if entry.confirm is not None]
    assert len(confirmed) == len(TRACES)
    assert {confirm.length.measured for confirm in confirmed} == {300_000}


def test_sizes_have_three_seeds_and_a_budget() -> None:
    for size in (full(), quick()):
        assert len(size.settings.seeds) >= 3
        assert size.settings.most_rates <= 8


def test_sizes_are_found_by_name() -> None:
    assert size_named("full") == full()
    with pytest.raises(ValueError, match="full, quick"):
        size_named("huge")


def test_sweeps_are_shared_between_rows_of_one_trace() -> None:
    entries = table(quick())
    sweeps = [entry.plan.sweep for entry in entries if entry.name == "co_chunk"]
    assert all(sweep is not None for sweep in sweeps)
    # six traces, three other fixed times, one slow engine; bursts and fleets take azure's
    assert len(set(sweeps)) == 6 + 3 + 1
    assert len(sweeps) > 10


def test_the_mix_is_inverted_in_the_burst_only() -> None:
    for entry in table(quick()):
        burst = entry.row.section is Section.BURST
        assert isinstance(entry.plan, Trial) is burst
        assert (entry.row.workload.invert_at == 0.5) is burst


def test_the_scale_of_a_row() -> None:
    scale = scale_of(AZURE, fleet())
    slow = scale_of(AZURE, fleet(floor_s=0.008))
    assert scale.optimal_rps > slow.optimal_rps > slow.pool_rps
    assert 1 < scale.optimal_rps / scale.pool_rps < 1.1
    assert slow.optimal_rps / slow.pool_rps > 1.3
    assert scale.optimal(Form.DISAGGREGATED) == scale.optimal_pd_rps
    assert 0 < scale.prefill_backends < 20
    ceilings = ceilings_of(AZURE, fleet(), Form.COLOCATED)
    assert scale.optimal_rps < ceilings.all_rps < ceilings.every_tier_rps <= ceilings.most_rps


def test_a_mixed_fleet_has_no_scale() -> None:
    mixed = FleetSpec((Engines("h200-llama-3.1-8b-bf16", 1), Engines("h100-llama-3.1-8b-bf16", 1)))
    with pytest.raises(UnevenFleet):
        scale_of(AZURE, mixed)


def test_goodputs_ratios_and_tables() -> None:
    entries = azure()
    known = found_in(entries)
    found = results(entries, known)
    assert not found.unfinished
    by_name = {line.entry.name: line for line in found.lines}
    assert by_name["co_chunk"].label == "co_chunk(chunk_tokens=512)"
    gains = {(gain.name, gain.target): gain for gain in found.gains}
    gain = gains["polyserve_co", MAIN]
    assert gain.against == "co_chunk"
    assert gain.ratio.bound is Bound.EXACT
    assert gain.ratio.estimate.mean == pytest.approx(1.0 / 0.9, rel=0.01)
    assert ("polyserve_co", EVERY_TIER) in gains
    line = by_name["polyserve_co"]
    assert line.of_optimal.mean == pytest.approx(Knee(1.0).crossing_rps(0.9, 2), rel=0.01)
    assert not line.above_ceiling
    text = report_text(found)
    assert "co_chunk(chunk_tokens=512)" in text
    assert "polyserve_co / co_chunk, 90% overall: 1.11" in text
    assert "simulated" in text
    shown = runs_of(found, known)
    assert next(iter(shown)).contender.name == "polyserve_co"
    assert {cell.seed for cell in shown} == {11, 12, 13}
    lengths = {cell.measured_requests for cell in shown}
    assert len(lengths) == 1  # no sweep among them


def test_what_no_policy_can_have_is_called_a_bug() -> None:
    entries = azure(only=("random",))
    known = carried_out(entries[0].plan, lambda _: outcome(1.0))
    (line,) = results(entries, known).lines
    assert line.main.bound is Bound.AT_LEAST
    assert MAIN in line.above_ceiling
    assert "ABOVE THE LONG-RUN BOUND" in report_text(results(entries, known))


def test_entries_whose_cells_failed_are_named() -> None:
    entries = azure()
    found = results(entries, found_in(entries[:1]))
    assert {entry.name for entry in found.unfinished} == {entry.name for entry in entries[1:]}
    assert "Not finished" in report_text(found)


def test_bursts_are_told_tier_by_tier() -> None:
    entries = azure(Section.BURST, ("minimal", "polyserve_co"))
    found = results(entries, found_in(entries))
    assert len(found.trials) == 4
    assert [name for name, _ in found.trials[0].tiers] == ["t20", "t100"]  # the fake's
    assert "100ms" in report_text(found)


def test_ablations_are_compared_with_the_whole() -> None:
    entries = table(quick(), Section.ABLATION)
    found = results(entries, found_in(entries))
    assert {gain.name for gain in found.gains} == {name for name, _ in ABLATIONS}
    assert all(gain.ratio.estimate.mean == pytest.approx(1.0, rel=0.02) for gain in found.gains)


def test_a_study_for_the_report() -> None:
    entries = (*azure(), *azure(Section.T0), *table(quick(), Section.ABLATION)[:3])
    known = {cell: replace(one, samples=()) for cell, one in found_in(entries).items()}
    found = results(entries, known)
    runs = [Run(cell, one) for cell, one in runs_of(found, known).items()]
    study = with_samples(study_of(found, runs, title="t", rerun="r"), fake)
    assert any(run.outcome.samples for run in study.runs)
    assert not all(run.outcome.samples for run in study.runs)
    assert len(study.goodputs) == 4 * len(found.lines)
    assert [row.mechanism for row in study.ablations[::2]] == [name for name, _ in ABLATIONS[:2]]
    curve = [row for row in study.gains if row.step_floor_s is not None and row.target == MAIN]
    assert len({(row.group, row.contender, row.against) for row in curve}) == 1
    assert [round(1e3 * (row.step_floor_s or 0)) for row in curve] == [1, 5, 8, 12]
    assert RIVALS["polyserve_co"][0] in curve[0].against


def test_columns_line_up() -> None:
    text = table_text(("name", "n"), [("a", "10"), ("long name", "7")])
    assert text == "name        n\n---------  --\na          10\nlong name   7\n"
