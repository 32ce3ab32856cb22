"""Groups of runs that differ only in the seed, with mean and standard deviation of their figures, and labels for runs.

In: results of runs. Out: a group for each configuration, in the order of its first run.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from kd_accel.report.rows import Row
from kd_accel.report.run_files import RunResult, mapping

_NOT_COMPARED = ("seed", "name", "run_dir", "checkpoint.resume", "checkpoint.stop_after_steps")
_TRACKING = "tracking."
_NETWORK = ("model.stem", "model.arch_args", "data.image_size")
_SEED_IN_NAME = re.compile(r"[\W_]*(seed|s)?[\W_]*$")
"""End of the common part of the names of a group, such as `-seed` of `small-seed0` and `small-seed1`."""


@dataclass(frozen=True)
class Group:
    """Finished runs with the same settings except the seed, or a single run.

    Attributes:
        name: Common part of the names of the runs.
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
    """Return the groups of the finished runs. A run without config.yaml is a group of its own."""
    found: dict[str, list[int]] = {}
    for position, result in enumerate(results):
        if result.is_finished:
            found.setdefault(_key(result, position), []).append(position)
    return [_group(positions, results) for positions in found.values()]


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
    return repr((result.row.role, sorted(compared_settings(result).items(), key=lambda item: item[0])))


def _group(positions: list[int], results: Sequence[RunResult]) -> Group:
    rows = [results[position].row for position in positions]
    names = [row.name for row in rows]
    common = names[0] if len(set(names)) == 1 else _SEED_IN_NAME.sub("", commonprefix(names))
    return Group(common or names[0], positions, rows, _task(results[positions[0]]))


def _task(result: RunResult) -> str:
    network = {name: value for name, value in result.settings.items() if name.startswith(_NETWORK)}
    test = mapping(result.summary.get("data")).get("test")
    return repr((result.row.arch, sorted(network.items(), key=lambda item: item[0]), result.class_names, test))
