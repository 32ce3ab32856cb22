"""Input normalization. Teacher and student have separate modules, each with the mean and std of its own training.

A teacher may also have its own image size: the view, which student and teacher share, is then resized before the normalization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kd_accel.config.teacher_schema import TeacherInterpolation


@dataclass(frozen=True)
class Resize:
    """Resizing of square images, and the central square of the result.

    It is a pure function of the pixels, antialiased as Pillow's, and not rounded to 8 bits: from the results of Pillow and
    torchvision for 8-bit images it differs by their rounding, less than 2 of 255 levels.

    Args:
        image_size: Height and width of the result, in pixels.
        interpolation: Interpolation of the resizing. Bicubic values outside of 0..255 are clipped.
        crop_pct: Side of the central square, as a fraction of the side of the image.

    Shape:
        Images [B, 3, S, S], uint8 or float, in 0..255; output float [B, 3, image_size, image_size], in 0..255.

    References:
        Wightman, PyTorch Image Models (timm): evaluations resize to floor(image_size / crop_pct), then crop the center.
    """

    image_size: int
    interpolation: TeacherInterpolation = "bilinear"
    crop_pct: float = 1.0

    @property
    def side(self) -> int:
        """Height and width of the resized image before the crop, in pixels."""
        return floor(self.image_size / self.crop_pct)

    def changes(self, image_size: int) -> bool:
        """Return whether the result differs from images of `image_size` pixels in height and width."""
        return not image_size == self.image_size == self.side

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the settings as plain values; `crop_pct` is missing for the complete image."""
        crop = {} if self.crop_pct == 1 else {"crop_pct": self.crop_pct}
        return {"image_size": self.image_size, "interpolation": self.interpolation, **crop}

    def __call__(self, images: Tensor) -> Tensor:
        """Resize `images`; gradients flow through float images. Raises ValueError if they are not square."""
        height, width = images.shape[2:]
        if height != width:
            raise ValueError(f"images: {height}x{width} pixels must be square for a teacher with its own image size")
        # The kernel of a CPU takes up to three times as long for channels_last images, and computes the same bits.
        dtype = images.dtype if images.is_floating_point() else torch.float32
        pixels = images.to(dtype, memory_format=torch.contiguous_format)
        if height != self.side:
            pixels = self._resized(pixels)
        first = round((self.side - self.image_size) / 2)
        return pixels[:, :, first : first + self.image_size, first : first + self.image_size]

    def _resized(self, pixels: Tensor) -> Tensor:
        side = self.side
        if self.interpolation == "bilinear":
            return interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        # 8-bit images are clipped after the rows, and again after the columns.
        for size in ((pixels.shape[2], side), (side, side)):
            pixels = interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp_(0, 255)
        return pixels


class Normalize(nn.Module):
    """Normalization of images to float32: (image / 255 - mean) / std.

    Mean and standard deviation are not part of the state dict, so a model file contains only the network's own keys.

    Args:
        mean: Mean per channel, as fractions of 1.
        std: Standard deviation per channel, as fractions of 1.
        resize: Resizing of the images before the normalization; None = they keep their size.
        memory_format: Memory format of the output, which all feature maps inherit; by default the format of the images.

    Shape:
        Images [B, 3, H, W], uint8 or float, in 0..255; output float32 [B, 3, H, W], with the same bits for equal pixels. With
        `resize`, height and width of the output are `resize.image_size`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        resize: Resize | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        super().__init__()
        self._resize, self._memory_format = resize, memory_format
        mean_3 = torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)
        std_3 = torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
        self.register_buffer("scale", (1 / (255 * std_3)).float(), persistent=False)
        self.register_buffer("shift", (-mean_3 / std_3).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalize `images`; gradients flow through float images."""
        if self._resize is not None:
            images = self._resize(images)
        if images.dtype == torch.uint8:
            pixels = images.to(torch.float32, memory_format=self._memory_format)
            return pixels.mul_(_repeat_along_row(self.scale, pixels)).add_(_repeat_along_row(self.shift, pixels))
        pixels = images.to(memory_format=self._memory_format)
        return pixels.mul(_repeat_along_row(self.scale, pixels)).add_(_repeat_along_row(self.shift, pixels))

    def output_size(self, image_size: int) -> int:
        """Return height and width of the output for images of `image_size` pixels in height and width."""
        return image_size if self._resize is None else self._resize.image_size


def _repeat_along_row(values: Tensor, pixels: Tensor) -> Tensor:
    """Repeat [1, 3, 1, 1] to [1, 3, 1, W] for channels_last images on a CPU.

    The inner loop of the CPU kernel then runs over a row of pixels instead of three channels, in a sixth of the time.
    """
    if pixels.device.type != "cpu" or not pixels.is_contiguous(memory_format=torch.channels_last):
        return values
    return values.expand(1, 3, 1, pixels.shape[3]).contiguous(memory_format=torch.channels_last)
