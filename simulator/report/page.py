"""The page: one HTML file that needs nothing else, without script, for a screen, a phone and paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

from simulator.campaign.curve import Bound
from simulator.campaign.goodput import Judged
from simulator.report import formats
from simulator.report.canvas import Drawing, inline_svg
from simulator.report.style import STYLE
from simulator.report.summary import Comparison, Point, compare
from simulator.report.values import GoodputRow, Setting, Study
from simulator.scenario import Fault, FaultKind
from workloads.mix import TierShare

_WORDS = """\
A request keeps its promise when every token is on time: token i, counted from zero, is due at arrival + TTFT +
i x TPOT. A TPOT above its promise is no loss where an early first token left time. Attainment is the part of all
offered requests that kept their promise; refused and failed ones count as missed.

The goodput is the highest offered rate at which attainment reaches a target. It is given for all requests, as the
papers score it, and for every tier, because a policy that gives up its dearest tenth still has 90 % of all.

The tier-packed reference is a fleet split perfectly between tiers, as in PolyServe's cost model. Upper bounds
relax the problem (lengths known, no waiting), so that no policy can be above them.

Intervals are 95 %, Student-t over seeds. All contenders and rates share the same requests for a seed. Warm-up and
cool-down requests load the fleet but are not scored, and every scored request is followed to its end.
"""

_FEW = 2  # rates that are worth a table of their own
_SHORT = ' class="short"'  # a number and its interval stay on one line

_NOTICE = """\
<p class="notice"><strong>Simulated.</strong> Every number here comes from a model of engines on a virtual clock.
No engine ran, and no GPU was used.</p>"""


def page(study: Study, drawings: Sequence[Drawing]) -> str:
    """The whole report. The same study gives the same text."""
    comparisons = compare(study.runs)
    of_study = {drawing.name: _figure(drawing) for drawing in drawings if not drawing.section}
    parts = [
        f"<h1>{escape(study.title)}</h1>",
        _NOTICE,
        _findings(study.findings),
        _overview(comparisons),
        _goodput(study.goodputs),
        of_study.pop("scaling", ""),
        _gains(study),
        of_study.pop("t0", ""),
        _ablations(study),
        *of_study.values(),
    ]
    for number, comparison in enumerate(comparisons, start=1):
        own = [item for item in drawings if item.section == f"s{number}"]
        parts.append(_setting(comparison, own, with_conditions=len(comparisons) > 1))
    parts += [_profiles(study), _words(), _rerun(study.rerun)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(study.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _findings(findings: Sequence[str]) -> str:
    if not findings:
        return ""
    return "<h2>In short</h2>\n<ul>" + "".join(f"<li>{escape(line)}</li>" for line in findings) + "</ul>"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls inside itself where it is too wide. The first column names the row, and stays.

    A row of one cell is a heading for those below it.
    """
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for first, *others in rows:
        if not others:
            group = f'<th class="group" colspan="{len(head)}" scope="rowgroup"><span>{escape(first)}</span></th>'
            lines.append(f"<tr>{group}</tr>")
            continue
        cells = "".join(f"<td{_SHORT if len(cell) < 26 else ''}>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first).replace("(", "<wbr>(")}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def _figure(drawing: Drawing) -> str:
    panels = "".join(f'<div class="panel">{svg}</div>' for svg in inline_svg(drawing))
    return (
        f'<figure id="{drawing.name}"><div class="panels">{panels}</div>'
        f"<figcaption><strong>{escape(drawing.title)}.</strong> {escape(drawing.says)}</figcaption></figure>"
    )


def _overview(comparisons: Sequence[Comparison]) -> str:
    """The conditions of the only setting, or a line for each: theirs stand in their own sections."""
    if not comparisons:
        return ""
    head = "<h2>What was run</h2>\n"
    if len(comparisons) == 1:
        return head + _conditions(comparisons[0])
    rows = [
        (
            item.setting.title,
            str(len(item.contenders)),
            f"{item.rates_rps[0]:.4g} to {item.rates_rps[-1]:.4g}",
            str(len(item.seeds)),
            f"{item.setting.measured_requests:,}",
        )
        for item in comparisons
    ]
    return head + _table("Settings", ("setting", "contenders", "requests/s", "seeds", "measured in a run"), rows)


def _conditions(comparison: Comparison) -> str:
    return _table("Conditions", ("what", "value"), conditions(comparison))


def conditions(comparison: Comparison) -> list[tuple[str, str]]:
    """Everything a comparison was run under, in words."""
    setting = comparison.setting
    work, fleet = setting.workload, setting.fleet
    shares = sum(tier.share for tier in work.tiers)
    labels = _labels(comparison)
    tiers = "; ".join(
        f"{labels[tier.name]} {100 * tier.share / shares:.3g} % ({_promise(tier, drawn=bool(work.ttft_s))})"
        for tier in work.tiers
    )
    lines = [
        (
            "trace",
            f"{work.trace}, arrivals {work.arrivals.value}{', with prefix blocks' if work.prefixes else ''}",
        ),
        ("tiers", tiers),
    ]
    if work.ttft_s:
        lines.append(("TTFT", f"{', '.join(map(_ms, work.ttft_s))}, drawn evenly for every request"))
    if work.invert_at is not None:
        lines.append(
            ("mix", f"the shares change places after {100 * work.invert_at:g} % of the measured requests")
        )
    lines += [
        ("backends", ", ".join(_engines(setting))),
        ("gateways", f"{fleet.replicas}; what one knows of the others is {1e3 * fleet.view_age_s:g} ms old"),
        ("start-up of a backend", f"{fleet.startup_s:g} s"),
        ("prefix caching", "on" if fleet.prefix_caching else "off"),
        ("host time", f"{1e3 * fleet.host_step_s:g} ms a step, {1e6 * fleet.host_seq_s:g} us a sequence"),
        ("failures", "; ".join(map(fault_text, fleet.faults)) or "none"),
        (
            "requests of a run",
            _run_length(setting),
        ),
        ("rates", f"{', '.join(f'{rate:.4g}' for rate in comparison.rates_rps)} requests/s"),
        ("seeds", ", ".join(map(str, comparison.seeds))),
        ("contenders", "; ".join(comparison.contenders)),
    ]
    left_out = max(run.outcome.left_out for run in comparison.runs)
    if left_out:
        lines.append(("left out", f"{100 * left_out:.2g} % of the trace, whose promise no idle engine keeps"))
    return lines


def _run_length(setting: Setting) -> str:
    return (
        f"{setting.warmup_requests:,} warm-up, {setting.measured_requests:,} measured, "
        f"{setting.cooldown_requests:,} cool-down, then drained"
    )


def _engines(setting: Setting) -> list[str]:
    return [
        f"{kind.count} x {kind.profile}"
        + ("" if kind.step_floor_s is None else f", t0 set to {1e3 * kind.step_floor_s:g} ms")
        for kind in setting.fleet.engines
    ]


def fault_text(fault: Fault) -> str:
    """`backend 3 down from 20 s for 10 s`; backends count from 0, seconds from the start of the run."""
    what = "down" if fault.kind is FaultKind.DOWN else f"{fault.factor:g} times as slow"
    return f"backend {fault.backend} {what} from {fault.from_s:g} s for {fault.for_s:g} s"


def _promise(tier: TierShare, *, drawn: bool) -> str:
    pace = f"TPOT {_ms(tier.slo.tpot_s)}"
    return pace if drawn else f"TTFT {_ms(tier.slo.ttft_s)}, {pace}"


def _ms(value_s: float | None) -> str:
    return "no promise" if value_s is None else f"{1e3 * value_s:g} ms"


def _goodput(rows: Sequence[GoodputRow]) -> str:
    """One table a setting; what all requests and what every tier can have stand side by side."""
    if not rows:
        return ""
    settings: dict[Setting, dict[tuple[float, str], dict[Judged, GoodputRow]]] = {}
    for row in rows:
        target = row.goodput.target
        settings.setdefault(row.setting, {}).setdefault((target.level, row.contender), {})[target.judged] = row
    head = ["contender", "at"]
    for judged in Judged:
        head += [f"{judged.value}, requests/s", "per backend", "of the reference"]
    parts = ["<h2>Goodput</h2>"]
    for setting, found in settings.items():
        lines = []
        for (level, contender), by_judged in found.items():
            cells = [cell for judged in Judged for cell in _goodput_cells(by_judged.get(judged))]
            lines.append((contender, f"{100 * level:g} %", *cells))
        parts.append(_table(f"Goodput with 95 % intervals: {setting.title}", head, lines))
    return "\n".join(parts)


def _goodput_cells(row: GoodputRow | None) -> tuple[str, str, str]:
    if row is None:
        return (formats.NOTHING, formats.NOTHING, formats.NOTHING)
    found = row.goodput
    shown = formats.bounded(found.estimate, found.bound, 1)
    if found.bound is not Bound.EXACT:
        return (shown, formats.NOTHING, formats.NOTHING)
    part = f"{100 * found.estimate.mean / row.reference_rps:.1f} %" if row.reference_rps else formats.NOTHING
    return (shown, f"{found.estimate.mean / row.setting.fleet.backends:.2f}", part)


def _gains(study: Study) -> str:
    if not study.gains:
        return ""
    lines = [
        (
            row.contender,
            row.against,
            row.group,
            "the profile's" if row.step_floor_s is None else f"{1e3 * row.step_floor_s:g} ms",
            row.target.label,
            formats.bounded(row.ratio.estimate, row.ratio.bound, 3),
        )
        for row in study.gains
    ]
    head = ("contender", "against", "where", "t0", "goodput at", "ratio")
    return "<h2>Gains</h2>\n" + _table("Ratios of goodputs with 95 % intervals, paired by seed", head, lines)


def _ablations(study: Study) -> str:
    if not study.ablations:
        return ""
    lines = [
        (row.mechanism, row.group, row.target.label, formats.bounded(row.ratio.estimate, row.ratio.bound, 3))
        for row in study.ablations
    ]
    head = ("without", "where", "goodput at", "of the whole policy")
    return "<h2>Ablation</h2>\n" + _table("Goodput with one mechanism taken out", head, lines)


def _setting(comparison: Comparison, drawings: Sequence[Drawing], *, with_conditions: bool) -> str:
    parts = [f"<h2>{escape(comparison.setting.title)}</h2>"]
    if with_conditions:
        parts.append(_conditions(comparison))
    shown = [drawing for drawing in drawings if drawing.name.endswith(("-goodput", "-attainment"))]
    parts += [_figure(drawing) for drawing in shown]
    parts += [_matrix(comparison), _results(comparison), _times(comparison), _effort(comparison)]
    parts += [_figure(drawing) for drawing in drawings if drawing not in shown]
    return "\n".join(parts)


def _matrix(comparison: Comparison) -> str:
    """What a person looks for first: the worst tier, one line a contender, one column a rate."""
    if len(comparison.rates_rps) < _FEW or not any(point.worst for point in comparison.points):
        return ""
    by_place = {(point.contender, point.rate_rps): point for point in comparison.points}
    rows = []
    for contender in comparison.contenders:
        points = (by_place.get((contender, rate_rps)) for rate_rps in comparison.rates_rps)
        rows.append((contender, *(_worst(point) for point in points)))
    head = ("contender", *(f"{rate:.4g} /s" for rate in comparison.rates_rps))
    return _table("Attainment of the worst tier, %, by rate", head, rows)


def _worst(point: Point | None) -> str:
    return formats.short_percent(point.worst.attainment if point and point.worst else None)


def _by_rate(comparison: Comparison, cells: Callable[[Point], Sequence[str]]) -> Iterator[Sequence[str]]:
    """A row for each contender under a heading for each rate."""
    for rate_rps in comparison.rates_rps:
        if len(comparison.rates_rps) > 1:
            yield (f"{rate_rps:.4g} requests/s",)
        for point in comparison.points:
            if point.rate_rps == rate_rps:
                yield (point.contender, *cells(point))


def _labels(comparison: Comparison) -> dict[str, str]:
    """How each tier is shown, by name."""
    return {
        tier.name: formats.tier_label(tier.name, tier.slo.tpot_s) for tier in comparison.setting.workload.tiers
    }


def _results(comparison: Comparison) -> str:
    labels = _labels(comparison)
    names = [labels.get(tier.tier, tier.tier) for tier in comparison.points[0].tiers]

    def cells(point: Point) -> Sequence[str]:
        return (
            formats.short_percent(point.overall.attainment),
            _worst(point),
            *(formats.short_percent(tier.attainment) for tier in point.tiers),
            formats.short_percent(point.overall.attainment_admitted),
            formats.short_percent(point.overall.attainment_one_based),
            ", ".join(f"{reason} {count:,}" for reason, count in point.refusals) or "none",
        )

    head = ("contender", "all", "worst", *names, "of admitted", "from one", "refused (all seeds)")
    caption = "Attainment, %, ± half a 95 % interval over seeds"
    return _table(caption, head, _by_rate(comparison, cells))


def _times(comparison: Comparison) -> str:
    """TTFT of all, TPOT of each tier beside what was promised."""
    labels = _labels(comparison)
    paces = {tier.name: tier.slo.tpot_s for tier in comparison.setting.workload.tiers}

    def heading(name: str) -> str:
        pace_s = paces.get(name)
        promised = "no promise" if pace_s is None else f"promised {1e3 * pace_s:g}"
        return f"TPOT P99 {labels.get(name, name)}, {promised}"

    def cells(point: Point) -> Sequence[str]:
        every = point.overall
        return tuple(
            map(
                formats.milliseconds,
                (every.ttft_p50_s, every.ttft_p99_s, every.tpot_p50_s, *(tier.tpot_p99_s for tier in point.tiers)),
            )
        )

    names = (heading(tier.tier) for tier in comparison.points[0].tiers)
    head = ("contender", "TTFT P50", "TTFT P99", "TPOT P50", *names)
    caption = "Times of the requests that were served, ms, mean over seeds"
    return _table(caption, head, _by_rate(comparison, cells))


def _effort(comparison: Comparison) -> str:
    def micro(value_s: float | None) -> str:
        return formats.NOTHING if value_s is None else f"{1e6 * value_s:,.0f}"

    def cells(point: Point) -> Sequence[str]:
        return (
            formats.number(point.cost_s, 3),
            formats.number(point.backends_busy),
            formats.number(point.backends_in_tiers),
            f"{point.preemptions:,}",
            micro(point.decision_p50_s),
            micro(point.decision_p99_s),
        )

    head = (
        "contender", "instance-seconds per request", "backends with work", "backends in tiers",
        "preemptions", "decision P50, us", "decision P99, us",
    )  # fmt: skip
    caption = "Cost. Decision times are this machine's and differ from run to run"
    return _table(caption, head, _by_rate(comparison, cells))


def _profiles(study: Study) -> str:
    if not study.profiles:
        return ""
    rows = (
        (note.name, note.model, note.hardware, note.source, note.conditions, f"{note.origin}; {note.licence}")
        for note in study.profiles
    )
    head = ("profile", "model", "hardware", "step times", "conditions", "origin and licence")
    return "<h2>Where the step times come from</h2>\n" + _table("Latency profiles", head, rows)


def _words() -> str:
    return "<h2>How to read this</h2>\n" + "\n".join(f"<p>{escape(line)}</p>" for line in _WORDS.split("\n\n"))


def _rerun(command: str) -> str:
    if not command:
        return ""
    return f"<h2>Run it again</h2>\n<p>The same command gives the same numbers.</p>\n<pre>{escape(command)}</pre>"
