"""What `tiergate simulate` is asked to run, read from its options into cells."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from profiles.catalogue import load
from profiles.format import ProfileError
from simulator.campaign.goodput import Judged
from simulator.campaign.scale import Scale, ceilings_of, scale_of
from simulator.contenders import KnobInfo, UnknownContender, knobs_of, names, setup_for
from simulator.reference import with_fixed_s
from simulator.report.values import Mark, MarkKind, Setting
from simulator.scenario import (
    Arrivals,
    Cell,
    Contender,
    Engines,
    Fault,
    FaultKind,
    FleetSpec,
    Form,
    Knob,
    Workload,
)
from tiergate.commands.bench import read_mix
from tiergate.simulate.options import Options
from tiergate.simulate.tuning import VALUES, with_chunk
from workloads.mix import WorkloadError
from workloads.traces import TraceError, named_trace

DEFAULT_TIERS = "20ms=0.1:-/20,30ms=0.2:-/30,50ms=0.3:-/50,100ms=0.4:-/100"
DEFAULT_TTFT_MS = "300,500,1000"
_SLOWEST_RPS = 1e-4  # slower ones simulate years of waiting
_LONGEST_S = 1e6
_SLOWEST = 1e4
_PAIR = 2  # backends of the smallest disaggregated fleet
DEFAULTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "trace": ("azure2023_conv",),
        "tiers": (DEFAULT_TIERS,),
        "arrivals": (Arrivals.POISSON.value,),
        "profile": ("h200-llama-3.1-8b-bf16",),
        "backends": ("8",),
        "policy": ("polyserve_co", "random", "least_load"),
        "sweep": ("0.9",),
        "seeds": ("2",),
        "requests": ("4000",),
        "replicas": ("1",),
        "view_age_ms": ("0",),
        "startup_s": ("0",),
        "host_step_ms": ("0",),
        "host_seq_us": ("0",),
    }
)
"""What is run when nothing is said: PolyServe's tiers on a small fleet."""

OPTIONS = (
    *DEFAULTS,
    "ttft_ms",
    "invert_at",
    "prefixes",
    "t0_ms",
    "prefill_backends",
    "fault",
    "rate",
    "warmup",
    "cooldown",
)
"""Every option of a scenario, as a scenario file names it."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to run, and what to read it against.

    Attributes:
        form: the one of all policies, or co-located where they differ.
        reference_rps: the tier-packed rate, a mixed fleet packed kind by kind; None when no tier has a pace.
        residence_s: how long a request of the loosest tier stays at its full pace; None when no tier has one.
    """

    cells: tuple[Cell, ...]
    form: Form
    reference_rps: float | None
    residence_s: float | None


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of engine: the scale of some of them, and which part of those there are."""

    scale: Scale
    part: float


def read(options: Options) -> Scenario:
    """The scenario that the options ask for. Raises UsageError naming the option."""
    workload = _workload(options)
    fleet = _fleet(options, prefixes=workload.prefixes)
    if options.has("fault"):
        fleet = dataclasses.replace(fleet, faults=_faults(options, fleet.backends))
    contenders = tuple(dict.fromkeys(contender(text, options) for text in _policies(options)))
    setting = Setting(workload, fleet, *_length(options))
    # The forms have references of their own; a comparison of both is read against the co-located one.
    forms = {_form(item) for item in contenders}
    if Form.DISAGGREGATED in forms and fleet.backends < _PAIR:
        split = ", ".join(item.name for item in contenders if _form(item) is Form.DISAGGREGATED)
        raise options.wrong("backends", f"{split} is disaggregated: it needs {_PAIR} at least, one for each phase")
    form = forms.pop() if len(forms) == 1 else Form.COLOCATED
    kinds = _scales(options, workload, fleet)
    best_rps = sum(kind.scale.optimal(form) * kind.part for kind in kinds) if kinds else None
    seeds = options.count("seeds", 1) or 1
    cells = tuple(
        setting.cell(item, rate_rps, seed)
        for item in contenders
        for rate_rps in _rates(options, best_rps)
        for seed in range(1, seeds + 1)
    )
    return Scenario(cells, form, best_rps, max((kind.scale.residence_s for kind in kinds), default=None))


def _form(item: Contender) -> Form:
    return setup_for(with_chunk(item, VALUES[0])).form


def _policies(options: Options) -> Iterator[str]:
    """Each contender's text: `--policy` is repeated, or names are separated by commas, as knobs are."""
    for text in options.texts("policy"):
        if ":" not in text:
            yield from (part.strip() for part in text.split(",") if part.strip())
            continue
        own: list[str] = []
        for part in text.split(","):
            if own and part.strip().partition(":")[0] in names():
                yield ",".join(own)
                own = []
            own.append(part.strip())
        yield ",".join(own)


