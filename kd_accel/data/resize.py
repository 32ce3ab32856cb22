"""Random crops of decoded images, resized by PyTorch's antialiased interpolation of uint8, as torchvision's tensors are.

It takes a fraction of the time of Pillow's interpolation, from which it differs by rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from kd_accel.config.transform_schema import Interpolation

Box = tuple[float, float, float, float]
"""(left, top, width, height) in pixels."""


def resized_crop(image: Image.Image | Tensor, box: Box, size: int, interpolation: Interpolation) -> np.ndarray:
    """Crop and resize an image.

    Args:
        image: RGB image, or uint8 tensor [H, W, 3].
        box: Part of the image, rounded to complete pixels.
        size: S, in pixels.
        interpolation: Interpolation of the resizing.

    Returns:
        RGB image, uint8 [S, S, 3].
    """
    left, top, right, lower = round(box[0]), round(box[1]), round(box[0] + box[2]), round(box[1] + box[3])
    if isinstance(image, Tensor):
        part = image[top:lower, left:right]
    else:
        part = torch.from_numpy(np.array(image.crop((left, top, right, lower))))
    if part.shape[:2] != (size, size):
        options = {"mode": "nearest-exact"} if interpolation == "nearest" else {"mode": interpolation, "antialias": True}
        # PyTorch detects channels_last by the strides of [1, H, W, 3], but not of [3, H, W] with an added axis. In this format
        # it takes two thirds of the time, and the result is copied to a batch without a transposition.
        part = interpolate(part[None].permute(0, 3, 1, 2), size=(size, size), **options)[0].permute(1, 2, 0)
    return part.numpy()
