"""Which figures a study has, and what is on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.campaign.curve import Bound
from simulator.campaign.goodput import Judged, Target
from simulator.campaign.interval import Interval
from simulator.report.canvas import (
    INK,
    MUTED,
    SERIES,
    Drawing,
    FiguresUnavailable,
    Look,
    Panel,
    inline_svg,
    need_figures,
    write_png,
)
from simulator.report.gradient import gradient_drawings
from simulator.report.summary import Comparison, Point, compare
from simulator.report.values import AblationRow, GainRow, GoodputRow, Mark, MarkKind, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Drawing", "FiguresUnavailable", "draw", "inline_svg", "need_figures", "write_png"]

_TARGET = 0.9
_MARK_DASHES = {MarkKind.REFERENCE: "dashed", MarkKind.UPPER: "dotted"}


def draw(study: Study) -> tuple[Drawing, ...]:
    """All figures of a study, in the order in which the page shows them."""
    found = _of_study(study)
    for number, comparison in enumerate(compare(study.runs), start=1):
        prefix, setting = f"s{number}", comparison.setting
        marks = [mark for mark in study.marks if mark.setting == setting]
        rows = [row for row in study.goodputs if row.setting == setting and row.goodput.target.level == _TARGET]
        if len({row.contender for row in rows}) > 1:
            found.append(_goodputs(prefix, rows, marks))
        if len(comparison.rates_rps) > 1:
            found += [
                _attainment(prefix, comparison, marks),
                _cost(prefix, comparison),
                *_latencies(prefix, comparison),
            ]
        found += gradient_drawings(prefix, comparison)
    return tuple(found)


def _of_study(study: Study) -> list[Drawing]:
    found = []
    scaling = _by_fleet_size(study.goodputs)
    if scaling:
        found.append(_scaling(scaling))
    floors = [row for row in study.gains if row.step_floor_s is not None]
    if floors:
        found.append(_floors(floors))
    if study.ablations:
        found.append(_ablations(study.ablations))
    return found


@dataclass(frozen=True, slots=True)
class _Curve:
    """A line with its interval."""

    label: str
    place: int
    points: tuple[tuple[float, Interval], ...]


def _paint_curve(axes: Axes, curve: _Curve, scale: float = 1.0) -> None:
    if not curve.points:
        return
    xs = [x for x, _ in curve.points]
    look = Look.of(curve.place)
    ys = [scale * y.mean for _, y in curve.points]
    axes.plot(
        xs, ys, label=curve.label, markersize=look.markersize, linewidth=look.linewidth, markerfacecolor="none",
        markeredgewidth=1.3, color=look.color, marker=look.marker, linestyle=look.linestyle,
    )  # fmt: skip
    sure = [
        (x, scale * y.mean, scale * y.low, scale * y.high)
        for x, y in curve.points
        if y.low is not None and y.high is not None
    ]
    if sure:
        whiskers = [[y - low for _, y, low, _ in sure], [high - y for _, y, _, high in sure]]
        axes.errorbar(
            [x for x, *_ in sure], [y for _, y, *_ in sure], yerr=whiskers, fmt="none", ecolor=look.color,
            elinewidth=0.9, capsize=2.0 + look.markersize / 3, capthick=0.9, alpha=0.8,
        )  # fmt: skip


def _curves(comparison: Comparison, value: Callable[[Point], Interval | None]) -> list[_Curve]:
    curves = []
    for place, contender in enumerate(comparison.contenders):
        pairs = ((point.rate_rps, value(point)) for point in comparison.curve(contender))
        known = tuple((rate, interval) for rate, interval in pairs if interval is not None)
        curves.append(_Curve(contender, place, known))
    return curves


def _rates(curves: Sequence[_Curve], ylabel: str, title: str, scale: float = 1.0) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for curve in curves:
            _paint_curve(axes, curve, scale)
        axes.set_xlabel("offered rate, requests/s")
        axes.set_ylabel(ylabel)
        axes.set_title(title)
        # Few seeds have whiskers far longer than any difference: the means set the scale.
        highest = max((scale * y.mean for curve in curves for _, y in curve.points), default=1.0)
        axes.set_ylim(0, 1.3 * highest or 1.0)

    return paint


def _attainment(prefix: str, comparison: Comparison, marks: Sequence[Mark]) -> Drawing:
    def panel(title: str, judged: Judged, value: Callable[[Point], Interval | None]) -> Panel:
        draw_rates = _rates(_curves(comparison, value), "attainment, %", title, 100.0)

        def paint(axes: Axes) -> None:
            draw_rates(axes)
            axes.set_ylim(0, 103)
            axes.axhline(100 * _TARGET, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
            axes.annotate(
                f"{100 * _TARGET:.0f} %", (0.005, 100 * _TARGET), xycoords=("axes fraction", "data"),
                xytext=(0, -2), textcoords="offset points", va="top", fontsize=8, color=MUTED,
            )  # fmt: skip
            _paint_marks_in_range(axes, marks, judged, comparison.rates_rps)

        return Panel(paint)

    return Drawing(
        f"{prefix}-attainment",
        prefix,
        "Attainment against the offered rate",
        "The part of the requests that kept every deadline. Left: of all. Right: of the tier that fares "
        "worst, which a policy cannot trade away. Whiskers are 95 % intervals over seeds; vertical lines are the "
        "tier-packed reference and the upper bounds; those far from the rates that were run stand in the legend "
        "with an arrow. Where lines lie on each other, the wider one is below.",
        (
            panel("all requests", Judged.OVERALL, lambda point: point.overall.attainment),
            panel(
                "the worst tier", Judged.EVERY_TIER, lambda point: point.worst.attainment if point.worst else None
            ),
        ),
    )


def _paint_marks(axes: Axes, marks: Iterable[Mark], judged: Judged) -> None:
    for mark in marks:
        if mark.judged not in {None, judged}:
            continue
        axes.axvline(
            mark.rate_rps,
            color=MUTED,
            linewidth=1.1,
            linestyle=_MARK_DASHES[mark.kind],
            label=f"{mark.label}, {mark.rate_rps:.3g}/s",
        )


def _paint_marks_in_range(axes: Axes, marks: Sequence[Mark], judged: Judged, rates_rps: Sequence[float]) -> None:
    """The axis keeps to the rates that were run: a mark far beyond them is told in words, not drawn."""
    least, most = rates_rps[0], rates_rps[-1]
    margin = 0.06 * (most - least)
    near = [mark for mark in marks if least - 3 * margin <= mark.rate_rps <= most + 3 * margin]
    _paint_marks(axes, near, judged)
    drawn = [mark.rate_rps for mark in near if mark.judged in {None, judged}]
    axes.set_xlim(min([least, *drawn]) - margin, max([most, *drawn]) + margin)
    for mark in marks:
        if mark not in near and mark.judged in {None, judged}:
            arrow = "→" if mark.rate_rps > most else "←"
            axes.plot(
                [], [], color=MUTED, linewidth=1.1, linestyle=_MARK_DASHES[mark.kind],
                label=f"{mark.label}, {mark.rate_rps:.3g}/s {arrow}",
            )  # fmt: skip


def _cost(prefix: str, comparison: Comparison) -> Drawing:
    cost = _curves(comparison, lambda point: point.cost_s)
    busy = _curves(comparison, lambda point: point.backends_busy)
    return Drawing(
        f"{prefix}-cost",
        prefix,
        "What a request costs, and how many backends are at work",
        "Left: instance-seconds a finished request took, a step's time shared by the sequences in it. Right: "
        "backends that had anybody on board, mean over the measured window.",
        (
            Panel(_rates(cost, "instance-seconds per request", "cost per request")),
            Panel(_rates(busy, "backends", "backends with work")),
        ),
    )


def _latencies(prefix: str, comparison: Comparison) -> list[Drawing]:
    return [
        Drawing(
            f"{prefix}-{name.lower()}",
            prefix,
            f"{what} ({name}) against the offered rate",
            "Median on the left and 99th percentile on the right, of the served requests of all tiers. The "
            "scale is logarithmic. Refused requests have no latency, so read this beside attainment.",
            (
                Panel(_logarithmic(_curves(comparison, p50), name, "median")),
                Panel(_logarithmic(_curves(comparison, p99), name, "99th percentile")),
            ),
        )
        for name, what, p50, p99 in _LATENCIES
    ]


_Value = Callable[[Point], Interval | None]
_LATENCIES: tuple[tuple[str, str, _Value, _Value], ...] = (
    ("TTFT", "Time to first token", lambda at: at.overall.ttft_p50_s, lambda at: at.overall.ttft_p99_s),
    ("TPOT", "Time per output token", lambda at: at.overall.tpot_p50_s, lambda at: at.overall.tpot_p99_s),
)


def _logarithmic(curves: Sequence[_Curve], name: str, title: str) -> Callable[[Axes], None]:
    draw_rates = _rates(curves, f"{name}, ms", title, 1e3)

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter  # noqa: PLC0415 - an extra

        draw_rates(axes)
        values = [1e3 * item.mean for curve in curves for _, item in curve.points if item.mean > 0]
        if not values:
            return
        axes.set_yscale("log")
        axes.set_ylim(0.8 * min(values), 1.25 * max(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())

    return paint


def _judged(targets: Iterable[Target]) -> list[Judged]:
    """Whose attainment was looked at, overall first."""
    found = {target.judged for target in targets}
    return [judged for judged in Judged if judged in found]


def _goodputs(prefix: str, rows: Sequence[GoodputRow], marks: Sequence[Mark]) -> Drawing:
    level = rows[0].goodput.target.level
    contenders = list(dict.fromkeys(row.contender for row in rows))

    def panel(judged: Judged) -> Panel:
        def paint(axes: Axes) -> None:
            for row in rows:
                found = row.goodput
                if found.target.judged is judged and found.bound in {Bound.EXACT, Bound.AT_LEAST}:
                    _paint_bar(axes, contenders.index(row.contender), found.estimate, bound=found.bound)
            axes.set_yticks(range(len(contenders)), contenders)
            axes.set_ylim(len(contenders) - 0.4, -0.6)
            axes.set_xlabel("requests/s")
            axes.set_title(judged.value)
            _paint_marks(axes, marks, judged)
            axes.set_xlim(left=0)

        return Panel(paint, _bars_height(len(contenders)))

    return Drawing(
        f"{prefix}-goodput",
        prefix,
        f"Goodput at {100 * level:g} %",
        f"The highest rate at which {100 * level:g} % keep every deadline: of all requests, and of every tier. "
        "Whiskers are 95 % intervals. An arrow: at least as much. No bar: below the lowest rate that was tried.",
        tuple(panel(judged) for judged in _judged(row.goodput.target for row in rows)),
    )


def _paint_bar(axes: Axes, place: int, value: Interval, bound: Bound = Bound.EXACT) -> None:
    axes.barh(place, value.mean, height=0.62, color=SERIES[place % len(SERIES)], alpha=0.75)
    if bound is Bound.AT_LEAST:
        axes.plot([value.mean], [place], marker=">", color=INK, markersize=6)
    elif value.low is not None and value.high is not None:
        whiskers = [[value.mean - value.low], [value.high - value.mean]]
        axes.errorbar(value.mean, place, xerr=whiskers, color=INK, capsize=3, linewidth=1.2)


def _bars_height(bars: int) -> float:
    return min(2.0, max(0.55, 0.3 + 0.11 * bars))


def _by_fleet_size(rows: Sequence[GoodputRow]) -> dict[str, list[GoodputRow]]:
    """By contender and what else is the same: rows for fleets of more than one size, at the papers' level."""
    lines: dict[tuple[str, str], list[GoodputRow]] = {}
    for row in rows:
        kinds = row.setting.fleet.engines
        if row.goodput.target.level == _TARGET and row.goodput.bound is Bound.EXACT and len(kinds) == 1:
            floor = kinds[0].step_floor_s
            where = f"{row.setting.workload.trace}, {kinds[0].profile}"
            where += "" if floor is None else f", t0 {1e3 * floor:g} ms"
            lines.setdefault((where, row.contender), []).append(row)
    scaled = {key: own for key, own in lines.items() if len({row.setting.fleet.backends for row in own}) > 1}
    alike = len({where for where, _ in scaled}) == 1
    return {contender if alike else f"{contender}, {where}": own for (where, contender), own in scaled.items()}


