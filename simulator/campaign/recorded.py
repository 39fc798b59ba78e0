"""What an earlier campaign found, kept in a file: where searches begin, and the curves that guide short ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from pydantic import TypeAdapter, ValidationError

from simulator.campaign.curve import Bound, Point, crossing
from simulator.campaign.goodput import MAIN, TARGETS, Guide, Target, mean_curve
from simulator.campaign.knobs import Searched, Trial, with_knob
from simulator.campaign.plan import Known
from simulator.campaign.results import Line
from simulator.campaign.table import CHUNK_KNOB, SWEPT, Entry
from simulator.scenario import Knob


class RecordError(ValueError):
    """A file of earlier results cannot be read."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for an entry. `curves` are in the order of `TARGETS`; `chunk` is the sweep's best value."""

    curves: tuple[tuple[Point, ...], ...]
    chunk: Knob | None = None

    @property
    def guide(self) -> Guide:
        return Guide(tuple(zip(TARGETS, self.curves, strict=False)))


Record = Mapping[str, Found]
_RECORD: TypeAdapter[dict[str, Found]] = TypeAdapter(dict[str, Found])
_DIGITS = 5


def read(path: Path) -> Record:
    """A record; an empty one where there is no file. Raises RecordError."""
    if not path.exists():
        return {}
    try:
        return _RECORD.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RecordError(f"{path}: {error}") from error


def write(path: Path, record: Record) -> None:
    """Write a record. Raises OSError."""
    option = orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    lines = [
        f"{orjson.dumps(name).decode()}:{orjson.dumps(record[name], option=option).decode().strip()}"
        for name in sorted(record)
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def found_by(lines: Sequence[Line], known: Known) -> Record:
    """What these lines add to a record."""
    record = {}
    for line in lines:
        curves = tuple(tuple(_short(point) for point in _curve(line, target, known)) for target in TARGETS)
        knobs = dict(line.search.subject.contender.knobs)
        swept = line.entry.plan.sweep is not None or line.entry.name in SWEPT
        record[key_of(line.entry)] = Found(curves, knobs.get(CHUNK_KNOB) if swept else None)
    return record


def key_of(entry: Entry) -> str:
    return f"{entry.row.name}/{entry.name}"


def begun(entry: Entry, record: Record, *, guided: bool) -> Entry:
    """The entry with its search begun where it ended before, or guided by the curves and the knob found then."""
    plan = entry.plan
    found = record.get(key_of(entry))
    if isinstance(plan, Searched) and found is not None:
        plan = _begun(plan, found, guided=guided)
    if guided:
        plan = _with_known_knob(plan, record.get(f"{(entry.row.of or entry.row).name}/{entry.name}"))
    confirm = entry.confirm
    if confirm is not None and isinstance(plan, Searched):
        confirm = replace(confirm, searched=plan)
    return replace(entry, plan=plan, confirm=confirm)


def _begun(plan: Searched, found: Found, *, guided: bool) -> Searched:
    settings = plan.of.settings
    curve = found.guide.curve(MAIN)
    last = crossing(curve, MAIN.level) if curve else None
    if guided:
        settings = settings.guided(found.guide)
    elif last is not None and last.bound is Bound.EXACT:
        settings = settings.around(last.rate)
    return replace(plan, of=replace(plan.of, settings=settings))


def _with_known_knob(plan: Searched | Trial, found: Found | None) -> Searched | Trial:
    """Without the sweep, where its best value is on record."""
    if plan.sweep is None or found is None or found.chunk is None:
        return plan
    if isinstance(plan, Trial):
        return replace(plan, of=with_knob(plan.of, CHUNK_KNOB, found.chunk), sweep=None)
    subject = with_knob(plan.of.subject, CHUNK_KNOB, found.chunk)
    return Searched(replace(plan.of, subject=subject))


def _curve(line: Line, target: Target, known: Known) -> tuple[Point, ...]:
    return mean_curve(line.search, target, known)


def _short(point: Point) -> Point:
    return Point(round(point.rate, _DIGITS), round(point.attainment, _DIGITS), point.offered)
