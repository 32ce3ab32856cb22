"""Image decoding: encoded bytes, or an array of another size, to RGB uint8 [S, S, 3].

Gray, palette, CMYK and 16-bit images are converted to RGB, transparent pixels are composited over black, and the EXIF
orientation is applied. An image of another size is center-cropped to a square and resized (bicubic).
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Accepted image formats. Pillow supports about forty; its EPS reader starts another program, and many of its decoders are
little tested."""

MAX_PIXELS = 64_000_000
"""Limit of the pixels of an image: a file of a few bytes can declare a size that exhausts the memory."""


def decode(data: bytes, image_size: int) -> np.ndarray:
    """Decode an image file.

    Args:
        data: Content of the file.
        image_size: S, in pixels.

    Returns:
        RGB image, uint8 [S, S, 3].

    Raises:
        ValueError: If the image cannot be decoded; the message contains the reason.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels exceed the limit of {MAX_PIXELS}")
            return _square(_rgb(ImageOps.exif_transpose(image)), image_size)
    except UnidentifiedImageError:
        raise ValueError("not an image file of a supported format") from None
    except Exception as error:
        # Each decoder of Pillow raises its own exceptions on damaged bytes.
        raise ValueError(str(error) or type(error).__name__) from None


def fit_array(image: np.ndarray, image_size: int) -> np.ndarray:
    """Center-crop and resize an image: uint8 [H, W, 3] to uint8 [S, S, 3]; unchanged if it already has that size."""
    if image.shape == (image_size, image_size, 3):
        return image
    return _square(Image.fromarray(image), image_size)


def fit_image(image: Image.Image, image_size: int) -> np.ndarray:
    """Convert a PIL image to RGB, center-crop and resize it: uint8 [S, S, 3]."""
    return _square(_rgb(image), image_size)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # 16 bits and more: Pillow's own conversion clips instead of scaling.
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
