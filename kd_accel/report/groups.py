"""Groups of runs that differ only in the seed, with mean and standard deviation of their figures, and labels for runs.

In: results of runs. Out: a group for each configuration, in the order of its first run.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

from kd_accel.report.rows import Row
from kd_accel.report.run_files import RunResult, mapping

_NOT_COMPARED = ("seed", "name", "run_dir", "checkpoint.resume", "checkpoint.stop_after_steps")
_TRACKING = "tracking."
_NETWORK = ("model.stem", "model.arch_args", "data.image_size")
_SEED_IN_NAME = re.compile(r"([\W_]+s|[\W_]*seed)?[\W_]*$")
"""End of the common part of the names of a group, such as `-seed` of `small-seed0` and `small-seed1`."""
_FIRST_DIGITS = re.compile(r"\d+$")
"""End of the common part if a digit follows in the names, such as the 1 of `small-seed10` and `small-seed11`."""


@dataclass(frozen=True)
class Group:
    """Finished runs with the same settings, data and teacher, but each with another seed, or a single run.

    Attributes:
        name: Common part of the names of the runs; the label of a single run.
        positions: Positions of the runs in the report.
        rows: Rows of the runs.
        task: What two groups have in common whose accuracies can be compared: network, classes, and test samples.
    """

    name: str
    positions: list[int]
    rows: list[Row]
    task: str = ""

    def values(self, field: str) -> list[float]:
        """Return the values of a field of `Row`; empty if a run has none."""
        values = [getattr(row, field) for row in self.rows]
        return [] if None in values else values

    def mean(self, field: str) -> float | None:
        """Return the mean of a field."""
        values = self.values(field)
        return statistics.fmean(values) if values else None

    def deviation(self, field: str) -> float | None:
        """Return the standard deviation (n - 1) of a field; None for a single run."""
        values = self.values(field)
        return statistics.stdev(values) if len(values) > 1 else None


def grouped(results: Sequence[RunResult]) -> list[Group]:
    """Return the groups of the finished runs. A run without config.yaml is a group of its own.

    A repeated run is not another seed: runs with equal settings and an equal seed are in different groups.
    """
    found: dict[tuple[str, int], list[int]] = {}
    repetitions: Counter[tuple[str, int | None]] = Counter()
    for position, result in enumerate(results):
        if result.is_finished:
            key = _key(result, position)
            number = repetitions[key, result.row.seed]
            repetitions[key, result.row.seed] += 1
            found.setdefault((key, number), []).append(position)
    labels = run_labels(results)
    groups = [_group(positions, results, labels) for positions in found.values()]
    counts = Counter(group.name for group in groups)
    return [group if counts[group.name] == 1 else replace(group, name=_with_directory(group, results)) for group in groups]


def run_labels(results: Sequence[RunResult]) -> list[str]:
    """Return the name of each run; runs with the same name are told apart by the seed, else by the directory."""
    names = [result.row.name for result in results]
    with_seeds = [name if result.row.seed is None else f"{name}, seed {result.row.seed}" for name, result in _pairs(results)]
    counts, seed_counts = Counter(names), Counter(with_seeds)
    return [
        name if counts[name] == 1 else with_seed if seed_counts[with_seed] == 1 else f"{name} ({result.directory})"
        for name, with_seed, result in zip(names, with_seeds, results, strict=True)
    ]


def compared_settings(result: RunResult) -> dict[str, Any]:
    """Return the settings of a run that make a difference between groups, by dotted name."""
    return {
        name: value
        for name, value in result.settings.items()
        if name not in _NOT_COMPARED and name != "tracking" and not name.startswith(_TRACKING)
    }


def _pairs(results: Sequence[RunResult]) -> list[tuple[str, RunResult]]:
    return [(result.row.name, result) for result in results]


def _key(result: RunResult, position: int) -> str:
    if not result.settings:
        return str(position)
    # The same settings may stand for other files: a path of data that were extended, or of a teacher that was trained again.
    files = [result.summary.get(name) for name in ("data", "teacher_fingerprint")]
    return repr((result.row.role, sorted(compared_settings(result).items(), key=lambda item: item[0]), files))


def _group(positions: list[int], results: Sequence[RunResult], labels: Sequence[str]) -> Group:
    rows = [results[position].row for position in positions]
    name = labels[positions[0]] if len(positions) == 1 else _common_name([row.name for row in rows])
    return Group(name, positions, rows, _task(results[positions[0]]))


def _common_name(names: Sequence[str]) -> str:
    """Return the common part of the names of runs, without what belongs to their seeds."""
    if len(set(names)) == 1:
        return names[0]
    common = commonprefix(names)
    if any(name[len(common) :][:1].isdigit() for name in names):
        common = _FIRST_DIGITS.sub("", common)
    return _SEED_IN_NAME.sub("", common) or names[0]


def _with_directory(group: Group, results: Sequence[RunResult]) -> str:
    """Return the name of a group that shares it with another one."""
    shown = f"({results[group.positions[0]].directory})"
    return group.name if group.name.endswith(shown) else f"{group.name} {shown}"


def _task(result: RunResult) -> str:
    network = {name: value for name, value in result.settings.items() if name.startswith(_NETWORK)}
    test = mapping(result.summary.get("data")).get("test")
    return repr((result.row.arch, sorted(network.items(), key=lambda item: item[0]), result.class_names, test))
