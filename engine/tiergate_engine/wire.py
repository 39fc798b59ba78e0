"""Checked JSON: fields read out of a document one by one, and step times as documents.

A reader is told where it stands, so that whoever sent the document learns which field is wrong. Fields that are
not asked for are ignored: a newer sender may know more than this reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from tiergate_engine.curves import Curve, Surface
from tiergate_engine.step import StepTime
from tiergate_engine.steptime import RooflineStepTime, ScaledStepTime, ShiftedStepTime, TableStepTime

_LARGEST = 2**53  # beyond, JSON readers of other languages lose digits
_DEEPEST = 8  # corrections on corrections


class ControlError(ValueError):
    """A document of the control contract that cannot be read; the message names the field and what it may be."""


def document(text: str | bytes) -> Mapping[str, object]:
    """The JSON object in `text`. Raises ControlError."""
    try:
        raw: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ControlError(f"not JSON: {error}") from error
    return as_object(raw, "the document")


def as_object(value: object, where: str) -> Mapping[str, object]:
    """`value` as a JSON object. Raises ControlError."""
    if not isinstance(value, dict):
        raise ControlError(f"{where} must be a JSON object, not {value!r:.80}")
    return value


def as_array(value: object, where: str) -> Sequence[object]:
    """`value` as a JSON array. Raises ControlError."""
    if not isinstance(value, list):
        raise ControlError(f"{where} must be an array, not {value!r:.80}")
    return value


def as_number(value: object, where: str, least: float = -math.inf) -> float:
    """`value` as a finite number of at least `least`. Raises ControlError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ControlError(f"{where} must be a finite number, not {value!r:.80}")
    if value < least:
        raise ControlError(f"{where} must be at least {least:g}, not {value!r:.80}")
    return float(value)


def as_count(value: object, where: str, least: int = 0) -> int:
    """`value` as a whole number of at least `least`. Raises ControlError."""
    number = as_number(value, where, least)
    if number != int(number) or abs(number) > _LARGEST:
        raise ControlError(f"{where} must be a whole number, not {value!r:.80}")
    return int(number)


def as_flag(value: object, where: str) -> bool:
    """`value` as true or false. Raises ControlError."""
    if not isinstance(value, bool):
        raise ControlError(f"{where} must be true or false, not {value!r:.80}")
    return value


def as_text(value: object, where: str) -> str:
    """`value` as a text. Raises ControlError."""
    if not isinstance(value, str):
        raise ControlError(f"{where} must be a text, not {value!r:.80}")
    return value


def required(fields: Mapping[str, object], name: str, where: str = "") -> object:
    """The value of a field that has to be there. Raises ControlError."""
    if name not in fields:
        raise ControlError(f"{where}{name} is missing")
    return fields[name]


# --- step times --------------------------------------------------------------------------------------------------

_COEFFICIENTS = (
    "c0_s",
    "weights_s",
    "per_token_s",
    "sharpness",
    "per_seq_s",
    "per_kv_s",
    "mixed_kv_s",
    "per_context_s",
    "per_attention_s",
    "host_step_s",
    "host_seq_s",
)


def step_time_to_json(step_time: StepTime) -> dict[str, object]:
    """A step time as a JSON object. Raises ControlError for a kind that has no JSON form."""
    if isinstance(step_time, RooflineStepTime):
        return {"kind": "roofline", **{name: float(getattr(step_time, name)) for name in _COEFFICIENTS}}
    if isinstance(step_time, TableStepTime):
        attention = step_time.attention
        return {
            "kind": "table",
            "tokens": _curve_to_json(step_time.tokens),
            "decode": {
                "seqs": _floats(step_time.decode.row_axis),
                "kv_tokens": _floats(step_time.decode.column_axis),
                "seconds": [_floats(row) for row in step_time.decode.rows_s],
            },
            "attention": None if attention is None else _curve_to_json(attention),
            "beyond": step_time_to_json(step_time.beyond),
        }
    if isinstance(step_time, ScaledStepTime):
        return {
            "kind": "scaled",
            "base": step_time_to_json(step_time.base),
            "decode_factor": float(step_time.decode_factor),
            "mixed_factor": float(step_time.mixed_factor),
        }
    if isinstance(step_time, ShiftedStepTime):
        return {"kind": "shifted", "base": step_time_to_json(step_time.base), "extra_s": float(step_time.extra_s)}
    raise ControlError(f"a {type(step_time).__name__} has no JSON form")


