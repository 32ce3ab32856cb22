"""Random crops of decoded images, resized by PyTorch's antialiased interpolation of uint8, as torchvision's tensors are.

For photos of the usual sizes, decoding by torchvision and resizing by PyTorch take about half of Pillow's time. Both decoders
give equal pixels; the interpolations differ by rounding.
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
        image: RGB image, or uint8 tensor [3, H, W].
        box: Part of the image, rounded to complete pixels.
        size: S, in pixels.
        interpolation: Interpolation of the resizing.

    Returns:
        RGB image, uint8 [S, S, 3].
    """
    left, top, right, lower = round(box[0]), round(box[1]), round(box[0] + box[2]), round(box[1] + box[3])
    if isinstance(image, Tensor):
        part = image[:, top:lower, left:right]
    else:
        part = torch.from_numpy(np.array(image.crop((left, top, right, lower)))).permute(2, 0, 1)
    if part.shape[1:] != (size, size):
        options = {"mode": "nearest-exact"} if interpolation == "nearest" else {"mode": interpolation, "antialias": True}
        part = interpolate(part[None], size=(size, size), **options)[0]
    return part.permute(1, 2, 0).numpy()


def decode_plain_jpeg(data: bytes) -> Tensor | None:
    """Decode a JPEG of three channels, without its EXIF orientation. Returns uint8 [3, H, W], or None if it fails."""
    # Its import takes as long as that of torch, and most commands decode no JPEG.
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
