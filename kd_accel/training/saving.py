"""Saving of checkpoints: checks of the state, and its hand-over to the writer thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_accel.config.schema import CheckpointConfig
from kd_accel.distributed import Accelerator, gathered, on_main_process
from kd_accel.errors import UserError
from kd_accel.io.hashing import tensors_digest
from kd_accel.profiling import profiler_range
from kd_accel.training.checkpoint import CheckpointWriter
from kd_accel.training.nonfinite import diverged, own_name
from kd_accel.training.state import TrainState, capture


@dataclass(frozen=True)
class CheckpointSaver:
    """Checkpoints of one training.

    Args:
        accelerator: of the launch.
        directory: of the checkpoints.
        settings: when they are due and how many are kept.
        extra_state: plain values that every checkpoint holds besides the training's own.
        extra_tensors: tensors that every checkpoint holds, by file and name.
        writer: writes in a thread.
    """

    accelerator: Accelerator
    directory: Path
    settings: CheckpointConfig
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    extra_tensors: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)

    def save(self, train_state: TrainState, *, metrics_bytes: int) -> None:
        """Start to write a checkpoint of this moment. Every rank must call it.

        Args:
            train_state: what is saved.
            metrics_bytes: length of metrics.jsonl.

        Raises:
            UserError: a weight is not finite, the ranks' weights differ, or the write of the checkpoint before has failed.
        """
        step = train_state.position.step
        weights = {name: weight.detach() for name, weight in train_state.module.named_parameters() if weight.requires_grad}
        named = {own_name(name): weight for name, weight in weights.items()}
        _refuse_broken(named, step=step)
        _refuse_drifted(named, step=step)
        tensors, state = capture(train_state, self.accelerator)
        on_main_process(
            self.accelerator,
            lambda: self.writer.write(
                self.directory,
                step=step,
                tensors={**tensors, **self.extra_tensors},
                state={**state, **self.extra_state, "metrics_bytes": metrics_bytes},
                keep=self.settings.keep,
            ),
        )

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Every rank must call it. Raises UserError if the disk refused it."""
        with profiler_range("checkpoint"):
            on_main_process(self.accelerator, self.writer.wait)


def _refuse_broken(weights: Mapping[str, Tensor], *, step: int) -> None:
    """Raise UserError for weights that are not finite: an update of finite numbers can overflow."""
    if not torch.stack([weight.isfinite().all() for weight in weights.values()]).all():
        name = next(name for name, weight in weights.items() if not weight.isfinite().all())
        raise diverged(f"{name} is not finite after step {step}")


def _refuse_drifted(weights: Mapping[str, Tensor], *, step: int) -> None:
    """Raise UserError for ranks whose weights differ, although they start alike and apply the same gradients."""
    digests = gathered([tensors_digest(weights)])
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        own = gathered([{name: tensors_digest({name: weight}) for name, weight in weights.items()}])
        names = [name for name in weights if own[others[0]][name] != own[0][name]]
        raise UserError(
            f"the weights of rank {', '.join(map(str, others))} differ from those of rank 0 after step {step} (first in "
            f"{names[0]}): the model changes its own weights, or a device, driver or network has failed silently. Fix the "
            "cause and run the same command again: the last checkpoint is from before the difference"
        )
