"""From the pixels of a view to what a model was trained on. Each model has its own, so teacher and student may differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Images [B, 3, H, W] in 0..255 (uint8 or float) -> (image / 255 - mean) / std in float32, in a memory layout.

    mean and std are fractions of 1 per channel. They are no part of the state dict: a model file holds the model's own keys.
    layout: of what it gives, and so of every map behind it; by default the one of the images.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, memory_format: torch.memory_format = torch.preserve_format
    ) -> None:
        super().__init__()
        self._memory_format = memory_format
        mean_3 = torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)
        std_3 = torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
        self.register_buffer("scale", (1 / (255 * std_3)).float(), persistent=False)
        self.register_buffer("shift", (-mean_3 / std_3).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            pixels = images.to(torch.float32, memory_format=self._memory_format)
            return pixels.mul_(_along_rows(self.scale, pixels)).add_(_along_rows(self.shift, pixels))
        pixels = images.to(memory_format=self._memory_format)
        return pixels * _along_rows(self.scale, pixels) + _along_rows(self.shift, pixels)


def _along_rows(values: Tensor, pixels: Tensor) -> Tensor:
    """[1, 3, 1, 1] as [1, 3, 1, W] where a CPU has channels innermost.

    A kernel's inner loop then runs along a sample of pixels and not along three values, in a sixth of the time.
    """
    if pixels.device.type != "cpu" or not pixels.is_contiguous(memory_format=torch.channels_last):
        return values
    return values.expand(1, 3, 1, pixels.shape[3]).contiguous(memory_format=torch.channels_last)
