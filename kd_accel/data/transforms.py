"""Views: augmented images as a pure function of (view_seed, view, index).

A view has the same pixels at any world size, number of workers, starting epoch and order of calls, so a teacher's outputs for
it can be stored and read later. Every random choice is a hash of (view_seed, view, operation, index); no random generator is
used.

Every change of the pixels requires a new VIEWS_VERSION, which is part of a cache's fingerprint; tests compare golden values.

With mixup or cutmix a view is also a function of the list of the training samples, because the sample that is mixed in is one
of them.

Shapes: pixels uint8 [n, S, S, 3] in NumPy, in either memory format of `ImageSet.pixels`; [n, 3, S, S] on a device. With mixup
they are float32, in 0..255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_accel.config.data_schema import DataConfig
from kd_accel.config.transform_schema import MixingSettings, TransformConfig, mixing_problems, transform_config
from kd_accel.data.dataset import ImageReader
from kd_accel.data.hashing import hash_words
from kd_accel.data.mixing import NUM_WORDS, Mix, draw_mix, in_boxes
from kd_accel.data.operations import (
    OPERATIONS,
    ColorJitter,
    CutMix,
    MixUp,
    Operation,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Transform,
    TrivialAugmentWide,
    operation_name,
)
from kd_accel.io.hashing import arrays_digest

__all__ = [
    "ColorJitter",
    "Compose",
    "Crop",
    "CropFlip",
    "CutMix",
    "Identity",
    "MixUp",
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
_MIX_KEY = _OPERATION_KEYS["mixup"]
"""Key of the words of mixup and cutmix, of which a sample gets at most one."""
_GATHERED = (RandomCrop, RandomHorizontalFlip)
"""Operations that a device computes as one gather."""


@dataclass(frozen=True)
class ViewTransform:
    """Augmentation of a batch of images, deterministic in (view_seed, view, index).

    Attributes:
        operations: Transforms in their order; a `RandomResizedCrop` must be the first, `MixUp` and `CutMix` the last. Empty =
            images without augmentation.
        image_size: Side of the square images, in pixels.
        view_seed: Seed of the views.
        partners: Indices of the training samples, int64 [N], among which `MixUp` and `CutMix` draw; set by `DataModule`.

    Raises:
        ValueError: If a transform occurs twice, or at a place where it cannot be.
    """

    operations: tuple[Transform, ...]
    image_size: int
    view_seed: int = 0
    partners: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        names = [operation_name(operation) for operation in self.operations]
        if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
            raise ValueError(f"operations: {repeated[0]} occurs twice; use each operation once")
        if "random_resized_crop" in names[1:]:
            raise ValueError("operations: random_resized_crop must be the first, because it cuts from the original image")
        for problem in mixing_problems(dict(zip(names, self.operations, strict=True))):
            raise ValueError(f"operations: {problem}")

    @classmethod
    def from_config(cls, config: DataConfig) -> ViewTransform:
        """Create the transform of the data settings."""
        return cls(operations_of(transform_config(config.transform)), config.image_size, config.view_seed)

    @property
    def needs_originals(self) -> bool:
        """True if views are cut from the original images, and not from squares of the image size."""
        return bool(self.operations) and isinstance(self.operations[0], RandomResizedCrop)

    @property
    def is_identity(self) -> bool:
        """True if all views equal the images."""
        return not self.operations

    @property
    def mixing(self) -> tuple[MixingSettings, ...]:
        """`MixUp` and `CutMix`, in their order."""
        return tuple(each for each in self.operations if isinstance(each, MixingSettings))

    @property
    def unmixed(self) -> tuple[Operation, ...]:
        """All transforms but `MixUp` and `CutMix`, in their order."""
        return tuple(each for each in self.operations if isinstance(each, Operation))

    def with_partners(self, samples: np.ndarray) -> ViewTransform:
        """Return the transform for a list of training samples, int64 [N]; the same without `MixUp` and `CutMix`."""
        return replace(self, partners=samples) if self.mixing else self

    def mix(self, samples: np.ndarray, view: int) -> Mix | None:
        """Draw the partner of each sample, and how both are mixed; None without `MixUp` and `CutMix`.

        Args:
            samples: Indices in the source split, int64 [n].
            view: Number of the view.
        """
        if not self.mixing:
            return None
        assert self.partners is not None, "set by DataModule"
        words = hash_words((_HASH_KEY, self.view_seed, view, _MIX_KEY), samples, NUM_WORDS)
        return draw_mix(self.mixing, words, samples, self.partners, size=self.image_size)

    def labels(self, images: ImageReader, samples: np.ndarray, view: int) -> np.ndarray:
        """Return the labels of one view of samples.

        Args:
            images: Source split.
            samples: Indices in the source split, int64 [n].
            view: Number of the view.

        Returns:
            Class indices, int64 [n]; with `MixUp` or `CutMix` the share of each class, float32 [n, C].
        """
        mix = self.mix(samples, view)
        if mix is None:
            return images.labels_of(samples)
        return mix.labels(images.labels_of(samples), images.labels_of(mix.partners), num_classes=len(images.label_names))

    def view(self, images: ImageReader, samples: np.ndarray, view: int) -> np.ndarray:
        """Read samples and compute one view of them.

        Args:
            images: Source split.
            samples: Indices in the source split, int64 [n].
            view: Number of the view.

        Returns:
            Augmented images, [n, S, S, 3]: uint8, or float32 in 0..255 with `MixUp`.

        Raises:
            UserError: If an image cannot be decoded.
        """
        views, mix = self._unmixed_view(images, samples, view), self.mix(samples, view)
        if mix is None:
            return views
        partners = mix.partners[mix.mixed]
        return mix.pixels(views, self._unmixed_view(images, partners, view) if len(partners) else views[:0])

    def _unmixed_view(self, images: ImageReader, samples: np.ndarray, view: int) -> np.ndarray:
        operations = self.unmixed
        first = operations[0] if operations else None
        if not isinstance(first, RandomResizedCrop):
            return self._apply(operations, images.pixels(samples), samples, view)
        words = self._words(first, samples, view)
        return self._apply(operations[1:], images.crops(samples, first.crops(words)), samples, view)

    def __call__(self, pixels: np.ndarray, samples: np.ndarray, view: int) -> np.ndarray:
        """Compute one view of images that are squares of the image size.

        Args:
            pixels: Images, uint8 [n, S, S, 3].
            samples: Index of each image in its source split, int64 [n].
            view: Number of the view.

        Returns:
            Augmented images, uint8 [n, S, S, 3], in new memory.

        Raises:
            ValueError: With `MixUp` or `CutMix`, because the images of the partners are not given.
        """
        if self.mixing:
            raise ValueError("operations: mixup and cutmix need the images of other samples; use `view`")
        assert pixels.shape[1:] == (self.image_size, self.image_size, 3), pixels.shape
        operations = self.unmixed
        needs_copy = not operations or operations[0].is_in_place
        return self._apply(operations, pixels.copy(order="K") if needs_copy else pixels, samples, view)

    @property
    def supports_device(self) -> bool:
        """True if `on_device` supports the transforms: crops and mirroring, then perhaps erasing, then perhaps mixing."""
        first, last = self.unmixed[:-1], self.unmixed[-1:]
        is_last_supported = all(isinstance(operation, (*_GATHERED, RandomErasing)) for operation in last)
        return is_last_supported and all(isinstance(operation, _GATHERED) for operation in first)

    def on_device(self, pixels: Tensor, samples: np.ndarray, view: int) -> Tensor:
        """Compute one view of images on their device with one gather; the pixels equal those of `view` before they are mixed.

        Args:
            pixels: Images, uint8 [n, 3, S, S], on any device.
            samples: Index of each image in its source split, int64 [n].
            view: Number of the view.

        Returns:
            Augmented images, as those of `placed`.
        """
        # A blocking copy to a GPU would synchronize with all queued work.
        placements = torch.from_numpy(self.placements(samples, view)).to(pixels.device, non_blocking=True)
        return self.placed(pixels, placements)

    def placements(self, samples: np.ndarray, view: int) -> np.ndarray:
        """Draw the random choices of one view before it is mixed, as a table for `placed`.

        Args:
            samples: Index of each image in its source split, int64 [n].
            view: Number of the view.

        Returns:
            First row and first column in the padded image, and steps between rows and between columns, int64 [4, n]. With
            random erasing also (left, top, width, height) of the rectangle, int64 [8, n].
        """
        top, left, is_mirrored = self._gather(samples, view)
        table = [top, left + (self.image_size - 1) * is_mirrored, np.ones_like(top), np.where(is_mirrored, -1, 1)]
        last = self.unmixed[-1] if self.unmixed else None
        if isinstance(last, RandomErasing):
            table += [*last.boxes(self.image_size, self._words(last, samples, view)).T]
        return np.stack(table)

    def placed(self, pixels: Tensor, placements: Tensor) -> Tensor:
        """Compute one view of images from random choices that are on their device; see `on_device`.

        Args:
            pixels: Images, uint8 [n, 3, S, S], on any device.
            placements: The images' columns of the table of `placements`, on the same device.

        Returns:
            Augmented images, uint8 [n, 3, S, S], in new memory: channels_last, or in the memory format of `pixels` without
            augmentation.
        """
        assert self.supports_device, self.operations
        last = self.unmixed[-1] if self.unmixed else None
        if not isinstance(last, RandomErasing):
            return self._gathered(pixels, placements) if last else pixels.clone()
        views = self._gathered(pixels, placements) if len(self.unmixed) > 1 else pixels
        is_erased = in_boxes(placements[4:].T, size=self.image_size)
        color = torch.tensor(last.value, dtype=torch.uint8).to(pixels.device, non_blocking=True)
        return torch.where(is_erased, color[:, None, None], views)

    def _gathered(self, pixels: Tensor, placements: Tensor) -> Tensor:
        """Crop and mirror images on their device; see `placed`."""
        pixel = torch.arange(self.image_size, device=pixels.device)
        down, across = torch.addcmul(placements[:2, :, None], placements[2:4, :, None], pixel)
        border = torch.nn.functional.pad(pixels, [self._padding] * 4)
        image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
        return border.permute(0, 2, 3, 1)[image, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the settings that determine a view's pixels, given the images, the index and the view.

        `partners` is a digest of the training samples, of `MixUp` and `CutMix` only.
        """
        transform = {operation_name(operation): operation.model_dump() for operation in self.operations}
        fields: dict[str, Any] = {"transform": transform, "version": VIEWS_VERSION, "image_size": self.image_size}
        if self.is_identity:
            return fields
        # JSON objects have no order. The usual order is not stored, so that another setting does not differ in two fields.
        is_usual = list(transform) == [name for name in OPERATIONS if name in transform]
        if self.partners is not None:
            fields["partners"] = arrays_digest(self.partners)
        return {**fields, "view_seed": self.view_seed, **({} if is_usual else {"order": list(transform)})}

    @classmethod
    def from_fingerprint(cls, fields: Mapping[str, Any]) -> ViewTransform:
        """Create the transform of `fingerprint_fields`, without the list of the partners."""
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

    @property
    def _padding(self) -> int:
        """Zero padding on each side from which a random crop is cut, in pixels."""
        return sum(operation.padding for operation in self.unmixed if isinstance(operation, RandomCrop))

    def _gather(self, samples: np.ndarray, view: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (top, left, is_mirrored) of each view in its padded image, as one gather of both operations."""
        zeros = np.zeros(len(samples), dtype=np.int64)
        top, left, is_mirrored = zeros, zeros, zeros.astype(bool)
        for operation in self.unmixed:
            words = self._words(operation, samples, view)
            if isinstance(operation, RandomCrop):
                top, left = operation.offsets(words)
            elif isinstance(operation, RandomHorizontalFlip):
                is_mirrored = operation.is_mirrored(words)
        if self.unmixed and isinstance(self.unmixed[0], RandomHorizontalFlip):
            # A crop of the mirrored image, and not a mirrored crop.
            left = np.where(is_mirrored, 2 * self._padding - left, left)
        return top, left, is_mirrored


def operations_of(config: TransformConfig) -> tuple[Transform, ...]:
    """Create the transforms of a config, in their order."""
    return tuple(OPERATIONS[name](**settings.model_dump()) for name, settings in config.items())


def Compose(operations: Sequence[Transform], *, image_size: int) -> ViewTransform:  # noqa: N802  (named like torchvision's)
    """Return a transform that applies the transforms of this module in their order.

    Args:
        operations: Transforms, each at most once; a `RandomResizedCrop` must be the first, `MixUp` and `CutMix` the last.
        image_size: Side of the square images, in pixels.

    Raises:
        ValueError: If a transform occurs twice, or at a place where it cannot be.
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
