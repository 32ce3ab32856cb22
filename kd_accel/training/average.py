"""Exponential moving average of the student's weights, updated without synchronizing the device."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """Moving average of a network: average = decay * average + (1 - decay) * weight in each `update`.

    It starts from the initial weights, as timm's `ModelEmaV3` does, so it does not count its updates. PyTorch's `AveragedModel`
    counts them in a tensor and reads it twice in each update, which synchronizes a GPU.

    Buffers (BatchNorm statistics) are not averaged but copied. The average is called like the network.

    Args:
        network: The network to average; it is copied.
        decay: Weight of the old average, between 0 and 1.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay

    def forward(self, images: Tensor) -> Tensor:
        """Run the averaged network: normalized images [B, 3, H, W] -> logits [B, C]."""
        return self.module(images)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Update the average with the network's weights, and copy the network's buffers."""
        torch._foreach_lerp_(list(self.module.parameters()), list(network.parameters()), 1 - self._decay)
        own, present = list(self.module.buffers()), list(network.buffers())
        # A foreach kernel needs tensors of one type.
        for dtype in {buffer.dtype for buffer in own}:
            same = [index for index, buffer in enumerate(own) if buffer.dtype == dtype]
            torch._foreach_copy_([own[index] for index in same], [present[index] for index in same])
