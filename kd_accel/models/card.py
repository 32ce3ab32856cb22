"""Model card: architecture, classes and preprocessing of a saved model, the content of `model.json`.

The preprocessing is complete: with the card, any program turns an image file into the pixels that the model was evaluated on.
A card of an older version lacks fields that had one value then, which is now their default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from kd_accel.config.data_schema import Background
from kd_accel.config.schema import MAX_IMAGE_SIZE, Stem
from kd_accel.data.decode import DECODE_VERSION
from kd_accel.errors import UserError
from kd_accel.io.files import read_json


@dataclass(frozen=True)
class ModelCard:
    """Architecture, classes and preprocessing of a saved model; the content of `model.json`.

    Attributes:
        arch: Name of the architecture, as for `build_model`.
        stem: Stem of a ResNet.
        arch_args: Additional arguments of the architecture.
        label_names: Name of each class, in the order of the logits.
        mean: Mean per channel for the normalization of images, in 0..1.
        std: Standard deviation per channel for the normalization, in 0..1.
        image_size: Height and width of the training images, in pixels.
        background: Color behind transparent pixels.
        pixel_range: Values that become black and white in images of more than 8 bits per channel; None = the range of the type.
        crop_pct: Side of the central square that is used, as a fraction of the image's shorter side.
        interpolation: Interpolation from this square to the image size, that of Pillow.
        exif_orientation: Whether a file is turned upright by its EXIF orientation before the crop.
        decode_version: Version of the pixels that a file is decoded to (`data/decode.py`).
    """

    arch: str
    stem: Stem
    arch_args: dict[str, Any]
    label_names: list[str]
    mean: list[float]
    std: list[float]
    image_size: int
    background: Background = "black"
    pixel_range: list[float] | None = None
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    exif_orientation: bool = True
    decode_version: int = DECODE_VERSION


_AS_OF_0_1_0 = {
    "background": "black",
    "pixel_range": None,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "exif_orientation": True,
    "decode_version": 1,
}
"""Preprocessing of the versions whose cards lack these fields."""

_APPLIED = {"interpolation": "bicubic", "exif_orientation": True, "decode_version": DECODE_VERSION}
"""The only values with which this version decodes a file."""


def load_card(directory: Path) -> ModelCard:
    """Load `model.json` from a run directory.

    Raises:
        UserError: If the file is missing, empty or damaged.
    """
    path = directory / "model.json"
    content = read_json(path, remedy="no finished run in this directory; train it first, or choose another directory")
    content = {**_AS_OF_0_1_0, **content}
    wrong = [name for name, is_valid in _VALID.items() if not is_valid(content.get(name))]
    if wrong:
        raise UserError(f"{path}: is damaged ({', '.join(wrong)} wrong or missing); train the run again")
    return ModelCard(**{field.name: content[field.name] for field in fields(ModelCard)})


def refuse_other_decoding(card: ModelCard, directory: Path) -> None:
    """Raise UserError if this version cannot compute the pixels that the model was evaluated on.

    Args:
        card: Card of the model.
        directory: Its directory, for the message.
    """
    for name, applied in _APPLIED.items():
        if (stated := getattr(card, name)) != applied:
            raise UserError(
                f"{directory / 'model.json'}: {name} is {stated!r}, but this version of kd_accel decodes images with "
                f"{applied!r}, so its predictions would be those for other pixels; predict with the version that has trained "
                "the run"
            )


def _is_per_channel(values: Any, *, above: float) -> bool:
    """Return whether `values` is a list of three finite numbers greater than `above`."""
    return isinstance(values, list) and len(values) == 3 and all(_is_number(v) and above < v < float("inf") for v in values)


def _is_range(values: Any) -> bool:
    """Return whether `values` is a list of two finite numbers in ascending order."""
    return isinstance(values, list) and len(values) == 2 and all(map(_is_number, values)) and values[0] < values[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_VALID: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str),
    "stem": lambda value: value in get_args(Stem),
    "arch_args": lambda value: isinstance(value, dict),
    "label_names": lambda value: isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value),
    "mean": lambda value: _is_per_channel(value, above=float("-inf")),
    "std": lambda value: _is_per_channel(value, above=0),
    "image_size": lambda value: _is_integer(value) and 0 < value <= MAX_IMAGE_SIZE,
    "background": lambda value: value in get_args(Background),
    "pixel_range": lambda value: value is None or _is_range(value),
    "crop_pct": lambda value: _is_number(value) and 0 < value <= 1,
    "interpolation": lambda value: isinstance(value, str),
    "exif_orientation": lambda value: isinstance(value, bool),
    "decode_version": _is_integer,
}
