"""The HTTP contract between gateway and engine plug-ins: what an engine is told, and what it tells back.

``PUT /v1/tiergate/orders`` with `Orders` answers `EngineState`, and so does ``GET /v1/tiergate/state``;
``GET /v1/tiergate/steps?since=N`` answers `StepFacts` from step N on. All of it JSON. A document carries the
version of the contract; a version that is not known is refused, a field that is not known is ignored. Only ages
and remaining times travel, never a clock's time.

What a request brings stands in `Promise`, in vLLM's ``vllm_xargs``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum

from tiergate_engine.drive import Rules
from tiergate_engine.step import Step, StepTime
from tiergate_engine.wire import (
    ControlError,
    as_array,
    as_count,
    as_flag,
    as_number,
    as_object,
    as_text,
    document,
    required,
    step_time_from_json,
    step_time_to_json,
)

__all__ = [
    "KNOWN_VERSIONS",
    "ORDERS_PATH",
    "STATE_PATH",
    "STEPS_PATH",
    "VERSION",
    "ControlError",
    "EngineState",
    "Mode",
    "Orders",
    "Promise",
    "SchedulerKind",
    "StepFact",
    "StepFacts",
    "digest_of",
]

VERSION = 1
"""The version this code writes."""
KNOWN_VERSIONS = frozenset({1})
"""The versions this code reads."""

STATE_PATH = "/v1/tiergate/state"
ORDERS_PATH = "/v1/tiergate/orders"
STEPS_PATH = "/v1/tiergate/steps"

TTFT_XARG = "tiergate_ttft_ms"
TPOT_XARG = "tiergate_tpot_ms"
RELEGATED_XARG = "tiergate_relegated"


class Mode(Enum):
    """What the plug-in does to the engine's steps."""

    STOCK = "stock"  # nothing; static limits in the orders still hold
    DRIVEN = "driven"  # plans each step with `tiergate_engine.drive`


class SchedulerKind(Enum):
    """Which of the engine's schedulers the plug-in stands on."""

    SYNC = "sync"
    ASYNC = "async"


@dataclass(frozen=True, slots=True)
class Orders:
    """What an engine is told to do from its next step on.

    Attributes:
        profile: how long a step takes; needed to be driven.
        rules: how it is driven.
        chunk_tokens: most prompt tokens a step may carry on top of its running decodes; None leaves the engine's
            own budget.
        running_cap: most sequences admitted to run, 0 admits nobody; None leaves the engine's own.
        lapse_s: the orders hold this long after they were last given, then the engine goes on as stock. None: for
            ever.

    Raises:
        ControlError: a limit out of range, or driven without a profile.
    """

    mode: Mode = Mode.STOCK
    profile: StepTime | None = None
    rules: Rules = field(default_factory=Rules)
    chunk_tokens: int | None = None
    running_cap: int | None = None
    lapse_s: float | None = None

    def __post_init__(self) -> None:
        if self.mode is Mode.DRIVEN and self.profile is None:
            raise ControlError("profile is missing: an engine is driven by the step times it is told")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ControlError(f"chunk_tokens must be at least 1 or null, not {self.chunk_tokens}")
        if self.running_cap is not None and self.running_cap < 0:
            raise ControlError(f"running_cap must be at least 0 or null, not {self.running_cap}")
        if self.lapse_s is not None and not (math.isfinite(self.lapse_s) and self.lapse_s > 0.0):
            raise ControlError(f"lapse_s must be a positive number of seconds or null, not {self.lapse_s}")

    def to_json(self) -> str:
        """The document to send."""
        return _dump(
            {
                "version": VERSION,
                "mode": self.mode.value,
                "profile": None if self.profile is None else step_time_to_json(self.profile),
                "rules": {one.name: _plain(getattr(self.rules, one.name)) for one in fields(Rules)},
                "chunk_tokens": self.chunk_tokens,
                "running_cap": self.running_cap,
                "lapse_s": None if self.lapse_s is None else float(self.lapse_s),
            }
        )

    @property
    def digest(self) -> str:
        """The same for the same orders: by it a gateway sees whether its own are in force."""
        return digest_of(self.to_json())

    @classmethod
    def from_json(cls, text: str | bytes) -> Orders:
        """Read a document. Raises ControlError."""
        given = document(text)
        _check_version(given)
        profile = given.get("profile")
        chunk_tokens, running_cap, lapse_s = (
            given.get(name) for name in ("chunk_tokens", "running_cap", "lapse_s")
        )
        return cls(
            _mode(required(given, "mode"), "mode"),
            None if profile is None else step_time_from_json(profile),
            _rules(given.get("rules"), "rules"),
            None if chunk_tokens is None else as_count(chunk_tokens, "chunk_tokens", 1),
            None if running_cap is None else as_count(running_cap, "running_cap"),
            None if lapse_s is None else as_number(lapse_s, "lapse_s"),
        )


