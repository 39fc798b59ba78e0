"""Read a few samples out of a Prometheus text exposition without parsing the rest of it.

vLLM's /metrics is tens of kilobytes of histograms, read every second or so from every backend; a general parser
would build thousands of objects for the six lines wanted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: name, labels, value."""

    name: str
    labels: Mapping[str, str]
    value: float


class Scanner:
    """Finds the samples of a few metric names; made once, used on every scrape."""

    def __init__(self, names: Iterable[str]) -> None:
        wanted = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        self._line = re.compile(
            rf"^({wanted})(?:[ \t]*\{{(.*)\}}[ \t]*|[ \t]+)([^\s{{}}]+)(?:[ \t]+-?\d+)?[ \t]*\r?$", re.MULTILINE
        )

    def samples(self, text: str) -> Iterator[Sample]:
        """The wanted samples in order. A line that is not in the format, or not a number, is passed over."""
        for name, labels, value in self._line.findall(text):
            try:
                number = float(value)
            except ValueError:
                continue
            yield Sample(name, {key: _unescaped(raw) for key, raw in _LABEL.findall(labels)}, number)


def total(samples: Sequence[Sample], *names: str) -> int | None:
    """The sum over label sets of the first of `names` that is there, as a whole number; None without one."""
    found = [one for one in samples if math.isfinite(one.value)]
    for name in names:
        values = [one.value for one in found if one.name == name]
        if values:
            return round(sum(values))
    return None


def mean(samples: Sequence[Sample], *names: str) -> float | None:
    """The mean over label sets of the first of `names` that is there; None without one."""
    found = [one for one in samples if math.isfinite(one.value)]
    for name in names:
        values = [one.value for one in found if one.name == name]
        if values:
            return sum(values) / len(values)
    return None


def _unescaped(raw: str) -> str:
    return re.sub(r"\\.", lambda match: _ESCAPES.get(match[0], match[0]), raw) if "\\" in raw else raw
