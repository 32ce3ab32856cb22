"""Weights of the loss terms over an entire training, to find settings that have no effect at any step."""

from __future__ import annotations

from kd_accel.config.schema import DistillConfig, RunConfig, Schedule


def value_range(value: float | Schedule) -> tuple[float, float]:
    """Return the smallest and the largest value of a number or a schedule, for a training of any length."""
    if not isinstance(value, Schedule):
        return value, value
    if value.kind == "constant":
        return value.start, value.start
    if value.kind == "exponential":
        floor = value.start if value.floor is None else value.floor
        highest = max(value.start, floor)
        return (highest if value.decay == 1 else floor), highest
    end = value.start if value.end is None else value.end
    return min(value.start, end), max(value.start, end)


def labels_without_weight(config: RunConfig) -> str | None:
    """Return the setting that gives the labels no weight at any step, as "field: value"; None if they have a weight."""
    if not config.has_teacher:
        return None
    distill = config.distill or DistillConfig()
    if distill.label_weight is not None:
        return None if value_range(distill.label_weight)[1] > 0 else "distill.label_weight: 0"
    return None if value_range(distill.alpha) != (1, 1) else "distill.alpha: 1, with distill.label_weight null"


def notices_of_weights(config: RunConfig) -> list[str]:
    """Return a notice if there is a teacher but no term of the loss compares the student with it."""
    distill = config.distill or DistillConfig()
    is_unused = config.has_teacher and not distill.features and value_range(distill.alpha)[1] == 0
    if not is_unused:
        return []
    return [
        "distill.alpha: 0 and no distill.features: the teacher has no weight in the loss, and only its agreement with the "
        f"student is measured; set {'teachers' if config.teachers else 'teacher'} to null for plain training"
    ]
