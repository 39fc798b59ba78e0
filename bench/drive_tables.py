"""Tables of `bench.drive_sim`: plain text, intervals are 95 % over seeds, comparisons paired by seed.

A `*` stands where the interval of a comparison leaves no difference out: it is more than the seeds' luck, but for
the one in twenty that chance gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulator.campaign.beside import Beside
from simulator.campaign.curve import Bound
from simulator.campaign.goodput import MAIN, Goodput, Ratio, Search, attainment, ratio
from simulator.campaign.interval import Interval, t_interval
from simulator.campaign.plan import Known
from simulator.campaign.scale import Scale
from simulator.campaign.text import percent, table_text, with_half

_SIGNS = {Bound.EXACT: "", Bound.AT_LEAST: ">= ", Bound.AT_MOST: "<= ", Bound.UNKNOWN: "? "}
_NONE = "-"
STOCK, DRIVEN = "stock, best budget", "driven"
BASES = (STOCK, DRIVEN)
"""What every variant of a router is compared with."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One variant on one trace."""

    name: str
    router: str
    scale: Scale
    plan: Beside

    @property
    def trace(self) -> str:
        return self.plan.leader.subject.workload.trace

    @property
    def length(self) -> int:
        return self.plan.leader.settings.length.measured


@dataclass(frozen=True, slots=True)
class _Line:
    """A variant with what is known of it."""

    of: Compared
    search: Search
    goodput: Goodput
    done: bool

    @property
    def name(self) -> str:
        budget = dict(self.search.subject.contender.knobs).get("chunk_tokens")
        swept = self.of.plan.of.sweep is not None
        return f"{self.of.name} ({budget or 'own'})" if swept else self.of.name


def trace_text(trace: str, backends: int, every: Sequence[Compared], known: Known) -> str:
    """One trace: a table for each router."""
    parts = []
    for router in dict.fromkeys(one.router for one in every):
        own = [one for one in every if one.router == router]
        some = own[0]
        common = some.plan.common(known)
        parts.append(
            f"== {router} on {trace} (simulated): {backends} H200, tier-packed reference "
            f"{some.scale.optimal_rps:.1f} requests/s, {some.length} measured requests a run ==\n"
        )
        lines = [line for one in own if (line := _line(one, known)) is not None]
        head = ("variant", *(f"% at {rate * some.scale.optimal_rps:.1f}/s" for rate in common))
        head += ("vs driven", "kept at 90 %", "/ stock", "/ driven", "% at other rates")
        parts.append(table_text(head, [_cells(line, lines, common, known) for line in lines]))
        waiting = [one.name for one in own if all(line.of is not one for line in lines)]
        if waiting:
            parts.append(f"not run yet: {'; '.join(waiting)}\n")
    return "\n".join(parts)


def summary_text(every: Sequence[Compared], known: Known) -> str:
    """All traces: the rate kept at 90 %, as a ratio to each base."""
    traces = tuple(dict.fromkeys(one.trace for one in every))
    parts = []
    for router in dict.fromkeys(one.router for one in every):
        lines = [line for one in every if one.router == router and (line := _line(one, known)) is not None]
        for base in BASES:
            of_base = {line.of.trace: line for line in lines if line.of.name == base}
            rows = []
            for name in dict.fromkeys(line.of.name for line in lines):
                own = {line.of.trace: line for line in lines if line.of.name == name}
                ratios = _ratios(own, of_base)
                texts = [_ratio(ratios.get(trace)) for trace in traces]
                rows.append((name, *texts, _mean(list(ratios.values()))))
            parts.append(f"== {router}: requests/s kept at 90 %, / {base} (simulated) ==\n")
            parts.append(table_text(("variant", *traces, "mean"), rows))
    return "\n".join(parts)


def _ratios(own: Mapping[str, _Line], of_base: Mapping[str, _Line]) -> dict[str, Ratio]:
    return {
        trace: ratio(line.goodput, of_base[trace].goodput)
        for trace, line in own.items()
        if trace in of_base and line.goodput.estimate.mean > 0.0
    }


def _line(one: Compared, known: Known) -> _Line | None:
    """None while nothing can be said of it."""
    search = one.plan.search(known)
    if search is None or not search.parts(known):
        return None
    return _Line(one, search, search.goodput(MAIN, known), done=not search.wanted(known))


def _cells(line: _Line, lines: Sequence[_Line], common: Sequence[float], known: Known) -> tuple[str, ...]:
    parts = line.search.parts(known)
    at = [percent(_attained(line, part, known)) if part in parts else _NONE for part in common]
    bases = [next((one for one in lines if one.of.name == base), None) for base in BASES]
    ratios = [None if base is None else ratio(line.goodput, base.goodput) for base in bases]
    others = ", ".join(
        f"{percent(_attained(line, part, known))} at {part * line.of.scale.optimal_rps:.1f}"
        for part in parts
        if part not in common
    )
    goodput = _SIGNS[line.goodput.bound] + with_half(line.goodput.estimate, 1) + ("" if line.done else " ...")
    return (line.name, *at, _apart(line, bases[1], common, known), goodput, *map(_ratio, ratios), others or _NONE)


def _attained(line: _Line, part: float, known: Known) -> Interval:
    return attainment(MAIN, line.search.outcomes(part, known))


def _apart(line: _Line, base: _Line | None, common: Sequence[float], known: Known) -> str:
    """Points of attainment above the base at the common rates, paired by seed, on the mean of these rates."""
    if base is None or base is line:
        return _NONE
    shared = [part for part in common if part in line.search.parts(known) and part in base.search.parts(known)]
    if not shared:
        return _NONE
    by_seed = []
    for seed in range(len(line.search.settings.seeds)):
        gaps = [_of_seed(line, part, seed, known) - _of_seed(base, part, seed, known) for part in shared]
        by_seed.append(math.fsum(gaps) / len(gaps))
    gap = t_interval(by_seed)
    half = "" if gap.half is None else f"±{100 * gap.half:.1f}"
    return f"{100 * gap.mean:+.1f}{half}{_mark(gap, 0.0)}"


def _of_seed(line: _Line, part: float, seed: int, known: Known) -> float:
    return MAIN.point(part, line.search.outcomes(part, known)[seed]).attainment


def _ratio(found: Ratio | None) -> str:
    if found is None:
        return _NONE
    estimate = found.estimate
    if estimate.low is None or estimate.high is None:
        return f"{_SIGNS[found.bound]}{estimate.mean:.3f}"
    return (
        f"{_SIGNS[found.bound]}{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]{_mark(estimate, 1.0)}"
    )


def _mark(interval: Interval, none: float) -> str:
    """`*` where `none`, no difference, lies outside; else a blank, so that columns line up."""
    if interval.low is None or interval.high is None or interval.low == interval.high:
        return " "
    return " " if interval.low <= none <= interval.high else "*"


def _mean(ratios: Sequence[Ratio]) -> str:
    """The geometric mean over traces, which says nothing of other traces."""
    if not ratios:
        return _NONE
    logs = [math.log(one.estimate.mean) for one in ratios]
    return f"{math.exp(math.fsum(logs) / len(logs)):.3f}"
