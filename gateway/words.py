"""How values that others sent are told in messages: never more of them than a person would read."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_SHOWN_CHARS = 100


def cut(text: str) -> str:
    """The text, or its beginning when it is long."""
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def quoted(value: object) -> str:
    """A text in quotes, cut when it is long; for anything else what kind of value it is."""
    return repr(cut(value)) if isinstance(value, str) else kind(value)


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """A message for a name that is not there, with the nearest one that is."""
    shown = cut(name)  # comparing takes time that grows with the product of the lengths
    near = difflib.get_close_matches(shown, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
    return f"unknown {what} {shown!r}; {hint}"


def kind(value: object) -> str:
    """What kind of JSON value this is; a number, which is short, as it is."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return str(value)
        case str():
            return "a text"
        case list():
            return "an empty list" if not value else "a list"
        case _:
            return "an object"
