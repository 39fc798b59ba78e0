"""The files of a report: canonical JSON, parquet, pictures and the page. The same study gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, get_args, get_type_hints

import orjson

from simulator.report.figures import draw, need_figures, write_png
from simulator.report.page import page
from simulator.report.rows import CellRow, TierRow, cell_rows, tier_rows
from simulator.report.summary import compare
from simulator.report.values import Run, Study

if TYPE_CHECKING:
    from pyarrow import DataType


class ParquetUnavailable(Exception):
    """pyarrow is not installed."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written where."""

    page: Path
    files: tuple[Path, ...]


def need_report() -> None:
    """Raises FiguresUnavailable or ParquetUnavailable when a report could not be written: before a run."""
    need_figures()
    _need_parquet()


def _need_parquet() -> None:
    if find_spec("pyarrow") is None:
        raise ParquetUnavailable("parquet files need pyarrow: install tiergate[parquet]")


def write_report(study: Study, folder: Path) -> Written:
    """Write the report's files (`docs/simulate.md` tells what is in each) into a folder, which may exist.

    Raises FiguresUnavailable, ParquetUnavailable and OSError.
    """
    need_report()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = folder / "figures"
    pictures.mkdir(exist_ok=True)
    drawings = draw(study)
    written = {
        folder / "results.json": results_json(study),
        folder / "runs.jsonl": runs_jsonl(study.runs),
        folder / "timing.json": timing_json(study.runs),
        folder / "report.html": page(study, drawings).encode(),
    }
    for path, content in written.items():
        path.write_bytes(content)
    write_parquet(cell_rows(study.runs), CellRow, folder / "cells.parquet")
    write_parquet(tier_rows(study.runs), TierRow, folder / "tiers.parquet")
    paths = [*written, folder / "cells.parquet", folder / "tiers.parquet"]
    for drawing in drawings:
        path = pictures / f"{drawing.name}.png"
        write_png(drawing, path)
        paths.append(path)
    return Written(folder / "report.html", tuple(paths))


def results_json(study: Study) -> bytes:
    """What was found, and every run as a row, keys sorted, without timings."""
    runs = tuple(replace(run, outcome=replace(run.outcome, timing=None)) for run in study.runs)
    comparisons = [
        {
            "setting": comparison.setting,
            "contenders": comparison.contenders,
            "points": [replace(point, decision_p50_s=None, decision_p99_s=None) for point in comparison.points],
        }
        for comparison in compare(runs)
    ]
    content = {
        "simulated": True,
        "study": replace(study, runs=()),
        "comparisons": comparisons,
        "cells": cell_rows(runs),
        "tiers": tier_rows(runs),
    }
    return _dump(content)


def runs_jsonl(runs: Sequence[Run]) -> bytes:
    """Every run whole, one a line: the cell and all it gave, samples included, timings left out."""
    option = orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    kept = (replace(run, outcome=replace(run.outcome, timing=None)) for run in runs)
    return b"".join(orjson.dumps(run, default=_plain, option=option) for run in kept)


def timing_json(runs: Sequence[Run]) -> bytes:
    """What each run cost here, and what its decisions cost: these differ from run to run."""
    return _dump(
        [
            {
                "contender": run.cell.contender.label,
                "rate_rps": run.cell.rate_rps,
                "seed": run.cell.seed,
                "timing": run.outcome.timing,
            }
            for run in runs
        ]
    )


def _dump(content: object) -> bytes:
    option = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(content, default=_plain, option=option)


def _plain(value: object) -> object:
    """What JSON has no word for: read-only mappings. Raises TypeError for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def write_parquet(rows: Sequence[CellRow] | Sequence[TierRow], kind: type[CellRow | TierRow], path: Path) -> None:
    """Write rows with one column a field; the types are those of the fields, also when there is no row.

    Raises ParquetUnavailable and OSError.
    """
    _need_parquet()
    import pyarrow as pa  # noqa: PLC0415 - an extra
    import pyarrow.parquet as pq  # noqa: PLC0415

    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    schema = pa.schema([pa.field(name, _column_type(hints[name])) for name in names])
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)
    pq.write_table(table, path, compression="zstd")


def _column_type(hint: object) -> DataType:
    import pyarrow as pa  # noqa: PLC0415 - an extra

    kinds = set(get_args(hint)) if isinstance(hint, UnionType) else {hint}
    columns = ((str, pa.string()), (int, pa.int64()), (float, pa.float64()))
    return next(column for kind, column in columns if kind in kinds)
