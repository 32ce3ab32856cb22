"""Table of results, from the files of finished runs and of a benchmark.

In: run directories (summary.json, metrics.jsonl) and a bench file. Out: results.md, results.json and, if matplotlib is
installed, two figures. Accuracies are fractions of 1 in files and percent in tables. Latencies are medians at batch size 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kd_accel.bench.provenance import model_digest
from kd_accel.errors import UserError, describe_error
from kd_accel.io.files import read_json

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# Figures of the reference job on CIFAR-10: accuracy (%) / parameters (M) / latency (ms).
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
_MAX_CURVE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Row:
    """Row of the table: one model and its figures.

    Attributes:
        name: Name of the run.
        role: Role of the model: teacher, student or distilled.
        arch: Architecture.
        accuracy: Accuracy on the test split, a fraction of 1; None without labels.
        parameters: Number of parameters.
        macs: Multiply-adds per image; None if not measured.
        latency_ms: Median latency at batch size 1 in milliseconds; None if not measured.
        graph_latency_ms: Median latency of the same forward as a CUDA graph, in milliseconds; None if not measured.
    """

    name: str
    role: Literal["teacher", "student", "distilled"]
    arch: str
    accuracy: float | None
    parameters: int
    macs: int | None
    latency_ms: float | None
    graph_latency_ms: float | None = None

    def figures(self) -> dict[str, Any]:
        """Return the values for results.json, without `graph_latency_ms` if it is None."""
        return {name: value for name, value in asdict(self).items() if name != "graph_latency_ms" or value is not None}


@dataclass(frozen=True)
class RunResult:
    """Results of a finished run.

    Attributes:
        row: Row of the table.
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
        say: Function that prints a notice if no figures are drawn.

    Returns:
        The table in Markdown.

    Raises:
        UserError: If a run is not finished or damaged, the bench file lacks its current model, or `out` cannot be written.
    """
    bench = _read_bench(bench_file) if bench_file else {}
    results = [load_result(directory, bench.get(str(directory))) for directory in directories]
    missing = [str(directory) for directory in directories if bench_file and not _has_figures(bench, directory)]
    if missing:
        names = " ".join(map(str, directories))
        raise UserError(
            f"--bench {bench_file}: lacks the current model of {', '.join(missing)}; measure all runs again, by the same "
            f"paths: kd-accel bench {names} --out {bench_file}"
        )
    text = results_table(results)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.md").write_text(text + "\n", encoding="utf-8")
        content = {"rows": [result.row.figures() for result in results]}
        (out / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _plot(results, out, say)
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); use a writable directory") from None
    return text


def _plot(results: Sequence[RunResult], out: Path, say: Callable[[str], None]) -> None:
    curves, scatter = out / "learning_curves.png", out / "accuracy_latency.png"
    # Figures of an earlier report may show other runs, and must not remain if this one draws none.
    for figure in (curves, scatter):
        figure.unlink(missing_ok=True)
    try:
        from kd_accel.report.plots import plot_accuracy_against_latency, plot_learning_curves
    except ModuleNotFoundError:
        say("no figures are drawn, because matplotlib is not installed; pip install matplotlib")
        return
    plot_learning_curves([(result.row.name, result.curve) for result in results], curves)
    points = [
        (result.row.name, result.row.latency_ms, result.row.accuracy)
        for result in results
        if result.row.latency_ms is not None and result.row.accuracy is not None
    ]
    if points:
        plot_accuracy_against_latency(points, scatter)


def load_result(directory: Path, bench: dict[str, Any] | None) -> RunResult:
    """Load a finished run.

    Args:
        directory: Run directory.
        bench: Entry of the run in a bench file; None = no MACs and latencies.

    Raises:
        UserError: If the run is not finished, or its files or the entry are damaged.
    """
    path = directory / "summary.json"
    summary = read_json(path, remedy="not a finished run; train it first")
    figures = _bench_figures(bench, directory) if bench else {"macs": None, "latency_ms": None}
    try:
        row = Row(
            name=str(summary["name"]),
            role=_ROLES[summary["role"]],
            arch=str(summary["arch"]),
            accuracy=None if summary["accuracy"] is None else float(summary["accuracy"]),
            parameters=int(summary["parameters"]),
            **figures,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: is damaged ({_reason(error)}); train the run again") from None
    return RunResult(row, summary, _read_curve(directory / "metrics.jsonl"))


def results_table(results: Sequence[RunResult]) -> str:
    """Format results as a Markdown table, with columns for CUDA graphs and for the reference job if a result has them."""
    has_reference = any(_is_cifar10(result) for result in results)
    has_graphs = any(result.row.graph_latency_ms is not None for result in results)
    header = ["Model", "Architecture", "Accuracy (%)", "Parameters (M)", "MACs (M)", "Latency (ms)"]
    if has_graphs:
        header.append("CUDA graph (ms)")
    if has_reference:
        header.append("Reference: accuracy / parameters / latency")
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for result in results:
        cells = _cells(result.row) + ([_milliseconds(result.row.graph_latency_ms)] if has_graphs else [])
        lines.append([*cells, _reference(result)] if has_reference else cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> list[str]:
    macs = "" if row.macs is None else f"{row.macs / 1e6:.1f}"
    accuracy = "" if row.accuracy is None else f"{100 * row.accuracy:.2f}"
    sizes = [accuracy, f"{row.parameters / 1e6:.2f}", macs]
    return [f"{row.name} ({row.role})", row.arch, *sizes, _milliseconds(row.latency_ms)]


def _milliseconds(value: float | None) -> str:
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


def _bench_figures(bench: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return the benchmark's fields of a `Row`: MACs, and median latencies at batch size 1 if that was measured."""
    try:
        macs, entry = int(bench["macs"]), next((entry for entry in bench["latency"] if entry["batch_size"] == 1), None)
        if entry is None:
            return {"macs": macs, "latency_ms": None}
        # Files of earlier versions have no figures of CUDA graphs.
        graph_ms = entry.get("graph_median_ms")
        return {
            "macs": macs,
            "latency_ms": float(entry["median_ms"]),
            "graph_latency_ms": None if graph_ms is None else float(graph_ms),
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"--bench: the entry of {directory} is damaged ({_reason(error)}); measure it again") from None