@dataclass(frozen=True, slots=True)
class EngineState:
    """What an engine says about itself.

    Attributes:
        run_id: changes when the engine starts anew; steps are counted from zero then.
        engine, engine_version: such as "vllm", "0.32.0".
        tested: the plug-in was tested with this version; else it only does what is safe.
        scheduler: which base the plug-in stands on.
        mode: what is done at present: stock although the orders say driven when they have lapsed, or cannot be
            obeyed (`note` says why).
        orders_digest: `Orders.digest` of the orders last given; None when nobody has spoken to it.
        orders_age_s: seconds since they were given.
        steps: steps so far.
        running, waiting: sequences that hold a slot, and that wait for one.
        kv_usage: share of the KV cache in use, 0 to 1.
        budget_tokens: most tokens the next step may carry.
        max_batched_tokens, max_running_seqs: the engine's own limits.
        plan_us: mean microseconds of the plug-in's own work in a recent step; None before the first plan.
        failures: plans that failed and were left to the engine.
        note: why the plug-in does less than it was told; None when it does not.
    """

    run_id: str
    engine: str
    engine_version: str
    tested: bool
    scheduler: SchedulerKind
    mode: Mode
    orders_digest: str | None
    orders_age_s: float | None
    steps: int
    running: int
    waiting: int
    kv_usage: float
    budget_tokens: int
    max_batched_tokens: int
    max_running_seqs: int
    plan_us: float | None = None
    failures: int = 0
    note: str | None = None

    def to_json(self) -> str:
        """The document to send."""
        given: dict[str, object] = {"version": VERSION}
        for one in fields(self):
            value: object = getattr(self, one.name)
            given[one.name] = value.value if isinstance(value, Enum) else value
        return _dump(given)

    @classmethod
    def from_json(cls, text: str | bytes) -> EngineState:
        """Read a document. Raises ControlError."""
        given = document(text)
        _check_version(given)
        digest, age, plan_us, note = (
            given.get(name) for name in ("orders_digest", "orders_age_s", "plan_us", "note")
        )
        scheduler = as_text(required(given, "scheduler"), "scheduler")
        if scheduler not in {kind.value for kind in SchedulerKind}:
            raise ControlError(f"scheduler is {scheduler!r:.80}: it must be sync or async")
        return cls(
            run_id=as_text(required(given, "run_id"), "run_id"),
            engine=as_text(required(given, "engine"), "engine"),
            engine_version=as_text(required(given, "engine_version"), "engine_version"),
            tested=as_flag(required(given, "tested"), "tested"),
            scheduler=SchedulerKind(scheduler),
            mode=_mode(required(given, "mode"), "mode"),
            orders_digest=None if digest is None else as_text(digest, "orders_digest"),
            orders_age_s=None if age is None else as_number(age, "orders_age_s", 0.0),
            steps=as_count(required(given, "steps"), "steps"),
            running=as_count(required(given, "running"), "running"),
            waiting=as_count(required(given, "waiting"), "waiting"),
            kv_usage=as_number(required(given, "kv_usage"), "kv_usage", 0.0),
            budget_tokens=as_count(required(given, "budget_tokens"), "budget_tokens"),
            max_batched_tokens=as_count(required(given, "max_batched_tokens"), "max_batched_tokens"),
            max_running_seqs=as_count(required(given, "max_running_seqs"), "max_running_seqs"),
            plan_us=None if plan_us is None else as_number(plan_us, "plan_us", 0.0),
            failures=as_count(given.get("failures", 0), "failures"),
            note=None if note is None else as_text(note, "note"),
        )


