"""What a training is given: who teaches, what is trained, and the course of loss and learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from kd_accel.config.schema import CheckpointConfig, OptimConfig, TrainConfig
from kd_accel.data.loader import TrainLoader
from kd_accel.training.checkpoint import CheckpointWriter
from kd_accel.training.evaluation import HeldOut
from kd_accel.training.metrics_log import MetricsLog
from kd_accel.training.nonfinite import NonFiniteGuard
from kd_accel.training.optim import learning_rate
from kd_accel.training.preemption import PreemptionHandler
from kd_accel.training.profile import StepProfiler
from kd_accel.training.progress import Progress
from kd_accel.training.state import TrainState
from kd_accel.types import LossFunction, TeacherSource


@dataclass(frozen=True)
class TrainingSchedule:
    """What changes with the position: rate, loss and the values to log with it, all pure functions.

    loss_at(epoch, step) -> (loss function, {"temperature": ..., ...}).
    """

    optim: OptimConfig
    steps_per_epoch: int
    total_steps: int
    loss_at: Callable[[int, int], tuple[LossFunction, dict[str, float]]]

    def lr_at(self, step: int) -> float:
        return learning_rate(self.optim, step=step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)


@dataclass(frozen=True)
class Job:
    """Everything that a training needs, built by the command. The checkpoint_ fields go into each checkpoint as they are."""

    accelerator: Accelerator
    train: TrainConfig
    checkpoint: CheckpointConfig
    train_state: TrainState
    guard: NonFiniteGuard
    loader: TrainLoader
    teacher: TeacherSource
    schedule: TrainingSchedule
    metrics_log: MetricsLog
    progress: Progress
    profiler: StepProfiler
    preemption: PreemptionHandler
    writer: CheckpointWriter
    checkpoint_dir: Path
    checkpoint_extra: dict[str, Any]
    checkpoint_tensors: dict[str, dict[str, Tensor]]
    validation: HeldOut | None = None

    @property
    def is_done(self) -> bool:
        return self.train_state.position.step >= self.schedule.total_steps

    @property
    def must_stop(self) -> bool:
        """Done, or at the step where the user asked for a pause."""
        return self.is_done or self.train_state.position.step == self.checkpoint.stop_after_steps
