"""Saving of checkpoints: checks of the state, its hand-over to the writer thread, and a failed write, which stops all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_accel.config.schema import CheckpointConfig
from kd_accel.distributed import Accelerator, on_main_process
from kd_accel.errors import UserError
from kd_accel.profiling import profiler_range
from kd_accel.training.checkpoint import CheckpointWriter, HostCopies
from kd_accel.training.nonfinite import diverged, own_name
from kd_accel.training.state import TrainState, capture

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class CheckpointSaver:
    """Checkpoints of one training.

    Args:
        accelerator: The launch's `Accelerator`.
        directory: Directory of the checkpoints.
        settings: When checkpoints are due, and how many are kept.
        extra_state: Plain values that every checkpoint holds in addition to the state of the training.
        extra_tensors: Tensors that every checkpoint holds in addition, by file and name.
        writer: Writer in a thread; only that of the main process writes.
    """

    accelerator: Accelerator
    directory: Path
    settings: CheckpointConfig
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    extra_tensors: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)
    _copies: HostCopies = field(default_factory=HostCopies, init=False)

    @property
    def has_failed(self) -> bool:
        """True if this rank could not write the last checkpoint, read without waiting; `wait` then raises the error."""
        return self.writer.has_failed

    def save(self, train_state: TrainState, *, metrics_bytes: int) -> None:
        """Start to write a checkpoint of the present state. Every rank must call it.

        Args:
            train_state: The state to save.
            metrics_bytes: Length of metrics.jsonl.

        Raises:
            UserError: If a weight is not finite, the ranks' weights differ, or the previous checkpoint could not be written.
        """
        step = train_state.position.step
        weights = {name: weight.detach() for name, weight in train_state.module.named_parameters() if weight.requires_grad}
        named = {own_name(name): weight for name, weight in weights.items()}
        if self.accelerator.num_processes > 1:
            _refuse_unequal(named, self.accelerator, step=step)
        _refuse_not_finite(named, step=step)
        tensors, state = capture(train_state, self.accelerator)
        self.wait()
        if self.accelerator.is_main_process:
            self.writer.write(
                self.directory,
                step=step,
                tensors={**self._copies.copy(tensors), **self.extra_tensors},
                state={**state, **self.extra_state, "metrics_bytes": metrics_bytes},
                keep=self.settings.keep,
            )

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Every rank must call it.

        Raises:
            UserError: If the checkpoint could not be written.
        """
        with profiler_range("checkpoint"):
            on_main_process(self.accelerator, self.writer.wait)


def _refuse_not_finite(weights: Mapping[str, Tensor], *, step: int) -> None:
    """Raise UserError for weights that are not finite: an update with finite gradients can overflow."""
    # One kernel for all norms; a norm of finite weights may overflow, so only then each weight is read.
    if torch.stack(torch._foreach_norm(list(weights.values()))).isfinite().all():
        return
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise diverged(f"{name} is not finite after step {step}")


def _refuse_unequal(weights: Mapping[str, Tensor], accelerator: Accelerator, *, step: int) -> None:
    """Raise UserError for ranks whose weights differ, although all ranks start alike and apply the same gradients."""
    sums = torch.stack([_bits_sum(weight) for weight in weights.values()])
    of_ranks = accelerator.gather(sums).view(-1, len(weights))
    differs = (of_ranks != of_ranks[0]).cpu()
    if differs.any():
        others = differs.any(1).nonzero().flatten().tolist()
        names = [name for name, is_other in zip(weights, differs[others[0]], strict=True) if is_other]
        raise UserError(
            f"the weights of rank {', '.join(map(str, others))} differ from those of rank 0 after step {step} (first in "
            f"{names[0]}): the model changes its own weights, or a device, driver or network has failed silently. Fix the "
            "cause and run the same command again: the last checkpoint is from before the difference"
        )


def _bits_sum(weight: Tensor) -> Tensor:
    """Add the bits of a weight, as integers modulo 2**64, on its device. The order of the elements has no effect."""
    flat = weight.flatten()
    # A CPU adds words of eight bytes three times as fast as shorter words.
    is_wide = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0
    return flat.view(torch.int64 if is_wide else _INTEGERS[flat.itemsize]).sum(dtype=torch.int64)