def _scaling(lines: Mapping[str, Sequence[GoodputRow]]) -> Drawing:
    def panel(judged: Judged) -> Panel:
        def paint(axes: Axes) -> None:
            for place, (label, rows) in enumerate(lines.items()):
                own = [row for row in rows if row.goodput.target.judged is judged]
                pairs = [(float(row.setting.fleet.backends), _per_backend(row)) for row in own]
                _paint_curve(axes, _Curve(label, place, tuple(sorted(pairs, key=lambda pair: pair[0]))))
            axes.set_xlabel("backends in the fleet")
            axes.set_ylabel("goodput, requests/s per backend")
            axes.set_title(judged.value)
            axes.set_ylim(bottom=0)

        return Panel(paint)

    return Drawing(
        "scaling",
        "",
        "Goodput per backend against the size of the fleet",
        "A rising line means that a larger fleet wastes less: fewer backends are left half full between tiers. "
        "Whiskers are 95 % intervals.",
        tuple(panel(judged) for judged in _judged(row.goodput.target for rows in lines.values() for row in rows)),
    )


def _per_backend(row: GoodputRow) -> Interval:
    return _scaled(row.goodput.estimate, 1.0 / row.setting.fleet.backends)


def _scaled(value: Interval, by: float, plus: float = 0.0) -> Interval:
    low = None if value.low is None else by * value.low + plus
    high = None if value.high is None else by * value.high + plus
    return Interval(by * value.mean + plus, low, high, value.count)


