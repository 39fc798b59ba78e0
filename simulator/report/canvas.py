"""How figures are drawn: panels, colours that colour-blind readers tell apart, PNG files and inline SVG.

Figures need matplotlib, which is an extra (`tiergate[figures]`). Inside the page, colours are CSS variables, so
that figures follow the reader's light or dark theme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

INK = "#14181d"
MUTED = "#5b6672"
GRID = "#d9dee4"
# Okabe and Ito's colours, darkened where they are too pale on white; the page has a brighter set for dark themes.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b8619a", "#8a6d00", "#3f9fd8", "#5b6672", "#9b4f10")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("solid", "dashed", "dashdot", "dotted")
GRADIENT = "viridis"

_VARIABLES: Mapping[str, str] = MappingProxyType(
    {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
    | {colour: f"var(--series-{place})" for place, colour in enumerate(SERIES) if colour != MUTED}
)
_PANEL_INCHES = (5.0, 3.2)
_LEGEND_INCHES = 0.19
_LEGEND_CHARACTERS = 60  # of two labels, in a panel's width


class FiguresUnavailable(Exception):
    """matplotlib is not installed."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: `paint` draws on it; `height` is in panels."""

    paint: Callable[[Axes], None]
    height: float = 1.0


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure of one or more panels.

    Attributes:
        name: its file name and address in the page.
        section: the place in the page: `s1` for the first setting and so on, or empty for the whole study.
        says: what it shows, in words; read aloud where the picture is not seen.
    """

    name: str
    section: str
    title: str
    says: str
    panels: tuple[Panel, ...]


def need_figures() -> None:
    """Raises FiguresUnavailable when figures could not be drawn: told before a run, not after it."""
    if find_spec("matplotlib") is None:
        raise FiguresUnavailable("figures need matplotlib: install tiergate[figures]")


@dataclass(frozen=True, slots=True)
class Look:
    """How one series is told from the others: colour is never the only difference.

    Attributes:
        linewidth: the first series are the widest, so that a line drawn over another leaves its edges to be seen.
        markersize: the same for its hollow markers.
    """

    color: str
    marker: str
    linestyle: str
    linewidth: float
    markersize: float

    @classmethod
    def of(cls, place: int) -> Look:
        """The look of the series at that place."""
        turn = place // len(SERIES)
        return cls(
            SERIES[place % len(SERIES)],
            MARKERS[(place + turn) % len(MARKERS)],
            DASHES[place % len(DASHES)],
            max(1.3, 3.4 - 0.6 * place),
            max(4.5, 9.0 - 1.5 * place),
        )


def write_png(drawing: Drawing, path: Path) -> None:
    """All panels of a drawing, side by side, on white."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    width, height = _PANEL_INCHES
    tallest = max(panel.height for panel in drawing.panels)
    figure = Figure(figsize=(width * len(drawing.panels), height * tallest), layout="constrained")
    figure.suptitle(drawing.title, color=INK, fontsize=11)
    parts = figure.subfigures(1, len(drawing.panels), squeeze=False)
    lines = [_paint(part, panel) for part, panel in zip(parts[0], drawing.panels, strict=True)]
    figure.set_size_inches(width * len(drawing.panels), height * tallest + _LEGEND_INCHES * max(lines))
    figure.savefig(path, dpi=130, facecolor="white")


def inline_svg(drawing: Drawing) -> tuple[str, ...]:
    """Each panel as an SVG element for a page: no outside reference, ids that are unique in the page."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    found = []
    width, height = _PANEL_INCHES
    for place, panel in enumerate(drawing.panels):
        name = f"{drawing.name}-{place}"
        # The salt replaces the random part of the ids, so that the same figure gives the same bytes.
        with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            figure = Figure(figsize=(width, height * panel.height), layout="constrained")
            lines = _paint(figure, panel)
            figure.set_size_inches(width, height * panel.height + _LEGEND_INCHES * lines)
            target = io.StringIO()
            figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        found.append(_for_page(target.getvalue(), name, drawing.says))
    return tuple(found)


def _paint(figure: Figure | SubFigure, panel: Panel) -> int:
    """Draw a panel. Returns how many lines its legend has, which stands below the axes."""
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(visible=True, color=GRID, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    panel.paint(axes)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
        text.set_fontsize(10)
    handles, labels = axes.get_legend_handles_labels()
    columns = _legend_columns([str(label) for label in labels])
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False, labelcolor=INK
        )
    return math.ceil(len(handles) / columns)


def _legend_columns(labels: Sequence[str]) -> int:
    """Two where they fit beside each other: matplotlib fills the left one first."""
    half = math.ceil(len(labels) / 2)
    widest = [max(map(len, part), default=0) for part in (labels[:half], labels[half:])]
    return 2 if len(labels) > 1 and sum(widest) <= _LEGEND_CHARACTERS else 1


def _for_page(svg: str, name: str, says: str) -> str:
    """An SVG file as an element of a page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None, "matplotlib writes a viewBox"
    rest = rest.replace("xlink:href", "href")
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'href="#', f'href="#{name}-', rest)
    rest = rest.replace("url(#", f"url(#{name}-")
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, variable)
    rest = rest.replace("'DejaVu Sans', ", "").replace("'Bitstream Vera Sans', ", "")
    label = says.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg viewBox="{box.group(1)}" role="img" aria-label="{label}">{rest}'.strip()
