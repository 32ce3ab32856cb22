"""Content of a report, from which the table, the pictures and the page are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd_accel.report.groups import Group
from kd_accel.report.run_files import RunResult

if TYPE_CHECKING:
    from kd_accel.training.prediction_file import StoredPredictions


@dataclass(frozen=True)
class Figures:
    """Figures as SVG elements.

    Attributes:
        scatter: Accuracy against latency; None without a latency.
        curves: (title, figure) of each logged quantity.
    """

    scatter: str | None
    curves: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Report:
    """Content of a report.

    Attributes:
        results: Results of the runs, in the order of the user.
        labels: Name of each run, all different.
        groups: Finished runs that differ only in the seed.
        predictions: Predictions of each run for its test samples; None where a run has not stored them.
        bench: Content of the bench file; empty without one.
        figures: Figures; None if matplotlib is not installed.
    """

    results: Sequence[RunResult]
    labels: Sequence[str]
    groups: Sequence[Group]
    predictions: Sequence[StoredPredictions | None]
    bench: dict[str, Any]
    figures: Figures | None