@dataclass(frozen=True, slots=True)
class StepFact:
    """One step as it was.

    Attributes:
        step: what it held.
        seconds: from its scheduling to its outputs. With asynchronous scheduling steps overlap; then it is the
            time from the outputs before to its own.
        budget_tokens: most tokens it was allowed.
        skipped: decodes left out of it.
    """

    step: Step
    seconds: float
    budget_tokens: int
    skipped: int = 0


_COUNTS = ("prefill_tokens", "prefill_seqs", "prefill_context_tokens", "decode_seqs", "decode_kv_tokens")


@dataclass(frozen=True, slots=True)
class StepFacts:
    """Consecutive steps of one run of an engine.

    Attributes:
        run_id: as in `EngineState`; when it changed, ask again from 0.
        first: the number of the first one here. More than was asked for when older ones were forgotten.
        facts: one for each step.
    """

    run_id: str
    first: int
    facts: tuple[StepFact, ...] = ()

    @property
    def next(self) -> int:
        """What to ask for next."""
        return self.first + len(self.facts)

    def to_json(self) -> str:
        """The document to send: one array for each number, since steps are many."""
        columns: dict[str, object] = {
            name: [getattr(fact.step, name) for fact in self.facts] for name in (*_COUNTS, "prefill_attention")
        }
        columns["seconds"] = [fact.seconds for fact in self.facts]
        columns["budget_tokens"] = [fact.budget_tokens for fact in self.facts]
        columns["skipped"] = [fact.skipped for fact in self.facts]
        return _dump({"version": VERSION, "run_id": self.run_id, "first": self.first, "steps": columns})

    @classmethod
    def from_json(cls, text: str | bytes) -> StepFacts:
        """Read a document. Raises ControlError."""
        given = document(text)
        _check_version(given)
        columns = as_object(required(given, "steps"), "steps")
        counts = {name: _counts(columns, name) for name in (*_COUNTS, "budget_tokens", "skipped")}
        attention = _column(columns, "prefill_attention")
        seconds = _column(columns, "seconds")
        rows = len(seconds)
        for name, column in (*counts.items(), ("prefill_attention", attention)):
            if len(column) != rows:
                raise ControlError(f"steps.{name} has {len(column)} values, steps.seconds has {rows}")
        facts = tuple(
            StepFact(
                Step(
                    counts["prefill_tokens"][row],
                    counts["prefill_seqs"][row],
                    counts["prefill_context_tokens"][row],
                    attention[row],
                    counts["decode_seqs"][row],
                    counts["decode_kv_tokens"][row],
                ),
                seconds[row],
                counts["budget_tokens"][row],
                counts["skipped"][row],
            )
            for row in range(rows)
        )
        return cls(
            as_text(required(given, "run_id"), "run_id"), as_count(required(given, "first"), "first"), facts
        )


