"""What `tiergate simulate` prints: tables for 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiles.catalogue import load, shipped
from simulator.campaign.interval import Interval
from simulator.contenders import KnobInfo, about, knobs_of, names
from simulator.report import formats
from simulator.report.page import fault_text
from simulator.report.summary import Comparison, Point
from simulator.scenario import Knob, Workload
from tiergate.simulate.scenario import Scenario
from workloads.traces import named_trace
from workloads.traces import shipped as shipped_traces

_MOST_TIERS = 5  # beside each other in one table
_LONG_NAME = 26  # characters; longer ones would squeeze the numbers


def answer(comparison: Comparison, scenario: Scenario, findings: Sequence[str]) -> RenderableType:
    """Everything a person wants to see of one comparison: what was run, what came of it, then tables by rate."""
    reference_rps = scenario.reference_rps
    parts: list[RenderableType] = [*_head(comparison, scenario), Text("\nIn short", style="bold")]
    parts += [_listed(line) for line in findings]
    parts.append(Text(""))
    for rate_rps in comparison.rates_rps:
        points = [point for point in comparison.points if point.rate_rps == rate_rps]
        title = f"{rate_rps:.4g} requests/s"
        if reference_rps:
            title += f", {100 * rate_rps / reference_rps:.0f} % of the tier-packed reference"
        workload = comparison.setting.workload
        parts += [Text(title, style="bold"), _attainment(points), _paces(points, workload), _effort(points)]
        parts += _missed(points)
    parts.append(Text(_LEGEND))
    if any(tier.slo.tpot_s is None for tier in comparison.setting.workload.tiers):
        parts.append(Text(_NO_PROMISE))
    return Group(*parts)


def _listed(line: str) -> Table:
    """A finding whose further lines are indented."""
    row = Table.grid(padding=(0, 1))
    row.add_row("-", Text(line))
    return row


_LEGEND = (
    "Requests that kept every deadline, % of all offered, ± half a 95 % interval over seeds; worst: the tier that "
    "fares worst. Times in ms, of what was served, mean over seeds. Token i is due at arrival + TTFT + i x TPOT: "
    "after an early first token a TPOT above the promise need not be late. inst·s: instance-seconds a request "
    "cost. busy: backends with work, mean over the window."
)
_NO_PROMISE = "-: nothing to keep (the tier has no such promise), or nobody was served."


def _head(comparison: Comparison, scenario: Scenario) -> list[Text]:
    setting = comparison.setting
    seeds = len(comparison.seeds)
    parts = (
        f"{setting.warmup_requests:,} requests to warm up",
        f"{setting.measured_requests:,} measured",
        f"{setting.cooldown_requests:,} to cool down",
    )
    lines = [
        f"SIMULATED: {setting.title}. No engine ran.",
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}, each {', '.join(parts)}.",
    ]
    if scenario.reference_rps:
        lines.append(f"Tier-packed reference: {scenario.reference_rps:.4g} requests/s.")
    if setting.fleet.faults:
        ended_s = [run.outcome.ended_s for run in comparison.runs]
        told = "; ".join(map(fault_text, setting.fleet.faults))
        lines.append(f"Faults: {told}. Runs took {min(ended_s):.0f} to {max(ended_s):.0f} s.")
    return [Text(line) for line in lines]


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _name(label: str) -> str:
    """A contender's label; a long one has a line for each knob."""
    if len(label) <= _LONG_NAME or "(" not in label:
        return label
    name, _, knobs = label.partition("(")
    return "\n  ".join([name, *knobs.removesuffix(")").split(", ")])


def _attainment(points: Sequence[Point]) -> RenderableType:
    tables: list[RenderableType] = []
    for number, group in enumerate(_groups(points)):
        first = number == 0
        table = _table([*(("all", "worst") if first else ()), *group])
        for point in points:
            own = {tier.tier: tier.attainment for tier in point.tiers}
            head = [
                formats.short_percent(point.overall.attainment),
                _share(point.worst.attainment if point.worst else None),
            ]
            table.add_row(_name(point.contender), *(head if first else ()), *(_share(own[tier]) for tier in group))
        tables.append(table)
    return Group(*tables)


