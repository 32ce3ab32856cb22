"""Files of a report: results.md, results.json, index.html, and, if matplotlib is installed, two pictures.

In: run directories (summary.json, config.yaml, metrics.jsonl, predictions.safetensors) and a bench file. Accuracies are
fractions of 1 in files and percent in tables. An unfinished run has a row and its curves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_accel.errors import UserError
from kd_accel.report.bench_file import entries, entry_of, read_bench, refuse_other_models
from kd_accel.report.content import Figures, Report
from kd_accel.report.gain import gains
from kd_accel.report.groups import Group, grouped, run_labels
from kd_accel.report.page import page
from kd_accel.report.rows import compared_with_teacher, finite
from kd_accel.report.run_files import RunResult, load_run
from kd_accel.report.tables import results_table

if TYPE_CHECKING:
    from kd_accel.report.plots import Point
    from kd_accel.training.prediction_file import StoredPredictions

_PREDICTIONS = "predictions.safetensors"
"""File of predictions. The module that reads it loads torch, which a report on runs without the file does not need."""


def write_report(
    directories: Sequence[Path], *, out: Path, bench_file: Path | None = None, say: Callable[[str], None] = print
) -> str:
    """Write the files of a report.

    Args:
        directories: Run directories, in the order of the rows; a repeated one has one row.
        out: Directory to write to.
        bench_file: File of `kd-accel bench` with the figures of all runs; None = no MACs and latencies.
        say: Function that prints a notice if no figures are drawn.

    Returns:
        The table in Markdown.

    Raises:
        UserError: If a directory is not one of a run, a file is damaged, the bench file lacks the current model of a
            finished run, or `out` cannot be written.
    """
    report = read_report(directories, bench_file)
    text = "\n\n".join(filter(None, (results_table(report.results), "\n".join(gains(report.groups)))))
    try:
        out.mkdir(parents=True, exist_ok=True)
        report = replace(report, figures=_draw(report, out, say))
        (out / "results.md").write_text(text + "\n", encoding="utf-8")
        content = {"rows": [result.row.figures() for result in report.results]}
        (out / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (out / "index.html").write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); use a writable directory") from None
    return text


def read_report(directories: Sequence[Path], bench_file: Path | None) -> Report:
    """Read the files of all runs, and compare them with the teacher. Raises UserError, see `write_report`."""
    by_path: dict[Path, Path] = {}
    for directory in directories:
        by_path.setdefault(directory.absolute(), directory)
    directories = list(by_path.values())
    bench = read_bench(bench_file) if bench_file else {}
    measured = entries(bench) if bench else {}
    results = [load_run(directory, entry_of(directory, measured)) for directory in directories]
    if bench_file:
        refuse_other_models(bench_file, bench, [result.directory for result in results if result.is_finished])
    predictions = [_predictions(result) for result in results]
    results = _with_comparisons(results, predictions)
    return Report(results, run_labels(results), grouped(results), predictions, bench, figures=None)


def _predictions(result: RunResult) -> StoredPredictions | None:
    if not result.is_finished or not (result.directory / _PREDICTIONS).is_file():
        return None
    from kd_accel.training.prediction_file import load_predictions

    return load_predictions(result.directory)


def _with_comparisons(results: Sequence[RunResult], predictions: Sequence[StoredPredictions | None]) -> list[RunResult]:
    rows = [
        result.row if stored is None else replace(result.row, top5_accuracy=_top5(result, stored))
        for result, stored in zip(results, predictions, strict=True)
    ]
    own_teachers = [finite(result.summary.get("teacher_accuracy")) for result in results]
    rows = compared_with_teacher(rows, own_teachers, [result.held_out for result in results])
    return [replace(result, row=row) for result, row in zip(results, rows, strict=True)]


def _top5(result: RunResult, stored: StoredPredictions) -> float | None:
    from kd_accel.report.classes import top5_accuracy

    return top5_accuracy(stored, num_classes=len(result.class_names))


def _draw(report: Report, out: Path, say: Callable[[str], None]) -> Figures | None:
    """Write the pictures, and return the figures of the page; None without matplotlib."""
    curves_file, scatter_file = out / "learning_curves.png", out / "accuracy_latency.png"
    # Pictures of an earlier report may show other runs, and must not remain if this one draws none.
    for picture in (curves_file, scatter_file):
        picture.unlink(missing_ok=True)
    try:
        import kd_accel.report.plots as plots
    except ModuleNotFoundError:
        say("no figures are drawn, because matplotlib is not installed; pip install matplotlib")
        return None
    curves = list(zip(report.labels, [result.curve for result in report.results], strict=True))
    plots.plot_learning_curves(curves, curves_file)
    points = _points(report, plots.Point)
    if points:
        plots.plot_accuracy_against_latency(points, scatter_file)
    return Figures(plots.accuracy_latency_svg(points) if points else None, plots.learning_curve_svgs(curves))


def _points(report: Report, make: Callable[..., Point]) -> list[Point]:
    return [
        make(name=_point_name(group), color=group.positions[0], **_point_figures(group))
        for group in report.groups
        if group.mean("accuracy") is not None and group.mean("latency_ms") is not None
    ]


def _point_name(group: Group) -> str:
    return group.name if len(group.positions) == 1 else f"{group.name} (n = {len(group.positions)})"


def _point_figures(group: Group) -> dict[str, Any]:
    return {
        "latency_ms": group.mean("latency_ms"),
        "accuracy": group.mean("accuracy"),
        "spread_ms": group.mean("latency_spread_ms"),
        "deviation": group.deviation("accuracy"),
    }