def _read_bench(path: Path) -> dict[str, dict[str, Any]]:
    content = read_json(path, remedy="measure the runs first: kd-accel bench RUN ... --out FILE")
    try:
        return {entry["name"]: entry for entry in content["models"]}
    except (KeyError, TypeError):
        raise UserError(
            f"--bench {path}: is not a file of kd-accel bench; write one with: kd-accel bench RUN ... --out FILE"
        ) from None


def _has_figures(bench: dict[str, dict[str, Any]], directory: Path) -> bool:
    """Return whether the bench file has figures of the run's current model; an entry without a digest counts as current."""
    entry = bench.get(str(directory))
    return entry is not None and entry.get("digest") in (None, model_digest(directory))


def _reason(error: Exception) -> str:
    return f"{error} is missing or unknown" if isinstance(error, KeyError) else describe_error(error)


def _read_curve(path: Path) -> list[dict[str, Any]]:
    content = _read_bounded(path)
    try:
        lines = [json.loads(line) for line in content.decode("utf-8").splitlines()]
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is damaged (a line is not valid JSON); train the run again") from None
    if not all(isinstance(line, dict) and _is_event(line) for line in lines):
        raise UserError(f"{path}: is damaged (a line without step, epoch and split); train the run again")
    return lines


def _read_bounded(path: Path) -> bytes:
    try:
        if path.stat().st_size <= _MAX_CURVE_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); train the run again") from None
    raise UserError(
        f"{path}: exceeds the limit of {_MAX_CURVE_BYTES // 2**20} MiB; train the run again with a larger train.log_every_steps"
    )


def _is_event(line: dict[str, Any]) -> bool:
    """Return whether a line has a split, and a finite number for each value that the figures show."""
    numbers = [line.get("step"), line.get("epoch"), *(line[key] for key in ("loss", "accuracy") if key in line)]
    return isinstance(line.get("split"), str) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15 for value in numbers
    )
