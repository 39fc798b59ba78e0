"""Contenders: the policies of a comparison by name, each with its knobs.

A contender is a live policy and how its engines are run. `names()` lists them, `knobs_of` and `KNOBS` tell what
may be set (the same table the documents and the command line print), `setup_for` makes one ready to run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from scheduling.options import Options
from scheduling.policies import make
from simulator.scenario import Contender, Form, Knob
from simulator.setup import Setup

__all__ = ["KNOBS", "KnobInfo", "UnknownContender", "knobs_of", "names", "setup_for"]

Values = Mapping[str, Knob]


class UnknownContender(ValueError):
    """No contender has that name or knob, or the knob does not take that value. The message names the remedy."""


@dataclass(frozen=True, slots=True)
class KnobInfo:
    """One knob.

    Attributes:
        default: its value when it is not set; its type is the type of every value.
        about: what it does.
        choices: all values it takes; empty: any of its type.
        least: the smallest number it takes.
    """

    name: str
    default: Knob
    about: str
    choices: tuple[Knob, ...] = ()
    least: float = 0.0

    def read(self, value: Knob, contender: str) -> Knob:
        """The value, checked. Raises UnknownContender."""
        where = f"{contender}: knob {self.name}"
        if isinstance(self.default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(self.default):
            raise UnknownContender(f"{where} takes a {type(self.default).__name__}, not {value!r}")
        if self.choices and value not in self.choices:
            raise UnknownContender(f"{where} is one of {', '.join(map(str, self.choices))}, not {value!r}")
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= self.least):
            raise UnknownContender(f"{where} must be at least {self.least:g}, not {value!r}")
        return value


@dataclass(frozen=True, slots=True)
class _Entry:
    """One contender: its knobs, and how it is made of their values."""

    about: str
    knobs: tuple[KnobInfo, ...]
    make: Callable[[Values], Setup]


_LENGTHS = KnobInfo(
    "lengths",
    "mean",
    "how answer lengths are known: mean of the trace (PolyServe §4.5), learned online, or known (a bound)",
    ("mean", "learned", "known"),
)
_MARGIN = KnobInfo("margin", 1.0, "factor on predicted times", least=1.0)
_COMMON = (_LENGTHS, _MARGIN)
_CHUNK = KnobInfo("chunk_tokens", 0, "static token budget of a step; 0: the engine's own default")
_PERIOD = KnobInfo("rebalance_period_s", 2.0, "length of a round in which demand is measured", least=0.1)
_MOVES = KnobInfo("moves_per_round", 64, "backends relabelled at most at the end of a round", least=1)
_DRIVEN = KnobInfo("driven", True, "engines size chunks so that a step keeps its pace (PolyServe §4.7)")


def _common(values: Values, setup: Setup) -> Setup:
    return replace(setup, lengths=str(values["lengths"]), margin=float(values["margin"]))


def _router(policy: str, form: Form = Form.COLOCATED) -> Callable[[Values], Setup]:
    """A policy on engines with a static token budget."""

    def build(values: Values) -> Setup:
        chunk = int(values["chunk_tokens"]) or None
        return _common(values, Setup(lambda rng: make(policy, rng), form, chunk_tokens=chunk))

    return build


def _polyserve(form: Form) -> Callable[[Values], Setup]:
    def build(values: Values) -> Setup:
        return _common(values, Setup(lambda rng: make("polyserve", rng), form, driven=form is Form.COLOCATED))

    return build


def _silo(values: Values) -> Setup:
    options = Options(
        rebalance_period_s=float(values["rebalance_period_s"]), moves_per_round=int(values["moves_per_round"])
    )
    chunk = int(values["chunk_tokens"]) or None
    setup = Setup(lambda rng: make("qoserve_silo", rng), driven=bool(values["driven"]), chunk_tokens=chunk)
    return _common(values, replace(setup, options=options))


def _entries() -> dict[str, _Entry]:
    routers = {
        "random": "a backend by chance (PolyServe §5)",
        "minimal": "the backend with the shortest predicted step (PolyServe §5)",
        "least_load": "the backend with the fewest sequences",
        "round_robin": "the next backend in turn",
        "lmetric": "the least pending prompt tokens times batch size (LMetric)",
        "headroom": "the fullest backend whose predictions keep the pace (llm-d)",
    }
    entries = {
        "polyserve_co": _Entry("PolyServe, co-located", _COMMON, _polyserve(Form.COLOCATED)),
        "polyserve_pd": _Entry("PolyServe, disaggregated", _COMMON, _polyserve(Form.DISAGGREGATED)),
    }
    for name, about in routers.items():
        entries[name] = _Entry(about, (_CHUNK, *_COMMON), _router(name))
        if name in ("random", "minimal"):
            entries[f"{name}_pd"] = _Entry(
                f"{about}, disaggregated", (_CHUNK, *_COMMON), _router(name, Form.DISAGGREGATED)
            )
    entries["co_chunk"] = _Entry(
        "the shortest predicted step, on engines with a static token budget that is swept (PolyServe §5)",
        (replace(_CHUNK, default=512, about="static token budget of a step", least=1), *_COMMON),
        _router("minimal"),
    )
    entries["qoserve_silo"] = _Entry(
        "a silo of backends per tier, sized by demand, least loaded within (QoServe's baseline)",
        (_DRIVEN, _CHUNK, _PERIOD, _MOVES, *_COMMON),
        _silo,
    )
    return entries


_ENTRIES: Mapping[str, _Entry] = MappingProxyType(_entries())

KNOBS: Mapping[str, tuple[KnobInfo, ...]] = MappingProxyType(
    {name: entry.knobs for name, entry in _ENTRIES.items()}
)
"""Every contender's knobs with their defaults."""


def names() -> tuple[str, ...]:
    """All contenders, PolyServe first."""
    return tuple(_ENTRIES)


def about(name: str) -> str:
    """A contender in a line. Raises UnknownContender."""
    return _entry(name).about


def knobs_of(name: str) -> tuple[KnobInfo, ...]:
    """A contender's knobs. Raises UnknownContender."""
    return _entry(name).knobs


def setup_for(contender: Contender) -> Setup:
    """The contender, ready to run. Raises UnknownContender for a name, a knob or a value that is not there."""
    entry = _entry(contender.name)
    known = {knob.name: knob for knob in entry.knobs}
    values: dict[str, Knob] = {knob.name: knob.default for knob in entry.knobs}
    for name, value in contender.knobs:
        if name not in known:
            raise UnknownContender(f"{contender.name}: {_unknown('knob', name, known)}")
        values[name] = known[name].read(value, contender.name)
    return entry.make(values)


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise UnknownContender(_unknown("contender", name, _ENTRIES))
    return _ENTRIES[name]


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    """A message that names the nearest known name, and all of them when none is near."""
    listed = list(known)
    near = difflib.get_close_matches(name, listed, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(listed)}"
    return f"unknown {what} {name!r}; {hint}"
