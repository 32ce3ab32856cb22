"""Exponential moving average of the student's weights, updated without a synchronization with the device."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """Moving average of a network: average = decay * average + (1 - decay) * weight, once per `update`.

    It starts at the initial weights, as timm's `ModelEmaV3` does, so it needs no count of its updates. torch's `AveragedModel`
    keeps that count in a tensor and reads it twice in each update, which on a GPU synchronizes with all queued work.

    Buffers (BatchNorm statistics) are not averaged but copied. Evaluate the average as the network: images -> logits [B, C].

    Args:
        network: the network to average; copied.
        decay: weight of the old average, 0 to 1.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay

    def forward(self, images: Tensor) -> Tensor:
        """Run the averaged network on normalized images [B, 3, H, W]."""
        return self.module(images)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Add the present weights of the network and copy its buffers."""
        torch._foreach_lerp_(list(self.module.parameters()), list(network.parameters()), 1 - self._decay)
        own, present = list(self.module.buffers()), list(network.buffers())
        for dtype in {buffer.dtype for buffer in own}:  # a foreach kernel takes tensors of one type
            same = [index for index, buffer in enumerate(own) if buffer.dtype == dtype]
            torch._foreach_copy_([own[index] for index in same], [present[index] for index in same])
