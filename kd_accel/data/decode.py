"""From encoded bytes or odd arrays to the one form that everything else reads: uint8 RGB, [S, S, 3].

Gray, palette, CMYK and 16-bit images become RGB; transparency is laid over black; the EXIF orientation is applied. Another
size is resized until the shorter side is S and cut at the center. What cannot be read raises ValueError, and the caller, who
knows the sample, names it.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Pillow knows forty kinds; for EPS it would start another program, and many others have hardly been looked at."""

MAX_PIXELS = 64_000_000
"""Larger images are refused: a small file can claim a size that fills the memory."""


def decode(data: bytes, image_size: int) -> np.ndarray:
    """Bytes of an image file -> uint8 [S, S, 3]. Raises ValueError that says why it cannot be."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            return _square(_rgb(ImageOps.exif_transpose(image)), image_size)
    except UnidentifiedImageError:
        raise ValueError("not an image file of a known kind") from None
    except Exception as error:  # each decoder of Pillow raises its own kinds on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from None


def fit_array(image: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [S, S, 3]."""
    if image.shape == (image_size, image_size, 3):
        return image
    return _square(Image.fromarray(image), image_size)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits and more: Pillow's own conversion clips instead of scaling
        levels = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(np.rint(levels / 257), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> np.ndarray:
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)
