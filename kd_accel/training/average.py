"""Exponential moving average of the student's weights, updated without synchronizing the device.

With a constant decay the average of a short training would be nearly the initial weights: after 30 steps with 0.9999 they have
99.7 % of the weight. So the decay rises with the steps, as in timm's `ModelEmaV3` with `use_warmup`
(https://github.com/huggingface/pytorch-image-models/blob/main/timm/utils/model_ema.py), whose constants are used here; the idea
is that of TensorFlow's `ExponentialMovingAverage` with `num_updates`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class _Pairs:
    """Tensors of the average with those of a network, in lists for foreach kernels.

    Attributes:
        network: The network.
        weights: (weights of the average, weights of the network).
        buffers: (buffers of the average, buffers of the network), one pair of lists for each type.
    """

    network: nn.Module
    weights: tuple[list[Tensor], list[Tensor]]
    buffers: list[tuple[list[Tensor], list[Tensor]]]

    @classmethod
    def of(cls, average: nn.Module, network: nn.Module) -> _Pairs:
        own, present = list(average.buffers()), list(network.buffers())
        # A foreach kernel needs tensors of one type.
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for buffer, other in zip(own, present, strict=True):
            for tensors, tensor in zip(by_type.setdefault(buffer.dtype, ([], [])), (buffer, other), strict=True):
                tensors.append(tensor)
        return cls(network, (list(average.parameters()), list(network.parameters())), list(by_type.values()))


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
        self.module = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay
        self._pairs: _Pairs | None = None

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
        if self._pairs is None or self._pairs.network is not network:
            # Listing the tensors of a network takes longer than the update.
            self._pairs = _Pairs.of(self.module, network)
        torch._foreach_lerp_(*self._pairs.weights, 1 - decay_after(step, self._decay))
        for own, present in self._pairs.buffers:
            torch._foreach_copy_(own, present)
