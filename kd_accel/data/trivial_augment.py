"""TrivialAugment, wide space: one random operation of random strength per image.

Operation and strength come from hash words, so the result is a pure function of them. Geometric operations use nearest-neighbor
sampling and fill with black; strengths have 31 levels.

References:
    Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021, table 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_STEPS = 31


def trivial_augment(image: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Apply one operation to an image.

    Args:
        image: Image, uint8 [S, S, 3].
        words: Three or more uint64 hash words: operation, strength, sign.

    Returns:
        Augmented image, uint8 [S, S, 3].
    """
    operation = _OPERATIONS[int(words[0] >> np.uint64(32)) % len(_OPERATIONS)]
    strength = int(words[1] >> np.uint64(32)) % _STEPS / (_STEPS - 1)
    sign = 1.0 if words[2] >> np.uint64(63) else -1.0
    return np.asarray(operation(Image.fromarray(image), strength, sign))


Operation = Callable[[Image.Image, float, float], Image.Image]
"""Function (image, strength in 0..1, sign) -> image."""


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST)


def _enhance(kind: type) -> Operation:
    return lambda image, strength, sign: kind(image).enhance(1 + 0.99 * sign * strength)


_OPERATIONS: tuple[Operation, ...] = (
    lambda image, strength, sign: image,
    lambda image, strength, sign: _affine(image, 1, 0.99 * sign * strength, 0, 0, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, 0, 0.99 * sign * strength, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, round(32 * sign * strength), 0, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, 0, 0, 1, round(32 * sign * strength)),
    lambda image, strength, sign: image.rotate(135 * sign * strength, Image.Resampling.NEAREST),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Sharpness),
    lambda image, strength, sign: ImageOps.posterize(image, 8 - round(6 * strength)),
    lambda image, strength, sign: ImageOps.solarize(image, round(255 * (1 - strength))),
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
)
