"""Figures of a report: learning curves, and accuracy against latency with one marker per model.

In: lines of metrics.jsonl and rows of the table. Out: PNG files. Figures are drawn without pyplot, so they need no display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

_MARKED_POINTS = 50
"""Largest number of points of a curve that are marked one by one."""
_MARKERS = "oxs+^Dv*"
"""Markers of the models in turn: hollow and crossed ones alternate, so that two models at one point are both visible."""
_MIN_SPAN_PERCENT = 2.0
_MAX_PERCENT = 100.1


def plot_learning_curves(curves: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Plot training loss by step and validation accuracy by epoch to a PNG file.

    Args:
        curves: (name, lines of metrics.jsonl) of each run.
        path: The file.
    """
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for name, lines in curves:
        _draw(loss, name, lines, split="train", x="step", y="loss", scale=1)
        _draw(accuracy, name, lines, split="val", x="epoch", y="accuracy", scale=100)
    loss.set(xlabel="optimizer step", ylabel="training loss (weighted sum of a run's terms)", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)")
    accuracy.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    loss.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_accuracy_against_latency(points: Sequence[tuple[str, float, float]], path: Path) -> None:
    """Plot test accuracy against latency to a PNG file.

    Args:
        points: (name, latency in milliseconds, accuracy as a fraction of 1) of each model.
        path: The file.
    """
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for index, (name, latency_ms, accuracy) in enumerate(points):
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(
            latency_ms, 100 * accuracy, marker, label=_plain(name), markersize=9, markeredgewidth=2, markerfacecolor="none"
        )
    axes.set(xlabel="latency at batch size 1 (ms)", ylabel="test accuracy (%)")
    axes.margins(0.15)
    axes.set_xlim(left=0)
    _set_accuracy_limits(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _set_accuracy_limits(axes: Axes) -> None:
    """Widen the accuracy axis to at least two percentage points, within 100 %; otherwise noise looks like a ranking."""
    lower, upper = axes.get_ylim()
    middle = (lower + upper) / 2
    half = max(upper - lower, _MIN_SPAN_PERCENT) / 2
    excess = max(0.0, middle + half - _MAX_PERCENT)
    axes.set_ylim(middle - half - excess, middle + half - excess)


def _draw(axes: Axes, name: str, lines: Sequence[Mapping[str, Any]], *, split: str, x: str, y: str, scale: float) -> None:
    points = [line for line in lines if line["split"] == split and y in line]
    marker = "." if len(points) <= _MARKED_POINTS else ""
    axes.plot(
        [line[x] for line in points],
        [scale * line[y] for line in points],
        label=_plain(name),
        marker=marker,
        linewidth=1.2,
    )


def _plain(name: str) -> str:
    """Escape dollar signs, between which matplotlib would render a formula."""
    return name.replace("$", r"\$")
