"""Columns of the table of results, for Markdown and for the page: which figures, in which unit, with how many digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd_accel.report.groups import Group
from kd_accel.report.rows import Row


@dataclass(frozen=True)
class Column:
    """Column of numbers.

    Attributes:
        title: Head of the column, with the unit.
        field: Field of `Row`.
        factor: Factor from the field to the unit.
        digits: Digits after the point.
        unit: Text after each number.
        is_fixed: Whether the column remains if no row has a value.
        has_deviation: Whether a group has a standard deviation; else its mean alone.
        explanation: Sentence for the page.
    """

    title: str
    field: str
    factor: float = 1.0
    digits: int = 2
    unit: str = ""
    is_fixed: bool = False
    has_deviation: bool = False
    explanation: str = ""

    def cell(self, row: Row) -> str:
        """Return the number of a row as text; empty without a value."""
        return self._text(getattr(row, self.field))

    def group_cell(self, group: Group) -> str:
        """Return the mean of a group as text, with its standard deviation."""
        mean, deviation = self._text(group.mean(self.field)), group.deviation(self.field)
        return f"{mean} ± {self._text(deviation)}" if self.has_deviation and deviation is not None else mean

    def _text(self, value: float | None) -> str:
        # The sum removes the sign of a zero, which a gap between equal accuracies may have after rounding.
        return "" if value is None else f"{round(self.factor * value, self.digits) + 0.0:.{self.digits}f}{self.unit}"


COLUMNS = [
    Column("Accuracy (%)", "accuracy", 100, is_fixed=True, has_deviation=True, explanation="on the test split, last weights"),
    Column(
        "Best epoch (%)",
        "accuracy_best_epoch",
        100,
        has_deviation=True,
        explanation="on the test split, weights of the epoch with the best validation accuracy",
    ),
    Column(
        "Top-5 (%)",
        "top5_accuracy",
        100,
        has_deviation=True,
        explanation="share of test samples with the label among the best 5",
    ),
    Column(
        "Gap to teacher (points)",
        "gap_to_teacher",
        100,
        has_deviation=True,
        explanation="accuracy of the teacher minus that of the model",
    ),
    Column(
        "Agreement (%)",
        "agreement",
        100,
        has_deviation=True,
        explanation="share of test samples for which model and teacher predict the same class",
    ),
    Column("Parameters (M)", "parameters", 1e-6, is_fixed=True),
    Column(
        "Compression", "compression", digits=1, unit="×", explanation="parameters of the teacher divided by those of the model"
    ),
    Column("MACs (M)", "macs", 1e-6, digits=1, is_fixed=True, explanation="multiply-adds per image"),
    Column("Latency (ms)", "latency_ms", is_fixed=True, explanation="median at batch size 1"),
    Column("CUDA graph (ms)", "graph_latency_ms", explanation="median of the same forward as a CUDA graph"),
    Column("Throughput (images/s)", "images_per_second", digits=0, explanation="at the largest batch size of the benchmark"),
]


def shown_columns(rows: Sequence[Row], *, keeps_fixed: bool = True) -> list[Column]:
    """Return the columns in which a row has a value, and the fixed ones."""
    return [
        column
        for column in COLUMNS
        if (column.is_fixed and keeps_fixed) or any(getattr(row, column.field) is not None for row in rows)
    ]
