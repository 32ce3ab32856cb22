"""Views: augmented images as a pure function of (view_seed, view, index).

A view has the same pixels at any world size, number of workers, starting epoch and order of calls, so a teacher's outputs for
it can be stored and read later. Every random choice is a hash of (view_seed, view, index); no random generator is used.

Every change of the pixels requires a new VIEWS_VERSION, which is part of a cache's fingerprint; tests compare golden values.

Shapes: pixels uint8 [n, S, S, 3] in NumPy, in either memory format of `ImageSet.pixels`; [n, 3, S, S] on a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kd_accel.config.schema import Augment
from kd_accel.data.dataset import channels_last
from kd_accel.data.hashing import hash_words
from kd_accel.data.trivial_augment import trivial_augment

VIEWS_VERSION = 1
_HASH_KEY = 11
"""Hash key of the views, different from the keys of all other uses of `hash_words`."""
_WORDS = {"crop": 2, "crop_flip": 3, "resized_crop": 5, "trivial_augment": 6}
"""Number of hash words per sample, by policy."""
_AREA_FRACTION = (0.25, 1.0)
_ASPECT_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class ViewTransform:
    """Augmentation of a batch of images, deterministic in (view_seed, view, index).

    Attributes:
        augment: Policy. `none`: the image without augmentation. `crop`: a random crop of the zero-padded image. `crop_flip`:
            the same, mirrored with probability 1/2. `resized_crop`: a crop of 25 to 100 % of the area with an aspect ratio of
            3:4 to 4:3, resized to the image size, mirrored with probability 1/2. `trivial_augment`: crop_flip, then one random
            operation.
        image_size: Side of the square images, in pixels.
        crop_padding: Zero padding of `crop`, `crop_flip` and `trivial_augment`, in pixels.
        view_seed: Seed of the views.
    """

    augment: Augment
    image_size: int
    crop_padding: int = 4
    view_seed: int = 0

    def __call__(self, pixels: np.ndarray, samples: np.ndarray, view: int) -> np.ndarray:
        """Compute one view of images.

        Args:
            pixels: Images, uint8 [n, S, S, 3].
            samples: Index of each image in its source split, int64 [n].
            view: Number of the view.

        Returns:
            Augmented images, uint8 [n, S, S, 3], in new memory.
        """
        assert pixels.shape[1:] == (self.image_size, self.image_size, 3), pixels.shape
        if self.augment == "none":
            return pixels.copy(order="K")
        words = self._words(samples, view)
        if self.augment == "resized_crop":
            images = channels_last(pixels)
            return np.stack([_resized_crop(image, word) for image, word in zip(images, words, strict=True)])
        views = self._crop(pixels, *self._offsets(words))
        if self.augment == "trivial_augment":
            images = channels_last(views)
            return np.stack([trivial_augment(image, word[3:]) for image, word in zip(images, words, strict=True)])
        return views

    @property
    def supports_device(self) -> bool:
        """True if `on_device` supports the policy."""
        return self.augment in ("none", "crop", "crop_flip")

    def on_device(self, pixels: Tensor, samples: np.ndarray, view: int) -> Tensor:
        """Compute one view of images on their device with one gather; the pixels equal those of `__call__`.

        Args:
            pixels: Images, uint8 [n, 3, S, S], on any device.
            samples: Index of each image in its source split, int64 [n].
            view: Number of the view.

        Returns:
            Augmented images, uint8 [n, 3, S, S], in new memory: channels_last, or in the memory format of `pixels` without
            augmentation.
        """
        assert self.supports_device, self.augment
        if self.augment == "none":
            return pixels.clone()
        offsets = self._offsets(self._words(samples, view))
        # A blocking copy to a GPU would synchronize with all queued work.
        top, left, is_mirrored = (torch.from_numpy(array).to(pixels.device, non_blocking=True) for array in offsets)
        steps = torch.arange(self.image_size, device=pixels.device)
        down = top[:, None] + steps
        across = left[:, None] + torch.where(is_mirrored[:, None], self.image_size - 1 - steps, steps)
        border = torch.nn.functional.pad(pixels, [self.crop_padding] * 4)
        image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
        return border.permute(0, 2, 3, 1)[image, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the settings that determine a view's pixels, given the image, its index and the view."""
        shared = {"transform": self.augment, "version": VIEWS_VERSION, "image_size": self.image_size}
        if self.augment == "none":
            return shared
        shared["view_seed"] = self.view_seed
        return shared if self.augment == "resized_crop" else {**shared, "crop_padding": self.crop_padding}

    def _words(self, indices: np.ndarray, view: int) -> np.ndarray:
        return hash_words((_HASH_KEY, self.view_seed, view), indices, _WORDS[self.augment])

    def _offsets(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (top, left, is_mirrored) of each image's crop: int64, int64, bool, each [n]."""
        choices = np.uint64(2 * self.crop_padding + 1)
        top, left = ((words[:, axis] >> np.uint64(32)) % choices for axis in (0, 1))
        is_mirrored = (words[:, 2] >> np.uint64(63)).astype(bool) if self.augment != "crop" else np.zeros(len(words), bool)
        return top.astype(np.int64), left.astype(np.int64), is_mirrored

    def _crop(self, pixels: np.ndarray, top: np.ndarray, left: np.ndarray, is_mirrored: np.ndarray) -> np.ndarray:
        """Crop and mirror the zero-padded images, in their memory format.

        Every possible crop of an image is an overlapping view of its padded memory. So all crops of a batch form one strided
        array [n, top, left, plane, row], and one crop per image is selected by advanced indexing. An item of that array is a
        complete row of pixels, of NumPy's void type: copying rows is several times as fast as copying single bytes.
        """
        count, size, padding = len(pixels), self.image_size, self.crop_padding
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
        views = np.ascontiguousarray(crops[np.arange(count), top, left]).view(np.uint8).reshape(images.shape)
        mirrored = np.flatnonzero(is_mirrored)
        views[mirrored] = torch.from_numpy(views[mirrored]).flip(3 if is_channels_first else 2).numpy()
        return views.transpose(0, 2, 3, 1) if is_channels_first else views


def Identity(image_size: int) -> ViewTransform:  # noqa: N802  (transforms are named like those of torchvision)
    """Return a transform without augmentation. image_size: in pixels."""
    return ViewTransform("none", image_size)


def Crop(image_size: int, *, padding: int = 4) -> ViewTransform:  # noqa: N802
    """Return a transform: random crop of the zero-padded image (He et al., CVPR 2016). image_size, padding: in pixels."""
    return ViewTransform("crop", image_size, padding)


def CropFlip(image_size: int, *, padding: int = 4) -> ViewTransform:  # noqa: N802
    """Return a transform: `Crop`, then mirrored with probability 1/2. image_size, padding: in pixels."""
    return ViewTransform("crop_flip", image_size, padding)


def ResizedCrop(image_size: int) -> ViewTransform:  # noqa: N802
    """Return a transform: random crop of 25 to 100 % of the area, resized to image_size pixels, mirrored with probability 1/2.

    References:
        Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6.
    """
    return ViewTransform("resized_crop", image_size)


def TrivialAugment(image_size: int, *, padding: int = 4) -> ViewTransform:  # noqa: N802
    """Return a transform: `CropFlip`, then one random operation. image_size, padding: in pixels.

    References:
        Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021.
    """
    return ViewTransform("trivial_augment", image_size, padding)


def _resized_crop(image: np.ndarray, words: np.ndarray) -> np.ndarray:
    size = len(image)
    area = size * size * _between(words[0], *_AREA_FRACTION)
    ratio = np.exp(_between(words[1], *np.log(_ASPECT_RATIO)))
    width, height = (min(float(size), float(np.sqrt(area * factor))) for factor in (ratio, 1 / ratio))
    left, top = _between(words[2], 0, size - width), _between(words[3], 0, size - height)
    box = (left, top, left + width, top + height)
    crop = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))
    return crop[:, ::-1] if words[4] >> np.uint64(63) else crop


def _between(word: np.uint64, low: float, high: float) -> float:
    """Map a 64-bit word to [low, high), by its upper 53 bits."""
    return low + (high - low) * (int(word) >> 11) / (1 << 53)
