"""Where a training stands, and what must be saved so that going on is the same as never having stopped.

Weights, buffers, optimizer, moving average, loss scaler, position in the epoch, best accuracy, the sums behind the next line
of metrics, and every generator of random numbers on every rank. The learning rate, T, alpha and the order of the rows need
no state: they are functions of the position.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from kd_accel.engine.average import MovingAverage
from kd_accel.engine.checkpoint import (
    Checkpoint,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
)
from kd_accel.engine.meters import Meters


@dataclass
class Position:
    """epoch: whole epochs done. step_in_epoch, step: optimizer steps done in this epoch and in all.

    best_val_accuracy: the best so far on the validation rows, None where nothing was measured. elapsed_s: training time.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_val_accuracy: float | None = None
    elapsed_s: float = 0.0


@dataclass
class Trainee:
    """Everything that a step changes. module: as prepared by Accelerate. average: moving average of the student."""

    module: nn.Module
    optimizer: Any
    meters: Meters
    average: MovingAverage | None = None
    position: Position = field(default_factory=Position)


def capture(trainee: Trainee, accelerator: Accelerator) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """(tensors by file, plain state) on the main process; every rank must call it."""
    ranks = gather_object([_rank_state(trainee, accelerator)])
    if not accelerator.is_main_process:
        return {}, {}
    optimizer, numbers = optimizer_tensors(trainee.optimizer)
    tensors = {"module": module_tensors(accelerator.unwrap_model(trainee.module)), "optimizer": optimizer}
    if trainee.average is not None:
        tensors["average"] = module_tensors(trainee.average)
    state = {
        "position": vars(trainee.position).copy(),
        "optimizer": numbers,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "meter_names": trainee.meters.names,
        "ranks": ranks,
    }
    return tensors, state


def restore(trainee: Trainee, checkpoint: Checkpoint, accelerator: Accelerator) -> list[str]:
    """Put a captured state back. Returns notices about what could not be the same."""
    state = checkpoint.state
    restore_module(accelerator.unwrap_model(trainee.module), checkpoint.tensors["module"])
    restore_optimizer(trainee.optimizer.optimizer, checkpoint.tensors["optimizer"], state["optimizer"])
    if trainee.average is not None:
        restore_module(trainee.average, checkpoint.tensors["average"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    trainee.position = Position(**state["position"])
    return _restore_ranks(trainee, state, accelerator)


def _restore_ranks(trainee: Trainee, state: dict[str, Any], accelerator: Accelerator) -> list[str]:
    ranks, rank = state["ranks"], accelerator.process_index
    if len(ranks) == accelerator.num_processes:
        trainee.meters.restore(ranks[rank]["meters"], state["meter_names"])
        _restore_random(ranks[rank]["random"])
        return []
    if accelerator.is_main_process:
        summed = np.sum([saved["meters"] for saved in ranks], axis=0).tolist()
        trainee.meters.restore(summed, state["meter_names"])
    return [
        f"the checkpoint was written by {len(ranks)} processes and is resumed by {accelerator.num_processes}: same rows, order "
        "and schedules, but BatchNorm sees other batch shares and dropout draws anew, so the weights will differ"
    ]


def _rank_state(trainee: Trainee, accelerator: Accelerator) -> dict[str, Any]:
    return {"meters": trainee.meters.sums.tolist(), "random": _capture_random(accelerator)}


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