def _length(options: Options) -> tuple[int, int, int]:
    """Requests to warm up, to measure, to cool down."""
    measured = options.count("requests", 1) or 1
    warmup, cooldown = options.count("warmup", 0), options.count("cooldown", 0)
    part = -(-measured // 4)
    return part if warmup is None else warmup, measured, part if cooldown is None else cooldown


def _workload(options: Options) -> Workload:
    tiers_text = options.text("tiers") or DEFAULT_TIERS
    try:
        tiers = read_mix(tiers_text).shares
    except (WorkloadError, ValueError) as error:
        raise options.wrong("tiers", _tiers_error(str(error), tiers_text)) from None
    ttft_ms = options.positive("ttft_ms")
    if not options.has("ttft_ms") and not options.has("tiers"):
        ttft_ms = tuple(map(float, DEFAULT_TTFT_MS.split(",")))
    name = options.text("trace") or ""
    try:
        trace = named_trace(name)
    except (TraceError, OSError) as error:
        raise options.wrong("trace", f"{error} (`tiergate simulate --list` shows what is shipped)") from None
    arrivals = options.text("arrivals")
    if arrivals not in set(Arrivals):
        raise options.wrong("arrivals", f"must be {' or '.join(Arrivals)}, not {arrivals!r}")
    if arrivals == Arrivals.TRACE and not trace.duration_s:
        raise options.wrong("arrivals", f"{name} has lengths only; take poisson")
    prefixes = options.on("prefixes")
    if prefixes and trace.block_tokens is None:
        raise options.wrong(
            "prefixes", f"{name} has no prefix blocks; leave it out, or take a trace that has them"
        )
    invert_at = options.number("invert_at")
    if invert_at is not None and invert_at > 1.0:
        raise options.wrong("invert_at", f"is a part of the measured requests, from 0 to 1, not {invert_at:g}")
    seconds = tuple(value / 1e3 for value in ttft_ms)
    return Workload(name, tiers, seconds, Arrivals(arrivals), invert_at, prefixes)


def _tiers_error(text: str, source: str) -> str:
    """The message without what `wrong` says already, with the nearest known key for one that is not known."""
    text = text.removeprefix("tiers: ").removeprefix(f"{source}: ")
    found = re.match(r"(tiers\.\d+)\.(\w+): Extra inputs", text)
    if not found:
        return text
    keys = ("name", "ttft_ms", "tpot_ms", "share")
    near = difflib.get_close_matches(found[2], keys, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(keys)}"
    return f"{found[1]}: {found[2]} is no key of a tier; {hint}"


def _fleet(options: Options, *, prefixes: bool) -> FleetSpec:
    t0_ms = options.number("t0_ms")
    floor_s = None if t0_ms is None else t0_ms / 1e3
    engines = tuple(Engines(name, count, floor_s) for name, count in _profiles(options))
    for kind in engines:
        try:
            profile = load(kind.profile)
            if floor_s is not None:
                with_fixed_s(profile.step_time, floor_s)
        except ProfileError as error:
            raise options.wrong("profile", str(error)) from None
        except ValueError as error:
            raise options.wrong("t0_ms", f"{kind.profile}: {error}") from None
    spec = FleetSpec(
        engines,
        prefill_backends=options.count("prefill_backends", 1),
        replicas=options.count("replicas", 1) or 1,
        view_age_s=(options.number("view_age_ms") or 0.0) / 1e3,
        startup_s=options.number("startup_s") or 0.0,
        prefix_caching=prefixes,
        host_step_s=(options.number("host_step_ms") or 0.0) / 1e3,
        host_seq_s=(options.number("host_seq_us") or 0.0) / 1e6,
    )
    if spec.prefill_backends is not None and spec.prefill_backends >= spec.backends:
        raise options.wrong("prefill_backends", f"must leave a backend to decode: fewer than {spec.backends}")
    return spec


def _profiles(options: Options) -> list[tuple[str, int]]:
    """Names with counts; `--backends` is the count of a profile that names none."""
    found = []
    texts = options.texts("profile")
    for text in texts:
        name, equals, count_text = text.rpartition("=")
        if not equals:
            if len(texts) > 1:
                raise options.wrong("profile", f"{text!r} needs its number in a mixed fleet, such as {text}=4")
            count = options.count("backends", 1)
            assert count is not None, "backends has a default"
            found.append((text, count))
            continue
        if options.has("backends"):
            raise options.wrong("backends", "the profiles name their own numbers; leave out one of the two")
        if not count_text.isdecimal() or int(count_text) < 1:
            raise options.wrong("profile", f"{text!r} must read NAME=COUNT with a count of at least 1")
        found.append((name, int(count_text)))
    return found


def contender(text: str, options: Options) -> Contender:
    """`random`, or with knobs `co_chunk:chunk_tokens=512,margin=1.1`. Raises UsageError."""
    name, _, inside = text.partition(":")
    if name not in names():
        near = [known for known in names() if name and known.startswith(name)]
        near = near or difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names())}"
        raise options.wrong(
            "policy", f"no policy is named {name!r}; {hint} (`tiergate simulate --list` shows all)"
        )
    knobs: dict[str, Knob] = {}
    try:
        known_knobs = {knob.name: knob for knob in knobs_of(name)}
        for part in filter(None, (part.strip() for part in inside.split(","))):
            key, equals, value = part.partition("=")
            if not equals:
                raise options.wrong("policy", f"{part!r} in {text!r} must read KNOB=VALUE")
            knobs[key] = _knob(known_knobs[key], value) if key in known_knobs else value
        found = Contender(name, tuple(sorted(knobs.items())))
        setup_for(with_chunk(found, VALUES[0]))
    except UnknownContender as error:
        raise options.wrong("policy", f"{error} (`tiergate simulate --list` shows all)") from None
    return found


