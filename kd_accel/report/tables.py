"""Table of results, with the columns of the reference job, from the files of finished runs and of a bench.

In: run directories (summary.json, metrics.jsonl) and a bench file. Out: results.md, results.json and, if matplotlib is
installed, two figures. Accuracies are fractions of 1 in files and percent in tables; a row's latency is the median at batch
size 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kd_accel.bench.provenance import model_digest
from kd_accel.errors import UserError
from kd_accel.io.files import read_json

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_REFERENCE = {
    "teacher": "85.11 / 23.5 / 8.72",
    "student": "75.06 / 11.18 / 4.70",
    "fixed": "76.8 / 11.18 / 4.10",
    "scheduled": "78.6 / 11.18 / 3.90",
}

_ROLES: dict[str, Literal["teacher", "student", "distilled"]] = {
    "teacher": "teacher",
    "student": "student",
    "distilled": "distilled",
}
_GRAPH = "graph_latency_ms"
_MAX_CURVE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Row:
    """Row of the table: one model and its figures.

    Attributes:
        name: Name of the run.
        role: teacher, student or distilled.
        arch: Architecture.
        accuracy: On the test split, fraction of 1.
        parameters: Number of parameters.
        macs: Multiply-adds per image; None without a bench.
        latency_ms: Median at batch size 1; None where not measured.
        graph_latency_ms: Median of the same forward replayed as a CUDA graph; None where not measured.
    """

    name: str
    role: Literal["teacher", "student", "distilled"]
    arch: str
    accuracy: float
    parameters: int
    macs: int | None
    latency_ms: float | None
    graph_latency_ms: float | None = None

    def figures(self) -> dict[str, Any]:
        """Return the row for results.json, without `graph_latency_ms` if that is None."""
        return {name: value for name, value in asdict(self).items() if name != _GRAPH or value is not None}


@dataclass(frozen=True)
class RunResult:
    """Results of a finished run.

    Attributes:
        row: Its row of the table.
        summary: Content of summary.json.
        curve: Lines of metrics.jsonl.
    """

    row: Row
    summary: dict[str, Any]
    curve: list[dict[str, Any]]


def write_report(
    directories: Sequence[Path], *, out: Path, bench_file: Path | None = None, say: Callable[[str], None] = print
) -> str:
    """Write results.md, results.json and the figures.

    Args:
        directories: Run directories, in the order of the rows.
        out: Directory to write to.
        bench_file: File of `kd-accel bench` with the figures of all runs; None = no MACs and latencies.
        say: Prints a notice if the figures are skipped.

    Returns:
        The table in Markdown.

    Raises:
        UserError: A run is not finished or cannot be read, the bench lacks it, or `out` cannot be written.
    """
    bench = _read_bench(bench_file) if bench_file else {}
    results = [load_result(directory, bench.get(str(directory))) for directory in directories]
    missing = [str(directory) for directory in directories if bench_file and not _has_figures(bench, directory)]
    if missing:
        names = " ".join(map(str, directories))
        raise UserError(
            f"--bench {bench_file}: has no figures of {', '.join(missing)} in its present state; measure all runs, by the "
            f"paths given to report: kd-accel bench {names} --out {bench_file}"
        )
    text = results_table(results)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.md").write_text(text + "\n", encoding="utf-8")
        content = {"rows": [result.row.figures() for result in results]}
        (out / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _plot(results, out, say)
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); use a directory with write permission") from None
    return text


def _plot(results: Sequence[RunResult], out: Path, say: Callable[[str], None]) -> None:
    curves, scatter = out / "learning_curves.png", out / "accuracy_latency.png"
    for old in (curves, scatter):
        old.unlink(missing_ok=True)  # figures of an earlier report would show other runs
    try:
        from kd_accel.report.plots import plot_accuracy_against_latency, plot_learning_curves
    except ModuleNotFoundError:
        say("figures are skipped: matplotlib is not installed")
        return
    plot_learning_curves([(result.row.name, result.curve) for result in results], curves)
    points = [
        (result.row.name, result.row.latency_ms, result.row.accuracy) for result in results if result.row.latency_ms is not None
    ]
    if points:
        plot_accuracy_against_latency(points, scatter)


def load_result(directory: Path, bench: dict[str, Any] | None) -> RunResult:
    """Load a finished run.

    Args:
        directory: Run directory.
        bench: The run's entry in a bench file; None = without MACs and latency.

    Raises:
        UserError: The run is not finished, or its files are damaged.
    """
    summary = read_json(directory / "summary.json", remedy="not a finished run; train it first")
    try:
        latency_ms, graph_ms = _latencies(bench) if bench else (None, None)
        row = Row(
            name=str(summary["name"]),
            role=_ROLES[summary["role"]],
            arch=str(summary["arch"]),
            accuracy=float(summary["accuracy"]),
            parameters=int(summary["parameters"]),
            macs=int(bench["macs"]) if bench else None,
            latency_ms=latency_ms,
            graph_latency_ms=graph_ms,
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{directory}/summary.json or its bench figures are damaged; train or bench the run again") from None
    return RunResult(row, summary, _read_curve(directory / "metrics.jsonl"))


def results_table(results: Sequence[RunResult]) -> str:
    """Format results as Markdown: with a column for CUDA graphs if any was measured, and one with the reference on CIFAR-10."""
    has_reference = any(_is_cifar10(result) for result in results)
    has_graphs = any(result.row.graph_latency_ms is not None for result in results)
    header = ["Model", "Architecture", "Accuracy (%)", "Parameters (M)", "MACs (M)", "Latency (ms)"]
    if has_graphs:
        header.append("CUDA graph (ms)")
    if has_reference:
        header.append("Reference: accuracy / parameters / latency")
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for result in results:
        cells = _cells(result.row) + ([_shown_ms(result.row.graph_latency_ms)] if has_graphs else [])
        lines.append([*cells, _reference(result)] if has_reference else cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> list[str]:
    macs = "" if row.macs is None else f"{row.macs / 1e6:.1f}"
    sizes = [f"{100 * row.accuracy:.2f}", f"{row.parameters / 1e6:.2f}", macs]
    return [f"{row.name} ({row.role})", row.arch, *sizes, _shown_ms(row.latency_ms)]


def _shown_ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _reference(result: RunResult) -> str:
    if not _is_cifar10(result):
        return ""
    role = result.row.role
    expected = "torchvision/resnet50" if role == "teacher" else "torchvision/resnet18"
    if result.row.arch != expected:
        return ""
    if role != "distilled":
        return _REFERENCE[role]
    return _REFERENCE["scheduled" if result.summary.get("is_scheduled") else "fixed"]


def _is_cifar10(result: RunResult) -> bool:
    return result.summary.get("data", {}).get("label_names") == CIFAR10_CLASSES


def _latencies(bench: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return the medians at batch size 1, eager and as a CUDA graph; the latter is absent from files of earlier versions."""
    entry = next((entry for entry in bench["latency"] if entry["batch_size"] == 1), None)
    if entry is None:
        return None, None
    graph_ms = entry.get("graph_median_ms")
    return float(entry["median_ms"]), None if graph_ms is None else float(graph_ms)


