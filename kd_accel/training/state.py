"""Where a training stands, and what must be saved so that going on is the same as never having stopped.

Weights, buffers, optimizer, moving average, loss scaler, position in the epoch, best accuracy, the sums behind the next line
of metrics, and every generator of random numbers on every rank. The learning rate, T, alpha and the order of the samples need
no state: they are functions of the position.
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
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
)
from kd_accel.training.metrics import Meters


@dataclass
class Position:
    """epoch: whole epochs done. step_in_epoch, step: optimizer steps done in this epoch and in all.

    best_val_accuracy: the best so far on the validation samples, None where nothing was measured. elapsed_s: training time.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_val_accuracy: float | None = None
    elapsed_s: float = 0.0


@dataclass
class TrainState:
    """Everything that a step changes. module: as prepared by Accelerate. average: moving average of the student."""

    module: nn.Module
    optimizer: Any
    meters: Meters
    average: MovingAverage | None = None
    position: Position = field(default_factory=Position)


def capture(train_state: TrainState, accelerator: Accelerator) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """(tensors by file, plain state) on the main process; every rank must call it."""
    ranks = gather_object([_rank_state(train_state, accelerator)])
    if not accelerator.is_main_process:
        return {}, {}
    optimizer, numbers = optimizer_tensors(train_state.optimizer)
    tensors = {"module": module_tensors(accelerator.unwrap_model(train_state.module)), "optimizer": optimizer}
    if train_state.average is not None:
        tensors["average"] = module_tensors(train_state.average)
    state = {
        "position": vars(train_state.position).copy(),
        "optimizer": numbers,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "meter_names": train_state.meters.names,
        "ranks": ranks,
    }
    return tensors, state


def restore(train_state: TrainState, checkpoint: Checkpoint, accelerator: Accelerator) -> list[str]:
    """Put a captured state back. Returns notices about what could not be the same."""
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
    ranks, rank = state["ranks"], accelerator.process_index
    if len(ranks) == accelerator.num_processes:
        train_state.meters.restore(ranks[rank]["meters"], state["meter_names"])
        _restore_random(ranks[rank]["random"])
        return []
    if accelerator.is_main_process:
        summed = np.sum([saved["meters"] for saved in ranks], axis=0).tolist()
        train_state.meters.restore(summed, state["meter_names"])
    return [
        f"the checkpoint was written by {len(ranks)} processes and is resumed by {accelerator.num_processes}: same samples, order "
        "and schedules, but BatchNorm sees other batch shares and dropout draws anew, so the weights will differ"
    ]


def _rank_state(train_state: TrainState, accelerator: Accelerator) -> dict[str, Any]:
    return {"meters": train_state.meters.sums.tolist(), "random": _capture_random(accelerator)}


def _capture_random(accelerator: Accelerator) -> dict[str, Any]:
    """The generators that a model may draw from; the data draws from none of them."""
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
    """Prepare both with Accelerate. Buffers are exchanged between ranks only where `needs_buffers_exchanged`."""
    accelerator.ddp_handler.broadcast_buffers = needs_buffers_exchanged(module)
    return accelerator.prepare(module, optimizer)


def needs_buffers_exchanged(module: nn.Module) -> bool:
    """Return whether a training forward may read a buffer that another rank's differs from.

    DistributedDataParallel would send rank 0's buffers to all before each forward. BatchNorm's running statistics are never
    read in a training forward; rank 0's are evaluated and saved, and they see rank 0's batches alone either way.
    """
    owners = [own for own in module.modules() if any(buffer is not None for buffer in own._buffers.values())]
    return not all(isinstance(own, _BatchNorm | Normalize) for own in owners)
