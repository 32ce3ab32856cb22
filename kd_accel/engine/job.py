"""What a training is given: who teaches, what is trained, and the course of loss and learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from kd_accel.config import CheckpointConfig, OptimConfig, TrainConfig
from kd_accel.data.loader import TrainLoader
from kd_accel.engine.checkpoint import CheckpointWriter
from kd_accel.engine.evaluate import HeldOut
from kd_accel.engine.finite import FiniteWatch
from kd_accel.engine.interruption import Interruption
from kd_accel.engine.journal import Journal
from kd_accel.engine.optim import learning_rate
from kd_accel.engine.profile import StepProfiler
from kd_accel.engine.progress import Progress
from kd_accel.engine.state import Trainee
from kd_accel.types import LossFunction, SignalSource


@dataclass(frozen=True)
class Course:
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
    trainee: Trainee
    watch: FiniteWatch
    loader: TrainLoader
    signals: SignalSource
    course: Course
    journal: Journal
    progress: Progress
    profiler: StepProfiler
    interruption: Interruption
    writer: CheckpointWriter
    checkpoint_dir: Path
    checkpoint_extra: dict[str, Any]
    checkpoint_tensors: dict[str, dict[str, Tensor]]
    validation: HeldOut | None = None

    @property
    def is_done(self) -> bool:
        return self.trainee.position.step >= self.course.total_steps

    @property
    def must_stop(self) -> bool:
        """Done, or at the step where the user asked for a pause."""
        return self.is_done or self.trainee.position.step == self.checkpoint.stop_after_steps
