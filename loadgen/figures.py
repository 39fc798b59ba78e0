"""Figures of a load. They need matplotlib, which is an extra (`tiergate[figures]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loadgen.results import LoadResult
from loadgen.search import Point
from scheduling.scoring import judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FiguresUnavailable(Exception):
    """matplotlib is not installed."""


def need_figures() -> None:
    """Raises FiguresUnavailable when figures could not be drawn: told before a load, not after it."""
    _figure()


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra; the rest of the package does without it
    except ImportError as error:
        raise FiguresUnavailable("figures need matplotlib: install tiergate[figures]") from error
    return Figure(figsize=(7.0, 4.2), layout="constrained")


def draw_slack(runs: Mapping[str, LoadResult], path: Path, title: str = "") -> None:
    """The share of requests whose slack is at most x, one line a tier, and a dash style for each run.

    Requests that were refused or failed have no tokens to judge and are left out; the table counts them.
    """
    figure = _figure()
    axes = figure.add_subplot()
    tiers = list(dict.fromkeys(item.record.tier for result in runs.values() for item in result.measured))
    for run, (label, result) in enumerate(runs.items()):
        for number, tier in enumerate(tiers):
            judged = (judge(item.record) for item in result.measured if item.record.tier == tier)
            slack = sorted(item.slack_s for item in judged if item.slack_s is not None)
            if slack:
                shares = [(rank + 1) / len(slack) for rank in range(len(slack))]
                name = f"{tier}, {label}" if len(runs) > 1 else tier
                axes.step(slack, shares, where="post", label=name, color=f"C{number}", linestyle=_DASHES[run % 4])
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("smallest slack of a request's tokens, s (below 0: late)")
    axes.set_ylabel("share of requests")
    axes.set_title(title)
    if axes.lines[:-1]:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


_DASHES = ("solid", "dashed", "dotted", "dashdot")


def draw_attainment(
    curves: Mapping[str, Sequence[Point]],
    path: Path,
    *,
    target: float,
    rate_rps: float | None = None,
    title: str = "",
) -> None:
    """Attainment against the offered rate; one curve a name. `rate_rps` is the rate at factor 1, if known."""
    figure = _figure()
    axes = figure.add_subplot()
    for name, points in curves.items():
        ordered = sorted(points, key=lambda point: point.factor)
        factors = [point.factor * (rate_rps or 1.0) for point in ordered]
        axes.plot(factors, [100 * point.attainment for point in ordered], marker="o", label=name)
    axes.axhline(100 * target, color="black", linewidth=0.8, linestyle="dashed")
    axes.set_xlabel("rate factor" if rate_rps is None else "offered requests/s")
    axes.set_ylabel("attainment, %")
    axes.set_ylim(0, 102)
    axes.set_title(title)
    if len(curves) > 1:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
