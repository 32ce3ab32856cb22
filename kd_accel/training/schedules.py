"""Schedules: numbers that change during training, as pure functions of the epochs and steps done.

The exponential schedule is that of the reference job: max(floor, start * decay ** epochs). linear and cosine go from start to
end in `length` units and keep the end. A resumed training needs no state of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kd_accel.config.schema import DistillConfig, OptimConfig, Schedule
from kd_accel.losses.distiller import LossWeights
from kd_accel.training.optim import learning_rate


def schedule_value(schedule: float | Schedule, *, epoch: int, step: int, total_epochs: int, total_steps: int) -> float:
    """Compute the value after `epoch` completed epochs and `step` optimizer steps."""
    if not isinstance(schedule, Schedule):
        return float(schedule)
    done, total = (epoch, total_epochs) if schedule.unit == "epoch" else (step, total_steps)
    if schedule.kind == "constant":
        return schedule.start
    if schedule.kind == "exponential":
        assert schedule.floor is not None and schedule.decay is not None, "checked by config/validation.py"
        return max(schedule.floor, schedule.start * schedule.decay**done)
    assert schedule.end is not None, "checked by config/validation.py"
    fraction = min(1.0, done / max(1, _last_unit(schedule, total)))
    if schedule.kind == "cosine":
        fraction = 0.5 * (1 - math.cos(math.pi * fraction))
    return schedule.start + fraction * (schedule.end - schedule.start)


def _last_unit(schedule: Schedule, total: int) -> int:
    """Return where `end` is reached: by default in the last epoch (or step), which begins with total - 1 done."""
    return schedule.length if schedule.length is not None else total - 1


@dataclass(frozen=True)
class TrainingSchedule:
    """Learning rate, temperature and loss weights by position.

    Args:
        optim: optimizer settings.
        steps_per_epoch: optimizer steps of an epoch.
        total_steps: optimizer steps of the training.
        distill: distillation settings; None for plain training.
    """

    optim: OptimConfig
    steps_per_epoch: int
    total_steps: int
    distill: DistillConfig | None = None

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the step that follows `step` steps done."""
        return learning_rate(self.optim, step=step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)

    def weights_at(self, epoch: int, step: int) -> LossWeights:
        """Return temperature and weights after `epoch` completed epochs and `step` steps."""
        distill = self.distill
        if distill is None:
            return LossWeights()

        def value(schedule: float | Schedule) -> float:
            total_epochs = -(-self.total_steps // self.steps_per_epoch)
            return schedule_value(schedule, epoch=epoch, step=step, total_epochs=total_epochs, total_steps=self.total_steps)

        return LossWeights(
            temperature=value(distill.temperature),
            alpha=value(distill.alpha),
            label_weight=None if distill.label_weight is None else value(distill.label_weight),
            features={name: value(feature.weight) for name, feature in distill.features.items()},
        )

    def logged(self, weights: LossWeights) -> dict[str, float]:
        """Return the numbers for a line of metrics: those that have an effect in this training."""
        if self.distill is None:
            return {}
        numbers = {f"features/{name}/weight": weight for name, weight in weights.features.items()}
        if self.distill.logits is not None:
            numbers |= {"temperature": weights.temperature, "alpha": weights.alpha}
        return numbers if weights.label_weight is None else {**numbers, "label_weight": weights.label_weight}