def _floors(rows: Sequence[GainRow]) -> Drawing:
    def name_of(row: GainRow) -> str:
        return f"{row.contender} / {row.against}, {row.group}, {100 * row.target.level:g} %"

    names = list(dict.fromkeys(map(name_of, rows)))

    def panel(judged: Judged) -> Panel:
        def paint(axes: Axes) -> None:
            for place, name in enumerate(names):
                pairs = [
                    (1e3 * row.step_floor_s, row.ratio.estimate)
                    for row in rows
                    if row.step_floor_s is not None and name_of(row) == name and row.target.judged is judged
                ]
                _paint_curve(axes, _Curve(name, place, tuple(sorted(pairs, key=lambda pair: pair[0]))))
            axes.axhline(1.0, color=INK, linewidth=0.9, linestyle="dotted")
            axes.set_xlabel("fixed part of a step (t0), ms")
            axes.set_ylabel("ratio of goodputs")
            axes.set_title(judged.value)

        return Panel(paint)

    return Drawing(
        "t0",
        "",
        "What tiers can win depends on the fixed step time",
        "The ratio of two goodputs against t0, the part of a step that does not depend on what is in it. The "
        "larger it is, the more a loose tier gains from a backend of its own. Whiskers are 95 % intervals.",
        tuple(panel(judged) for judged in _judged(row.target for row in rows)),
    )


def _ablations(rows: Sequence[AblationRow]) -> Drawing:
    def name_of(row: AblationRow) -> str:
        return f"{row.mechanism} ({row.group}, {100 * row.target.level:g} %)"

    names = list(dict.fromkeys(map(name_of, rows)))

    def panel(judged: Judged) -> Panel:
        def paint(axes: Axes) -> None:
            for row in rows:
                if row.target.judged is judged and row.ratio.bound is not Bound.UNKNOWN:
                    change = _scaled(row.ratio.estimate, 100.0, -100.0)
                    _paint_bar(axes, names.index(name_of(row)), change)
            axes.axvline(0.0, color=INK, linewidth=0.9)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_xlabel("change of goodput, %")
            axes.set_title(judged.value)

        return Panel(paint, _bars_height(len(names)))

    return Drawing(
        "ablation",
        "",
        "What each mechanism is worth",
        "The goodput without a mechanism against that of the whole policy: a bar to the left is what taking it "
        "out costs. An interval that crosses zero says that these runs cannot tell.",
        tuple(panel(judged) for judged in _judged(row.target for row in rows)),
    )
