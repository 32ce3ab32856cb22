"""Exponential moving average of the student's weights, updated without synchronizing the device.

With a constant decay the average of a short training would be nearly the initial weights: after 30 steps with 0.9999 they have
99.7 % of the weight. So the decay rises with the steps, as in timm's `ModelEmaV3` with `use_warmup`
(https://github.com/huggingface/pytorch-image-models/blob/main/timm/utils/model_ema.py), whose constants are used here; the idea
is that of TensorFlow's `ExponentialMovingAverage` with `num_updates`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kd_accel.models.feature_extractor import without_recorders

_POWER = 2 / 3
"""Exponent of the warm-up in timm, where it is called `warmup_power`."""


def decay_after(step: int, decay: float) -> float:
    """Return the weight of the old average in an update: min(decay, 1 - (1 + step) ** (-2/3)).

    The first update copies the weights. The warm-up ends after 30 steps for a decay of 0.9, 999 for 0.99 and 31,622 for 0.999.

    Args:
        step: Updates done before; a function of the position of a training, so that a resumed training needs no counter.
        decay: Largest weight, between 0 and 1.
    """
    return min(decay, 1 - (1 + step) ** -_POWER)


class MovingAverage(nn.Module):
    """Moving average of a network: average = d * average + (1 - d) * weight in each `update`, with d from `decay_after`.

    It does not count its updates. PyTorch's `AveragedModel` counts them in a tensor and reads it twice in each update, which
    synchronizes a GPU.

    Buffers (BatchNorm statistics) are not averaged but copied. The average is called like the network.

    Args:
        network: The network to average; it is copied.
        decay: Weight of the old average after the warm-up, between 0 and 1.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        super().__init__()
        self.module = without_recorders(copy.deepcopy(network)).requires_grad_(False)
        self._decay = decay
        self._weights: tuple[nn.Module | None, list[Tensor], list[Tensor]] = (None, [], [])

    def forward(self, images: Tensor) -> Tensor:
        """Run the averaged network: normalized images [B, 3, H, W] -> logits [B, C]."""
        return self.module(images)

    @torch.no_grad()
    def update(self, network: nn.Module, *, step: int) -> None:
        """Update the average with the network's weights, and copy the network's buffers.

        Args:
            network: The trained network.
            step: Optimizer steps before the one that has just changed the weights; 0 for the first.
        """
        if self._weights[0] is not network:
            # Listing the weights takes longer than the update. Buffers are listed each time: a network may replace them.
            self._weights = (network, list(self.module.parameters()), list(network.parameters()))
        _, weights, present_weights = self._weights
        torch._foreach_lerp_(weights, present_weights, 1 - decay_after(step, self._decay))
        own, present = list(self.module.buffers()), list(network.buffers())
        # A foreach kernel needs tensors of one type.
        for dtype in {buffer.dtype for buffer in own}:
            same = [index for index, buffer in enumerate(own) if buffer.dtype == dtype]
            torch._foreach_copy_([own[index] for index in same], [present[index] for index in same])
