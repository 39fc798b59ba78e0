"""Options from the command line, a scenario file and defaults, as text: the first that has one wins."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from tiergate.commands import UsageError

MOST = 1e9
"""The greatest number that an option takes; beyond it stand typing errors."""


@dataclass(frozen=True, slots=True)
class Given:
    """One option's values and where they were written, such as `--rate` or `day.yaml: rate`."""

    values: tuple[str, ...]
    where: str


class Options:
    """Options by name (with underscores). Every error names the place and the remedy."""

    def __init__(self, given: Mapping[str, Given], defaults: Mapping[str, tuple[str, ...]]) -> None:
        self._given = given
        self._defaults = defaults

    def has(self, name: str) -> bool:
        """Whether somebody wrote it, be it on the command line or in the file."""
        return name in self._given

    def where(self, name: str) -> str:
        return self._given[name].where if name in self._given else flag(name)

    def wrong(self, name: str, message: str) -> UsageError:
        """The error to raise for a value of this option."""
        return UsageError(f"{self.where(name)}: {message}")

    def texts(self, name: str) -> tuple[str, ...]:
        """All values, in order."""
        return self._given[name].values if name in self._given else self._defaults.get(name, ())

    def text(self, name: str) -> str | None:
        """The value of an option that has one; the last where it was repeated."""
        values = self.texts(name)
        return values[-1] if values else None

    def on(self, name: str) -> bool:
        """A switch. Raises UsageError for a word that is neither yes nor no."""
        text = self.text(name)
        if text is None:
            return False
        if text.lower() not in {"true", "false", "yes", "no"}:
            raise self.wrong(name, f"must be true or false, not {text!r}")
        return text.lower() in {"true", "yes"}

    def number(self, name: str, least: float = 0.0) -> float | None:
        """A number of at least `least`, at most `MOST`; None when there is none. Raises UsageError."""
        text = self.text(name)
        return None if text is None else self._number(name, text, least)

    def positive(self, name: str) -> tuple[float, ...]:
        """Numbers above zero, repeated or with commas between them. Raises UsageError."""
        return tuple(self._number(name, part, 0.0, above=True) for part in self._parts(name))

    def count(self, name: str, least: int) -> int | None:
        """A whole number of at least `least`; None when there is none. Raises UsageError."""
        text = self.text(name)
        if text is None:
            return None
        try:
            value = int(text)
        except ValueError:
            raise self.wrong(name, f"must be a whole number, not {text!r}") from None
        if not least <= value <= MOST:
            bound = f"at least {least}" if value < least else f"at most {MOST:g}"
            raise self.wrong(name, f"must be {bound}, not {value}")
        return value

    def _parts(self, name: str) -> Iterator[str]:
        for text in self.texts(name):
            yield from filter(None, (part.strip() for part in text.split(",")))

    def _number(self, name: str, text: str, least: float, *, above: bool = False) -> float:
        try:
            value = float(text)
        except ValueError:
            raise self.wrong(name, f"must be a number, not {text!r}{_without_percent(text)}") from None
        if not math.isfinite(value) or value < least or (above and value <= least):
            raise self.wrong(name, f"must be {'above' if above else 'at least'} {least:g}, not {text}")
        if value > MOST:
            raise self.wrong(name, f"must be at most {MOST:g}, not {text}")
        return value


def _without_percent(text: str) -> str:
    """What to write in place of `90%`."""
    try:
        return f"; write {float(text.removesuffix('%')) / 100:g}" if text.endswith("%") else ""
    except ValueError:
        return ""


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")


def read_file(path: Path, known: tuple[str, ...]) -> dict[str, Given]:
    """The options of a scenario file: YAML, one key an option, a list for one that may be repeated.

    `tiers` as a list of mappings is left to whoever reads tier files: its value is the file's own path.
    Raises UsageError naming file and key.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--scenario: {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--scenario: {path} is not valid YAML: {_yaml_error(error)}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"--scenario: {path} must be a mapping of options, such as `trace: azure2023_conv`")
    given = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        where = f"{path}: {key}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"{where} is no option of a scenario; {hint}")
        if name == "tiers" and isinstance(value, list):
            given[name] = Given((str(path),), where)
        elif value is not None:
            given[name] = Given(tuple(_texts(value, where)), where)
    return given


def _yaml_error(error: Exception) -> str:
    """What is wrong and where, on one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _texts(value: object, where: str) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | int | float):
            raise UsageError(f"{where} must be a value or a list of values, not {item!r}")
        yield str(item).lower() if isinstance(item, bool) else str(item)
