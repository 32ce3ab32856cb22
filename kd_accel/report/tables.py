"""Table of results in Markdown, with figures of the reference job for CIFAR-10.

In: results of runs and their groups. Out: text. Accuracies are fractions of 1 in rows and percent in tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from kd_accel.report.columns import Column, shown_columns
from kd_accel.report.groups import Group, grouped, run_labels
from kd_accel.report.run_files import RunResult as RunResult
from kd_accel.report.run_files import load_result as load_result
from kd_accel.report.run_files import mapping

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
REFERENCE_TITLE = "Reference: accuracy / parameters / latency"

# Figures of the reference job on CIFAR-10: accuracy (%) / parameters (M) / latency (ms).
_REFERENCE = {
    "teacher": "85.11 / 23.5 / 8.72",
    "student": "75.06 / 11.18 / 4.70",
    "fixed": "76.8 / 11.18 / 4.10",
    "scheduled": "78.6 / 11.18 / 3.90",
}


def results_table(results: Sequence[RunResult]) -> str:
    """Format results as a Markdown table: a line for each run, and one for each group of several seeds after its last run.

    The column for the reference job is shown if a result is one on CIFAR-10.
    """
    columns = shown_columns([result.row for result in results])
    references = [reference(result) for result in results] if has_reference(results) else None
    header = ["Model", "Architecture", *(column.title for column in columns), *([REFERENCE_TITLE] if references else [])]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    means = groups_by_last_run(grouped(results))
    for position, (result, label) in enumerate(zip(results, run_labels(results), strict=True)):
        extra = [references[position]] if references else []
        lines.append(
            [_name(result, label), _escaped(result.row.arch), *(column.cell(result.row) for column in columns), *extra]
        )
        if position in means:
            lines.append([*_group_cells(means[position], columns), *([""] if references else [])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def groups_by_last_run(groups: Sequence[Group]) -> dict[int, Group]:
    """Return the groups of several runs by the position of their last run."""
    return {group.positions[-1]: group for group in groups if len(group.positions) > 1}


def has_reference(results: Sequence[RunResult]) -> bool:
    """Return whether a result is on CIFAR-10."""
    return any(result.class_names == CIFAR10_CLASSES for result in results)


def reference(result: RunResult) -> str:
    """Return the figures of the reference job for a result; empty if it has no such model."""
    role = result.row.role
    expected = "torchvision/resnet50" if role == "teacher" else "torchvision/resnet18"
    if result.class_names != CIFAR10_CLASSES or result.row.arch != expected:
        return ""
    if role != "distilled":
        return _REFERENCE[role]
    return _REFERENCE["scheduled" if mapping(result.summary).get("is_scheduled") else "fixed"]


def _name(result: RunResult, label: str) -> str:
    state = ", ".join(filter(None, (result.row.role, result.row.status)))
    return f"{_escaped(label)} ({state})"


def _group_cells(group: Group, columns: Sequence[Column]) -> list[str]:
    name = f"**{_escaped(group.name)}**, mean ± standard deviation (n = {len(group.rows)})"
    return [name, _escaped(group.rows[0].arch), *(column.group_cell(group) for column in columns)]


def _escaped(text: str) -> str:
    """Return a name without line breaks and with escaped bars, which would end a cell."""
    return " ".join(text.split()).replace("|", "\\|")
