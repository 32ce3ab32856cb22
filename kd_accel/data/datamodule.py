"""Data module: source splits, their selected samples, channel statistics, and the loaders over them.

Input: the data settings. Output: training and evaluation loaders, batches of given samples and view, and sample digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kd_accel.config.schema import DataConfig
from kd_accel.data.dataset import samples_digest
from kd_accel.data.folders import quoted
from kd_accel.data.loader import EvalLoader, Share, TrainLoader, load_batches, make_batch
from kd_accel.data.sources import ImageSet, load_splits
from kd_accel.data.splits import HeldOutSplit, Split, SplitSamples, channel_statistics, split_samples
from kd_accel.data.transforms import ViewTransform
from kd_accel.types import Batch

_COPIED_SAMPLES = 1024
_FEW_SAMPLES, _SMALL_IMAGE = 128, 32
"""Forward passes with fewer images of at most this size, in pixels, are bound by a GPU's kernel launches."""


@dataclass(frozen=True)
class DataModule:
    """Data of a run: images and labels, the samples of each split, and their augmentation.

    Attributes:
        train: Source split of the training and validation samples.
        test: Source split of the test samples.
        splits: Sample indices of train, val and test.
        mean: Channel means in 0..1 that the trained model is normalized with.
        std: Channel standard deviations in 0..1.
        transform: Augmentation of the training samples.
        num_views: Number of different views of each sample; None = a new view in each epoch.
        num_workers: Number of worker processes that prepare batches; 0 = the calling process prepares them.
    """

    train: ImageSet
    test: ImageSet
    splits: SplitSamples
    mean: list[float]
    std: list[float]
    transform: ViewTransform
    num_views: int | None = None
    num_workers: int = 0

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names, by label."""
        return self.train.label_names

    @property
    def notices(self) -> list[str]:
        """Lines for the user about the source: files that are left out, and classes without samples."""
        counts = np.bincount(self.train.labels, minlength=len(self.label_names))
        empty = [name for name, count in zip(self.label_names, counts, strict=True) if not count]
        lines = [f"data: {len(empty)} of {len(counts)} classes have no training sample: {quoted(empty)}"] if empty else []
        return [*self.train.notices, *self.test.notices, *lines]

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the classes, sample counts and sample digest that identify the data of a run, independent of its path."""
        return {
            "label_names": list(self.label_names),
            "train_samples": len(self.splits.train),
            "val_samples": len(self.splits.val),
            "test_samples": len(self.splits.test),
            "digest": samples_digest(self.train, self.splits.train),
        }

    def covered_samples(self) -> dict[Split, tuple[np.ndarray, np.ndarray]]:
        """Return each split's sample indices, int64 [n], and the digests of image and label, uint64 [n]."""
        return {split: (indices, self._images(split).digests(indices)) for split, indices in self.splits.by_name().items()}

    def train_loader(
        self,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        grad_accum_steps: int = 1,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> TrainLoader:
        """Create the loader of one rank's augmented training batches.

        Args:
            batch_size: Number of samples per optimizer step, over all ranks and accumulation steps.
            rank: Rank of this process.
            world_size: Number of processes.
            grad_accum_steps: Number of micro-batches per optimizer step.
            seed: Seed of the order of the samples.
            pin_memory: Whether batches are in page-locked memory.

        Raises:
            UserError: If the batch size is not divisible by ranks and accumulation steps, or exceeds the number of samples.
        """
        return TrainLoader(
            self.train,
            self.transform,
            samples=self.splits.train,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            grad_accum_steps=grad_accum_steps,
            seed=seed,
            views=self.num_views,
            num_workers=self.num_workers,
            pin_memory=pin_memory,
        )

    def eval_loader(
        self, split: HeldOutSplit, *, batch_size: int, rank: int = 0, world_size: int = 1, pin_memory: bool = False
    ) -> EvalLoader:
        """Create the loader of one rank's share of a held-out split, without augmentation."""
        return EvalLoader(
            self._images(split),
            samples=self.splits.by_name()[split],
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            pin_memory=pin_memory,
        )

    def batches(self, split: Split, shares: Sequence[Share], *, pin_memory: bool = False) -> Iterator[Batch]:
        """Yield one batch for each (indices, view): augmented views of train, images without augmentation of val and test."""
        transform = self.transform if split == "train" else None
        return load_batches(self._images(split), transform, shares, num_workers=self.num_workers, pin_memory=pin_memory)

    def view_batch(self, indices: np.ndarray, view: int) -> Batch:
        """Compute one view of training samples, in host memory. indices: int64 [n], positions in the source split."""
        pixels = self.transform(self.train.pixels(indices), indices, view)
        return make_batch(pixels, self.train.labels[indices], indices, view)

    def _images(self, split: Split) -> ImageSet:
        return self.test if split == "test" else self.train


def load_data(config: DataConfig) -> DataModule:
    """Read the source, split the samples, and compute mean and standard deviation unless the config sets them.

    Raises:
        UserError: If the source cannot be read or does not match the settings.
    """
    train, test = load_splits(config)
    splits = split_samples(train.num_samples, test.num_samples, config)
    if config.mean is not None and config.std is not None:
        mean, std = config.mean, config.std
    else:
        mean, std = channel_statistics(train, splits.train)
    transform = ViewTransform(
        augment=config.augment,
        image_size=config.image_size,
        crop_padding=config.crop_padding,
        view_seed=config.view_seed,
    )
    num_views = 1 if config.augment == "none" else config.views
    return DataModule(train, test, splits, mean, std, transform, num_views, config.num_workers)


def keep_images_on_gpu(loader: TrainLoader, data: DataModule, device: torch.device) -> None:
    """Store the training images on `device` if it is a GPU with enough free memory that can compute the views."""
    needed_bytes = len(data.splits.train) * 3 * data.transform.image_size**2
    if device.type == "cuda" and data.transform.supports_device and fits_on_gpu(needed_bytes, device):
        loader.keep_images(images_on(device, data))


def fits_on_gpu(needed_bytes: int, device: torch.device) -> bool:
    """Return whether `needed_bytes` are at most half of a GPU's free memory; training needs the other half."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return 2 * needed_bytes <= free_bytes


def images_on(device: torch.device, data: DataModule) -> torch.Tensor:
    """Copy the training images to a device, in the order of `data.splits.train`.

    Returns:
        Images, uint8 [N, 3, S, S], channels_last.
    """
    indices, size = data.splits.train, data.transform.image_size
    images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
    shares = [(indices[start : start + _COPIED_SAMPLES], 0) for start in range(0, len(indices), _COPIED_SAMPLES)]
    workers = 0 if data.train.is_in_memory else data.num_workers
    for number, batch in enumerate(load_batches(data.train, None, shares, num_workers=workers)):
        images[number * _COPIED_SAMPLES :][: len(batch.index)] = batch.images.to(device)
    return images


def notices_of_small_batches(
    device: torch.device, *, batch_size: int, image_size: int, processes: int = 1, grad_accum_steps: int = 1
) -> list[str]:
    """Return a notice if a forward pass on a GPU has too few small images to hide the latency of its kernel launches."""
    samples = batch_size // (processes * grad_accum_steps)
    if device.type != "cuda" or samples >= _FEW_SAMPLES or image_size > _SMALL_IMAGE:
        return []
    return [
        f"train.batch_size: {batch_size} over {processes} processes x {grad_accum_steps} accumulation steps gives {samples} "
        f"images of {image_size} pixels in a forward pass, too few to hide the latency of a GPU's kernel launches; use "
        f"{_FEW_SAMPLES} or more per process (and scale optim.lr), or fewer processes"
    ]