def _read_bench(path: Path) -> dict[str, dict[str, Any]]:
    content = read_json(path, remedy="bench the runs first: kd-accel bench RUN ... --out FILE")
    try:
        return {entry["name"]: entry for entry in content["models"]}
    except (KeyError, TypeError):
        raise UserError(
            f"--bench {path}: is not a file of kd-accel bench; measure again: kd-accel bench RUN ... --out FILE"
        ) from None


def _has_figures(bench: dict[str, dict[str, Any]], directory: Path) -> bool:
    """Return whether the bench has figures of the run's present model."""
    entry = bench.get(str(directory))
    return entry is not None and entry.get("digest") in (None, model_digest(directory))


def _read_curve(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > _MAX_CURVE_BYTES:
            raise UserError(f"{path}: is longer than {_MAX_CURVE_BYTES // 2**20} MiB, the limit; train the run again")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); train the run again") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: cannot be read (a line is not valid JSON); train the run again") from None
    if not all(isinstance(line, dict) and _is_event(line) for line in lines):
        raise UserError(f"{path}: cannot be read (a line without step, epoch and split); train the run again")
    return lines


def _is_event(line: dict[str, Any]) -> bool:
    """Return whether a line has a split and, for what the figures show, finite numbers."""
    numbers = [line.get("step"), line.get("epoch"), *(line[key] for key in ("loss", "accuracy") if key in line)]
    return isinstance(line.get("split"), str) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15 for value in numbers
    )
