"""Operations that make a view: random crops, mirroring, color changes, erasing and mixing, as functions of hash words.

Input: images and one row of hash words per image. Output: images, in new memory or that of the input. Each operation is its
settings, declared in `config/transform_schema.py`, with a `__call__`. `mixing.py` computes mixtures of two samples.

Shapes: n images, S side in pixels; images are uint8 [n, S, S, 3], in either memory format of `ImageSet.pixels`. Hash words are
uint64 [n, num_words].

References:
    TorchVision 0.29, `torchvision.transforms`: names, defaults and definitions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from kd_accel.config.transform_schema import (
    MAX_AUGMENT_OPS,
    ColorJitterSettings,
    CutMixSettings,
    MixUpSettings,
    RandAugmentSettings,
    RandomCropSettings,
    RandomErasingSettings,
    RandomHorizontalFlipSettings,
    RandomResizedCropSettings,
    TransformSettings,
    TrivialAugmentWideSettings,
)
from kd_accel.data.dataset import channels_last
from kd_accel.data.decode import Crop, Decoder
from kd_accel.data.hashing import uniform
from kd_accel.data.image_operations import AugmentSpace, jitter_color, rand_augment, trivial_augment
from kd_accel.data.resize import Box

_TRIES = 10
"""Number of random rectangles that are tried before the fallback, as in torchvision."""


class Transform(TransformSettings):
    """Base class of the transforms.

    Raises:
        ValueError: If a setting is not valid.
    """

    def model_post_init(self, context: object) -> None:
        """Raise ValueError for the first broken rule."""
        if problem := next(self.problems(), None):
            raise ValueError(problem)


class Operation(Transform, ABC):
    """Step from images to images; abstract.

    Attributes:
        num_words: Number of hash words per image.
        is_in_place: Whether the images are changed in their memory.
    """

    num_words: ClassVar[int]
    is_in_place: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, pixels: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Apply the operation.

        Args:
            pixels: Images, uint8 [n, S, S, 3].
            words: Hash words, uint64 [n, num_words].

        Returns:
            Images, uint8 [n, S, S, 3].
        """


class RandomCrop(RandomCropSettings, Operation):
    """Random crop of the zero-padded image. Settings: padding, in pixels."""

    num_words: ClassVar[int] = 2

    def offsets(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (top, left) of each crop in the padded image: int64 [n]."""
        choices = np.uint64(2 * self.padding + 1)
        top, left = ((words[:, axis] >> np.uint64(32)) % choices for axis in (0, 1))
        return top.astype(np.int64), left.astype(np.int64)

    def __call__(self, pixels: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Crop the zero-padded images, in their memory format.

        Every possible crop of an image is an overlapping view of its padded memory. So all crops of a batch form one strided
        array [n, top, left, plane, row], and one crop per image is selected by advanced indexing. An item of that array is a
        complete row of pixels, of NumPy's void type: copying rows is several times as fast as copying single bytes.
        """
        count, size, padding = len(pixels), pixels.shape[1], self.padding
        is_channels_first = pixels.strides[2] == 1
        # A row has one channel (three planes) or interleaved RGB (one plane); a step to the right is 1 or 3 bytes.
        planes, step = (3, 1) if is_channels_first else (1, 3)
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) if is_channels_first else pixels)
        row, choices, padded_size = f"V{size * step}", 2 * padding + 1, size + 2 * padding
        padded = np.zeros((count, planes, padded_size, padded_size * step), dtype=np.uint8)
        by_image, by_plane, by_row, _ = padded.strides
        # A crop one pixel further down starts a row later, and a crop one pixel further right starts `step` bytes later.
        strides = (by_image, by_row, step, by_plane, by_row)
        crops = np.ndarray((count, choices, choices, planes, size), row, padded, 0, strides)
        # Writing the images as their centered crops fills the padded array.
        crops[:, padding, padding] = images.reshape(count, planes, size, size * step).view(row)[..., 0]
        top, left = self.offsets(words)
        views = np.ascontiguousarray(crops[np.arange(count), top, left]).view(np.uint8).reshape(images.shape)
        return views.transpose(0, 2, 3, 1) if is_channels_first else views


