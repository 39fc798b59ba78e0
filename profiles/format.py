"""The profile file, format 1: JSON with provenance, coefficients, tables, limits and their errors.

pydantic stands at this border only. Everything is checked when a file is read; what leaves is immutable.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tiergate_engine.curves import Curve, Surface
from tiergate_engine.step import StepTime
from tiergate_engine.steptime import RooflineStepTime, TableStepTime

FORMAT = 1

_NUMBERS = re.compile(r"\[([-+.\deE,\s]+)\]")  # a list of nothing but numbers goes on one line

_Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_Axis = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_Count = Annotated[int, Field(gt=0)]


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the place and the remedy."""

    status: ClassVar[int] = 400


class Source(StrEnum):
    """Where a regime's numbers come from."""

    MEASURED = "measured"  # whole steps timed in an engine
    COMPOSED = "composed"  # sums of measured kernels
    FORMULA = "formula"  # nothing of this regime was measured; the formula extends another


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Provenance(_Part):
    """Who measured what, when, how, and under which licence the numbers may be passed on."""

    origin: str
    licence: str
    date: str
    command: str
    conditions: str


class FitError(_Part):
    """Relative errors |predicted / observed - 1| on observations that were held out of the fit."""

    mape: float = Field(ge=0.0)
    p50: float = Field(ge=0.0)
    p90: float = Field(ge=0.0)
    observations: int = Field(ge=0)
    folds: int = Field(ge=2)


class Regime(_Part):
    """One regime: where its numbers come from, and their cross-validated error (None: nothing to judge by)."""

    source: Source
    error: FitError | None = None


class Regimes(_Part):
    """Steps of decodes only, and steps that carry prefill."""

    decode: Regime
    mixed: Regime


class Limits(_Part):
    """The engine's limits where the profile was taken. None is unknown."""

    kv_tokens: _Count | None = None
    max_running_seqs: _Count | None = None
    max_batched_tokens: _Count | None = None
    max_model_tokens: _Count | None = None
    block_tokens: _Count = 16


class Coefficients(_Part):
    """The formula's coefficients; see `tiergate_engine.steptime.RooflineStepTime`. Host time is on top."""

    c0_s: _Seconds = 0.0
    weights_s: _Seconds = 0.0
    per_token_s: _Seconds = 0.0
    sharpness: float = Field(default=1.0, ge=1.0, le=32.0)
    per_seq_s: _Seconds = 0.0
    per_kv_s: _Seconds = 0.0
    mixed_kv_s: _Seconds = 0.0
    per_context_s: _Seconds = 0.0
    per_attention_s: _Seconds = 0.0
    host_step_s: _Seconds = 0.0
    host_seq_s: _Seconds = 0.0

    def step_time(self) -> RooflineStepTime:
        return RooflineStepTime(**self.model_dump())

    @classmethod
    def of(cls, step_time: RooflineStepTime) -> Coefficients:
        return cls(**{name: getattr(step_time, name) for name in cls.model_fields})


class CurveTable(_Part):
    axis: tuple[_Axis, ...]
    seconds: tuple[_Seconds, ...]


class DecodeTable(_Part):
    """What decodes add to a step: one row per number of sequences, one column per sum of their contexts."""

    seqs: tuple[_Axis, ...]
    kv_tokens: tuple[_Axis, ...]
    seconds: tuple[tuple[_Seconds, ...], ...]


class Tables(_Part):
    """The parts of `tiergate_engine.steptime.TableStepTime`, without host time."""

    tokens: CurveTable
    decode: DecodeTable
    attention: CurveTable | None = None


class ProfileFile(_Part):
    """The whole file. `format` comes first, so that a reader of another version can say so."""

    format: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    model: str
    hardware: str
    engine: str
    provenance: Provenance
    limits: Limits
    regimes: Regimes
    coefficients: Coefficients
    tables: Tables | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """A loaded profile: what the file says, and the step time made of it."""

    file: ProfileFile
    step_time: StepTime

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def model(self) -> str:
        return self.file.model

    @property
    def limits(self) -> Limits:
        return self.file.limits

    @property
    def p90_error(self) -> float | None:
        """The worse of the regimes' cross-validated p90 relative errors; None when neither has one."""
        regimes = self.file.regimes
        errors = [regime.error.p90 for regime in (regimes.decode, regimes.mixed) if regime.error is not None]
        return max(errors, default=None)


def parse(text: str | bytes, where: str) -> Profile:
    """Read a profile file's text. `where` names it in messages.

    Raises:
        ProfileError: not JSON, an unknown key (with the nearest known one), a missing or wrong value, or a table
            whose axis does not rise or whose times fall, with the place.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"{where}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ProfileError(f"{where}: a profile is a JSON object")
    if raw.get("format") != FORMAT:
        raise ProfileError(f"{where}: format is {raw.get('format')!r}; this version reads format {FORMAT}")
    try:
        file = ProfileFile.model_validate(raw)
    except ValidationError as error:
        raise ProfileError(f"{where}: {_explain(error)}") from error
    return Profile(file, build(file, where))


def dump(file: ProfileFile) -> str:
    """The file's text: stable, one line per row of a table."""
    text = json.dumps(file.model_dump(mode="json", exclude_none=True), indent=1)
    return _NUMBERS.sub(lambda row: "[" + ", ".join(row[1].replace(",", " ").split()) + "]", text) + "\n"


def build(file: ProfileFile, where: str) -> StepTime:
    """The step time a file describes: tables when it has them, else the formula. Raises ProfileError."""
    formula = file.coefficients.step_time()
    tables = file.tables
    if tables is None:
        return formula
    host_step_s, host_seq_s = formula.host_step_s, formula.host_seq_s
    tokens = _curve(tables.tokens, f"{where}: tables.tokens", host_step_s)
    attention = None if tables.attention is None else _curve(tables.attention, f"{where}: tables.attention", 0.0)
    decode = tables.decode
    rows = tuple(
        tuple(value + host_seq_s * seqs for value in row)
        for seqs, row in zip(decode.seqs, decode.seconds, strict=False)
    )
    try:
        surface = Surface(
            decode.seqs, decode.kv_tokens, rows if len(rows) == len(decode.seconds) else decode.seconds
        )
    except ValueError as error:
        place = str(error).replace("row_axis", "seqs").replace("column_axis", "kv_tokens")
        raise ProfileError(f"{where}: tables.decode: {place.replace('rows_s', 'seconds')}") from error
    try:
        return TableStepTime(tokens, surface, attention, formula)
    except ValueError as error:
        raise ProfileError(f"{where}: tables: {error}") from error


def _curve(table: CurveTable, where: str, add_s: float) -> Curve:
    try:
        return Curve(table.axis, tuple(value + add_s for value in table.seconds))
    except ValueError as error:
        raise ProfileError(f"{where}: {str(error).replace('values_s', 'seconds')}") from error


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{place}: {first['msg']}"
    known = _known_keys(first["loc"][:-1])
    nearest = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
    return f"unknown key {place!r}; the nearest known one is {nearest[0]!r}"


_PARTS: dict[str, type[_Part]] = {
    "provenance": Provenance,
    "limits": Limits,
    "regimes": Regimes,
    "decode": Regime,
    "mixed": Regime,
    "error": FitError,
    "coefficients": Coefficients,
    "tables": Tables,
    "tokens": CurveTable,
    "attention": CurveTable,
}


def _known_keys(place: tuple[int | str, ...]) -> list[str]:
    if not place:
        return list(ProfileFile.model_fields)
    if place == ("tables", "decode"):
        return list(DecodeTable.model_fields)
    return list(_PARTS[str(place[-1])].model_fields)
