"""From distillation settings to the loss of each step: the only place where schedules meet losses."""

from __future__ import annotations

from kd_accel.config.schema import DistillConfig, RunConfig
from kd_accel.losses.distiller import DistillationLoss, plain_loss
from kd_accel.training.job import TrainingSchedule
from kd_accel.training.schedules import schedule_value
from kd_accel.types import LossFunction


def total_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """All epochs, or `train.max_steps` if that ends earlier."""
    steps = config.train.epochs * steps_per_epoch
    return steps if config.train.max_steps is None else min(steps, config.train.max_steps)


def build_schedule(config: RunConfig, *, steps_per_epoch: int) -> TrainingSchedule:
    """Learning rate and loss as functions of the position."""
    steps = total_steps(config, steps_per_epoch)
    epochs = -(-steps // steps_per_epoch)
    plain = plain_loss(config.train.label_smoothing)

    def plain_loss_at(epoch: int, step: int) -> tuple[LossFunction, dict[str, float]]:
        return plain, {}

    def distillation_loss_at(epoch: int, step: int) -> tuple[LossFunction, dict[str, float]]:
        values = _scheduled_values(distill, epoch=epoch, step=step, total_epochs=epochs, total_steps=steps)
        loss = DistillationLoss(
            temperature=values["temperature"],
            alpha=values["alpha"],
            feature_weight=values.get("feature_weight"),
            t_squared=distill.t_squared,
            label_smoothing=config.train.label_smoothing,
        )
        return loss, values

    distill = config.distill or DistillConfig()
    loss_at = plain_loss_at if config.teacher is None else distillation_loss_at
    return TrainingSchedule(config.optim, steps_per_epoch=steps_per_epoch, total_steps=steps, loss_at=loss_at)


def _scheduled_values(
    distill: DistillConfig, *, epoch: int, step: int, total_epochs: int, total_steps: int
) -> dict[str, float]:
    settings = {"temperature": distill.temperature, "alpha": distill.alpha}
    if distill.feature is not None:
        settings["feature_weight"] = distill.feature.weight
    return {
        name: schedule_value(setting, epoch=epoch, step=step, total_epochs=total_epochs, total_steps=total_steps)
        for name, setting in settings.items()
    }
