"""State of a training, its capture for a checkpoint, and its restoration, after which the training is as if never stopped.

The state consists of weights, buffers, optimizer, moving average, loss scaler, position, best accuracy, the weights of the best
epoch if they are kept, the sums for the next line of metrics, and all random number generators of every rank. Learning rate,
temperature, alpha and the order of the samples are functions of the position and need no state.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_accel.losses.base import FeatureLoss, LogitLoss
from kd_accel.losses.logits import CrossEntropy
from kd_accel.models.preprocess import Normalize
from kd_accel.training.average import MovingAverage
from kd_accel.training.checkpoint import (
    Checkpoint,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
)
from kd_accel.training.metrics import Meters


@dataclass
class Position:
    """Position of a training.

    Attributes:
        epoch: Epochs completed.
        step_in_epoch: Optimizer steps done in the current epoch.
        step: Optimizer steps done in total.
        best_val_accuracy: Best accuracy so far on the validation samples, a fraction of 1; None before the first evaluation.
        elapsed_s: Training time in seconds.
        best_val_agreement: Best agreement with the teacher, as `best_val_accuracy`, of validation samples without labels.
        best_epoch: Epochs completed at the evaluation with the best of these; None before the first evaluation.
        stopped_early: Whether the training has ended before the end of its schedule (`train.early_stopping_epochs`).
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_val_accuracy: float | None = None
    elapsed_s: float = 0.0
    best_val_agreement: float | None = None
    best_epoch: int | None = None
    stopped_early: bool = False

    def note_validation(self, result: Mapping[str, float], *, epochs_done: int) -> bool:
        """Compare an evaluation on the validation samples with the best one so far, the earlier of equal ones.

        Args:
            result: Metrics by name; without an accuracy the agreement with the teacher counts.
            epochs_done: Epochs completed.

        Returns:
            True if the evaluation is the best one.
        """
        name = "accuracy" if "accuracy" in result else "agreement"
        best = getattr(self, f"best_val_{name}")
        if best is not None and result[name] <= best:
            return False
        setattr(self, f"best_val_{name}", result[name])
        self.best_epoch = epochs_done
        return True


@dataclass
class TrainState:
    """The state that an optimizer step changes.

    Attributes:
        module: The distiller, prepared by Accelerate.
        optimizer: The optimizer, prepared by Accelerate.
        meters: Sums since the last line of metrics.
        average: Moving average of the student; None without one.
        position: Position of the training.
        best: Weights of the best epoch on the CPU, as the state dict of the student; None if they are not kept.
    """

    module: nn.Module
    optimizer: Any
    meters: Meters
    average: MovingAverage | None = None
    position: Position = field(default_factory=Position)
    best: dict[str, torch.Tensor] | None = None


def capture(train_state: TrainState, accelerator: Accelerator) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Collect the state. Every rank must call it.

    Returns:
        The tensors themselves, by file and name, and plain values; both are empty on other ranks than the main process.
    """
    ranks = gather_object([_rank_state(train_state, accelerator)])
    if not accelerator.is_main_process:
        return {}, {}
    optimizer, numbers = optimizer_tensors(train_state.optimizer)
    tensors = {"module": accelerator.unwrap_model(train_state.module).state_dict(), "optimizer": optimizer}
    if train_state.average is not None:
        tensors["average"] = train_state.average.state_dict()
    if train_state.best is not None:
        tensors["best"] = train_state.best
    state = {
        "position": vars(train_state.position).copy(),
        "optimizer": numbers,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "meter_names": list(train_state.meters.names),
        "ranks": ranks,
    }
    return tensors, state


def restore(train_state: TrainState, checkpoint: Checkpoint, accelerator: Accelerator) -> list[str]:
    """Load a captured state. Every rank must call it.

    Returns:
        A notice if the resumed training cannot be exact, for another number of processes.
    """
    state = checkpoint.state
    restore_module(accelerator.unwrap_model(train_state.module), checkpoint.tensors["module"])
    restore_optimizer(train_state.optimizer.optimizer, checkpoint.tensors["optimizer"], state["optimizer"])
    if train_state.average is not None:
        restore_module(train_state.average, checkpoint.tensors["average"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    train_state.position = Position(**state["position"])
    train_state.best = checkpoint.tensors.get("best")
    return _restore_ranks(train_state, state, accelerator)


def _restore_ranks(train_state: TrainState, state: dict[str, Any], accelerator: Accelerator) -> list[str]:
    """Load the state of this rank; for another number of ranks, only the sums for the next line of metrics."""
    ranks, rank = state["ranks"], accelerator.process_index
    if len(ranks) == accelerator.num_processes:
        train_state.meters.restore(ranks[rank]["meters"])
        _restore_random(ranks[rank]["random"])
        return []
    if accelerator.is_main_process:
        summed = np.sum([saved["meters"] for saved in ranks], axis=0).tolist()
        train_state.meters.restore(summed)
    return [
        f"the checkpoint was written by {len(ranks)} processes and is resumed by {accelerator.num_processes}: samples, order "
        "and schedules are the same, but BatchNorm's batches and dropout's random numbers are not, so the weights will differ"
    ]


def _rank_state(train_state: TrainState, accelerator: Accelerator) -> dict[str, Any]:
    return {"meters": train_state.meters.sums.tolist(), "random": _capture_random(accelerator)}


def _capture_random(accelerator: Accelerator) -> dict[str, Any]:
    """Capture the states of the global random number generators, which a model may use; the data uses none of them."""
    name, keys, *rest = np.random.get_state(legacy=True)
    device = accelerator.device
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes().hex() if device.type == "cuda" else None,
    }


def _restore_random(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
    torch.set_rng_state(_byte_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_byte_tensor(state["cuda"]))


def _byte_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def wrap_for_training(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Prepare module and optimizer with Accelerate; DDP broadcasts buffers only if `needs_buffers_exchanged`.

    With several processes, losses receive a function that gathers tensors from all of them.
    """
    if accelerator.num_processes > 1:
        for loss in _losses(module):
            loss.gather = accelerator.gather
    accelerator.ddp_handler.broadcast_buffers = needs_buffers_exchanged(module)
    return accelerator.prepare(module, optimizer)


def needs_buffers_exchanged(module: nn.Module) -> bool:
    """Return whether a training forward may read a buffer that differs between ranks.

    If so, DistributedDataParallel must broadcast rank 0's buffers before each forward. BatchNorm does not read its running
    statistics in a training forward, and evaluation and checkpoints use rank 0's statistics in any case; those of frozen layers
    are read, but never changed. Losses that declare it keep their buffers equal by themselves.
    """
    synchronized = {part for loss in _losses(module) if loss.synchronizes_buffers for part in loss.modules()}
    owners = {own for own in module.modules() if any(buffer is not None for buffer in own._buffers.values())} - synchronized
    return not all(isinstance(own, _BatchNorm | CrossEntropy | Normalize) for own in owners)


def _losses(module: nn.Module) -> list[LogitLoss | FeatureLoss]:
    return [part for part in module.modules() if isinstance(part, LogitLoss | FeatureLoss)]
