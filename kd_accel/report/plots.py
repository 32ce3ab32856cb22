"""The two pictures of a report: learning curves, and accuracy against latency with a dot a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")

_SIZE_INCHES = (9.0, 4.0)


def plot_learning_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """curves: lines of metrics.jsonl by name of the run. Training loss by step, accuracy on the validation rows by epoch."""
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for name, lines in curves.items():
        _draw(loss, name, lines, split="train", across="step", up="loss", scale=1)
        _draw(accuracy, name, lines, split="val", across="epoch", up="accuracy", scale=100)
    loss.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    accuracy.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_accuracy_against_latency(points: Sequence[tuple[str, float, float]], path: Path) -> None:
    """points: (name, latency in milliseconds, accuracy as a fraction of 1)."""
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, latency_ms, accuracy in points:
        axes.scatter([latency_ms], [100 * accuracy], label=name, s=50)
    axes.set(xlabel="latency at batch size 1 (ms)", ylabel="test accuracy (%)", xlim=(0, None))
    axes.margins(y=0.2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, name: str, lines: Sequence[Mapping[str, Any]], *, split: str, across: str, up: str, scale: float) -> None:
    chosen = [line for line in lines if line.get("split") == split and up in line]
    axes.plot([line[across] for line in chosen], [scale * line[up] for line in chosen], label=name, marker=".", markersize=3)
