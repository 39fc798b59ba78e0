"""The load gradient over time, and how many servers each tier uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from simulator.outcome import Sample
from simulator.report.canvas import DASHES, GRADIENT, INK, MUTED, SERIES, Drawing, Panel
from simulator.report.formats import tier_label
from simulator.report.summary import Comparison
from simulator.report.values import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TARGET = 0.9
_OWN = "polyserve"
_SHOWN = 2
_MOST_COLUMNS = 160
POOL = "pool"


def gradient_drawings(prefix: str, comparison: Comparison) -> list[Drawing]:
    """One drawing for the best PolyServe and one for the best baseline, where their runs have samples."""
    return [
        _drawing(f"{prefix}-gradient-{number}", prefix, run)
        for number, run in enumerate(telling_runs(comparison), start=1)
        if run.outcome.samples
    ]


def telling_runs(comparison: Comparison) -> list[Run]:
    """The runs whose samples are drawn: of the best on each side, where the first of them still does well."""
    shown = _best_of_each_side(comparison)
    wanted_rps = _telling_rate(comparison, shown[0])
    found = []
    for contender in shown:
        own = [run for run in comparison.runs if run.cell.contender.label == contender]
        found.append(min(own, key=lambda run: (abs(run.cell.rate_rps - wanted_rps), run.cell.seed)))
    return found


def _best_of_each_side(comparison: Comparison) -> list[str]:
    """PolyServe's best and the baselines' best, by the worst tier over all rates; else the best two."""

    def kept(contender: str) -> float:
        shares = [point.worst.attainment for point in comparison.curve(contender) if point.worst is not None]
        return math.fsum(share.mean for share in shares if share is not None)

    ranked = sorted(comparison.contenders, key=kept, reverse=True)
    own = [name for name in ranked if name.startswith(_OWN)]
    others = [name for name in ranked if not name.startswith(_OWN)]
    return [own[0], others[0]] if own and others else ranked[:_SHOWN]


def _telling_rate(comparison: Comparison, contender: str) -> float:
    """The highest rate at which a contender reaches the target, else the lowest of all."""
    reached = [
        point.rate_rps
        for point in comparison.curve(contender)
        if point.overall.attainment is not None and point.overall.attainment.mean >= _TARGET
    ]
    return max(reached, default=comparison.rates_rps[0])


def _drawing(name: str, section: str, run: Run) -> Drawing:
    samples = thin(run.outcome.samples, _MOST_COLUMNS)
    order = [tier.tier for tier in run.outcome.tiers]
    names = {key for sample in samples for key in sample.backends}
    tiers = [tier for tier in order if tier in names] + sorted(names - set(order) - {POOL})
    tiers += [POOL] if POOL in names else []
    paces = {tier.name: tier.slo.tpot_s for tier in run.cell.workload.tiers}
    shown = {tier: tier_label(tier, paces.get(tier)) for tier in tiers}
    return Drawing(
        name,
        section,
        f"{run.cell.contender.label} at {run.cell.rate_rps:.4g} requests/s: load of each backend, and tiers",
        "Left: one row a backend, the most loaded of each tier on top; colour is its predicted steady step time "
        "over the pace of its tier. A gradient shows as rows that fade downwards. Right: how many backends each "
        "tier holds, or have work where a policy knows no tiers. One seed, the whole run with warm-up and drain.",
        (Panel(lambda axes: _paint_loads(axes, samples, shown), 1.15), Panel(_servers(samples, shown), 1.15)),
    )


def thin(samples: Sequence[Sample], most: int) -> tuple[Sample, ...]:
    """At most `most` samples, evenly taken."""
    every = max(1, math.ceil(len(samples) / most))
    return tuple(samples[::every])


def _paint_loads(axes: Axes, samples: Sequence[Sample], shown: Mapping[str, str]) -> None:
    """`shown`: what each tier is called, in order."""
    tiers = [*shown]
    rows: list[list[float]] = []
    ticks: list[tuple[float, str]] = []
    for tier in tiers:
        most = max(len(sample.backends.get(tier, ())) for sample in samples)
        if not most:
            continue
        ticks.append((len(rows) + (most - 1) / 2, "no tiers" if tiers == [POOL] else shown[tier]))
        for place in range(most):
            loads = [sample.backends.get(tier, ()) for sample in samples]
            rows.append([load[place] if place < len(load) else math.nan for load in loads])
        if tier != tiers[-1]:
            axes.axhline(len(rows) - 0.5, color=MUTED, linewidth=0.8)
    if not rows:
        return
    end_s = max(samples[-1].at_s, samples[0].at_s + 1e-9)
    picture = axes.imshow(
        rows, aspect="auto", interpolation="nearest", cmap=GRADIENT, vmin=0.0, vmax=1.0,
        extent=(samples[0].at_s, end_s, len(rows) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.set_xlabel("time, s")
    axes.set_title("load of the backends, by tier")
    axes.grid(visible=False)
    bar = axes.figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02, extend="max")
    bar.set_label("load (1: no time left)", color=INK, fontsize=9)
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8)
    bar.outline.set_visible(False)


def _servers(samples: Sequence[Sample], shown: Mapping[str, str]) -> Callable[[Axes], None]:
    """How many backends each tier holds; without tiers, where all are the pool's, how many have work."""
    tierless = [*shown] == [POOL]

    def count(sample: Sample, tier: str) -> int:
        loads = sample.backends.get(tier, ())
        return sum(load > 0 for load in loads) if tierless else len(loads)

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - an extra

        times = [sample.at_s for sample in samples]
        for place, tier in enumerate(shown):
            axes.step(
                times, [count(sample, tier) for sample in samples], where="post", linewidth=1.6,
                label="with work" if tierless else shown[tier],
                color=MUTED if tier == POOL else SERIES[place % len(SERIES)],
                linestyle=DASHES[place % len(DASHES)],
            )  # fmt: skip
        axes.set_xlabel("time, s")
        axes.set_ylabel("backends")
        axes.set_title("backends with work" if tierless else "backends in each tier")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    return paint
