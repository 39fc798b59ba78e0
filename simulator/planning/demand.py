"""What a recorded day asks for: windows of a trace, their load, and which promises nothing can keep."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from scheduling.tiers import Slo
from simulator.build import Kind, idle_ttft, kinds_of, shortest_model_tokens
from simulator.reference import Lengths, TierNeed, reference
from simulator.scenario import FleetSpec
from workloads.mix import TierShare
from workloads.traces import Trace, TraceRequest

MOST_GROUPS = 3
ALIKE = 1.75
"""Costs per request that differ by less than this factor are one group."""
_MOST_ROWS = 20_000  # of a group's file: every run reads it whole
_PROBED_ROWS = 5_000  # whose promises are checked where tiers are drawn
_WINDOWS_S = (60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
_MOST_WINDOWS = 24
_LEAST_PER_WINDOW = 200
_RESIDENCES = 5.0  # a window is at least so many mean residence times


class PlanningError(ValueError):
    """No plan can be made; the message names the option or the tier and the remedy."""


class WrongUse(PlanningError):
    """What was asked for does not go together, whatever a fleet could do; the message names the option."""


@dataclass(frozen=True, slots=True)
class Impossible:
    """The part of a tier's requests whose promise not even an idle engine keeps, so that no fleet does."""

    tier: str
    share: float


@dataclass(frozen=True, slots=True)
class Demand:
    """A trace whose requests can be served, with tiers.

    Attributes:
        tiers: those that can be served at all, tight to loose; shares of the requests.
        own_tiers: rows carry their tier and promise; else tiers are drawn by share.
        impossible: for every tier of the request, what was left out.
        residence_s: how long a request stays when it is served at its full pace, mean.
    """

    trace: Trace
    tiers: tuple[TierShare, ...]
    own_tiers: bool
    impossible: tuple[Impossible, ...]
    residence_s: float

    @property
    def promised(self) -> tuple[str, ...]:
        """The tiers that are judged: those with a promise."""
        return tuple(tier.name for tier in self.tiers if tier.slo.promised)


def tiers_of_log(trace: Trace) -> tuple[TierShare, ...]:
    """The tiers of the gateway's own log with their shares, tight to loose; none for other traces.

    A tier's pace is the tightest that its requests were promised: the gateway bins a tighter wish in a tighter
    tier. Its TTFT is the one promised most often.
    """
    rows: dict[str, list[Slo]] = {}
    for request in trace.requests:
        if request.tier is not None:
            rows.setdefault(request.tier, []).append(request.slo or Slo(None, None))
    shares = []
    for name, slos in rows.items():
        paces = [slo.tpot_s for slo in slos if slo.tpot_s is not None]
        ttft_s = Counter(slo.ttft_s for slo in slos).most_common(1)[0][0]
        shares.append(TierShare(name, Slo(ttft_s, min(paces, default=None)), len(slos)))
    return _ordered(shares)


def _ordered(shares: Iterable[TierShare]) -> tuple[TierShare, ...]:
    """Tight to loose, shares as parts of one."""
    ordered = sorted(shares, key=lambda tier: (_pace_s(tier.slo), tier.name))
    total = math.fsum(tier.share for tier in ordered)
    return tuple(replace(tier, share=tier.share / total) for tier in ordered)


def _pace_s(slo: Slo) -> float:
    return math.inf if slo.tpot_s is None else slo.tpot_s


def demand_of(trace: Trace, tiers: Sequence[TierShare] | None, fleet: FleetSpec) -> Demand:
    """What of a trace can be served by a fleet of these engines.

    Without `tiers` the trace's own are taken; where it has its own and all of them are among `tiers`, requests
    keep their tier and the promise is that of `tiers`. Raises PlanningError.
    """
    recorded = tiers_of_log(trace)
    own = bool(recorded)
    if tiers is None:
        if not recorded:
            raise WrongUse(
                f"--tiers: is needed, because {trace.name} does not say who was promised what; only the gateway's "
                "own request log does"
            )
        tiers = recorded
    elif recorded:
        given = {tier.name: tier.slo for tier in tiers}
        own = all(tier.name in given for tier in recorded)
        if own:
            promised = tuple(replace(row, slo=given[row.tier]) for row in trace.requests if row.tier is not None)
            trace = replace(trace, requests=promised)
            tiers = tuple(replace(tier, slo=given[tier.name]) for tier in recorded)
    if all(tier.slo.tpot_s is None for tier in tiers):
        raise WrongUse("--tiers: no tier has a TPOT, so there is nothing a fleet could be sized by")
    return _servable(trace, _ordered(tiers), fleet, own=own)


