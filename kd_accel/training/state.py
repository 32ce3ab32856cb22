"""State of a training, its capture for a checkpoint, and its restoration, after which the training is as if never stopped.

The state consists of weights, buffers, optimizer, moving average, loss scaler, position, best accuracy, the sums for the next
line of metrics, and all random number generators of every rank. Learning rate, temperature, alpha and the order of the samples
are functions of the position and need no state.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_val_accuracy: float | None = None
    elapsed_s: float = 0.0


@dataclass
class TrainState:
    """The state that an optimizer step changes.

    Attributes:
        module: The distiller, prepared by Accelerate.
        optimizer: The optimizer, prepared by Accelerate.
        meters: Sums since the last line of metrics.
        average: Moving average of the student; None without one.
        position: Position of the training.
    """

    module: nn.Module
    optimizer: Any
    meters: Meters
    average: MovingAverage | None = None
    position: Position = field(default_factory=Position)


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
    """Prepare module and optimizer with Accelerate; DDP broadcasts buffers only if `needs_buffers_exchanged`."""
    accelerator.ddp_handler.broadcast_buffers = needs_buffers_exchanged(module)
    return accelerator.prepare(module, optimizer)


def needs_buffers_exchanged(module: nn.Module) -> bool:
    """Return whether a training forward may read a buffer that differs between ranks.

    If so, DistributedDataParallel must broadcast rank 0's buffers before each forward. BatchNorm does not read its running
    statistics in a training forward, and evaluation and checkpoints use rank 0's statistics in any case.
    """
    owners = [own for own in module.modules() if any(buffer is not None for buffer in own._buffers.values())]
    return not all(isinstance(own, _BatchNorm | Normalize) for own in owners)