class RandomResizedCrop(RandomResizedCropSettings, Operation):
    """Random crop of the original image, resized to the image size. Settings: scale, ratio, interpolation."""

    num_words: ClassVar[int] = 2 * _TRIES + 2

    def crops(self, words: np.ndarray) -> list[Crop]:
        """Return the crop of each image, which may have any size. words: Hash words, uint64 [n, num_words]."""
        return [Crop(partial(self._box, draws), self.interpolation) for draws in uniform(words).tolist()]

    def _box(self, draws: list[float], width: int, height: int) -> Box:
        """Choose the crop of an image, as torchvision does: the first that fits, of random area and aspect ratio.

        The area is uniform in `scale`, and the logarithm of the aspect ratio is uniform.

        Args:
            draws: `num_words` numbers in [0, 1).
            width: Width of the image, in pixels.
            height: Height of the image, in pixels.
        """
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for draw in range(0, 2 * _TRIES, 2):
            area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * draws[draw])
            aspect = math.exp(low + (high - low) * draws[draw + 1])
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left, top = int(draws[-2] * (width - crop_width + 1)), int(draws[-1] * (height - crop_height + 1))
                return left, top, crop_width, crop_height
        return self._central(width, height)

    def _central(self, width: int, height: int) -> Box:
        """Return the largest centered crop of an allowed aspect ratio."""
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        crop_width, crop_height = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
        return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height

    def __call__(self, pixels: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Crop and resize images that are squares of the image size already."""
        images, decoder = channels_last(pixels), Decoder(pixels.shape[1])
        return np.stack([decoder.fit_array(image, crop) for image, crop in zip(images, self.crops(words), strict=True)])


class RandomHorizontalFlip(RandomHorizontalFlipSettings, Operation):
    """Mirror image, left and right exchanged. Settings: p."""

    num_words: ClassVar[int] = 1
    is_in_place: ClassVar[bool] = True

    def is_mirrored(self, words: np.ndarray) -> np.ndarray:
        """Return whether each image is mirrored: bool [n]."""
        return uniform(words[:, 0]) < self.p

    def __call__(self, pixels: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Mirror some of the images, in place."""
        chosen = np.flatnonzero(self.is_mirrored(words))
        # Of NumPy, PyTorch and Pillow, PyTorch mirrors a batch fastest.
        if pixels.strides[2] == 1:
            planes = pixels.transpose(0, 3, 1, 2)
            planes[chosen] = torch.from_numpy(planes[chosen]).flip(3).numpy()
        else:
            pixels[chosen] = torch.from_numpy(pixels[chosen]).flip(2).numpy()
        return pixels


class RandomErasing(RandomErasingSettings, Operation):
    """Random rectangle in one color. Settings: p, scale, ratio, value."""

    num_words: ClassVar[int] = 2 * _TRIES + 3
    is_in_place: ClassVar[bool] = True

    def boxes(self, size: int, words: np.ndarray) -> np.ndarray:
        """Return (left, top, width, height) of each rectangle, int64 [n, 4]; the width is 0 where nothing is erased."""
        draws = uniform(words)
        area = size * size * (self.scale[0] + (self.scale[1] - self.scale[0]) * draws[:, : 2 * _TRIES : 2])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = np.exp(low + (high - low) * draws[:, 1 : 2 * _TRIES : 2])
        heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (heights < size) & (widths < size)
        first = np.arange(len(words)), fits.argmax(1)
        height, width = heights[first], widths[first]
        left, top = np.floor(draws[:, -3] * (size - width + 1)), np.floor(draws[:, -2] * (size - height + 1))
        is_erased = fits.any(1) & (draws[:, -1] < self.p)
        return np.stack([left, top, np.where(is_erased, width, 0), height], axis=1).astype(np.int64)

    def __call__(self, pixels: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Fill the rectangles, in place."""
        for image, (left, top, width, height) in zip(pixels, self.boxes(pixels.shape[1], words).tolist(), strict=True):
            image[top : top + height, left : left + width] = self.value
        return pixels


class _ImageOperation(Operation, ABC):
    """Operation on one Pillow image at a time."""

    @abstractmethod
    def apply(self, image: Image.Image, words: list[int]) -> Image.Image:
        """Apply the operation to one image. words: hash words of the image."""

    def __call__(self, pixels: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Apply the operation to each image."""
        images = channels_last(pixels)
        views = np.empty_like(images)
        for view, image, word in zip(views, images, words.tolist(), strict=True):
            view[:] = np.asarray(self.apply(Image.fromarray(image), word))
        return views


class RandAugment(RandAugmentSettings, _ImageOperation):
    """Several random operations of equal magnitude. Settings: num_ops, magnitude, num_magnitude_bins."""

    num_words: ClassVar[int] = 2 * MAX_AUGMENT_OPS

    def apply(self, image: Image.Image, words: list[int]) -> Image.Image:
        """Apply `num_ops` random operations to one image."""
        space = AugmentSpace(self.num_magnitude_bins, is_wide=False)
        return rand_augment(image, words, space, num_ops=self.num_ops, magnitude=self.magnitude)


class TrivialAugmentWide(TrivialAugmentWideSettings, _ImageOperation):
    """One random operation of random magnitude. Settings: num_magnitude_bins."""

    num_words: ClassVar[int] = 3

    def apply(self, image: Image.Image, words: list[int]) -> Image.Image:
        """Apply one random operation to one image."""
        return trivial_augment(image, words, AugmentSpace(self.num_magnitude_bins, is_wide=True))


class ColorJitter(ColorJitterSettings, _ImageOperation):
    """Random brightness, contrast, saturation and hue, in random order. Settings: those four."""

    num_words: ClassVar[int] = 8

    def apply(self, image: Image.Image, words: list[int]) -> Image.Image:
        """Change brightness, contrast, saturation and hue of one image, in random order."""
        ranges = {name: _factor_range(getattr(self, name)) for name in ("brightness", "contrast", "saturation")}
        hue = self.hue if isinstance(self.hue, list) else [-self.hue, self.hue]
        return jitter_color(image, words, {**ranges, "hue": hue})


class MixUp(MixUpSettings, Transform):
    """Weighted mean of two training samples and of their labels. Settings: alpha, p."""


class CutMix(CutMixSettings, Transform):
    """Random rectangle from another training sample, with its share of the label. Settings: alpha, p."""


OPERATIONS: Mapping[str, type[Transform]] = {
    "random_resized_crop": RandomResizedCrop,
    "random_crop": RandomCrop,
    "random_horizontal_flip": RandomHorizontalFlip,
    "rand_augment": RandAugment,
    "trivial_augment_wide": TrivialAugmentWide,
    "color_jitter": ColorJitter,
    "random_erasing": RandomErasing,
    "mixup": MixUp,
    "cutmix": CutMix,
}
"""Transforms by the name that configs use."""


def operation_name(operation: Transform) -> str:
    """Return the name of a transform in a config."""
    return next(name for name, kind in OPERATIONS.items() if type(operation) is kind)


def _factor_range(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [max(0.0, 1 - value), 1 + value]
