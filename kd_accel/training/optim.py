"""The optimizer, and the learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from kd_accel.config.schema import OptimConfig
from kd_accel.errors import UserError

_ONECYCLE_START_FRACTION = 1 / 25
_ONECYCLE_END_FRACTION = 1 / 25 / 1e4


def build_optimizer(parameters: Iterable[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer with one parameter group and a fused kernel, which is one pass over the parameters.

    Args:
        parameters: those without `requires_grad` are left out.
        optim: settings.

    Raises:
        UserError: no parameter can be trained.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise UserError("model.arch: the model has no parameter that can be trained; use another, or set requires_grad to True")
    if optim.name == "adamw":
        first, second = optim.betas
        return torch.optim.AdamW(trained, lr=optim.lr, betas=(first, second), weight_decay=optim.weight_decay, fused=True)
    optimizer = torch.optim.SGD(
        trained,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    if optim.momentum:
        # torch allocates the buffers in the first step and lets the kernel fill them. Where found_inf leaves that update out
        # (training/nonfinite.py), the next step would continue from uninitialized memory.
        for weight in trained:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def learning_rate(optim: OptimConfig, *, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Compute the learning rate of the optimizer step that follows `step` steps done.

    Args:
        optim: settings.
        step: 0 to total_steps - 1.
        total_steps: optimizer steps of the training.
        steps_per_epoch: optimizer steps of an epoch.

    References:
        onecycle: Smith and Topin, "Super-Convergence", 2018, with cosine flanks: from a 25th of the peak up to it, then down
        to a 250,000th of it.
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _rise(done: float) -> float:
    return _ONECYCLE_START_FRACTION + (1 - _ONECYCLE_START_FRACTION) * (1 - _cosine_fall(done))


def _cosine_fall(done: float) -> float:
    """Compute half a cosine: 1 at 0, 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * done))
