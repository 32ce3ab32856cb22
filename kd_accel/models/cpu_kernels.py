"""Layers in the form that a CPU computes fastest: the same function, parameters, names and gradients (docs/profile.md).

Convolutions that give one pixel are matrix products. The last stages of an ImageNet network see small images as maps of one
pixel; a 3x3 convolution there multiplies zeros with eight of its nine layers. Sums differ in their last bits.

A teacher's maxima are taken with the channels innermost, where torch has a vectorized kernel of them; not a bit differs.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


def use_cpu_kernels(model: nn.Module, device: torch.device) -> None:
    """Make the ordinary convolutions of `model` `OnePixelConv2d` and its max-pools `ChannelsLastMaxPool2d`.

    On a CPU alone: on GPUs it was never measured, and there a convolution and a matrix product round differently (TF32).
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_ordinary(module):
            module.__class__ = OnePixelConv2d
        elif type(module) is nn.MaxPool2d and not module.return_indices:
            module.__class__ = ChannelsLastMaxPool2d


class OnePixelConv2d(nn.Conv2d):
    """nn.Conv2d, faster where its output is [B, D, 1, 1]."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, D', H', W']."""
        top, left = cast(tuple[int, int], self.padding)
        if not self._gives_one_pixel(input, top, left):
            return super().forward(input)
        # The kernel lies once, from (-top, -left) on: it meets the map's first samples and columns, mostly all of them.
        height, width = min(self.kernel_size[0] - top, input.shape[2]), min(self.kernel_size[1] - left, input.shape[3])
        layers = _cut(self.weight, top, left, height, width)
        output = functional.linear(input[:, :, :height, :width].flatten(1), layers.flatten(1), self.bias)
        return output.unsqueeze_(2).unsqueeze_(3)  # in place: no view, which could not be written to in every mode

    def _gives_one_pixel(self, input: Tensor, top: int, left: int) -> bool:
        samples = (input.shape[-2] + 2 * top - self.kernel_size[0]) // self.stride[0]
        columns = (input.shape[-1] + 2 * left - self.kernel_size[1]) // self.stride[1]
        return input.dim() == 4 and samples == columns == 0


class ChannelsLastMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d, faster for contiguous maps [B, D, H, W] that need no gradient, whose way back would cost what it saves."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or input.requires_grad or not input.is_contiguous():
            return super().forward(input)
        return super().forward(input.contiguous(memory_format=torch.channels_last)).contiguous()


def _cut(weight: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """weight[:, :, top : top + height, left : left + width], packed, and its gradient written once instead of per axis."""
    bottom, right = weight.shape[2] - top - height, weight.shape[3] - left - width
    return functional.pad(weight, (-left, -right, -top, -bottom)) if top or left or bottom or right else weight


def _is_ordinary(module: nn.Conv2d) -> bool:
    """One group, neighboring layers, zeros around the map, but fewer than the kernel has."""
    if isinstance(module.padding, str) or module.padding_mode != "zeros" or module.groups != 1 or module.dilation != (1, 1):
        return False
    return all(padding < layers for padding, layers in zip(module.padding, module.kernel_size, strict=True))
