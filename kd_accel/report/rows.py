"""Rows of the table of results: one run and its figures, and the figures that need a second run, the teacher.

In: results of runs. Out: rows as plain values. Accuracies are fractions of 1. Latencies are medians at batch size 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Role = Literal["teacher", "student", "distilled"]
ROLES: dict[str, Role] = {"teacher": "teacher", "student": "student", "distilled": "distilled"}

_ALWAYS = ("name", "role", "arch", "accuracy", "parameters", "macs", "latency_ms")
"""Keys of results.json that each row has; the others are absent if they have no value."""


@dataclass(frozen=True)
class Row:
    """Row of the table: one run and its figures, None = not measured or not defined.

    Attributes:
        name: Name of the run.
        role: Role of the model: teacher, student or distilled.
        arch: Architecture.
        accuracy: Accuracy on the test split, a fraction of 1.
        parameters: Number of parameters.
        macs: Multiply-adds per image.
        latency_ms: Median latency at batch size 1 in milliseconds.
        graph_latency_ms: Median latency of the same forward as a CUDA graph, in milliseconds.
        latency_spread_ms: Interquartile range of the latency, in milliseconds.
        images_per_second: Throughput at `throughput_batch_size`.
        throughput_batch_size: Largest batch size that was measured.
        accuracy_best_epoch: Accuracy of the weights of the best epoch on the test split.
        best_epoch: The best epoch, by the validation split.
        top5_accuracy: Fraction of the test samples whose label is among the five best classes; None up to five classes.
        agreement: Fraction of the test samples for which the model and its teacher predict the same class.
        gap_to_teacher: Accuracy of the teacher minus that of the model.
        compression: Parameters of the teacher divided by those of the model.
        seed: Seed of the training.
        step: Step that an unfinished run has reached; None for a finished run.
        steps: Steps of the complete training, if an unfinished run has shown them.
        run: Run directory, as the user has named it.
    """

    name: str
    role: Role
    arch: str
    accuracy: float | None = None
    parameters: int | None = None
    macs: int | None = None
    latency_ms: float | None = None
    graph_latency_ms: float | None = None
    latency_spread_ms: float | None = None
    images_per_second: float | None = None
    throughput_batch_size: int | None = None
    accuracy_best_epoch: float | None = None
    best_epoch: int | None = None
    top5_accuracy: float | None = None
    agreement: float | None = None
    gap_to_teacher: float | None = None
    compression: float | None = None
    seed: int | None = None
    step: int | None = None
    steps: int | None = None
    run: str | None = None

    @property
    def status(self) -> str:
        """State of an unfinished run as text; empty for a finished run."""
        if self.step is None:
            return ""
        return f"unfinished, step {self.step}" + ("" if self.steps is None else f" of {self.steps}")

    def figures(self) -> dict[str, Any]:
        """Return the values for results.json."""
        return {name: value for name, value in asdict(self).items() if name in _ALWAYS or value is not None}


def finite(value: Any) -> float | None:
    """Return a finite number, or None for null. Raises ValueError or TypeError for anything else."""
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not finite")
    return number


def compared_with_teacher(rows: Sequence[Row], own_teachers: Sequence[float | None], held_out: Sequence[str]) -> list[Row]:
    """Add the gap to the teacher and the compression.

    Args:
        rows: Rows; the first one with the role teacher is the teacher of all with the same test samples.
        own_teachers: Accuracy of the teacher that each run has stored; without it the gap is that to the first teacher.
        held_out: Classes and number of test samples of each run, as text.
    """
    teachers: dict[str, Row] = {}
    for row, samples in zip(rows, held_out, strict=True):
        if row.role == "teacher":
            teachers.setdefault(samples, row)
    compared = zip(rows, own_teachers, held_out, strict=True)
    return [_compared(row, teachers.get(samples), own) for row, own, samples in compared]


def _compared(row: Row, teacher: Row | None, own_teacher: float | None) -> Row:
    if row.role == "teacher":
        return row
    # In a chain, the teacher of a run is not the first one of the report.
    expected = own_teacher if own_teacher is not None or teacher is None else teacher.accuracy
    gap = None if expected is None or row.accuracy is None else expected - row.accuracy
    sizes = (teacher.parameters if teacher else None, row.parameters)
    compression = sizes[0] / sizes[1] if sizes[0] and sizes[1] else None
    return replace(row, gap_to_teacher=gap, compression=compression)