def _servable(trace: Trace, tiers: tuple[TierShare, ...], fleet: FleetSpec, *, own: bool) -> Demand:
    kinds = kinds_of(fleet)
    idle, most = idle_ttft(kinds, fleet), shortest_model_tokens(kinds)

    def kept(row: TraceRequest, slo: Slo) -> bool:
        if most is not None and row.prompt_tokens + row.output_tokens > most:
            return False
        idle_s = idle(row.prompt_tokens, _pace_s(slo))
        return idle_s < math.inf and (slo.ttft_s is None or idle_s <= slo.ttft_s)

    impossible, left = [], []
    step = max(1, len(trace.requests) // _PROBED_ROWS)
    for tier in tiers:
        if own:
            rows = [(row, row.slo or tier.slo) for row in trace.requests if row.tier == tier.name]
        else:
            rows = [(row, tier.slo) for row in trace.requests[::step]]
        found = sum(kept(row, slo) for row, slo in rows)
        impossible.append(Impossible(tier.name, 1 - found / len(rows)))
        if found:
            left.append(replace(tier, share=tier.share * (found / len(rows) if own else 1.0)))
    if not left:
        worst = ", ".join(tier.name for tier in tiers)
        raise PlanningError(
            f"no request of any tier ({worst}) can be served on time even by an idle engine, so no number of "
            "backends is enough: loosen --tiers, or take a faster --profile"
        )
    if own:
        rest = tuple(
            row for row in trace.requests if row.tier is not None and kept(row, row.slo or Slo(None, None))
        )
        trace = replace(trace, requests=rest)
    servable = _ordered(left)
    return Demand(trace, servable, own, tuple(impossible), _residence_s(trace, servable, own=own))


def _residence_s(trace: Trace, tiers: Sequence[TierShare], *, own: bool) -> float:
    """Of requests with a promise; those without one leave when they can."""
    whole = weight = 0.0
    for tier in tiers:
        rows = [row for row in trace.requests if row.tier == tier.name] if own else trace.requests
        if tier.slo.tpot_s is not None and rows:
            steps = sum(row.output_tokens for row in rows) / len(rows)
            whole += tier.share * ((tier.slo.ttft_s or 0.0) + steps * tier.slo.tpot_s)
            weight += tier.share
    return whole / weight if weight else 1.0


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the day.

    Attributes:
        requests: recorded in it, before the rate factor.
        rate_rps: of arrivals, times the rate factor.
        load: backends the tier-packed reference needs for it: perfect packing, no waiting.
        group: whose lengths stand for its own; None where nothing arrived.
    """

    start_s: float
    duration_s: float
    requests: int
    rate_rps: float
    load: float
    group: int | None


@dataclass(frozen=True, slots=True)
class Group:
    """Windows whose requests cost about the same.

    Attributes:
        rows: their requests, from every window.
        cost_s: instance-seconds a request in the tier-packed reference.
    """

    rows: tuple[TraceRequest, ...]
    cost_s: float


@dataclass(frozen=True, slots=True)
class Day:
    windows: tuple[Window, ...]
    groups: tuple[Group, ...]


def default_window_s(demand: Demand) -> float:
    """A usual length that gives at most 24 windows of at least 200 requests and five residence times."""
    duration_s, count = demand.trace.duration_s, len(demand.trace.requests)
    least_s = max(
        duration_s / _MOST_WINDOWS,
        _RESIDENCES * demand.residence_s,
        duration_s * min(1.0, _LEAST_PER_WINDOW / count),
    )
    return next((float(each) for each in _WINDOWS_S if each >= least_s), float(_WINDOWS_S[-1]))


def shortest_window_s(demand: Demand) -> float:
    """Shorter ones hold too few residence times for a steady load."""
    return _RESIDENCES * demand.residence_s


def usual_window(least_s: float) -> str:
    """A usual length that is no shorter, as `--window` takes it."""
    seconds = next((each for each in _WINDOWS_S if each >= least_s), math.ceil(least_s / 86_400) * 86_400)
    return f"{seconds // 60}m" if seconds < 3600 else f"{seconds // 3600}h"


def day_of(demand: Demand, fleet: FleetSpec, window_s: float, rate_factor: float) -> Day:
    """The windows of a trace with their load. A last part of less than half a window joins the one before.

    Raises WrongUse when the trace has no arrivals.
    """
    trace = demand.trace
    if not trace.duration_s:
        raise WrongUse(f"--trace: {trace.name} has lengths only; a plan over the day needs arrivals")
    kind = kinds_of(fleet)[0]
    count = max(1, round(trace.duration_s / window_s + 1e-9))
    length_s = [window_s] * (count - 1) + [max(trace.duration_s - (count - 1) * window_s, window_s / 2)]
    rows: list[list[TraceRequest]] = [[] for _ in range(count)]
    for row in trace.requests:
        rows[min(int(row.arrival_s / window_s), count - 1)].append(row)
    costs = [reference_cost_s(demand, own, kind, fleet) if own else math.nan for own in rows]
    groups = _groups(costs)
    windows = tuple(
        Window(
            place * window_s,
            length_s[place],
            len(own),
            rate_factor * len(own) / length_s[place],
            rate_factor * len(own) / length_s[place] * cost_s if own else 0.0,
            groups.get(place),
        )
        for place, (own, cost_s) in enumerate(zip(rows, costs, strict=True))
    )
    return Day(windows, _made(rows, costs, groups))


def reference_cost_s(demand: Demand, rows: Sequence[TraceRequest], kind: Kind, fleet: FleetSpec) -> float:
    """Instance-seconds a request costs in the tier-packed reference, over tiers with a TPOT and those without.

    Raises PlanningError when a tier cannot be packed at all.
    """
    needs, paced = [], 0.0
    for tier in demand.tiers:
        own = [row for row in rows if row.tier == tier.name] if demand.own_tiers else rows
        share = len(own) / len(rows) if demand.own_tiers else tier.share
        if tier.slo.tpot_s is None or not own:
            continue
        paced += share
        lengths = Lengths.of((row.prompt_tokens, 0, row.output_tokens) for row in own)
        needs.append(TierNeed(tier.name, share, tier.slo.tpot_s, lengths))
    if not needs:
        return 0.0
    found = reference(
        kind.step_time, kind.limits, needs, host_step_s=fleet.host_step_s, host_seq_s=fleet.host_seq_s
    )
    for packed in found.tiers:
        if not math.isfinite(packed.cost_s):
            raise PlanningError(
                f"tier {packed.name}: no engine of this profile can keep its TPOT of {1e3 * packed.tpot_s:g} ms "
                "beside prompts: loosen it in --tiers, or take a faster --profile"
            )
    return found.cost_s * paced


def _groups(costs: Sequence[float]) -> dict[int, int]:
    """The group of each window with a cost: bins of equal width in the logarithm, cheap to dear."""
    known = [(cost_s, place) for place, cost_s in enumerate(costs) if cost_s > 0]
    if not known:
        return {place: 0 for place, cost_s in enumerate(costs) if not math.isnan(cost_s)}
    low, high = math.log(min(known)[0]), math.log(max(known)[0])
    bins = min(MOST_GROUPS, max(1, math.ceil((high - low) / math.log(ALIKE) - 1e-9)))
    width = (high - low) / bins or 1.0
    found = {place: min(int((math.log(cost_s) - low) / width), bins - 1) for cost_s, place in known}
    names = {number: rank for rank, number in enumerate(sorted(set(found.values())))}
    whole = {place: names[number] for place, number in found.items()}
    return whole | {place: 0 for place, cost_s in enumerate(costs) if cost_s == 0}


def _made(
    rows: Sequence[Sequence[TraceRequest]], costs: Sequence[float], groups: Mapping[int, int]
) -> tuple[Group, ...]:
    made = []
    for number in sorted(set(groups.values())):
        places = [place for place, group in groups.items() if group == number]
        count = sum(len(rows[place]) for place in places)
        whole_s = math.fsum(costs[place] * len(rows[place]) for place in places)
        # Every window gives the same part of its own, from its beginning on: what came together stays together.
        part = min(1.0, _MOST_ROWS / count)
        kept = [row for place in sorted(places) for row in rows[place][: math.ceil(part * len(rows[place]))]]
        made.append(Group(tuple(kept), whole_s / count))
    return tuple(made)


def write_rows(rows: Iterable[TraceRequest], folder: Path, promise: Callable[[TraceRequest], Slo | None]) -> Path:
    """Write requests as a trace that runs can read, named by its content. `promise`: None drops the request.

    Windows that are not neighbours are brought together without the time between them. Raises OSError.
    """
    lines, shift_s, before_s = [], 0.0, None
    for place, row in enumerate(rows):
        if before_s is not None and row.arrival_s - before_s > _GAP_S:
            shift_s += row.arrival_s - before_s - _GAP_S
        before_s = row.arrival_s
        slo = promise(row)
        if slo is None:
            continue
        lines.append(
            orjson.dumps(
                {
                    "request_id": str(place),
                    "end": "finished",
                    "time": round(row.arrival_s - shift_s, 6),
                    "seconds": 0.0,
                    "prompt_tokens": row.prompt_tokens,
                    "output_tokens": row.output_tokens,
                    "tier": row.tier,
                    "promised_ttft_s": slo.ttft_s,
                    "promised_tpot_s": slo.tpot_s,
                },
                option=orjson.OPT_APPEND_NEWLINE,
            )
        )
    content = b"".join(lines)
    path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_bytes(content)
        unfinished.replace(path)
    return path


_GAP_S = 60.0
"""A longer silence in a group's requests is time that belongs to another group."""
