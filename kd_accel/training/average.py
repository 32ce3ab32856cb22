"""Exponential moving average of the student's weights, updated without waiting for the device.

torch's `AveragedModel` counts its updates in a tensor and reads it twice in each of them, which on a GPU waits for all queued
work. This average starts at the initial weights, as timm's `ModelEmaV3` does, so there is nothing to count.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """A copy of a network whose weights follow it: average = decay * average + (1 - decay) * weight, once per `update`.

    Buffers (BatchNorm statistics) are the network's own, copied in each update. Evaluate it as the network: logits [B, C].
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Follow the present weights of the network that this is an average of."""
        torch._foreach_lerp_(list(self.module.parameters()), list(network.parameters()), 1 - self._decay)
        own, present = list(self.module.buffers()), list(network.buffers())
        for dtype in {buffer.dtype for buffer in own}:  # one kernel for all buffers of a type
            same = [index for index, buffer in enumerate(own) if buffer.dtype == dtype]
            torch._foreach_copy_([own[index] for index in same], [present[index] for index in same])
