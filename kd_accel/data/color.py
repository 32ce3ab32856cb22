"""Conversion of a PIL image of any mode to 8-bit RGB: value range, transparency and color space.

Value range: 8-bit values are used as they are. The type of a float or 32-bit integer image does not define black and white, and
16-bit values below 4096 are usually those of a 12-bit camera: such an image is refused unless the range is given. Transparency:
every kind of it is composited over one background color. Embedded color profiles are ignored, as torchvision does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from PIL import Image

from kd_accel.config.data_schema import Background

PixelRange = tuple[float, float]

_COLORS = {"black": (0, 0, 0, 255), "white": (255, 255, 255, 255)}
_MAX_16_BITS, _MAX_12_BITS = 65535, 4095
_ALPHA_MODES = ("RGBA", "LA", "RGBa", "La")
_KEYED_MODES = ("1", "L", "RGB")
_CHUNK_PIXELS = 2**22
_PHOTOMETRIC, _MIN_IS_WHITE = 262, 0

# Pillow keeps the high byte of a 16-bit color channel. Unpacked in the other byte order, a file yields its low bytes.
_LOW_BYTES = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBX;16B": "RGBX;16L",
    "RGBX;16L": "RGBX;16B",
}
_NATIVE = "L" if sys.byteorder == "little" else "B"
_GRAY_ALPHA = "LA;16B"


class UnknownRangeError(ValueError):
    """Pixel values whose type does not define black and white; the message is a clause about the image."""


def to_eight_bits(
    image: Image.Image, *, pixel_range: PixelRange | None = None, reopen: Callable[[], Image.Image] | None = None
) -> Image.Image:
    """Convert an image to 8 bits per channel, and a transparent color or palette to an alpha channel.

    Args:
        image: Image of any mode. Of a file, it is not loaded yet, because the depth is lost then.
        pixel_range: Values that become 0 and 255 in an image of more than 8 bits per channel, with linear interpolation between
            them. None = the range of the type.
        reopen: Function that opens the same file again; None = the image is not that of a file.

    Returns:
        8-bit image; the same object if nothing has to be converted.

    Raises:
        UnknownRangeError: If the range is None and the type does not define it.
        ValueError: If the values cannot be mapped.
    """
    raw_mode = _raw_mode(image)
    key = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        gray = Image.fromarray(_scale(values, _gray_range(image, values, raw_mode, pixel_range)))
        return _with_alpha(gray, values != key) if isinstance(key, int) else gray
    if ";16" in raw_mode:
        return _from_color_16(image, raw_mode, pixel_range, reopen)
    if key is not None and image.mode in _KEYED_MODES:
        return _with_alpha(image, _differs_from_key(image, key, raw_mode))
    is_palette_with_alpha = image.mode == "PA" or (image.mode == "P" and key is not None)
    return image.convert("RGBA") if is_palette_with_alpha else image


def flatten(image: Image.Image, background: Background) -> Image.Image:
    """Convert an 8-bit image to RGB, and composite transparent pixels over the background."""
    if image.mode == "RGB":
        return image
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.mode in _ALPHA_MODES:
        over = image.convert("LA") if image.mode == "La" else image
        over = over.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, _COLORS[background]), over).convert("RGB")
    return image.convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's raw mode, such as `RGB;16B`: depth and order of the channels in a file.

    It is empty if the image is loaded, or not that of a file.
    """
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0].args
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _gray_range(image: Image.Image, values: np.ndarray, raw_mode: str, pixel_range: PixelRange | None) -> PixelRange:
    """Return the values that become black and white in a gray image of more than 8 bits."""
    if image.format == "PPM" and image.mode == "I":
        # Pillow scales the values by the maximum that the file declares.
        return 0, _MAX_16_BITS
    low, high = pixel_range or _type_range(image.mode, values, raw_mode)
    tags = getattr(image, "tag_v2", {})
    return (high, low) if tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE else (low, high)


def _type_range(mode: str, values: np.ndarray, raw_mode: str) -> PixelRange:
    if mode == "F":
        raise _unknown_range("float", values)
    if mode == "I":
        raise _unknown_range("signed 16-bit" if raw_mode in ("I;16S", "I;16BS") else "32-bit integer", values)
    if raw_mode == "I;12":
        return 0, _MAX_12_BITS
    _check_depth(values)
    return 0, _MAX_16_BITS


def _check_depth(values: np.ndarray) -> None:
    """Refuse 16-bit values that may have 12 bits. An image of zeros is black in both."""
    if 0 < values.max() <= _MAX_12_BITS:
        raise _unknown_range("16-bit", values)