def _knob(knob: KnobInfo, text: str) -> Knob:
    """A knob's value in the type of its default; what does not fit is refused where knobs are checked."""
    kind = type(knob.default)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in {int, float}:
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
    return text


def _faults(options: Options, backends: int) -> tuple[Fault, ...]:
    return tuple(_fault(text, options, backends) for text in options.texts("fault"))


def _fault(text: str, options: Options, backends: int) -> Fault:
    """`down:backend=3,from=20,for=10` or `slow:backend=3,from=20,for=10,factor=2`."""
    kind, _, inside = text.partition(":")
    needed = {"backend", "from", "for"} | ({"factor"} if kind == FaultKind.SLOW else set())
    parts = dict(part.strip().split("=", 1) for part in inside.split(",") if "=" in part)
    remedy = "write down:backend=3,from=20,for=10 or slow:backend=3,from=20,for=10,factor=2"
    missing = sorted(needed - set(parts))
    if kind in set(FaultKind) and missing and set(parts) < needed:
        raise options.wrong("fault", f"{' and '.join(missing)} is missing in {text!r}; {remedy}")
    if kind not in set(FaultKind) or set(parts) != needed:
        raise options.wrong("fault", f"{text!r} is not understood; {remedy}")
    try:
        numbers = {name: float(value) for name, value in parts.items()}
    except ValueError:
        raise options.wrong("fault", f"{text!r} has something that is no number; {remedy}") from None
    backend = int(numbers["backend"])
    if backend != numbers["backend"] or not 0 <= backend < backends:
        raise options.wrong("fault", f"backends are numbered from 0 to {backends - 1}, not {parts['backend']}")
    factor = numbers.get("factor", 1.0)
    if not (numbers["from"] >= 0 and numbers["for"] > 0 and factor >= 1.0):
        raise options.wrong("fault", f"{text!r}: from is 0 or later, for above 0 and factor at least 1")
    if numbers["from"] > _LONGEST_S or numbers["for"] > _LONGEST_S or factor > _SLOWEST:
        raise options.wrong(
            "fault", f"{text!r}: from and for are at most {_LONGEST_S:g} s and factor at most {_SLOWEST:g}"
        )
    return Fault(backend, FaultKind(kind), numbers["from"], numbers["for"], factor)


def _rates(options: Options, best_rps: float | None) -> tuple[float, ...]:
    if options.has("rate"):
        if options.has("sweep"):
            raise options.wrong("sweep", f"leave out this or {options.where('rate')}: both name the rates")
        rates_rps = tuple(sorted(set(options.positive("rate"))))
        if rates_rps and rates_rps[0] < _SLOWEST_RPS:
            raise options.wrong("rate", f"must be at least {_SLOWEST_RPS:g} requests/s, not {rates_rps[0]:g}")
        return rates_rps
    parts = options.positive("sweep")
    if best_rps is None:
        raise options.wrong("rate", "is needed: no tier has a TPOT, so there is no reference rate to sweep")
    if not best_rps:
        raise options.wrong("tiers", "a TPOT is shorter than any step of these engines; loosen it")
    return tuple(float(f"{part * best_rps:.4g}") for part in sorted(set(parts)))


def _scales(options: Options, workload: Workload, fleet: FleetSpec) -> tuple[_Kind, ...]:
    """The reference of each kind of engine; none when no tier has a pace. Raises UsageError for the impossible."""
    if all(tier.slo.tpot_s is None for tier in workload.tiers):
        return ()
    found = []
    for kind in fleet.engines:
        # The reference is in proportion to the engines; a disaggregated one needs two.
        pair = dataclasses.replace(kind, count=max(2, kind.count))
        alone = dataclasses.replace(fleet, engines=(pair,), faults=(), prefill_backends=None)
        try:
            found.append(_Kind(scale_of(workload, alone), kind.count / pair.count))
        except ValueError as error:
            raise options.wrong("tiers", str(error)) from None
    return tuple(found)


def ceiling_marks(setting: Setting, form: Form) -> tuple[Mark, ...]:
    """Upper bounds for a setting with one kind of engine, else none; takes some seconds."""
    fleet = setting.fleet
    if len(fleet.engines) > 1 or (form is Form.DISAGGREGATED and fleet.backends < 2):
        return ()
    found = ceilings_of(setting.workload, dataclasses.replace(fleet, faults=()), form)
    return (
        Mark(setting, MarkKind.UPPER, "upper bound, all on time", found.all_rps),
        Mark(setting, MarkKind.UPPER, "upper bound, 90 %", found.most_rps, Judged.OVERALL),
        Mark(setting, MarkKind.UPPER, "upper bound, 90 % of every tier", found.every_tier_rps, Judged.EVERY_TIER),
    )
