"""Operations on one Pillow image: RandAugment, TrivialAugment and color jitter, as functions of hash words.

Geometric operations use nearest-neighbor sampling and fill with black, as torchvision's do by default.

References:
    Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space", NeurIPS 2020.
    Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021, table 1.
    TorchVision 0.29, `torchvision.transforms.autoaugment` and `ColorJitter`: the spaces of operations and magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_NEAREST = Image.Resampling.NEAREST
_WORD_BITS = 64


@dataclass(frozen=True)
class AugmentSpace:
    """Operations with their range of magnitudes.

    Attributes:
        num_magnitudes: Number of magnitudes of each operation, from the weakest to the strongest.
        is_wide: Whether the ranges are those of TrivialAugment (wide); False = those of RandAugment.
    """

    num_magnitudes: int
    is_wide: bool

    def apply(self, image: Image.Image, operation: int, magnitude: int, sign: int) -> Image.Image:
        """Apply one operation.

        Args:
            image: RGB image.
            operation: Position in the list of the operations.
            magnitude: Magnitude, at least 0 and below `num_magnitudes`.
            sign: 1 or -1, the direction of an operation that has one.
        """
        name = OPERATION_NAMES[operation]
        return _FUNCTIONS[name](image, self.level(name, magnitude, sign, image.width, image.height))

    def level(self, name: str, magnitude: int, sign: int, width: int, height: int) -> float:
        """Return the strength of an operation, in the unit of the operation."""
        share = magnitude / (self.num_magnitudes - 1)
        match name:
            case "identity" | "auto_contrast" | "equalize":
                return 0.0
            case "posterize":
                # Bits that remain. NumPy rounds halves to even, as torchvision does.
                return float(8 - np.rint(share * (6 if self.is_wide else 4)))
            case "solarize":
                return 255 * (1 - share)
        narrow = {
            "translate_x": 150 / 331 * width,
            "translate_y": 150 / 331 * height,
            "rotate": 30.0,
            "shear_x": 0.3,
            "shear_y": 0.3,
        }
        wide = {"translate_x": 32.0, "translate_y": 32.0, "rotate": 135.0}
        most = wide.get(name, 0.99) if self.is_wide else narrow.get(name, 0.9)
        return sign * most * share


def rand_augment(image: Image.Image, words: Sequence[int], space: AugmentSpace, *, num_ops: int, magnitude: int) -> Image.Image:
    """Apply `num_ops` random operations of one magnitude. words: two hash words per operation."""
    for number in range(num_ops):
        operation, sign = words[2 * number : 2 * number + 2]
        image = space.apply(image, _choice(operation, len(OPERATION_NAMES)), magnitude, _sign(sign))
    return image


def trivial_augment(image: Image.Image, words: Sequence[int], space: AugmentSpace) -> Image.Image:
    """Apply one random operation of random magnitude. words: three hash words."""
    operation, magnitude, sign = words[:3]
    chosen = _choice(operation, len(OPERATION_NAMES))
    return space.apply(image, chosen, _choice(magnitude, space.num_magnitudes), _sign(sign))


def jitter_color(image: Image.Image, words: Sequence[int], ranges: Mapping[str, Sequence[float]]) -> Image.Image:
    """Change brightness, contrast, saturation and hue in random order.

    Args:
        image: RGB image.
        words: Eight hash words: the order of the four changes, and their strengths.
        ranges: [low, high] of the factors `brightness`, `contrast` and `saturation`, and of the shift `hue` in turns.
    """
    names = ("brightness", "contrast", "saturation", "hue")
    for number in sorted(range(4), key=lambda number: words[number]):
        low, high = ranges[names[number]]
        value = low + (high - low) * (words[4 + number] >> 11) / (1 << 53)
        image = _shift_hue(image, value) if names[number] == "hue" else _ENHANCERS[names[number]](image).enhance(value)
    return image


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    if not turns:
        return image
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.uint8(int(turns * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


_ENHANCERS: Mapping[str, Any] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, _NEAREST)


def _enhance(name: str) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, level: _ENHANCERS[name](image).enhance(1 + level)


_FUNCTIONS: Mapping[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, level: image,
    # The level is the tangent of the angle.
    "shear_x": lambda image, level: _affine(image, 1, level, 0, 0, 1, 0),
    "shear_y": lambda image, level: _affine(image, 1, 0, 0, level, 1, 0),
    "translate_x": lambda image, level: _affine(image, 1, 0, int(level), 0, 1, 0),
    "translate_y": lambda image, level: _affine(image, 1, 0, 0, 0, 1, int(level)),
    "rotate": lambda image, level: image.rotate(level, _NEAREST),
    "brightness": _enhance("brightness"),
    "saturation": _enhance("saturation"),
    "contrast": _enhance("contrast"),
    "sharpness": _enhance("sharpness"),
    "posterize": lambda image, level: ImageOps.posterize(image, int(level)),
    "solarize": lambda image, level: ImageOps.solarize(image, level),  # type: ignore[arg-type]
    "auto_contrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
}

OPERATION_NAMES = tuple(_FUNCTIONS)
"""Operations of both spaces, in the order of torchvision."""


def _choice(word: int, choices: int) -> int:
    return (word >> 32) % choices


def _sign(word: int) -> int:
    return 1 if word >> (_WORD_BITS - 1) else -1