def _groups(points: Sequence[Point]) -> list[list[str]]:
    """The tiers in groups that fit beside each other."""
    tiers = [tier.tier for tier in points[0].tiers]
    return [tiers[start : start + _MOST_TIERS] for start in range(0, len(tiers), _MOST_TIERS)] or [[]]


def _paces(points: Sequence[Point], workload: Workload) -> RenderableType:
    """TPOT P99 of every tier, with what was promised on top."""
    promises = {tier.name: tier.slo.tpot_s for tier in workload.tiers}
    tables: list[RenderableType] = []
    for group in _groups(points):
        table = _table([f"TPOT P99 {tier}" if tier == group[0] else tier for tier in group])
        wanted = [promises.get(tier) for tier in group]
        table.add_row(
            Text("promised", style="italic"),
            *(formats.NOTHING if pace_s is None else f"{1e3 * pace_s:g}" for pace_s in wanted),
        )
        for point in points:
            own = {tier.tier: tier.tpot_p99_s for tier in point.tiers}
            table.add_row(_name(point.contender), *(formats.milliseconds(own[tier]) for tier in group))
        tables.append(table)
    return Group(*tables)


def _share(value: Interval | None) -> str:
    return formats.NOTHING if value is None else f"{100 * value.mean:.1f}"


def _plain(value: Interval | None, decimals: int) -> str:
    return formats.NOTHING if value is None else f"{value.mean:,.{decimals}f}"


def _effort(points: Sequence[Point]) -> Table:
    table = _table(("TTFT P50", "P99", "inst·s", "busy", "preempted"))
    for point in points:
        every = point.overall
        table.add_row(
            _name(point.contender),
            *map(formats.milliseconds, (every.ttft_p50_s, every.ttft_p99_s)),
            _plain(point.cost_s, 3),
            _plain(point.backends_busy, 1),
            f"{point.preemptions:,}",
        )
    return table


def _missed(points: Iterable[Point]) -> list[Text]:
    """A line for each policy that refused or failed somebody, by reason."""
    lines = []
    for point in points:
        offered = point.overall.offered
        told = [f"{reason} {_part(count / offered)}" for reason, count in point.refusals if offered]
        parts = [f"refused: {', '.join(told)}"] if told else []
        failed = point.overall.failed
        if failed is not None and failed.mean > 0:
            parts.append(f"failed: {_part(failed.mean)}")
        if parts:
            lines.append(Text(f"{point.contender} {'; '.join(parts)}"))
    return [*lines, Text("")] if lines else []


def _part(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "<0.1 %"


def catalogue() -> RenderableType:
    """What `--list` shows: traces, profiles, and contenders with their knobs."""
    traces = _listing("Traces (--trace; also a file, or uniform:LOW-HIGH/LOW-HIGH tokens)")
    for name in shipped_traces():
        trace = named_trace(name)
        count = len(trace.requests)
        prompt = sum(row.prompt_tokens for row in trace.requests) / count
        output = sum(row.output_tokens for row in trace.requests) / count
        blocks = ", prefix blocks" if trace.block_tokens else ""
        traces.add_row(name, f"{count:,} requests, mean prompt {prompt:,.0f}, answer {output:,.0f} tokens{blocks}")
    profiles = _listing("Latency profiles (--profile; also a file)")
    for name in shipped():
        file = load(name).file
        profiles.add_row(name, f"{file.model} on {file.hardware}")
    policies = _listing("Policies (--policy NAME or NAME:KNOB=VALUE,KNOB=VALUE; chunk_tokens=best tries first)")
    knobs: dict[tuple[str, str], KnobInfo] = {}
    for name in names():
        own = knobs_of(name)
        knobs |= {(knob.name, knob.about): knob for knob in own}
        policies.add_row(name, f"{about(name)}. Knobs: {', '.join(map(_default, own))}")
    explained = _listing("Knobs")
    for knob in knobs.values():
        choices = f": {', '.join(map(_value, knob.choices))}" if knob.choices else ""
        explained.add_row(knob.name, knob.about + choices)
    return Group(traces, Text(""), profiles, Text(""), policies, Text(""), explained)


def _listing(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _default(knob: KnobInfo) -> str:
    return f"{knob.name}={_value(knob.default)}"


def _value(value: Knob) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
