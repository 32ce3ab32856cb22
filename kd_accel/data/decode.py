"""Image decoding: encoded bytes, a PIL image or an array, to RGB uint8 [S, S, 3].

An image is converted to 8-bit RGB (`color.py`), turned upright by its EXIF orientation, cropped and resized: by default the
central square, bicubic. A large JPEG is reduced while it is decoded. A truncated or damaged file is an error, never a partly
gray image.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, UnidentifiedImageError
from torch import Tensor

from kd_accel.config.data_schema import Background
from kd_accel.config.schema import DataConfig
from kd_accel.config.transform_schema import Interpolation
from kd_accel.data.color import PixelRange, UnknownRangeError, flatten, to_eight_bits
from kd_accel.data.jpeg import decode_plain_jpeg, plain_jpeg_size
from kd_accel.data.resize import Box, resized_crop

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Accepted image formats. Pillow supports about forty; its EPS reader starts another program, and many of its decoders are
little tested."""

MAX_PIXELS = 178_956_970
"""Limit of the decoded pixels of an image, Pillow's own: a file of a few bytes can declare a size that exhausts the memory."""

MAX_JPEG_PIXELS = 2**28
"""Limit of the pixels of a JPEG before its reduction; a progressive one needs up to 6 bytes for each of them."""

DECODE_VERSION = 1
"""Version of the pixels that a file is decoded to, part of the fingerprint of a cache."""