@dataclass(frozen=True, slots=True)
class Promise:
    """What one request brings along. Without a first token's time it is best effort.

    Attributes:
        ttft_s: seconds left until its first token is due, as the request leaves the gateway; negative when late,
            None without a promise.
        tpot_s: seconds promised per token behind the first; None without a promise.
        relegated: its promise is given up: served after all others.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    relegated: bool = False

    def to_xargs(self) -> dict[str, int | float]:
        """What to put into ``vllm_xargs``, milliseconds; empty for a request without a promise."""
        xargs: dict[str, int | float] = {}
        if self.ttft_s is not None:
            xargs[TTFT_XARG] = round(self.ttft_s * 1e3, 3)
        if self.tpot_s is not None:
            xargs[TPOT_XARG] = round(self.tpot_s * 1e3, 3)
        if self.relegated:
            xargs[RELEGATED_XARG] = 1
        return xargs

    @classmethod
    def from_xargs(cls, xargs: Mapping[str, object] | None) -> Promise:
        """Read what a request brought; other keys are ignored. Raises ControlError."""
        if not xargs:
            return cls()
        ttft_ms, tpot_ms = xargs.get(TTFT_XARG), xargs.get(TPOT_XARG)
        tpot_s = None if tpot_ms is None else as_number(tpot_ms, TPOT_XARG, 0.0) / 1e3
        if tpot_s == 0.0:
            raise ControlError(f"{TPOT_XARG} must be more than 0 milliseconds")
        relegated = as_count(xargs.get(RELEGATED_XARG, 0), RELEGATED_XARG)
        if relegated > 1:
            raise ControlError(f"{RELEGATED_XARG} must be 0 or 1, not {relegated}")
        return cls(None if ttft_ms is None else as_number(ttft_ms, TTFT_XARG) / 1e3, tpot_s, relegated == 1)


def digest_of(text: str) -> str:
    """`Orders.digest` of orders that came as this text; another release's plug-in may know fewer fields of it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _dump(given: Mapping[str, object]) -> str:
    return json.dumps(given, separators=(",", ":"), allow_nan=False)


def _plain(value: bool | float | None) -> bool | float | None:
    """Whole numbers as 1.0, so that equal values give equal text."""
    return value if value is None or isinstance(value, bool) else float(value)


def _check_version(given: Mapping[str, object]) -> None:
    version = required(given, "version")
    if isinstance(version, bool) or not isinstance(version, int) or version not in KNOWN_VERSIONS:
        known = ", ".join(map(str, sorted(KNOWN_VERSIONS)))
        raise ControlError(
            f"version is {version!r:.80}: this side knows {known}; "
            "gateway and plug-in have to be of releases next to each other"
        )


def _mode(value: object, where: str) -> Mode:
    text = as_text(value, where)
    if text not in {mode.value for mode in Mode}:
        raise ControlError(f"{where} is {text!r:.80}: it must be stock or driven")
    return Mode(text)


def _rules(value: object, where: str) -> Rules:
    if value is None:
        return Rules()
    given = as_object(value, where)
    default, longest_s = Rules(), given.get("longest_s")

    def number(name: str, otherwise: float) -> float:
        return as_number(given.get(name, otherwise), f"{where}.{name}")

    def flag(name: str, otherwise: bool) -> bool:
        return as_flag(given.get(name, otherwise), f"{where}.{name}")

    try:
        return Rules(
            number("margin", default.margin),
            number("host_step_s", default.host_step_s),
            number("host_seq_s", default.host_seq_s),
            flag("chunk_from_slack", default.chunk_from_slack),
            flag("deadline_order", default.deadline_order),
            flag("skip", default.skip),
            flag("relegate", default.relegate),
            as_count(given.get("floor_tokens", default.floor_tokens), f"{where}.floor_tokens", 1),
            None if longest_s is None else as_number(longest_s, f"{where}.longest_s"),
        )
    except ControlError:
        raise
    except ValueError as error:
        raise ControlError(f"{where}: {error}") from error


def _column(columns: Mapping[str, object], name: str) -> Sequence[float]:
    column = as_array(required(columns, name, "steps."), f"steps.{name}")
    return [as_number(value, f"steps.{name}[{row}]", 0.0) for row, value in enumerate(column)]


def _counts(columns: Mapping[str, object], name: str) -> Sequence[int]:
    column = as_array(required(columns, name, "steps."), f"steps.{name}")
    return [as_count(value, f"steps.{name}[{row}]") for row, value in enumerate(column)]
