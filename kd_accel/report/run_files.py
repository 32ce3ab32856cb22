"""Files of a run for a report: summary.json, config.yaml and metrics.jsonl, checked, of a finished or an unfinished run.

In: a run directory and its entry in a bench file. Out: `RunResult`, plain values. Nothing here loads torch or numpy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kd_accel.config.fields import flatten
from kd_accel.errors import UserError, describe_error
from kd_accel.io.files import read_json
from kd_accel.io.safe_yaml import load_yaml_file
from kd_accel.report.bench_file import bench_figures
from kd_accel.report.rows import ROLES, Role, Row, finite

_MAX_CURVE_BYTES = 512 * 2**20
_NUMBERS = ("loss", "ce", "accuracy", "lr", "temperature", "alpha")
"""Metrics that a report shows."""
_LARGEST = 3.5e38
_ERRORS = (KeyError, TypeError, ValueError, OverflowError)


@dataclass(frozen=True)
class RunResult:
    """Results of a run.

    Attributes:
        row: Row of the table.
        summary: Content of summary.json; empty for an unfinished run.
        curve: Lines of metrics.jsonl.
        directory: Run directory.
        settings: Content of config.yaml by dotted names; empty if the file is missing or damaged.
    """

    row: Row
    summary: dict[str, Any]
    curve: list[dict[str, Any]]
    directory: Path = Path()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """True if the training has ended."""
        return self.row.step is None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits; empty for an unfinished run."""
        names = mapping(self.summary.get("data")).get("label_names")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def held_out(self) -> str:
        """Classes and number of test samples as text: a teacher in which they are equal is that of a run."""
        return repr((self.class_names, mapping(mapping(self.summary.get("data")).get("test")).get("samples")))


def load_run(directory: Path, bench: Mapping[str, Any] | None) -> RunResult:
    """Load a run, also an unfinished one, which has config.yaml and metrics.jsonl but no summary.json.

    Raises:
        UserError: If the directory has neither, or a file or the entry is damaged.
    """
    is_started = all((directory / name).is_file() for name in ("config.yaml", "metrics.jsonl"))
    if is_started and not (directory / "summary.json").exists():
        return _load_unfinished(directory)
    return load_result(directory, bench)


def load_result(directory: Path, bench: Mapping[str, Any] | None) -> RunResult:
    """Load a finished run.

    Args:
        directory: Run directory.
        bench: Entry of the run in a bench file; None = no MACs and latencies.

    Raises:
        UserError: If the run is not finished, or its files or the entry are damaged.
    """
    path = directory / "summary.json"
    summary = read_json(path, remedy="not a finished run; train it first")
    figures = bench_figures(bench, directory) if bench else {}
    settings = _read_settings(directory / "config.yaml")
    try:
        row = Row(
            name=str(summary["name"]),
            role=ROLES[summary["role"]],
            arch=str(summary["arch"]),
            accuracy=finite(summary["accuracy"]),
            parameters=int(summary["parameters"]),
            accuracy_best_epoch=finite(summary.get("accuracy_best")),
            best_epoch=_count(summary.get("best_epoch")),
            agreement=finite(summary.get("agreement")),
            seed=_seed(settings),
            run=str(directory),
            **figures,
        )
        finite(summary.get("teacher_accuracy"))
    except _ERRORS as error:
        raise UserError(f"{path}: is damaged ({_reason(error)}); train the run again") from None
    return RunResult(row, summary, _read_curve(directory / "metrics.jsonl"), directory, settings)


def mapping(value: Any) -> dict[str, Any]:
    """Return a value of a JSON file that must be an object; an empty one for any other value."""
    return value if isinstance(value, dict) else {}


def _load_unfinished(directory: Path) -> RunResult:
    settings = _read_settings(directory / "config.yaml")
    if not settings:
        raise UserError(f"{directory / 'config.yaml'}: is damaged, and the run is not finished; train it first")
    curve = _read_curve(directory / "metrics.jsonl", is_growing=True)
    row = Row(
        name=str(settings.get("name")),
        role=_role(settings),
        arch=str(settings.get("model.arch")),
        seed=_seed(settings),
        step=max((int(line["step"]) for line in curve), default=0),
        steps=_all_steps(settings, curve),
        run=str(directory),
    )
    return RunResult(row, {}, curve, directory, settings)


def _role(settings: Mapping[str, Any]) -> Role:
    """Return the role of a run by its settings; `teacher` is null, or absent after flattening, in a run without one."""
    has_teacher = any(
        name.startswith(("teacher.", "teachers.")) and value is not None and value != {} for name, value in settings.items()
    )
    return "distilled" if has_teacher else ROLES.get(str(settings.get("role")), "student")


def _all_steps(settings: Mapping[str, Any], curve: list[dict[str, Any]]) -> int | None:
    """Return the steps of the complete training; without `train.max_steps`, from the first evaluation on."""
    limit, epochs = settings.get("train.max_steps"), settings.get("train.epochs")
    last = next((line for line in reversed(curve) if line["split"] == "val" and line["epoch"] > 0), None)
    steps = None if last is None or not isinstance(epochs, int) else round(last["step"] / last["epoch"] * epochs)
    if isinstance(limit, int):
        return limit if steps is None else min(limit, steps)
    return steps


def _seed(settings: Mapping[str, Any]) -> int | None:
    seed = settings.get("seed")
    return seed if isinstance(seed, int) else None


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of a run by dotted names; a report can do without them, so that a damaged file has none."""
    try:
        content = load_yaml_file(path)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {str(name): value for name, value in flatten(content).items()} if isinstance(content, dict) else {}


def _reason(error: Exception) -> str:
    return f"{error} is missing or unknown" if isinstance(error, KeyError) else describe_error(error)


def _read_curve(path: Path, *, is_growing: bool = False) -> list[dict[str, Any]]:
    """Return the lines of a file of metrics. is_growing: Whether its last line may be incomplete."""
    content = _read_bounded(path)
    if is_growing:
        content = content[: content.rfind(b"\n") + 1]
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
    """Return whether a line has a split, and a number that float32 can hold for each value that a report shows."""
    numbers = [line.get("step"), line.get("epoch"), *(line[key] for key in _NUMBERS if key in line)]
    return isinstance(line.get("split"), str) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST for value in numbers
    )
