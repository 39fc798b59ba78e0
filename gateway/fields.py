"""Values of a JSON body, checked one by one; every mistake is told with the field's name."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.errors import InvalidRequest
from gateway.words import kind


def boolean(fields: Mapping[str, object], name: str) -> bool:
    value = fields.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InvalidRequest(f"{name}: must be true or false, not {kind(value)}", param=name)


def positive_int(value: object, name: str, highest: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name}: must be a whole number, not {kind(value)}", param=name)
    if not 1 <= value <= highest:
        raise InvalidRequest(f"{name}: must be from 1 to {highest}, not {value}", param=name)
    return value
