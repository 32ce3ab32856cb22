"""Figures of a report: learning curves, and accuracy against latency with names at the points.

In: lines of metrics.jsonl and figures of groups. Out: PNG files with a white background, and SVG elements in the colors of the
page (`svg.py`). Figures are drawn without pyplot, so they need no display. A run has one color in all figures.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, MaxNLocator
from matplotlib.transforms import Bbox

from kd_accel.report.svg import GRID, INK, LIGHT_COLORS, MUTED, NUM_COLORS, RUN_COLORS, inline_svg

Curve = tuple[str, Sequence[Mapping[str, Any]]]
"""(name, lines of metrics.jsonl) of a run."""

_LINE_STYLES = ("-", "--", ":", "-.")
_MARKERS = "oxs+^Dv*"
"""Markers of the models in turn: hollow and crossed ones alternate, so that two models at one point are both visible."""
_MAX_POINTS = 300
"""Largest number of points of a curve; each is the mean of equally many lines."""
_MARKED_POINTS = 30
"""Largest number of points of a curve that are marked one by one."""
_MIN_SPAN_PERCENT = 2.0
_MAX_PERCENT = 100.1
_DPI = 160
_COLUMNS = 3


@dataclass(frozen=True)
class Theme:
    """Colors of a figure: text, axes, grid lines, runs."""

    ink: str
    muted: str
    grid: str
    runs: Sequence[str]


_PNG = Theme("#1f2328", "#59636e", "#e4e8ec", LIGHT_COLORS)
_SVG = Theme(INK, MUTED, GRID, RUN_COLORS)


@dataclass(frozen=True)
class Panel:
    """One quantity over the training, in one pair of axes.

    Attributes:
        title: Title, with the unit.
        split: Split of the lines of metrics.
        x: Key of the horizontal axis: step or epoch.
        y: Key of the quantity.
        factor: Factor from the quantity to the unit.
        is_log: Whether the vertical axis is logarithmic.
    """

    title: str
    split: str
    x: str
    y: str
    factor: float = 1.0
    is_log: bool = False

    def points(self, lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
        """Return the points of a run; of a long training, means of equally many lines."""
        found = [line for line in lines if line["split"] == self.split and self.y in line]
        size = -(-len(found) // _MAX_POINTS) or 1
        parts = [found[start : start + size] for start in range(0, len(found), size)]
        return [(part[-1][self.x], self.factor * sum(line[self.y] for line in part) / len(part)) for part in parts]


PANELS = (
    Panel("Training cross-entropy", "train", "step", "ce", is_log=True),
    Panel("Validation loss", "val", "epoch", "loss"),
    Panel("Validation accuracy (%)", "val", "epoch", "accuracy", factor=100),
    Panel("Learning rate", "train", "step", "lr"),
    Panel("Temperature", "train", "step", "temperature"),
    Panel("Alpha, weight of the teacher", "train", "step", "alpha"),
)


@dataclass(frozen=True)
class Point:
    """Point of the figure of accuracy against latency: a run, or the mean of a group.

    Attributes:
        name: Name at the point.
        latency_ms: Latency in milliseconds.
        accuracy: Accuracy, a fraction of 1.
        spread_ms: Interquartile range of the latency; None = no bar.
        deviation: Standard deviation of the accuracy; None = no bar.
        color: Position of the run, which decides on the color.
    """

    name: str
    latency_ms: float
    accuracy: float
    spread_ms: float | None = None
    deviation: float | None = None
    color: int = 0


def plot_learning_curves(curves: Sequence[Curve], path: Path) -> None:
    """Plot what the runs have logged to a PNG file, one pair of axes for each quantity.

    Args:
        curves: Name and lines of each run.
        path: The file.
    """
    panels = _shown_panels(curves) or list(PANELS[:1])
    columns = 2 if len(panels) == 4 else min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with _style(_PNG):
        figure = Figure(figsize=(4.0 * columns, 3.0 * rows + 0.4), layout="constrained")
        for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
            _draw_panel(axes, panel, curves, _PNG)
            axes.set_title(panel.title, loc="left", fontweight="bold")
        for axes in figure.axes[len(panels) :]:
            axes.set_axis_off()
        handles = [_handle(name, index) for index, (name, _) in enumerate(curves)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(curves) or 1), frameon=False)
        figure.savefig(path, dpi=_DPI, facecolor="white")


def learning_curve_svgs(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """Return (title, SVG element) of each quantity that a run has logged."""
    return [(panel.title, _panel_svg(panel, curves)) for panel in _shown_panels(curves)]


def plot_accuracy_against_latency(points: Sequence[Point], path: Path) -> None:
    """Plot test accuracy against latency to a PNG file."""
    with _style(_PNG):
        figure = _scatter(points, _PNG, size=(6.5, 4.2))
        figure.savefig(path, dpi=_DPI, facecolor="white")


def accuracy_latency_svg(points: Sequence[Point]) -> str:
    """Return the figure of test accuracy against latency as an SVG element."""
    names = ", ".join(f"{point.name}: {100 * point.accuracy:.2f} %, {point.latency_ms:.2f} ms" for point in points)
    with _style(_SVG):
        figure = _scatter(points, _SVG, size=(7.6, 4.0))
        return _as_svg(figure, label=f"Test accuracy against latency. {names}")


def _shown_panels(curves: Sequence[Curve]) -> list[Panel]:
    return [panel for panel in PANELS if any(panel.points(lines) for _, lines in curves)]


def _panel_svg(panel: Panel, curves: Sequence[Curve]) -> str:
    with _style(_SVG):
        figure = Figure(figsize=(3.7, 2.4), layout="constrained")
        _draw_panel(figure.subplots(), panel, curves, _SVG)
        return _as_svg(figure, label=f"{panel.title} by {panel.x}")


def _as_svg(figure: Figure, *, label: str) -> str:
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline_svg(file.getvalue(), label=label)


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    settings: Any = {
        "text.parse_math": False,  # names may have dollar signs
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlecolor": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "text.color": theme.ink,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "legend.labelcolor": theme.ink,
    }
    with rc_context(settings):
        yield


def _line_style(index: int) -> Any:
    return _LINE_STYLES[index // NUM_COLORS % len(_LINE_STYLES)]


def _handle(name: str, index: int) -> Line2D:
    return Line2D([], [], color=LIGHT_COLORS[index % NUM_COLORS], linestyle=_line_style(index), label=name)


def _draw_panel(axes: Axes, panel: Panel, curves: Sequence[Curve], theme: Theme) -> None:
    for index, (_, lines) in enumerate(curves):
        points = panel.points(lines)
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=theme.runs[index % NUM_COLORS],
            linestyle=_line_style(index),
            # Of equal curves, such as learning rates, the earlier ones remain visible as an edge.
            linewidth=1.4 + 1.6 * (len(curves) - 1 - index) / max(1, len(curves) - 1),
            marker="o" if len(points) <= _MARKED_POINTS else "",
            markersize=3.5,
        )
    axes.set_xlabel("optimizer step" if panel.x == "step" else panel.x)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if panel.is_log and all(y > 0 for _, lines in curves for _, y in panel.points(lines)):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")


def _scatter(points: Sequence[Point], theme: Theme, *, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for index, point in enumerate(points):
        axes.errorbar(
            point.latency_ms,
            100 * point.accuracy,
            xerr=None if point.spread_ms is None else point.spread_ms / 2,
            yerr=None if point.deviation is None else 100 * point.deviation,
            fmt=_MARKERS[index % len(_MARKERS)],
            color=theme.runs[point.color % NUM_COLORS],
            markersize=9,
            markeredgewidth=2,
            markerfacecolor="none",
            elinewidth=1.2,
            capsize=3,
        )
    axes.set(xlabel="latency at batch size 1 (ms)", ylabel="test accuracy (%)")
    axes.margins(0.15)
    axes.set_xlim(left=0)
    _set_accuracy_limits(axes)
    _write_names(figure, axes, points, theme)
    return figure


def _set_accuracy_limits(axes: Axes) -> None:
    """Widen the accuracy axis to at least two percentage points, within 100 %; otherwise noise looks like a ranking."""
    lower, upper = axes.get_ylim()
    middle = (lower + upper) / 2
    half = max(upper - lower, _MIN_SPAN_PERCENT) / 2
    excess = max(0.0, middle + half - _MAX_PERCENT)
    axes.set_ylim(middle - half - excess, middle + half - excess)


def _write_names(figure: Figure, axes: Axes, points: Sequence[Point], theme: Theme) -> None:
    """Write each name next to its point, at the place that covers the least of markers, bars and earlier names."""
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    taken = [area for point in points for area in _marked_areas(axes, point)]
    for point in points:
        text = axes.annotate(
            point.name,
            (point.latency_ms, 100 * point.accuracy),
            xytext=(0, 0),
            textcoords="offset points",
            color=theme.runs[point.color % NUM_COLORS],
            fontweight="bold",
        )
        text.set_in_layout(False)
        places = [(across, up) for up, across in product((1, 0, -1, 2, -2), (1, -1, 0)) if across or up]
        _, best = min((_covered(_moved(text, place), taken, axes), order) for order, place in enumerate(places))
        taken.append(_moved(text, places[best]))


def _moved(text: Annotation, place: tuple[int, int]) -> Bbox:
    """Move a name to a place around its point, counted in lines of text, and return the area that it covers."""
    across, up = place
    text.set_position((8 * across, (11 if up and not across else 8) * up))
    text.set_horizontalalignment("left" if across > 0 else "right" if across < 0 else "center")
    text.set_verticalalignment("bottom" if up > 0 else "top" if up < 0 else "center")
    return text.get_window_extent()


def _marked_areas(axes: Axes, point: Point) -> list[Bbox]:
    """Return the areas of a marker and its bars."""
    x, y = axes.transData.transform((point.latency_ms, 100 * point.accuracy))
    right, upper = axes.transData.transform(
        (point.latency_ms + (point.spread_ms or 0) / 2, 100 * (point.accuracy + (point.deviation or 0)))
    )
    half_sizes = [(8.0, 8.0), (right - x, 3.0), (3.0, upper - y)]
    return [Bbox([[x - width, y - height], [x + width, y + height]]) for width, height in half_sizes if width and height]


def _covered(area: Bbox, taken: Sequence[Bbox], axes: Axes) -> float:
    """Return how much of an area is taken or outside of the axes, in square pixels."""
    inside = Bbox.intersection(area, axes.get_window_extent())
    outside = area.width * area.height - (inside.width * inside.height if inside else 0.0)
    overlaps = [Bbox.intersection(area, other) for other in taken]
    return round(outside + sum(overlap.width * overlap.height for overlap in overlaps if overlap), 3)
