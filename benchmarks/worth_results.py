"""Table of benchmarks.worth, from the lines of the finished runs.

A gain is the difference of two means. Its standard error is computed from the standard deviations of its own two groups of
seeds, because runs of other lengths, or with fewer labels, may spread more. A gain counts as none if it is at most two standard
errors.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.methods_results import NOT_RUN
from benchmarks.worth_plan import Design, Group, Run
from kd_accel.report.gain import ERRORS, standard_error

_HEADER = ("steps", "labels", "plain", "distilled", "gain", "seeds, plain", "seeds, distilled")
_ALIGNMENT = ("---:",) * 5 + ("---",) * 2


def accuracies_of(design: Design, results: Mapping[str, Mapping[str, Any]]) -> dict[Group, list[float]]:
    """Return the accuracies on the test samples in percent, one for each finished seed, of each group of runs.

    Args:
        design: Sizes of the experiment.
        results: Lines of the finished runs, by name.
    """
    runs = {group: [Run(group, seed).name for seed in design.seeds] for row in design.rows for group in row}
    return {group: [100 * results[name]["accuracy"] for name in names if name in results] for group, names in runs.items()}


def described_gain(plain: Sequence[float], distilled: Sequence[float]) -> str:
    """Describe what distillation gains, in points with the standard error; as none if it is within two standard errors.

    Args:
        plain: Accuracies of the plain runs in percent.
        distilled: Accuracies of the distilled runs in percent.
    """
    if not plain or not distilled:
        return NOT_RUN
    gain = statistics.fmean(distilled) - statistics.fmean(plain)
    if min(len(plain), len(distilled)) < 2:
        return f"{gain:+.2f}, spread unknown"
    error = standard_error(plain, distilled)
    shown = f"{gain:+.2f} ± {error:.2f}"
    return f"no difference ({shown})" if abs(gain) <= ERRORS * error else shown


def worth_table(design: Design, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the accuracies on the test samples as a Markdown table.

    Args:
        design: Sizes of the experiment.
        results: Lines of the finished runs, by name.
    """
    accuracies = accuracies_of(design, results)
    body = [
        [f"{group.steps:,}", f"{100 * group.labels / design.images:g} %", *_cells(accuracies[group], accuracies[distilled])]
        for group, distilled in design.rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (_HEADER, _ALIGNMENT, *body))


def _cells(plain: Sequence[float], distilled: Sequence[float]) -> list[str]:
    listed = (", ".join(f"{each:.2f}" for each in group) for group in (plain, distilled))
    return [_described(plain), _described(distilled), described_gain(plain, distilled), *listed]


def _described(group: Sequence[float]) -> str:
    if not group:
        return NOT_RUN
    deviation = f" ± {statistics.stdev(group):.2f}" if len(group) > 1 else ""
    return f"{statistics.fmean(group):.2f}{deviation}"
