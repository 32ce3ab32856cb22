"""Input normalization. Teacher and student have separate modules, each with the mean and std of its own training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Normalization of images to float32: (image / 255 - mean) / std.

    Mean and standard deviation are not part of the state dict, so a model file contains only the network's own keys.

    Args:
        mean: Mean per channel, as fractions of 1.
        std: Standard deviation per channel, as fractions of 1.
        memory_format: Memory format of the output, which all feature maps inherit; by default the format of the images.

    Shape:
        Images [B, 3, H, W], uint8 or float, in 0..255; output float32 [B, 3, H, W], with the same bits for equal pixels.
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
        """Normalize `images`; gradients flow through float images."""
        if images.dtype == torch.uint8:
            pixels = images.to(torch.float32, memory_format=self._memory_format)
            return pixels.mul_(_repeat_along_row(self.scale, pixels)).add_(_repeat_along_row(self.shift, pixels))
        pixels = images.to(memory_format=self._memory_format)
        return pixels.mul(_repeat_along_row(self.scale, pixels)).add_(_repeat_along_row(self.shift, pixels))


def _repeat_along_row(values: Tensor, pixels: Tensor) -> Tensor:
    """Repeat [1, 3, 1, 1] to [1, 3, 1, W] for channels_last images on a CPU.

    The inner loop of the CPU kernel then runs over a row of pixels instead of three channels, in a sixth of the time.
    """
    if pixels.device.type != "cpu" or not pixels.is_contiguous(memory_format=torch.channels_last):
        return values
    return values.expand(1, 3, 1, pixels.shape[3]).contiguous(memory_format=torch.channels_last)