_LARGE_PIXELS = 64_000_000
_JPEG_MARGIN = 2
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ALPHA_MODES = ("LA", "RGBA")
_SWAPPED = (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
_FROM_RIGHT = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
)
"""Methods that move the right or lower edge of a file to the left edge."""
_FROM_BELOW = (
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
)
"""Methods that move the right or lower edge of a file to the upper edge."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Crop:
    """Part of an image that is resized to the image size.

    Attributes:
        box: Function of width and height of the upright image, in pixels, that returns the part.
        interpolation: Interpolation by PyTorch (`resize.py`); None = Pillow's, bicubic, with fractions of pixels.
    """

    box: Callable[[int, int], Box]
    interpolation: Interpolation | None = None


@dataclass(frozen=True)
class Decoder:
    """Conversion of image files and images to RGB uint8 [S, S, 3].

    Attributes:
        image_size: S, in pixels.
        background: Color behind transparent pixels.
        pixel_range: Values that become black and white in an image of more than 8 bits per channel; None = the range of its
            type, or an error if the type does not define it.
        crop_pct: Side of the central square that is used, as a fraction of the image's shorter side.
    """

    image_size: int
    background: Background = "black"
    pixel_range: PixelRange | None = None
    crop_pct: float = 1.0

    @classmethod
    def from_config(cls, config: DataConfig) -> Decoder:
        """Create the decoder of the data settings."""
        return cls(config.image_size, config.background, as_range(config.pixel_range), config.crop_pct)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what decides the pixels besides the file and the image size."""
        pixel_range = None if self.pixel_range is None else [float(value) for value in self.pixel_range]
        return {
            "version": DECODE_VERSION,
            "background": self.background,
            "pixel_range": pixel_range,
            "crop_pct": float(self.crop_pct),
        }

    def center(self, width: int, height: int) -> Box:
        """Return the central square of an image."""
        side = min(width, height) * self.crop_pct
        return (width - side) / 2, (height - side) / 2, side, side

    def decode(self, data: bytes, crop: Crop | None = None) -> np.ndarray:
        """Decode an image file.

        Args:
            data: Content of the file.
            crop: Part of the image; None = the central square.

        Returns:
            RGB image, uint8 [S, S, 3].

        Raises:
            ValueError: If the image cannot be decoded; the message contains the reason.
        """
        try:
            with warnings.catch_warnings(action="ignore"):
                return self._decode_file(data, crop or Crop(self.center))
        except UnknownRangeError:
            raise
        except UnidentifiedImageError:
            raise ValueError("not an image file of a supported format") from None
        except Exception as error:
            # Each decoder of Pillow raises its own exceptions on damaged bytes.
            raise ValueError(str(error) or type(error).__name__) from None

    def fit_array(self, image: np.ndarray, crop: Crop | None = None) -> np.ndarray:
        """Crop and resize an image: uint8 [H, W, 3] to uint8 [S, S, 3]; unchanged if the crop already has that size.

        Args:
            image: RGB image, uint8 [H, W, 3].
            crop: Part of the image; None = the central square.
        """
        crop = crop or Crop(self.center)
        source = Image.fromarray(image) if crop.interpolation is None else torch.from_numpy(image)
        return _resized(source, self.image_size, crop)

    def fit_image(self, image: Image.Image, crop: Crop | None = None) -> np.ndarray:
        """Convert a PIL image to RGB, crop and resize it, without its EXIF orientation.

        Args:
            image: Image of any mode.
            crop: Part of the image; None = the central square.

        Returns:
            RGB image, uint8 [S, S, 3].

        Raises:
            ValueError: If its values cannot be converted, as those of a float image without `pixel_range`.
        """
        rgb = flatten(to_eight_bits(image, pixel_range=self.pixel_range), self.background)
        return _resized(rgb, self.image_size, crop or Crop(self.center))

    def _decode_file(self, data: bytes, crop: Crop) -> np.ndarray:
        try:
            return self._decode_bytes(data, crop)
        except ValueError:
            # Pillow refuses texts and color profiles that are large when decompressed. They do not affect the pixels.
            reduced = _without_metadata(data)
            if len(reduced) == len(data):
                raise
        return self._decode_bytes(reduced, crop)

    def _decode_bytes(self, data: bytes, crop: Crop) -> np.ndarray:
        if self._is_plain_and_full(data, crop) and (pixels := decode_plain_jpeg(data)) is not None:
            return _resized(pixels, self.image_size, crop)
        with _open(data) as image:
            width, height = image.size
            scale = _reduce_jpeg(image, self.image_size, crop)
            is_plain = scale == 1 and crop.interpolation is not None and _is_plain_jpeg(image)
            if is_plain and (pixels := decode_plain_jpeg(data)) is not None:
                return _resized(pixels, self.image_size, crop)
            levels = to_eight_bits(image, pixel_range=self.pixel_range, reopen=lambda: _open(data))
            # Some orientations and metadata are known only when the pixels are loaded.
            image.load()
            method = _UPRIGHT.get(_orientation(image))
            box = crop.box(*_upright_size((width, height), method))
            factor = _block_size(levels, min(box[2:]) / scale, self.image_size)
            if factor > 1:
                levels, scale = levels.reduce(factor), scale * factor
            upright, box = _in_reduced(flatten(levels, self.background), box, (width, height), scale, method)
            return _resized(upright, self.image_size, replace(crop, box=lambda width, height: box))

    def _is_plain_and_full(self, data: bytes, crop: Crop) -> bool:
        """Return whether a file is a plain JPEG of a random crop that is not reduced, without opening it."""
        size = None if crop.interpolation is None else plain_jpeg_size(data)
        if size is None or size[0] * size[1] > _LARGE_PIXELS:
            return False
        return jpeg_scale(*size, min(crop.box(*size)[2:]), self.image_size, is_random=True) == 1


