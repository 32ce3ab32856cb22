"""Numbers that change during training, as pure functions of the epochs and steps done.

`value(e) = max(floor, start * decay ** e)` is the exponential schedule of the reference job. linear and cosine go from start to
end over `length` units and stay there.
"""

from __future__ import annotations

import math

from kd_accel.config.schema import Schedule


def schedule_value(schedule: float | Schedule, *, epoch: int, step: int, total_epochs: int, total_steps: int) -> float:
    """The value after `epoch` whole epochs and `step` optimizer steps."""
    if not isinstance(schedule, Schedule):
        return float(schedule)
    done, total = (epoch, total_epochs) if schedule.unit == "epoch" else (step, total_steps)
    if schedule.kind == "constant":
        return schedule.start
    if schedule.kind == "exponential":
        assert schedule.floor is not None and schedule.decay is not None, "checked by checks.problems"
        return max(schedule.floor, schedule.start * schedule.decay**done)
    assert schedule.end is not None, "checked by checks.problems"
    fraction = min(1.0, done / max(1, _last_unit(schedule, total)))
    if schedule.kind == "cosine":
        fraction = 0.5 * (1 - math.cos(math.pi * fraction))
    return schedule.start + fraction * (schedule.end - schedule.start)


def _last_unit(schedule: Schedule, total: int) -> int:
    """Where `end` is reached. Over the whole training that is the last epoch (or step), which begins with total - 1 done."""
    return schedule.length if schedule.length is not None else total - 1
