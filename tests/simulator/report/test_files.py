"""The files of a report: they agree with each other, and the same study gives the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from simulator.outcome import Timing
from simulator.report import canvas, files
from simulator.report.canvas import FiguresUnavailable, Look
from simulator.report.figures import draw
from simulator.report.files import (
    ParquetUnavailable,
    Written,
    results_json,
    runs_jsonl,
    timing_json,
    write_parquet,
    write_report,
)
from simulator.report.gradient import telling_runs
from simulator.report.rows import CellRow, TierRow, cell_rows
from simulator.report.summary import compare
from simulator.report.values import Run, Study
from tests.simulator.report.conftest import made_runs


@pytest.fixture(scope="module")
def small(study: Study) -> Study:
    """Few figures: what the tests of files need."""
    runs = made_runs((30.0, 40.0), seeds=1)[:2]
    return replace(study, runs=runs, goodputs=(), gains=(), marks=study.marks[:1])


@pytest.fixture(scope="module")
def written(small: Study, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_report(small, tmp_path_factory.mktemp("report"))


def test_parquet_holds_what_the_json_holds(written: Written) -> None:
    folder = written.page.parent
    results = json.loads((folder / "results.json").read_bytes())
    assert pq.read_table(folder / "cells.parquet").to_pylist() == results["cells"]
    assert pq.read_table(folder / "tiers.parquet").to_pylist() == results["tiers"]
    assert len(results["cells"]) == 2
    assert len(results["tiers"]) == 2 * 5
    assert results["simulated"] is True


def test_every_run_is_kept_whole(small: Study) -> None:
    lines = [json.loads(line) for line in runs_jsonl(small.runs).splitlines()]
    assert [line["cell"]["seed"] for line in lines] == [run.cell.seed for run in small.runs]
    assert lines[0]["outcome"]["samples"][1]["backends"]["20ms"] == [0.95, 0.75]
    assert lines[0]["outcome"]["timing"] is None


def test_the_same_study_gives_the_same_bytes(small: Study, written: Written, tmp_path: Path) -> None:
    again = write_report(small, tmp_path)
    for one, other in zip(written.files, again.files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_timings_are_in_their_own_file(small: Study) -> None:
    slower = tuple(Run(run.cell, replace(run.outcome, timing=Timing(99.0, 1.0, 2.0))) for run in small.runs)
    other = replace(small, runs=slower)
    assert results_json(other) == results_json(small)
    assert runs_jsonl(other.runs) == runs_jsonl(small.runs)
    assert json.loads(timing_json(other.runs))[0]["timing"]["cpu_s"] == 99.0


def test_every_figure_is_a_picture(written: Written) -> None:
    pictures = [path for path in written.files if path.suffix == ".png"]
    names = {"s1-attainment", "s1-cost", "s1-ttft", "s1-tpot", "s1-gradient-1", "ablation"}
    assert {path.stem for path in pictures} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_bound_far_from_the_rates_is_told_and_does_not_stretch_the_axis(study: Study) -> None:
    far = replace(study.marks[0], label="far bound", rate_rps=900.0)
    (drawing,) = [item for item in draw(replace(study, marks=(*study.marks, far))) if item.name == "s1-attainment"]
    axes = Figure().add_subplot()
    drawing.panels[0].paint(axes)
    assert axes.get_xlim()[1] < 80
    assert "far bound, 900/s →" in axes.get_legend_handles_labels()[1]


def test_the_best_of_each_side_is_drawn_over_time(study: Study) -> None:
    (comparison,) = compare(study.runs)
    swapped = replace(comparison, contenders=comparison.contenders[::-1])
    for each in (comparison, swapped):
        assert [run.cell.contender.name for run in telling_runs(each)] == ["polyserve_co", "co_chunk"]


def test_lines_on_each_other_differ_in_width_and_dashes() -> None:
    looks = [Look.of(place) for place in range(4)]
    assert len({look.linewidth for look in looks}) == len({look.linestyle for look in looks}) == 4


def test_a_study_has_every_kind_of_figure(study: Study) -> None:
    names = [drawing.name for drawing in draw(study)]
    assert len(names) == len(set(names))
    assert {"s1-attainment", "s1-gradient-2", "s1-goodput", "scaling", "t0", "ablation"} <= set(names)


def test_parquet_has_its_columns_without_a_row(tmp_path: Path) -> None:
    write_parquet((), TierRow, tmp_path / "none.parquet")
    schema = pq.read_schema(tmp_path / "none.parquet")
    assert str(schema.field("attainment").type) == "double"
    assert str(schema.field("offered").type) == "int64"


def test_a_fixed_step_part_is_a_number_of_its_own(study: Study) -> None:
    run = study.runs[0]
    engines = tuple(replace(kind, step_floor_s=0.005) for kind in run.cell.fleet.engines)
    changed = replace(run, cell=replace(run.cell, fleet=replace(run.cell.fleet, engines=engines)))
    rows = cell_rows((run, changed))
    assert [row.t0_ms for row in rows] == [None, 5.0]
    assert isinstance(rows[0], CellRow)


def test_missing_extras_are_told_before_anything_is_written(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "find_spec", lambda _name: None)
    with pytest.raises(ParquetUnavailable, match=r"tiergate\[parquet\]"):
        write_report(study, tmp_path / "out")
    monkeypatch.setattr(canvas, "find_spec", lambda _name: None)
    with pytest.raises(FiguresUnavailable, match=r"tiergate\[figures\]"):
        write_report(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()