def step_time_from_json(value: object, where: str = "profile") -> StepTime:
    """The step time of a JSON object. Raises ControlError, with the place."""
    return _step_time(value, where, _DEEPEST)


def _step_time(value: object, where: str, depth: int) -> StepTime:
    if not depth:
        raise ControlError(f"{where} is nested too deeply: at most {_DEEPEST} corrections")
    fields = as_object(value, where)
    kind = required(fields, "kind", f"{where}.")
    try:
        if kind == "roofline":
            return _roofline(fields, where)
        if kind == "table":
            return _table(fields, where)
        if kind == "scaled":
            return ScaledStepTime(
                _step_time(required(fields, "base", f"{where}."), f"{where}.base", depth - 1),
                as_number(fields.get("decode_factor", 1.0), f"{where}.decode_factor"),
                as_number(fields.get("mixed_factor", 1.0), f"{where}.mixed_factor"),
            )
        if kind == "shifted":
            return ShiftedStepTime(
                _step_time(required(fields, "base", f"{where}."), f"{where}.base", depth - 1),
                as_number(required(fields, "extra_s", f"{where}."), f"{where}.extra_s"),
            )
    except ControlError:
        raise
    except ValueError as error:
        raise ControlError(f"{where}: {error}") from error
    raise ControlError(f"{where}.kind is {kind!r:.80}: it must be roofline, table, scaled or shifted")


def _roofline(fields: Mapping[str, object], where: str) -> RooflineStepTime:
    given = {name: as_number(fields[name], f"{where}.{name}") for name in _COEFFICIENTS if name in fields}
    return RooflineStepTime(**given)


def _table(fields: Mapping[str, object], where: str) -> TableStepTime:
    decode = as_object(required(fields, "decode", f"{where}."), f"{where}.decode")
    rows = as_array(required(decode, "seconds", f"{where}.decode."), f"{where}.decode.seconds")
    surface = Surface(
        _numbers(decode, "seqs", f"{where}.decode"),
        _numbers(decode, "kv_tokens", f"{where}.decode"),
        tuple(_row(row, f"{where}.decode.seconds[{index}]") for index, row in enumerate(rows)),
    )
    attention = fields.get("attention")
    beyond = as_object(required(fields, "beyond", f"{where}."), f"{where}.beyond")
    return TableStepTime(
        _curve(required(fields, "tokens", f"{where}."), f"{where}.tokens"),
        surface,
        None if attention is None else _curve(attention, f"{where}.attention"),
        _roofline(beyond, f"{where}.beyond"),
    )


def _curve_to_json(curve: Curve) -> dict[str, object]:
    return {"axis": _floats(curve.axis), "seconds": _floats(curve.values_s)}


def _floats(values: tuple[float, ...]) -> list[float]:
    return list(map(float, values))  # equal step times give equal text


def _curve(value: object, where: str) -> Curve:
    fields = as_object(value, where)
    return Curve(_numbers(fields, "axis", where), _numbers(fields, "seconds", where))


def _numbers(fields: Mapping[str, object], name: str, where: str) -> tuple[float, ...]:
    return _row(required(fields, name, f"{where}."), f"{where}.{name}")


def _row(value: object, where: str) -> tuple[float, ...]:
    return tuple(as_number(item, f"{where}[{index}]") for index, item in enumerate(as_array(value, where)))
