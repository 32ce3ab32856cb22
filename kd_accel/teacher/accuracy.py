"""Check of the teacher's accuracy against chance, before a training or the build of a cache is paid for."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from kd_accel.errors import UserError

_STANDARD_ERRORS = 2


def check_accuracy(accuracy: float, labels: np.ndarray, minimum: float | Literal["auto"] | None) -> list[str]:
    """Check that a teacher is good enough to teach.

    Args:
        accuracy: Accuracy of the teacher on held-out samples, a fraction of 1.
        labels: Labels of these samples, int64 [N]; negative for samples without a label, which are not counted.
        minimum: Smallest accuracy that is accepted, a fraction of 1. `auto` = two standard errors above the share of the
            largest class, which a constant prediction reaches; None = no check.

    Returns:
        Lines for the user.

    Raises:
        UserError: If the accuracy is below the minimum.
    """
    labels = labels[labels >= 0]
    if minimum is None or not len(labels):
        return []
    share = float(np.bincount(labels).max()) / len(labels)
    bound = share + _STANDARD_ERRORS * math.sqrt(share * (1 - share) / len(labels)) if minimum == "auto" else minimum
    if minimum == "auto" and bound >= 1:
        return [
            f"teacher.min_accuracy: auto has no effect, because {len(labels)} test samples, {share:.0%} of them of one class, "
            "are too few to distinguish a teacher from a constant prediction; set a number for a check"
        ]
    if accuracy >= bound:
        return []
    rule = f": two standard errors above the share of the largest class, {_percent(share)}" if minimum == "auto" else ""
    raise UserError(
        f"teacher.min_accuracy: the teacher's accuracy on {len(labels)} test samples is {_percent(accuracy)}, and must be at "
        f"least {_percent(bound)} ({minimum}{rule}). Check that its classes are in the order of the data "
        "(teacher.class_map), that its mean and std are those of its training (teacher.mean, teacher.std), and that it was "
        "trained on data of this kind and size (teacher.image_size); set teacher.min_accuracy to null to use it nevertheless"
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
