"""Convolutions that give one pixel, computed as the matrix products that they are.

The last stages of an ImageNet network see small images as maps of one pixel. A 3x3 convolution there multiplies zeros with
eight of its nine taps, and the kernels of convolutions are slow on such maps: a quarter of the training step of a ResNet-18 on
32x32 images on a CPU (docs/profile.md). The function is the same, and so are parameters, their names and their gradients; sums
differ in their last bits.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


def use_matrix_products(model: nn.Module, device: torch.device) -> None:
    """Make every ordinary convolution of `model` an `OnePixelConv2d`; whether it has one pixel to give shows in a forward.

    On a CPU alone: on GPUs it was never measured, and there a convolution and a matrix product round differently (TF32).
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_ordinary(module):
            module.__class__ = OnePixelConv2d


class OnePixelConv2d(nn.Conv2d):
    """nn.Conv2d, faster where its output is [B, D, 1, 1]."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, D', H', W']."""
        top, left = cast(tuple[int, int], self.padding)
        if not self._gives_one_pixel(input, top, left):
            return super().forward(input)
        # The kernel lies once, from (-top, -left) on: it meets the map's first rows and columns, mostly all of them.
        height, width = min(self.kernel_size[0] - top, input.shape[2]), min(self.kernel_size[1] - left, input.shape[3])
        taps, pixels = self.weight[:, :, top : top + height, left : left + width], input[:, :, :height, :width]
        output = functional.linear(pixels.flatten(1), taps.flatten(1), self.bias)
        return output.unsqueeze_(2).unsqueeze_(3)  # in place: no view, which could not be written to in every mode

    def _gives_one_pixel(self, input: Tensor, top: int, left: int) -> bool:
        rows = (input.shape[-2] + 2 * top - self.kernel_size[0]) // self.stride[0]
        columns = (input.shape[-1] + 2 * left - self.kernel_size[1]) // self.stride[1]
        return input.dim() == 4 and rows == columns == 0


def _is_ordinary(module: nn.Conv2d) -> bool:
    """One group, neighbouring taps, zeros around the map, but fewer than the kernel has."""
    if isinstance(module.padding, str) or module.padding_mode != "zeros" or module.groups != 1 or module.dilation != (1, 1):
        return False
    return all(padding < taps for padding, taps in zip(module.padding, module.kernel_size, strict=True))