def _unknown_range(kind: str, values: np.ndarray) -> UnknownRangeError:
    least, most = (float(function(values)) for function in (np.nanmin, np.nanmax))
    if kind == "16-bit":
        remedy = f"[0, {_MAX_12_BITS}] for 12-bit values, or [0, {_MAX_16_BITS}] for a dark image"
    elif least >= 0 and most <= 1:
        remedy = "[0, 1]"
    else:
        remedy = "[0, 255]" if least >= 0 and most <= 255 else "the smallest and the largest value of all images"  # noqa: PLR2004
    return UnknownRangeError(
        f"it has {kind} values from {least:g} to {most:g}, and its type does not define black and white; set data.pixel_range: "
        f"[low, high], such as {remedy}"
    )


def _scale(values: np.ndarray, pixel_range: PixelRange) -> np.ndarray:
    """Map the range linearly to 0..255, rounded and clipped, uint8."""
    low, high = pixel_range
    scaled = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _CHUNK_PIXELS // values[0].size)
    for start in range(0, len(values), rows):
        part = values[start : start + rows].astype(np.float64)
        if np.isnan(part).any():
            raise ValueError("it has pixels that are not a number (NaN)")
        with np.errstate(over="ignore"):
            scaled[start : start + rows] = np.clip(np.rint((part - low) * 255 / (high - low)), 0, 255)
    return scaled


def _differs_from_key(image: Image.Image, key: int | tuple[int, int, int], raw_mode: str) -> np.ndarray:
    """Return which pixels differ from the transparent color, bool [H, W]."""
    if image.mode == "RGB":
        return (np.asarray(image) != np.asarray(key) % 256).any(axis=2)
    # PNG stores the color at the file's own depth, and Pillow expands the pixels to 8 bits.
    expanded = {"L;2": 85, "L;4": 17}.get(raw_mode, 1)
    level = (255 if key else 0) if image.mode == "1" else int(key) % 256 * expanded  # type: ignore[arg-type]
    return np.asarray(image.convert("L")) != level


def _with_alpha(image: Image.Image, is_opaque: np.ndarray) -> Image.Image:
    result = image.convert("RGB")
    result.info.pop("transparency", None)
    result.putalpha(Image.fromarray(is_opaque.astype(np.uint8) * 255))
    return result


def _from_color_16(
    image: Image.Image, raw_mode: str, pixel_range: PixelRange | None, reopen: Callable[[], Image.Image] | None
) -> Image.Image:
    """Convert a color or gray-alpha image with 16 bits per channel."""
    key = image.info.get("transparency")
    is_dark = image.mode != "CMYK" and _brightest(image) <= _MAX_12_BITS >> 8
    if pixel_range is None and not is_dark and key is None:
        return image
    values = _read_color_16(raw_mode, reopen)
    if values is None:
        problem = "may have 12 bits" if pixel_range is None else "cannot be mapped by data.pixel_range"
        raise ValueError(f"its 16-bit channels ({raw_mode}) {problem}; convert it to 8 bits per channel")
    if pixel_range is None:
        _check_depth(values[..., :3])
    color = (values[..., :3] >> 8).astype(np.uint8) if pixel_range is None else _scale(values[..., :3], pixel_range)
    result = Image.fromarray(color)
    if isinstance(key, tuple):
        return _with_alpha(result, (values[..., :3] != np.asarray(key)).any(axis=2))
    if image.mode == "RGBA":
        result.putalpha(image.getchannel("A"))
    return result


def _brightest(image: Image.Image) -> int:
    extrema = image.getextrema()
    return max(int(high) for _, high in extrema[:3])  # type: ignore[misc]


def _read_color_16(raw_mode: str, reopen: Callable[[], Image.Image] | None) -> np.ndarray | None:
    """Read 16-bit channels from their high and their low bytes, uint16 [H, W, C]; None if Pillow cannot read them."""
    own = raw_mode.replace("16N", f"16{_NATIVE}")
    if reopen is None or (own != _GRAY_ALPHA and own not in _LOW_BYTES):
        return None
    if own == _GRAY_ALPHA:
        pairs = _load_as(reopen, raw_mode, "RGBA").astype(np.uint16)
        gray, alpha = (pairs[..., first] << 8 | pairs[..., first + 1] for first in (0, 2))
        return np.stack([gray, gray, gray, alpha], axis=2)
    high, low = (_load_as(reopen, raw_mode, name).astype(np.uint16) for name in (raw_mode, _LOW_BYTES[own]))
    return high << 8 | low


def _load_as(reopen: Callable[[], Image.Image], raw_mode: str, other: str) -> np.ndarray:
    """Load a file, unpacking its pixels by another raw mode of the same size."""
    with reopen() as image:
        tiles = image.tile  # type: ignore[attr-defined]
        assert all(raw_mode in (tile.args, tile.args[0]) for tile in tiles), tiles
        image.tile = [  # type: ignore[attr-defined]
            tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:])) for tile in tiles
        ]
        return np.asarray(image)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    assert converted is not None
    return converted
