"""Rules of a schedule: its numbers are in range, and it has the settings of its kind alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kd_accel.config.schema import Schedule


def schedule_problems(name: str, value: float | Schedule, *, least: float = 0.0, most: float | None = None) -> Iterator[str]:
    """Yield a message for each broken rule of a number or a schedule.

    Args:
        name: Name of the setting.
        value: The number or the schedule.
        least: Smallest value that is accepted.
        most: Largest value that is accepted; None = no limit.
    """
    if isinstance(value, Schedule):
        yield from _fields(name, value)
        numbers = {f"{name}.{part}": getattr(value, part) for part in ("start", "floor", "end")}
    else:
        numbers = {name: value}
    rule = f"at least {least:g}" if most is None else f"at least {least:g} and at most {most:g}"
    for field, number in numbers.items():
        if number is not None and not (math.isfinite(number) and least <= number and (most is None or number <= most)):
            yield f"{field}: {number} must be {rule}"


def _fields(name: str, schedule: Schedule) -> Iterator[str]:
    needed = {"exponential": ("floor", "decay"), "linear": ("end",), "cosine": ("end",), "constant": ()}[schedule.kind]
    allowed = (*needed, "length") if needed == ("end",) else needed
    if schedule.kind == "constant" and schedule.unit != "epoch":
        yield f"{name}.unit: has no effect with kind constant; leave it out"
    for field_name in ("floor", "decay", "end", "length"):
        is_given = getattr(schedule, field_name) is not None
        if field_name in needed and not is_given:
            yield f"{name}.{field_name}: missing; a schedule of kind {schedule.kind} needs it"
        if is_given and field_name not in allowed:
            yield f"{name}.{field_name}: has no effect with kind {schedule.kind}; leave it out or set it to null"
    if schedule.decay is not None and not 0 < schedule.decay <= 1:
        yield f"{name}.decay: {schedule.decay} must be above 0 and at most 1"
    if schedule.length is not None and schedule.length < 1:
        yield f"{name}.length: {schedule.length} must be at least 1"
