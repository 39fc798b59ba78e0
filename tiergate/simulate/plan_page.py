"""A capacity plan as one HTML page that needs nothing else, with one figure: backends by tier over the day."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from simulator.planning.result import CapacityPlan
from simulator.report.canvas import INK, SERIES, Drawing, Panel, inline_svg
from simulator.report.style import STYLE
from tiergate.simulate.plan_show import (
    COSTS_SAY,
    DAY_SAYS,
    FORGIVEN_SAYS,
    LEVELS_SAY,
    LIMITS,
    SCALED_SAYS,
    attained,
    change,
    clock,
    conditions,
    fleet_cell,
    held_names,
    saving_cells,
    tenths,
    title,
    totals,
    warnings,
)

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
        "<h2>What each fleet serves</h2>",
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
        own = tenths(one)
        level = None if one.level is None else plan.levels[one.level]
        reached = {} if level is None else dict(level.attainments)
        rows.append(
            (
                clock(one.window.start_s, plan.window_s),
                f"{one.window.rate_rps:.4g}",
                f"{one.window.load:.2f}",
                fleet_cell(one),
                *(own.get(name, "0.0") for name in names),
                own.get("pool", "0.0"),
                *("-" if level is None else attained(plan, reached.get(name), level) for name in _promised(plan)),
            )
        )
    promised = [f"{name} on time, %" for name in _promised(plan)]
    head = ("since the start", "requests/s", "ideal", "fleet", *names, "pool" if names else "shared", *promised)
    return _table(head, rows) + f"\n<p>{escape(f'{DAY_SAYS} {SCALED_SAYS}')}</p>"


def _promised(plan: CapacityPlan) -> tuple[str, ...]:
    return plan.asked.demand.promised


def _levels(plan: CapacityPlan) -> str:
    rows = (
        (
            "none found" if level.backends is None else str(level.backends),
            f"{level.rate_rps:.4g}",
            *(attained(plan, dict(level.attainments).get(name), level) for name in ("all", *_promised(plan))),
            f"{level.seeds_reached} of {level.worst.count}",
            "-" if level.over_rps is None else f"{level.over_rps:.4g}",
            "; ".join(f"{rate_rps:.4g}: {100 * score:.1f}" for _, rate_rps, score in level.tried),
        )
        for level in plan.levels
    )
    head = (
        "fleet", "serves requests/s", "all, %", *_promised(plan), "seeds that keep the target", "not",
        "worst tier by requests/s, without what is forgiven, %",
    )  # fmt: skip
    says = f"{LEVELS_SAY} {FORGIVEN_SAYS}" if plan.unloaded else LEVELS_SAY
    return _table(head, rows) + f"\n<p>{escape(says)}</p>"


def _costs(plan: CapacityPlan, price: float | None) -> tuple[str, ...]:
    if plan.priced is None or not plan.priced.savings:
        return ()
    rows = ((one.tier, change(one), *saving_cells(plan, one, price)) for one in plan.priced.savings)
    head = (
        "tier", "change", "backends saved at the peak", "backend-seconds per 1,000 of its requests",
        "money per 1,000",
    )  # fmt: skip
    return ("<h2>What each promise costs</h2>", _table(head, rows), f"<p>{escape(COSTS_SAY)}</p>")
