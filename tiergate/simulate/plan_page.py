"""A capacity plan as one HTML page that needs nothing else, with one figure: backends by tier over the day."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from simulator.planning.result import CapacityPlan
from simulator.report.canvas import INK, SERIES, Drawing, Panel, inline_svg
from simulator.report.style import STYLE
from tiergate.simulate.plan_show import LIMITS, change, clock, conditions, held_names, title, totals, warnings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POOL_COLOR = "#d9dee4"


def page(plan: CapacityPlan, price: float | None, rerun: str) -> str:
    """The page. The same plan gives the same text. Raises FiguresUnavailable without matplotlib."""
    heading = f"Capacity plan (simulated): {title(plan)}"
    parts = [
        f"<h1>{escape(heading)}</h1>",
        (
            '<p class="notice"><strong>Simulated.</strong> Every number comes from a model of engines on a '
            "virtual clock. No engine ran, and no GPU was used.</p>"
        ),
        *(f"<p>{escape(line)}</p>" for line in conditions(plan)),
        *(f'<p class="notice">{escape(line)}</p>' for line in warnings(plan)),
        "<h2>In short</h2>",
        *(f"<p>{escape(line)}</p>" for line in totals(plan, price) if line),
        "<h2>Backends over the day</h2>",
        _figure(_drawing(plan)),
        _day(plan),
        "<h2>Simulated loads</h2>",
        _levels(plan),
        *_costs(plan, price),
        "<h2>What this does not tell</h2>",
        f"<p>{escape(LIMITS)}</p>",
        f"<h2>Run it again</h2>\n<pre>{escape(rerun)}</pre>",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(heading)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in others)
        + "</tr>"
        for first, *others in rows
    )
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def _figure(drawing: Drawing) -> str:
    (svg,) = inline_svg(drawing)
    return (
        f'<figure id="{drawing.name}"><div class="panels"><div class="panel">{svg}</div></div>'
        f"<figcaption><strong>{escape(drawing.title)}.</strong> {escape(drawing.says)}</figcaption></figure>"
    )


def _drawing(plan: CapacityPlan) -> Drawing:
    names = held_names(plan)
    edges_h = [one.window.start_s / 3600 for one in plan.windows]
    edges_h.append(edges_h[-1] + plan.windows[-1].window.duration_s / 3600)

    def paint(axes: Axes) -> None:
        base = [0.0] * len(plan.windows)
        for place, name in enumerate([*names, "pool" if names else "shared"]):
            pool = place == len(names)
            held = [one.held.pool if pool else dict(one.held.tiers).get(name, 0.0) for one in plan.windows]
            top = [low + value for low, value in zip(base, held, strict=True)]
            color = _POOL_COLOR if pool else SERIES[place % len(SERIES)]
            axes.stairs(top, edges_h, baseline=base, fill=True, color=color, label=name)
            base = top
        axes.stairs([one.backends or 0 for one in plan.windows], edges_h, color=INK, label="planned")
        axes.set_xlabel("hours since the trace began")
        axes.set_ylabel("backends")
        axes.set_ylim(bottom=0)

    says = (
        "Simulated. Backends that each tier held, mean over time, under the number that is planned for a window."
    )
    return Drawing("plan-day", "", "Backends by tier over the day", says, (Panel(paint),))


def _day(plan: CapacityPlan) -> str:
    names = held_names(plan)
    rows = []
    for one in plan.windows:
        own = dict(one.held.tiers)
        attained = dict(plan.levels[one.level].attainments) if one.level is not None else {}
        rows.append(
            (
                clock(one.window.start_s, plan.window_s),
                f"{one.window.rate_rps:.4g}",
                "none found" if one.backends is None else f"{one.backends}{' (scaled)' if one.scaled else ''}",
                *(f"{own.get(name, 0.0):.1f}" for name in names),
                f"{one.held.pool:.1f}",
                *(_hundred(attained.get(name)) for name in plan.asked.demand.promised),
            )
        )
    promised = [f"{name} on time, %" for name in plan.asked.demand.promised]
    return _table(("from", "requests/s", "backends", *names, "pool" if names else "shared", *promised), rows)


def _hundred(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _levels(plan: CapacityPlan) -> str:
    promised = plan.asked.demand.promised
    rows = (
        (
            f"{level.rate_rps:.4g}",
            "none found" if level.backends is None else str(level.backends),
            *(_hundred(dict(level.attainments).get(name)) for name in ("all", *promised)),
            f"{level.seeds_reached} of {level.worst.count}",
            "; ".join(f"{backends}: {_hundred(score)}" for backends, score in level.tried),
        )
        for level in plan.levels
    )
    head = ("requests/s", "backends", "all, %", *promised, "seeds that keep the target", "tried, %")
    return _table(head, rows)


def _costs(plan: CapacityPlan, price: float | None) -> tuple[str, ...]:
    if plan.priced is None or not plan.priced.savings:
        return ()
    rows = (
        (
            one.tier,
            change(one),
            f"{plan.peak_rps * one.per_request_s.mean:.2f}",
            "" if one.per_request_s.half is None else f"{plan.peak_rps * one.per_request_s.half:.2f}",
            f"{one.per_thousand_s:,.0f}{'' if one.exact else ' (bound)'}",
            "" if price is None else f"{one.per_thousand_s * price / 3600:,.4f}",
        )
        for one in plan.priced.savings
    )
    head = (
        "tier", "change", "backends saved at the peak", "± (95 %)", "backend-seconds per 1,000 of its requests",
        "money per 1,000",
    )  # fmt: skip
    return ("<h2>What each promise costs</h2>", _table(head, rows))
