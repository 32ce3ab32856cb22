"""Gain of distillation: test accuracy of a distilled student minus that of the same network trained on labels alone.

In: groups of runs that differ only in the seed. Out: a sentence for each distilled group. A difference within two standard
errors is called none; without several seeds the standard error is unknown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from kd_accel.report.groups import Group

ERRORS = 2.0
"""Standard errors up to which a difference of two means counts as none."""


def gains(groups: Sequence[Group]) -> list[str]:
    """Describe the gain of each distilled group over the first group of plain students of the same network and test data."""
    plain: dict[str, Group] = {}
    for group in groups:
        if group.rows[0].role == "student" and group.values("accuracy"):
            plain.setdefault(group.task, group)
    return [
        described_gain(group, plain[group.task])
        for group in groups
        if group.rows[0].role == "distilled" and group.task in plain and group.values("accuracy")
    ]


def described_gain(distilled: Group, plain: Group) -> str:
    """Describe the difference of two groups in points of test accuracy, with its standard error."""
    mine, other = ([100 * value for value in group.values("accuracy")] for group in (distilled, plain))
    gain = statistics.fmean(mine) - statistics.fmean(other)
    names, seeds = f"{distilled.name} against {plain.name}", f"{len(mine)} and {len(other)} seeds"
    if min(len(mine), len(other)) < 2:
        return f"{names}: {gain:+.2f} points of test accuracy; one seed, so that the standard error is unknown."
    error = standard_error(mine, other)
    if abs(gain) <= ERRORS * error:
        return f"{names}: no gain is shown, {gain:+.2f} ± {error:.2f} points of test accuracy (standard error, {seeds})."
    word = "gain" if gain > 0 else "loss"
    return f"{names}: a {word} of {abs(gain):.2f} ± {error:.2f} points of test accuracy (standard error, {seeds})."


def standard_error(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the standard error of the difference of two means, from the variance of each group of at least two values."""
    return math.sqrt(sum(statistics.variance(group) / len(group) for group in (values, others)))
