"""Saving of checkpoints: checks of the state, its hand-over to the writer thread, and a failed write, which stops all ranks."""

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
from kd_accel.training.agreement import StepExchange
from kd_accel.training.checkpoint import CheckpointWriter, WriteStatus
from kd_accel.training.nonfinite import diverged, own_name
from kd_accel.training.state import TrainState, capture


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
    _exchange: StepExchange | None = field(default=None, init=False)
    _is_writing: bool = field(default=False, init=False)

    def connect(self, *, timeout_s: float | None) -> None:
        """Create the exchange with the other ranks that `poll` needs. Every rank must call it at the same place.

        Args:
            timeout_s: Timeout of the exchange, `train.timeout_s`; None = the default.
        """
        self._exchange = StepExchange(self.accelerator, timeout_s=timeout_s)

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
        _refuse_not_finite(named, step=step)
        _refuse_unequal(named, step=step)
        tensors, state = capture(train_state, self.accelerator)
        self.wait()
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
        self._is_writing = True

    def poll(self) -> None:
        """Raise the error of a failed write, if any, on all ranks at the same step. Every rank must call it after each step.

        It waits neither for the write nor for a device. Without it, a full disk would be reported one checkpoint later.

        Raises:
            UserError: If the checkpoint could not be written.
        """
        if not self._is_writing:
            return
        assert self._exchange is not None, "connect() must be called before"
        status = self._exchange.exchange(self.writer.status)
        if status == WriteStatus.FAILED:
            self.wait()
        elif status == WriteStatus.COMPLETE:
            self._finish_exchange()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Every rank must call it.

        Raises:
            UserError: If the checkpoint could not be written.
        """
        self._finish_exchange()
        with profiler_range("checkpoint"):
            on_main_process(self.accelerator, self.writer.wait)

    def _finish_exchange(self) -> None:
        # An exchange that is still pending is about this write; the next write must not read it.
        if self._exchange is not None:
            self._exchange.finish()
        self._is_writing = False


def _refuse_not_finite(weights: Mapping[str, Tensor], *, step: int) -> None:
    """Raise UserError for weights that are not finite: an update with finite gradients can overflow."""
    if not torch.stack([weight.isfinite().all() for weight in weights.values()]).all():
        name = next(name for name, weight in weights.items() if not weight.isfinite().all())
        raise diverged(f"{name} is not finite after step {step}")


def _refuse_unequal(weights: Mapping[str, Tensor], *, step: int) -> None:
    """Raise UserError for ranks whose weights differ, although all ranks start alike and apply the same gradients."""
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
