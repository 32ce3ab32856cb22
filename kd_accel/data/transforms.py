"""Views: augmented images as a pure function of (view_seed, view, index).

A view has the same pixels at any world size, number of workers, starting epoch and order of calls, so a teacher's outputs for
it can be stored and read later. Every random choice is a hash of (view_seed, view, operation, index); no random generator is
used.

Every change of the pixels requires a new VIEWS_VERSION, which is part of a cache's fingerprint; tests compare golden values.

Shapes: pixels uint8 [n, S, S, 3] in NumPy, in either memory format of `ImageSet.pixels`; [n, 3, S, S] on a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_accel.config.data_schema import DataConfig
from kd_accel.config.transform_schema import TransformConfig, transform_config
from kd_accel.data.dataset import ImageSet
from kd_accel.data.hashing import hash_words
from kd_accel.data.operations import (
    OPERATIONS,
    ColorJitter,
    Operation,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    TrivialAugmentWide,
    operation_name,
)

__all__ = [
    "ColorJitter",
    "Compose",
    "Crop",
    "CropFlip",
    "Identity",
    "RandAugment",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "TrivialAugmentWide",
    "ViewTransform",
]

VIEWS_VERSION = 2
_HASH_KEY = 11
"""Hash key of the views, different from the keys of all other uses of `hash_words`."""
_OPERATION_KEYS = {name: key for key, name in enumerate(OPERATIONS)}
_GATHERED = (RandomCrop, RandomHorizontalFlip)
"""Operations that a device computes as one gather."""


@dataclass(frozen=True)
class ViewTransform:
    """Augmentation of a batch of images, deterministic in (view_seed, view, index).

    Attributes:
        operations: Operations in their order; a `RandomResizedCrop` must be the first. Empty = images without augmentation.
        image_size: Side of the square images, in pixels.
        view_seed: Seed of the views.

    Raises:
        ValueError: If an operation occurs twice, or a `RandomResizedCrop` is not the first.
    """

    operations: tuple[Operation, ...]
    image_size: int
    view_seed: int = 0

    def __post_init__(self) -> None:
        names = [operation_name(operation) for operation in self.operations]
        if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
            raise ValueError(f"operations: {repeated[0]} occurs twice; use each operation once")
        if "random_resized_crop" in names[1:]:
            raise ValueError("operations: random_resized_crop must be the first, because it cuts from the original image")

    @classmethod
    def from_config(cls, config: DataConfig) -> ViewTransform:
        """Create the transform of the data settings."""
        return cls(operations_of(transform_config(config.transform)), config.image_size, config.view_seed)

    @property
    def is_identity(self) -> bool:
        """True if all views equal the images."""
        return not self.operations

    def view(self, images: ImageSet, samples: np.ndarray, view: int) -> np.ndarray:
        """Read samples and compute one view of them.

        Args:
            images: Source split.
            samples: Indices in the source split, int64 [n].
            view: Number of the view.

        Returns:
            Augmented images, uint8 [n, S, S, 3].

        Raises:
            UserError: If an image cannot be decoded.
        """
        first = self.operations[0] if self.operations else None
        if not isinstance(first, RandomResizedCrop):
            return self._apply(self.operations, images.pixels(samples), samples, view)
        words = self._words(first, samples, view)
        return self._apply(self.operations[1:], images.crops(samples, first.crops(words)), samples, view)

    def __call__(self, pixels: np.ndarray, samples: np.ndarray, view: int) -> np.ndarray:
        """Compute one view of images that are squares of the image size.

        Args:
            pixels: Images, uint8 [n, S, S, 3].
            samples: Index of each image in its source split, int64 [n].
            view: Number of the view.

        Returns:
            Augmented images, uint8 [n, S, S, 3], in new memory.
        """
        assert pixels.shape[1:] == (self.image_size, self.image_size, 3), pixels.shape
        needs_copy = not self.operations or self.operations[0].is_in_place
        return self._apply(self.operations, pixels.copy(order="K") if needs_copy else pixels, samples, view)

    @property
    def supports_device(self) -> bool:
        """True if `on_device` supports the operations: crops and mirroring, then perhaps erasing."""
        first, last = self.operations[:-1], self.operations[-1:]
        is_last_supported = all(isinstance(operation, (*_GATHERED, RandomErasing)) for operation in last)
        return is_last_supported and all(isinstance(operation, _GATHERED) for operation in first)

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
        assert self.supports_device, self.operations
        last = self.operations[-1] if self.operations else None
        if not isinstance(last, RandomErasing):
            return self._gathered(pixels, samples, view) if last else pixels.clone()
        views = self._gathered(pixels, samples, view) if len(self.operations) > 1 else pixels
        boxes = torch.from_numpy(last.boxes(self.image_size, self._words(last, samples, view)))
        left, top, width, height = boxes.to(pixels.device, non_blocking=True).T[..., None, None, None]
        steps = torch.arange(self.image_size, device=pixels.device)
        is_erased = (steps >= left) & (steps < left + width) & ((steps >= top) & (steps < top + height)).mT
        color = torch.tensor(last.value, dtype=torch.uint8).to(pixels.device, non_blocking=True)
        return torch.where(is_erased, color[:, None, None], views)

    def _gathered(self, pixels: Tensor, samples: np.ndarray, view: int) -> Tensor:
        """Crop and mirror images on their device; see `on_device`."""
        padding, *offsets = self._gather(samples, view)
        # A blocking copy to a GPU would synchronize with all queued work.
        top, left, is_mirrored = (torch.from_numpy(array).to(pixels.device, non_blocking=True) for array in offsets)
        steps = torch.arange(self.image_size, device=pixels.device)
        down = top[:, None] + steps
        across = left[:, None] + torch.where(is_mirrored[:, None], self.image_size - 1 - steps, steps)
        border = torch.nn.functional.pad(pixels, [padding] * 4)
        image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
        return border.permute(0, 2, 3, 1)[image, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the settings that determine a view's pixels, given the image, its index and the view."""
        transform = {operation_name(operation): operation.model_dump() for operation in self.operations}
        fields: dict[str, Any] = {"transform": transform, "version": VIEWS_VERSION, "image_size": self.image_size}
        if self.is_identity:
            return fields
        # JSON objects have no order. The usual order is not stored, so that another setting does not differ in two fields.
        is_usual = list(transform) == [name for name in OPERATIONS if name in transform]
        return {**fields, "view_seed": self.view_seed, **({} if is_usual else {"order": list(transform)})}

    @classmethod
    def from_fingerprint(cls, fields: Mapping[str, Any]) -> ViewTransform:
        """Create the transform of `fingerprint_fields`."""
        order = fields.get("order") or [name for name in OPERATIONS if name in fields["transform"]]
        config = TransformConfig.model_validate({name: fields["transform"][name] for name in order})
        return cls(operations_of(config), fields["image_size"], fields.get("view_seed", 0))

    def _words(self, operation: Operation, samples: np.ndarray, view: int) -> np.ndarray:
        key = _OPERATION_KEYS[operation_name(operation)]
        return hash_words((_HASH_KEY, self.view_seed, view, key), samples, operation.num_words)

    def _apply(self, operations: Sequence[Operation], pixels: np.ndarray, samples: np.ndarray, view: int) -> np.ndarray:
        for operation in operations:
            pixels = operation(pixels, self._words(operation, samples, view))
        return pixels

    def _gather(self, samples: np.ndarray, view: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Return padding, and (top, left, is_mirrored) of each view in its padded image, as one gather of both operations."""
        zeros = np.zeros(len(samples), dtype=np.int64)
        padding, top, left, is_mirrored = 0, zeros, zeros, zeros.astype(bool)
        for operation in self.operations:
            words = self._words(operation, samples, view)
            if isinstance(operation, RandomCrop):
                padding, (top, left) = operation.padding, operation.offsets(words)
            elif isinstance(operation, RandomHorizontalFlip):
                is_mirrored = operation.is_mirrored(words)
        if self.operations and isinstance(self.operations[0], RandomHorizontalFlip):
            # A crop of the mirrored image, and not a mirrored crop.
            left = np.where(is_mirrored, 2 * padding - left, left)
        return padding, top, left, is_mirrored


def operations_of(config: TransformConfig) -> tuple[Operation, ...]:
    """Create the operations of a config, in their order."""
    return tuple(OPERATIONS[name](**settings.model_dump()) for name, settings in config.items())


def Compose(operations: Sequence[Operation], *, image_size: int) -> ViewTransform:  # noqa: N802  (named like torchvision's)
    """Return a transform that applies operations in their order.

    Args:
        operations: Operations of this module, each at most once; a `RandomResizedCrop` must be the first.
        image_size: Side of the square images, in pixels.

    Raises:
        ValueError: If an operation occurs twice, or a `RandomResizedCrop` is not the first.
    """
    return ViewTransform(tuple(operations), image_size)


def Identity(image_size: int) -> ViewTransform:  # noqa: N802
    """Return a transform without augmentation. image_size: in pixels."""
    return ViewTransform((), image_size)


def Crop(image_size: int, *, padding: int = 4) -> ViewTransform:  # noqa: N802
    """Return a transform for images that must not be mirrored, such as digits: random crop of the zero-padded image.

    Args:
        image_size: Side of the square images, in pixels.
        padding: Zero padding on each side, in pixels.
    """
    return ViewTransform((RandomCrop(padding=padding),), image_size)


def CropFlip(image_size: int, *, padding: int = 4) -> ViewTransform:  # noqa: N802
    """Return the usual transform of CIFAR: random crop of the zero-padded image, mirrored with probability 1/2.

    Args:
        image_size: Side of the square images, in pixels.
        padding: Zero padding on each side, in pixels.

    References:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """
    return ViewTransform((RandomCrop(padding=padding), RandomHorizontalFlip()), image_size)
