"""Schedules of temperature and loss weights as pure functions of the epochs and steps done, without a state to save.

- exponential: max(floor, start * decay ** t), with t epochs or steps done; that of the reference job.
- linear, cosine: from start to end in `length` units, then constant.
- constant: start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kd_accel.config.loss_weights import value_range
from kd_accel.config.schema import DistillConfig, OptimConfig, Schedule
from kd_accel.losses.distiller import LossWeights
from kd_accel.training.optim import learning_rate

_LEAST_WEIGHT = 1e-30
"""Sum of the teachers' weights from which float32 represents their shares."""


def schedule_value(schedule: float | Schedule, *, epoch: int, step: int, total_epochs: int, total_steps: int) -> float:
    """Compute the value of a schedule.

    Args:
        schedule: A schedule, or a number, which is constant.
        epoch: Epochs completed.
        step: Optimizer steps done.
        total_epochs: Epochs of the training.
        total_steps: Optimizer steps of the training.
    """
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
    """Return the unit in which `end` is reached; by default the last epoch or step, which begins with total - 1 done."""
    return schedule.length if schedule.length is not None else total - 1


@dataclass(frozen=True)
class TrainingSchedule:
    """Learning rate, temperature and loss weights by position.

    Args:
        optim: Settings of the optimizer.
        steps_per_epoch: Optimizer steps of an epoch.
        total_steps: Optimizer steps of the training.
        distill: Settings of the distillation; None for plain training.
        teachers: Weight of each of several teachers, by name.
    """

    optim: OptimConfig
    steps_per_epoch: int
    total_steps: int
    distill: DistillConfig | None = None
    teachers: Mapping[str, float | Schedule] = field(default_factory=dict)

    def lr_at(self, step: int) -> float:
        """Return the learning rate after `step` optimizer steps."""
        return learning_rate(self.optim, step=step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)

    def weights_at(self, epoch: int, step: int) -> LossWeights:
        """Return temperature and loss weights after `epoch` epochs and `step` optimizer steps."""
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
            teachers={name: value(weight) for name, weight in self.teachers.items()},
        )

    def step_without_teacher(self) -> int | None:
        """Return the first step at which the weights of several teachers have no sum to be divided by; None if all have one."""
        if not self.teachers or self.distill is None or self.distill.logits is None:
            return None
        if any(value_range(weight)[0] >= _LEAST_WEIGHT for weight in self.teachers.values()):
            return None
        for step in range(self.total_steps):
            weights = self.weights_at(step // self.steps_per_epoch, step).teachers
            if sum(map(float, weights.values())) < _LEAST_WEIGHT:
                return step
        return None

    @property
    def scheduled(self) -> list[str]:
        """Names of what can change: `temperature`, `alpha`, `label_weight`, `features/NAME`, `teachers/NAME`."""
        if self.distill is None:
            return []
        schedules = {name: getattr(self.distill, name) for name in ("temperature", "alpha", "label_weight")}
        schedules |= {f"features/{name}": feature.weight for name, feature in self.distill.features.items()}
        schedules |= {f"teachers/{name}": weight for name, weight in self.teachers.items()}
        return [name for name, own in schedules.items() if isinstance(own, Schedule) and own.kind != "constant"]

    def logged(self, weights: LossWeights) -> dict[str, float]:
        """Return temperature and weights for a line of metrics, without those that have no effect in this training."""
        if self.distill is None:
            return {}
        numbers = {f"features/{name}/weight": float(weight) for name, weight in weights.features.items()}
        if self.distill.logits is not None:
            numbers |= {"temperature": float(weights.temperature), "alpha": float(weights.alpha)}
            numbers |= {f"teachers/{name}/weight": float(weight) for name, weight in weights.teachers.items()}
        return numbers if weights.label_weight is None else {**numbers, "label_weight": float(weights.label_weight)}
