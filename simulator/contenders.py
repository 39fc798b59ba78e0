"""Contenders: the policies of a comparison by name, each with its knobs.

A contender is a live policy and how its engines are run. `names()` lists them, `knobs_of` and `KNOBS` tell what
may be set (the same table the documents and the command line print), `setup_for` makes one ready to run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from random import Random
from types import MappingProxyType

from scheduling.checks import Checks, KvGrowth
from scheduling.knobs import Means
from scheduling.options import Options
from scheduling.policies import Policy, make
from scheduling.policies.headroom import TPOT_WEIGHT, TTFT_WEIGHT, Headroom
from scheduling.policies.polyserve import PolyServe, Promotion
from scheduling.tiers import TierSet
from simulator.scenario import Contender, Form, Knob
from simulator.setup import Setup
from tiergate_engine.drive import Rules

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
_REFUSAL = KnobInfo(
    "refusal",
    True,
    "a request that cannot be on time any more is refused; else it is served late (as in PolyServe)",
)
_QUEUE = KnobInfo(
    "queue",
    "overtake",
    "the held of a tier: overtake (a newcomer that fits goes at once, of the held only the first is tried), head "
    "(nobody passes the first), scan (up to 64 of the held are tried, in order)",
    ("overtake", "head", "scan"),
)
_COMMON = (_QUEUE, _REFUSAL, _LENGTHS, _MARGIN)
_CHUNK = KnobInfo("chunk_tokens", 0, "token budget of a step at most; 0: the engine's own default")
_PERIOD = KnobInfo("rebalance_period_s", 2.0, "without a pool: round in which demand is measured", least=0.1)
_MOVES = KnobInfo("moves_per_round", 64, "without a pool: backends relabelled at most a round", least=1)
_DRIVEN = KnobInfo(
    "driven",
    True,
    "dynamic chunking: engines size chunks so that a step keeps its pace (§4.7); else a static budget",
)
_TIERED = (
    KnobInfo("binning", True, "a bin per TPOT (§4.2); else one mixed pool at the tightest pace"),
    KnobInfo("gradient", "fullest", "the backend that is tried first in a tier (§4.3)", ("fullest", "emptiest")),
    KnobInfo(
        "promotion", "lazy", "when requests go to tighter tiers (§4.4)", tuple(each.value for each in Promotion)
    ),
    KnobInfo("promotion_order", "nearest", "the tighter tier that is tried first", ("nearest", "tightest")),
    KnobInfo("pool", True, "tiers take and give back backends (§4.3); else a split that follows demand"),
    KnobInfo("handback_period_s", 10.0, "how often tails are looked at (§4.3)", least=0.1),
    KnobInfo("handback_checks", 2, "empty looks in a row until a backend goes back", least=1),
    _PERIOD,
    _MOVES,
    KnobInfo("wait_aware", "both", "which tokens are checked with their wait (§4.6)", ("both", "first", "off")),
    KnobInfo("kv_growth", "peak", "the KV that is planned for (§4.5)", tuple(each.value for each in KvGrowth)),
    KnobInfo("held_order", "deadline", "the order in which the held of a tier are tried", ("deadline", "fifo")),
)
_DRIVE = (
    KnobInfo(
        "chunk_from_slack",
        False,
        "engines: a step may last until the first token on board is due, not just a pace",
    ),
    KnobInfo("deadline_order", False, "engines: prompts by their deadline, not as they came"),
    KnobInfo("skip_loose", False, "engines: decodes with time to spare leave out a step that others need"),
    KnobInfo("relegate_late", False, "engines: prompts that cannot be on time come after those that can"),
)
_CONTROLLED = KnobInfo(
    "controlled",
    "off",
    "the live controller runs, on engines that let themselves be told this and no more (stock: nothing); it alone "
    "then says how engines are driven, whatever the knobs above say",
    ("off", "driven", "chunk_budget", "running_cap", "prefill_pacing", "stock"),
)
_MEANS: Mapping[str, Means] = MappingProxyType(
    {
        "driven": Means(orders=True, chunk_budget=True, running_cap=True),
        "chunk_budget": Means(chunk_budget=True, running_cap=True),
        "running_cap": Means(running_cap=True),
        "prefill_pacing": Means(admission=True),
        "stock": Means(),
    }
)
"""What is found to work on such an engine live: one whose chunk can be set takes a running cap too."""
_COLOCATED = (
    _DRIVEN,
    *_DRIVE,
    _CONTROLLED,
    _CHUNK,
    KnobInfo(
        "chunk_prediction",
        "strict",
        "driven: the least chunk on the way must do for the TTFT (strict), or those predicted (weak) (§4.7)",
        ("strict", "weak"),
    ),
    KnobInfo("resident_slack", True, "not driven: no resident's token may be late for a newcomer's prompt"),
)
_HEADROOM = (
    KnobInfo("strategy", "least", "which headroom goes first: least (bin packing) or most", ("least", "most")),
    KnobInfo("ttft_weight", TTFT_WEIGHT, "weight of the TTFT's headroom"),
    KnobInfo("tpot_weight", TPOT_WEIGHT, "weight of the TPOT's headroom"),
)
_PREFILL_GRADIENT = KnobInfo(
    "prefill_gradient",
    "emptiest",
    "the prefill backend that is tried first; not in the paper",
    ("fullest", "emptiest"),
)
_MOST_SCANNED = 64


def _setup(values: Values, policy: Callable[[Random], Policy], form: Form = Form.COLOCATED) -> Setup:
    """What all contenders read of their values."""
    queue = values["queue"]
    defaults = Options()
    options = Options(
        handback_period_s=float(values.get("handback_period_s", defaults.handback_period_s)),
        handback_checks=int(values.get("handback_checks", defaults.handback_checks)),
        rebalance_period_s=float(values.get("rebalance_period_s", defaults.rebalance_period_s)),
        moves_per_round=int(values.get("moves_per_round", defaults.moves_per_round)),
        scan_held=_MOST_SCANNED if queue == "scan" else 1,
        overtaking=queue == "overtake",
        refuses=bool(values["refusal"]),
        paces_prefill=values.get("controlled") == "prefill_pacing",
    )
    means = _MEANS.get(str(values.get("controlled")))
    return Setup(
        policy,
        form,
        driven=bool(values.get("driven", False)) and means is None,
        drive=_rules(values) if means is None else None,
        means=means,
        chunk_tokens=int(values.get("chunk_tokens", 0)) or None,
        lengths=str(values["lengths"]),
        margin=float(values["margin"]),
        options=options,
    )


def _rules(values: Values) -> Rules | None:
    """How engines keep promises; None when no mechanism is on."""
    on = [bool(values.get(knob.name, False)) for knob in _DRIVE]
    if not any(on):
        return None
    chunk_from_slack, deadline_order, skip, relegate = on
    return Rules(chunk_from_slack=chunk_from_slack, deadline_order=deadline_order, skip=skip, relegate=relegate)


def _router(policy: str, form: Form = Form.COLOCATED) -> Callable[[Values], Setup]:
    """A registered policy without knobs of its own."""
    return lambda values: _setup(values, lambda rng: make(policy, rng), form)


def _polyserve(form: Form) -> Callable[[Values], Setup]:
    def build(values: Values) -> Setup:
        checks = Checks(
            first_token=values["wait_aware"] != "off",
            second_token=values["wait_aware"] == "both",
            resident_slack=bool(values.get("resident_slack", True)),
            chunk_kept=values.get("chunk_prediction", "strict") == "strict",
            kv_growth=KvGrowth(values["kv_growth"]),
        )
        policy = PolyServe(
            fullest_first=values["gradient"] == "fullest",
            promotion=Promotion(values["promotion"]),
            nearest_first=values["promotion_order"] == "nearest",
            uses_pool=bool(values["pool"]),
            held_by_deadline=values["held_order"] == "deadline",
            checks=checks,
        )
        setup = _setup(values, lambda _rng: policy, form)
        if form is Form.DISAGGREGATED:
            prefill = replace(policy, fullest_first=values["prefill_gradient"] == "fullest")
            setup = replace(setup, prefill_policy=lambda _rng: prefill)
        return setup if values["binning"] else replace(setup, tiers=one_bin)

    return build


def _headroom(values: Values) -> Setup:
    policy = Headroom(
        float(values["ttft_weight"]), float(values["tpot_weight"]), least=values["strategy"] == "least"
    )
    return _setup(values, lambda _rng: policy)


def one_bin(tiers: TierSet) -> TierSet:
    """One mixed pool at the tightest pace: what a fleet is without binning."""
    tightest = tiers.tightest
    return TierSet((replace(tightest, name="mixed"),), "mixed")


def _entries() -> dict[str, _Entry]:
    routers = {
        "random": "a backend by chance (PolyServe §5)",
        "minimal": "the backend with the shortest predicted step (PolyServe §5)",
        "least_load": "the backend with the fewest sequences",
        "round_robin": "the next backend in turn",
        "lmetric": "the least pending prompt tokens times batch size (LMetric)",
    }
    entries = {
        "polyserve_co": _Entry(
            "PolyServe, co-located", (*_TIERED, *_COLOCATED, *_COMMON), _polyserve(Form.COLOCATED)
        ),
        "polyserve_pd": _Entry(
            "PolyServe, disaggregated",
            (*_TIERED, _PREFILL_GRADIENT, _CHUNK, *_COMMON),
            _polyserve(Form.DISAGGREGATED),
        ),
        "co_chunk": _Entry(
            "the shortest predicted step, on engines with a static token budget that is swept (PolyServe §5)",
            (
                replace(_CHUNK, default=512, about="static token budget of a step", least=1),
                *_DRIVE,
                _CONTROLLED,
                *_COMMON,
            ),
            _router("minimal"),
        ),
        "qoserve_silo": _Entry(
            "a silo of backends per tier, sized by demand, least loaded within (QoServe's baseline)",
            (_DRIVEN, *_DRIVE, _CONTROLLED, _CHUNK, _PERIOD, _MOVES, *_COMMON),
            _router("qoserve_silo"),
        ),
    }
    entries["headroom"] = _Entry(
        "the fullest backend whose predictions keep the pace (llm-d)",
        (*_HEADROOM, *_DRIVE, _CONTROLLED, _CHUNK, *_COMMON),
        _headroom,
    )
    for name, about in routers.items():
        entries[name] = _Entry(about, (_CHUNK, *_DRIVE, _CONTROLLED, *_COMMON), _router(name))
        if name in ("random", "minimal"):
            in_two = _router(name, Form.DISAGGREGATED)
            entries[f"{name}_pd"] = _Entry(f"{about}, disaggregated", (_CHUNK, *_COMMON), in_two)
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
