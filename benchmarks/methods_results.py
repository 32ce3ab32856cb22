"""Results of benchmarks.methods: finished runs, the weight chosen on validation, differences, and the table.

A difference of two means counts as none if it is at most two standard errors. The standard error is computed from the pooled
standard deviation of all methods with several seeds, because that of three accuracies is uncertain.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.methods_table import Method

NOT_RUN = "not run"
_ERRORS = 2.0
"""Standard errors up to which a difference counts as none."""


@dataclass(frozen=True)
class Row:
    """Results of one method.

    Args:
        method: The method.
        factor: Factor of its weight, chosen by the accuracy on the validation samples with the first seed.
        tried: Number of factors of which a run has finished.
        accuracies: Accuracy on the test samples in percent, one for each finished seed.
    """

    method: Method
    factor: float
    tried: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean accuracy in percent."""
        return statistics.fmean(self.accuracies)


def run_name(method: Method, factor: float, seed: int) -> str:
    """Return the name of a run, which is also that of its directory."""
    return f"{method.name}-x{factor:g}-seed{seed}" if method.is_tuned else f"{method.name}-seed{seed}"


def chosen_factor(method: Method, results: Mapping[str, Mapping[str, Any]]) -> tuple[float, int]:
    """Choose the factor with the highest accuracy on the validation samples; among equals, the first of `FACTORS`.

    Args:
        method: The method.
        results: Lines of the finished trainings.

    Returns:
        The factor, and the number of factors of which a run has finished. Without any, the factor of the source.
    """
    runs = {factor: results.get(run_name(method, factor, method.seeds[0])) for factor in method.factors}
    validation = {factor: line["accuracy_best_val"] for factor, line in runs.items() if line}
    return max(validation, key=lambda factor: validation[factor], default=method.factors[0]), len(validation)


def read_row(method: Method, results: Mapping[str, Mapping[str, Any]]) -> Row:
    """Return the results of a method, from the lines of the finished trainings."""
    factor, tried = chosen_factor(method, results)
    lines = (results.get(run_name(method, factor, seed)) for seed in method.seeds)
    return Row(method, factor, tried, tuple(100 * line["accuracy"] for line in lines if line))


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the pooled standard deviation of groups of values; None if no group has two values."""
    several = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    if not freedom:
        return None
    return math.sqrt(sum((len(group) - 1) * statistics.variance(group) for group in several) / freedom)


def described_difference(row: Row, other: Row, deviation: float | None) -> str:
    """Describe the difference of two means in points, as none if it is within two standard errors.

    Args:
        row: Results of a method.
        other: Results of the method that it is compared with.
        deviation: Pooled standard deviation of the accuracies; None = unknown.
    """
    if row is other:
        return ""
    if not row.accuracies or not other.accuracies:
        return NOT_RUN
    difference = row.mean - other.mean
    if deviation is None:
        return f"{difference:+.2f}, spread unknown"
    error = deviation * math.sqrt(1 / len(row.accuracies) + 1 / len(other.accuracies))
    return f"no difference ({difference:+.2f})" if abs(difference) <= _ERRORS * error else f"{difference:+.2f}"


def results_table(rows: Sequence[Row], costs: Mapping[str, Mapping[str, float]]) -> str:
    """Format the results as a Markdown table.

    Args:
        rows: Results of the methods.
        costs: Ratio of the times of a step, with `median` and `error`, by "METHOD/kl".
    """
    deviation = pooled_deviation([row.accuracies for row in rows])
    by_name = {row.method.name: row for row in rows}
    compared = [name for name in ("plain", "kl") if name in by_name]
    header = ["method", "weight", "mean", "standard deviation", "seeds", *(f"to {name}" for name in compared), "step / kl"]
    body = [
        [
            *_accuracy_cells(row),
            *(described_difference(row, by_name[name], deviation) for name in compared),
            _described_cost(costs, row.method.name),
        ]
        for row in rows
    ]
    lines = [header, ["---", "---:", "---:", "---:", "---", *("---:" for _ in compared), "---:"], *body]
    spread = "unknown" if deviation is None else f"{deviation:.2f}"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\nPooled standard deviation: {spread} points."


def _accuracy_cells(row: Row) -> list[str]:
    method = row.method
    weight = f"{method.scaled_weight(row.factor):g}" if method.loss else ""
    if method.is_tuned:
        weight += f" (best of {row.tried})" if row.tried > 1 else " (not tuned)"
    if not row.accuracies:
        return [method.name, weight, NOT_RUN, "", ""]
    deviation = f"{statistics.stdev(row.accuracies):.2f}" if len(row.accuracies) > 1 else ""
    return [method.name, weight, f"{row.mean:.2f}", deviation, ", ".join(f"{each:.2f}" for each in row.accuracies)]


def _described_cost(costs: Mapping[str, Mapping[str, float]], name: str) -> str:
    if name == "kl":
        return "1"
    cost = costs.get(f"{name}/kl")
    return f"{cost['median']:.3f} ± {cost['error']:.3f}" if cost else NOT_RUN
