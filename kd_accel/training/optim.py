"""Optimizer, and learning rate as a pure function of the step, so that a checkpoint holds no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from kd_accel.config.schema import OptimConfig
from kd_accel.errors import UserError

_ONECYCLE_START_FRACTION = 1 / 25
_ONECYCLE_END_FRACTION = 1 / 25 / 1e4


def build_optimizer(parameters: Iterable[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer with a fused kernel, which makes a single pass over the parameters of a group.

    It has one parameter group, or with `norm_bias_weight_decay: false` a second one without weight decay.

    Args:
        parameters: The parameters; those without `requires_grad` are left out.
        optim: Settings of the optimizer.

    Raises:
        UserError: If no parameter requires a gradient, or a second group is asked for and would be empty.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise UserError(
            "model.arch: the model has no parameter that can be trained; use another model, or set requires_grad to True"
        )
    groups = [{"params": trained}] if optim.norm_bias_weight_decay else _groups_by_decay(trained)
    if optim.name == "adamw":
        first, second = optim.betas
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(first, second), weight_decay=optim.weight_decay, fused=True)
    optimizer = torch.optim.SGD(
        groups,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    if optim.momentum:
        # torch allocates the momentum buffers in the first step, uninitialized, and its kernel fills them. If that update were
        # skipped (training/nonfinite.py), the next step would read uninitialized memory.
        for weight in trained:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def _groups_by_decay(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Return parameter groups with and without weight decay: weights, then norms and biases, which have one dimension.

    Raises:
        UserError: If no parameter has one dimension.

    References:
        He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019 ("no bias decay").
    """
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    if not others:
        raise UserError(
            "optim.norm_bias_weight_decay: false has no effect, because the model has no norm or bias that is trained; leave "
            "it out"
        )
    return [*([{"params": decayed}] if decayed else []), {"params": others, "weight_decay": 0.0}]


def learning_rate(optim: OptimConfig, *, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Compute the learning rate of an optimizer step.

    Args:
        optim: Settings of the optimizer.
        step: Optimizer steps done before, 0 to total_steps - 1.
        total_steps: Optimizer steps of the training.
        steps_per_epoch: Optimizer steps of an epoch.

    References:
        Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018 (onecycle);
        here with cosine annealing, from 1/25 of the peak up to the peak, then down to 1/250,000 of the peak.
    """
    warmup_fraction = optim.warmup_fraction
    if warmup_fraction is None:
        warmup_fraction = 0.3 if optim.schedule == "onecycle" else 0.0
    warmup_steps = round(warmup_fraction * total_steps)
    if step < warmup_steps:
        done = (step + 1) / warmup_steps
        return optim.lr * (_rise(done) if optim.schedule == "onecycle" else done)
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "step":
        return optim.lr * optim.step_gamma ** sum(step >= epoch * steps_per_epoch for epoch in optim.step_epochs)
    end_fraction = _ONECYCLE_END_FRACTION if optim.schedule == "onecycle" else 0.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return optim.lr * (end_fraction + (1 - end_fraction) * _cosine_fall(done))


def prepare_for_capture(optimizer: torch.optim.Optimizer) -> None:
    """Store the learning rate on the device of the parameters, where a recorded step of a fused optimizer reads it."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
        if "capturable" in group:
            group["capturable"] = True


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups of an optimizer."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _rise(done: float) -> float:
    return _ONECYCLE_START_FRACTION + (1 - _ONECYCLE_START_FRACTION) * (1 - _cosine_fall(done))


def _cosine_fall(done: float) -> float:
    """Compute half a period of a cosine: 1 at 0, 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * done))