def as_range(pixel_range: list[float] | None) -> PixelRange | None:
    """Return [low, high] of a setting as a tuple."""
    return None if pixel_range is None else (pixel_range[0], pixel_range[1])


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height of an image file, without decoding it. Raises OSError or ValueError if it is not an image."""
    with warnings.catch_warnings(action="ignore"), _open(data) as image:
        return image.size


def jpeg_scale(width: int, height: int, side: float, image_size: int, *, is_random: bool = False) -> int:
    """Return the factor by which a JPEG is reduced while it is decoded: 1, 2, 4 or 8.

    The shorter side of the crop keeps at least twice the pixels of the result, as in Pillow's thumbnails, so that the result is
    nearly the same (a mean difference of about 1 of 255 levels in photos); in random crops, and in images above 64 megapixels,
    at least those of the result, so that it is never enlarged.

    Args:
        width: Width in the file, in pixels.
        height: Height in the file, in pixels.
        side: Shorter side of the crop in the file, in pixels.
        image_size: Side of the result, in pixels.
        is_random: Whether the crop is a random one.
    """
    margin = 1 if is_random or width * height > _LARGE_PIXELS else _JPEG_MARGIN
    fitting = [scale for scale in (2, 4, 8) if side // scale >= margin * image_size]
    return max(fitting, default=1)


def _open(data: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        if not data.startswith(_JPEG_SIGNATURE):
            raise
    # Without Pillow's limit, which does not consider that a reduced JPEG needs less memory.
    return JpegImagePlugin.jpeg_factory(io.BytesIO(data))


def _reduce_jpeg(image: ImageFile.ImageFile, image_size: int, crop: Crop) -> int:
    """Set the reduction of a JPEG. Returns its factor. Raises ValueError if an image exceeds the limit of pixels."""
    (width, height), scale = image.size, 1
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
    if is_jpeg and width * height <= MAX_JPEG_PIXELS:
        box = crop.box(*_upright_size((width, height), _UPRIGHT.get(_orientation(image))))
        scale = jpeg_scale(width, height, min(box[2:]), image_size, is_random=crop.interpolation is not None)
        image.draft(None, (width // scale, height // scale))
    limit = MAX_JPEG_PIXELS if is_jpeg and width * height > MAX_JPEG_PIXELS else MAX_PIXELS
    if image.width * image.height > limit:
        raise ValueError(f"{width}x{height} pixels exceed the limit of {limit}")
    return scale


def _is_plain_jpeg(image: ImageFile.ImageFile) -> bool:
    is_rgb = isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode == "RGB"
    return is_rgb and image.width * image.height <= _LARGE_PIXELS and _UPRIGHT.get(_orientation(image)) is None


def _block_size(image: Image.Image, side: float, image_size: int) -> int:
    """Return the side of the blocks of pixels that are averaged in a large image before its background is added.

    The background needs several times the memory of the image.

    Args:
        image: The image.
        side: Shorter side of the crop, in pixels.
        image_size: Side of the result, in pixels.
    """
    is_large = image.width * image.height > _LARGE_PIXELS and image.mode in _ALPHA_MODES
    return max(1, int(side // (2 * image_size))) if is_large else 1


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the metadata is damaged, as in viewers. The image is loaded."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  (each kind of metadata has its own parser, and exceptions)
        return 1


def _without_metadata(data: bytes) -> bytes:
    """Return a PNG file without its texts and color profile; other data unchanged."""
    if not data.startswith(_PNG_SIGNATURE):
        return data
    parts, start = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in _PNG_METADATA:
            parts.append(data[start:end])
        start = end
    return b"".join(parts)


def _upright_size(size: tuple[int, int], method: Image.Transpose | None) -> tuple[int, int]:
    return (size[1], size[0]) if method in _SWAPPED else size


def _in_reduced(
    image: Image.Image, box: Box, size: tuple[int, int], scale: int, method: Image.Transpose | None
) -> tuple[Image.Image, Box]:
    """Turn a reduced image upright.

    Args:
        image: Image that is reduced by `scale`, with sides that are rounded up.
        box: Part of the upright image that is not reduced.
        size: Width and height in the file, in pixels.
        scale: Factor of the reduction.
        method: Method that turns the image upright; None = it is upright.

    Returns:
        The upright image, and the part in it; fractions of a pixel keep the part where it is in the file.
    """
    upright = image if method is None else image.transpose(method)
    width, height = _upright_size(size, method)
    left = upright.width - width / scale if method in _FROM_RIGHT else 0.0
    top = upright.height - height / scale if method in _FROM_BELOW else 0.0
    return upright, (left + box[0] / scale, top + box[1] / scale, box[2] / scale, box[3] / scale)


def _resized(image: Image.Image | Tensor, size: int, crop: Crop) -> np.ndarray:
    """Crop and resize an RGB image or a tensor, uint8 [H, W, 3]. Returns uint8 [S, S, 3]."""
    if isinstance(image, Tensor):
        height, width = image.shape[:2]
    else:
        width, height = image.size
    box = crop.box(width, height)
    if crop.interpolation is not None:
        return resized_crop(image, box, size, crop.interpolation)
    assert isinstance(image, Image.Image)
    if box[2:] != image.size or image.size != (size, size):
        left, top = box[:2]
        right, lower = min(left + box[2], width), min(top + box[3], height)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, lower))
    return np.asarray(image)
