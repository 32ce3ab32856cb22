"""A view is a pure function of (view_seed, view, sample): the same pixels at any world size, worker count, start and order.

So a teacher's answers can be kept: who asks later for the same view of the same sample gets the same pixels. Every choice is a
hash of (view_seed, view, sample); no generator is touched. A change of what any policy gives is a change of VIEWS_VERSION, and
tests hold golden values to notice it.

Shapes: pixels uint8 [n, S, S, 3] in numpy, in either layout of `ImageSet.pixels`; [n, 3, S, S] on a device.
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
_PURPOSE = 11
_WORDS = {"crop": 2, "crop_flip": 3, "resized_crop": 5, "trivial_augment": 6}
_AREA_FRACTION = (0.25, 1.0)
_ASPECT_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class ViewTransform:
    """The pixels of a view.

    augment: none; crop = a shifted cut from the image with a zero border of crop_padding pixels; crop_flip = that, half of
    them mirrored; resized_crop = a cut of 25 to 100 % of the area and 3:4 to 4:3, scaled back, half of them mirrored;
    trivial_augment = crop_flip, then one random operation (Müller and Hutter, "TrivialAugment", 2021).
    """

    augment: Augment
    image_size: int
    crop_padding: int = 4
    view_seed: int = 0

    def __call__(self, pixels: np.ndarray, samples: np.ndarray, view: int) -> np.ndarray:
        """Images and their samples -> the same number of images, new memory. pixels: uint8 [n, S, S, 3]; samples: int64 [n]."""
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
        """Whether `on_device` can make these views."""
        return self.augment in ("none", "crop", "crop_flip")

    def on_device(self, pixels: Tensor, samples: np.ndarray, view: int) -> Tensor:
        """The same views, bit for bit, from uint8 images [n, 3, S, S] on any device, by one gather per axis."""
        assert self.supports_device, self.augment
        if self.augment == "none":
            return pixels.clone()
        offsets = self._offsets(self._words(samples, view))
        # non_blocking: a plain copy to a GPU waits for the work that is queued there
        top, left, is_mirrored = (torch.from_numpy(array).to(pixels.device, non_blocking=True) for array in offsets)
        steps = torch.arange(self.image_size, device=pixels.device)
        down = top[:, None] + steps
        across = left[:, None] + torch.where(is_mirrored[:, None], self.image_size - 1 - steps, steps)
        border = torch.nn.functional.pad(pixels, [self.crop_padding] * 4)
        image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
        return border.permute(0, 2, 3, 1)[image, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)

    def fingerprint_fields(self) -> dict[str, Any]:
        """What decides the pixels of a view, besides the image, the sample and the view."""
        shared = {"policy": self.augment, "version": VIEWS_VERSION, "image_size": self.image_size}
        if self.augment == "none":
            return shared
        shared["view_seed"] = self.view_seed
        return shared if self.augment == "resized_crop" else {**shared, "crop_padding": self.crop_padding}

    def _words(self, samples: np.ndarray, view: int) -> np.ndarray:
        return hash_words((_PURPOSE, self.view_seed, view), samples, _WORDS[self.augment])

    def _offsets(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(top, left, is mirrored) of each image's cut, int64 and bool [n]."""
        choices = np.uint64(2 * self.crop_padding + 1)
        top, left = ((words[:, axis] >> np.uint64(32)) % choices for axis in (0, 1))
        is_mirrored = (words[:, 2] >> np.uint64(63)).astype(bool) if self.augment != "crop" else np.zeros(len(words), bool)
        return top.astype(np.int64), left.astype(np.int64), is_mirrored

    def _crop(self, pixels: np.ndarray, top: np.ndarray, left: np.ndarray, is_mirrored: np.ndarray) -> np.ndarray:
        """In the layout of the images. Whole lines are copied: value by value takes several times as long."""
        count, size, padding = len(pixels), self.image_size, self.crop_padding
        is_channels_first = pixels.strides[2] == 1
        planes, step = (3, 1) if is_channels_first else (1, 3)  # step: bytes from a column to the next
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) if is_channels_first else pixels)
        line, choices, bordered = f"V{size * step}", 2 * padding + 1, size + 2 * padding
        border = np.zeros((count, planes, bordered, bordered * step), dtype=np.uint8)
        image, plane, sample, _ = border.strides
        cuts = np.ndarray((count, choices, choices, planes, size), line, border, 0, (image, sample, step, plane, sample))
        cuts[:, padding, padding] = images.reshape(count, planes, size, size * step).view(line)[..., 0]
        views = np.ascontiguousarray(cuts[np.arange(count), top, left]).view(np.uint8).reshape(images.shape)
        mirrored = np.flatnonzero(is_mirrored)
        views[mirrored] = torch.from_numpy(views[mirrored]).flip(3 if is_channels_first else 2).numpy()
        return views.transpose(0, 2, 3, 1) if is_channels_first else views


def _resized_crop(image: np.ndarray, words: np.ndarray) -> np.ndarray:
    size = len(image)
    area = size * size * _between(words[0], *_AREA_FRACTION)
    ratio = np.exp(_between(words[1], *np.log(_ASPECT_RATIO)))
    width, height = (min(float(size), float(np.sqrt(area * factor))) for factor in (ratio, 1 / ratio))
    left, top = _between(words[2], 0, size - width), _between(words[3], 0, size - height)
    box = (left, top, left + width, top + height)
    cut = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))
    return cut[:, ::-1] if words[4] >> np.uint64(63) else cut


def _between(word: np.uint64, low: float, high: float) -> float:
    return low + (high - low) * (int(word) >> 11) / (1 << 53)
