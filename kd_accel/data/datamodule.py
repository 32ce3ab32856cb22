"""Data module: source splits, their selected samples, channel statistics, and the loaders over them.

Input: the data settings. Output: training and evaluation loaders, batches of given samples and view, and sample digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from kd_accel.config.schema import DataConfig
from kd_accel.data.batches import BatchLoader, Share, make_batch
from kd_accel.data.dataset import ImageReader, samples_digest
from kd_accel.data.decode import Decoder
from kd_accel.data.duplicates import Part, leak_notices
from kd_accel.data.inventory import Inventory
from kd_accel.data.labels import refuse_unlabeled
from kd_accel.data.loader import EvalLoader, TrainLoader
from kd_accel.data.passes import Peers
from kd_accel.data.sources import ImageSet, load_splits, load_unlabeled
from kd_accel.data.splits import HeldOutSplit, Split, SplitSamples, channel_statistics, split_samples
from kd_accel.data.transforms import ViewTransform
from kd_accel.data.unlabeled import UNLABELED_OFFSET, JoinedImages, Turns, samples_per_epoch
from kd_accel.types import Batch

if TYPE_CHECKING:
    from kd_accel.distributed import Accelerator

_COPIED_SAMPLES = 1024
_FEW_SAMPLES, _SMALL_IMAGE = 128, 32
"""Forward passes with fewer images of at most this size, in pixels, are bound by a GPU's kernel launches."""


@dataclass(frozen=True)
class DataModule:
    """Data of a run: images and labels, the samples of each split, and their augmentation.

    Attributes:
        train: Source split of the labeled training samples.
        val: Source split of the validation samples; `train` unless the source has one of its own.
        test: Source split of the test samples; `train` with `data.test_fraction`.
        splits: Sample indices of train, val, test and unlabeled.
        mean: Channel means in 0..1 that the trained model is normalized with.
        std: Channel standard deviations in 0..1.
        transform: Augmentation of the training samples.
        num_views: Number of different views of each sample; None = a new view in each epoch.
        num_workers: Number of worker processes that prepare batches; 0 = the calling process prepares them.
        decoder: Conversion of images to pixels.
        left_out: Samples of each split that are left out because they cannot be decoded (`data.on_error`).
        inventory_notices: Lines for the user about the inventory of the images.
        unlabeled: Training images without labels from a source of their own (`data.unlabeled`); None = there are none.
        unlabeled_per_epoch: Number of these images in an epoch.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    splits: SplitSamples
    mean: list[float]
    std: list[float]
    transform: ViewTransform
    num_views: int | None = None
    num_workers: int = 0
    decoder: Decoder = field(kw_only=True)
    left_out: Mapping[Split, np.ndarray] = field(default_factory=dict)
    inventory_notices: tuple[str, ...] = ()
    unlabeled: ImageSet | None = None
    unlabeled_per_epoch: int = 0

    def __post_init__(self) -> None:
        # In any copy, the partners of mixup and cutmix are the training samples of its own splits.
        object.__setattr__(self, "transform", self.transform.with_partners(self.splits.train))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names, by label."""
        return self.train.label_names

    @property
    def unlabeled_samples(self) -> np.ndarray:
        """Training samples of `train` without a label, int64 [n], positions in the source split."""
        return self.splits.train[self.train.labels[self.splits.train] < 0]

    @property
    def has_unlabeled(self) -> bool:
        """True if a training sample of either source has no label."""
        return self.turns is not None or len(self.unlabeled_samples) > 0

    @cached_property
    def turns(self) -> Turns | None:
        """Samples of `unlabeled`, of which each epoch has some; None without such samples."""
        if self.splits.unlabeled is None:
            return None
        return Turns(UNLABELED_OFFSET + self.splits.unlabeled, self.unlabeled_per_epoch)

    @cached_property
    def training_samples(self) -> np.ndarray:
        """Indices of all training samples, int64 [N + M], ascending: those of `splits.train`, then those of `turns`."""
        return self.splits.train if self.turns is None else np.concatenate([self.splits.train, self.turns.samples])

    @property
    def epoch_samples(self) -> int:
        """Number of training samples in an epoch."""
        return len(self.splits.train) + self.unlabeled_per_epoch

    @cached_property
    def training_images(self) -> ImageReader:
        """Images and labels of all training samples."""
        return self.train if self.unlabeled is None else JoinedImages(self.train, self.unlabeled)

    @property
    def notices(self) -> list[str]:
        """Lines for the user about the data: files that are left out, classes without samples, and duplicates across splits."""
        images = {id(each): each for each in map(self._images, self.splits.by_name())}
        own = [notice for each in images.values() for notice in each.notices]
        return [*own, *self.inventory_notices, *self._left_out_notices(*get_args(Split)), *leak_notices(self.parts())]

    def parts(self) -> dict[Split, Part]:
        """Return the image set and the samples of each split."""
        return {split: Part(self._images(split), samples) for split, samples in self.splits.by_name().items()}

    def notices_of(self, split: Split) -> list[str]:
        """Return the lines for the user about one split, without the digests of its samples."""
        return [*self._images(split).notices, *self.inventory_notices, *self._left_out_notices(split)]

    def _left_out_notices(self, *splits: Split) -> list[str]:
        """Return a line for each of the splits that lacks samples which cannot be decoded."""
        lines = []
        for split, samples in self.left_out.items():
            if split in splits and len(samples):
                total = len(samples) + len(self.splits.by_name()[split])
                example = self._images(split).unreadable[int(samples[0])]
                lines.append(
                    f"data.on_error: skip leaves out {len(samples)} of {total} {split} samples ({example}); "
                    "`kd-accel data check` lists them all"
                )
        return lines

    def fingerprint_fields(self, *, replaceable: Sequence[int] = ()) -> dict[str, Any]:
        """Return what identifies the data of a training, independent of its path: classes, samples, and those left out.

        The test samples are not part of it, because no training depends on them.

        Args:
            replaceable: Training samples whose images may change, because they could not be read when they were needed.
        """
        left_out = {split: samples.tolist() for split, samples in self.left_out.items() if split != "test" and len(samples)}
        return {
            "label_names": list(self.label_names),
            "train_samples": len(self.splits.train),
            "val_samples": len(self.splits.val),
            "digest": samples_digest(self.train, self.splits.train, replaceable=replaceable),
            **self._unlabeled_fields(replaceable),
            "pixels": self.decoder.fingerprint_fields(),
            **({"left_out": left_out} if left_out else {}),
            **({"replaceable": list(replaceable)} if replaceable else {}),
        }

    def _unlabeled_fields(self, replaceable: Sequence[int]) -> dict[str, Any]:
        """Return what identifies the samples of `unlabeled`; nothing without such samples."""
        if self.unlabeled is None or self.splits.unlabeled is None:
            return {}
        own = [sample - UNLABELED_OFFSET for sample in replaceable]
        digest = samples_digest(self.unlabeled, self.splits.unlabeled, replaceable=own)
        return {"unlabeled": {"samples": len(self.splits.unlabeled), "digest": digest}}

    def fields_of_test_split(self) -> dict[str, Any]:
        """Return what identifies the test samples, on which no training depends, but the results of a finished run do."""
        return {"samples": len(self.splits.test), "digest": samples_digest(self.test, self.splits.test)}

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
        is_balanced: bool = False,
    ) -> TrainLoader:
        """Create the loader of one rank's augmented training batches.

        Args:
            batch_size: Number of samples per optimizer step, over all ranks and accumulation steps.
            rank: Rank of this process.
            world_size: Number of processes.
            grad_accum_steps: Number of micro-batches per optimizer step.
            seed: Seed of the order of the samples.
            pin_memory: Whether batches are in page-locked memory.
            is_balanced: Whether an epoch has as many labeled samples of each class, instead of each sample once.

        Raises:
            UserError: If the batch size is not divisible by ranks and accumulation steps, or exceeds the number of samples; if
                the classes have equally many samples, and `is_balanced` has no effect.
        """
        return TrainLoader(
            self.batch_loader,
            samples=self.splits.train,
            turns=self.turns,
            labels=self.train.labels[self.splits.train] if is_balanced else None,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            grad_accum_steps=grad_accum_steps,
            seed=seed,
            views=self.num_views,
            pin_memory=pin_memory,
        )

    def eval_loader(
        self, split: HeldOutSplit, *, batch_size: int, rank: int = 0, world_size: int = 1, pin_memory: bool = False
    ) -> EvalLoader:
        """Create the loader of one rank's share of a held-out split, without augmentation."""
        return EvalLoader(
            self.batch_loader,
            split,
            samples=self.splits.by_name()[split],
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            pin_memory=pin_memory,
        )

    def batches(self, split: Split, shares: Sequence[Share], *, pin_memory: bool = False) -> Iterator[Batch]:
        """Yield one batch for each (indices, view): views of train and unlabeled, unaugmented images of val and test."""
        if split == "unlabeled":
            split, shares = "train", [(UNLABELED_OFFSET + indices, view) for indices, view in shares]
        return self.batch_loader.load(split, shares, pin_memory=pin_memory)

    @cached_property
    def batch_loader(self) -> BatchLoader:
        """Loader of batches of any split, which owns the worker processes."""
        images: dict[Split, ImageReader] = {"train": self.training_images, "val": self.val, "test": self.test}
        return BatchLoader(images, self.transform, num_workers=self.num_workers)

    def view_batch(self, indices: np.ndarray, view: int) -> Batch:
        """Compute one view of training samples, in host memory. indices: int64 [n], as those of `training_samples`."""
        images, transform = self.training_images, self.transform
        return make_batch(transform.view(images, indices, view), transform.labels(images, indices, view), indices, view)

    def _images(self, split: Split) -> ImageSet:
        images = {"train": self.train, "val": self.val, "test": self.test, "unlabeled": self.unlabeled}[split]
        assert images is not None, split
        return images


def load_data(
    config: DataConfig,
    accelerator: Accelerator | None = None,
    *,
    class_names: Sequence[str] | None = None,
    rereads: bool = False,
    reads_unlabeled: bool = True,
) -> DataModule:
    """Read the source, split the samples, and compute mean and standard deviation unless the config sets them.

    Args:
        config: The data settings.
        accelerator: Accelerator of a launch whose ranks all call this function, and share its work; None = this process alone.
        class_names: Class names of data without labels (`data.label_column: null`).
        rereads: Whether every image is read again, to find files that have changed under the same size and time.
        reads_unlabeled: Whether the source of unlabeled images is read, if the settings have one.

    Raises:
        UserError: If the source cannot be read or does not match the settings.
    """
    inventory = Inventory(config.on_error, config.num_workers, Peers(accelerator), rereads=rereads)
    train, val, test = load_splits(config, class_names)
    unlabeled = load_unlabeled(config, train.label_names) if reads_unlabeled else None
    return build_module(train, val, test, config, inventory, unlabeled=unlabeled)


def build_module(
    train: ImageSet,
    val: ImageSet | None,
    test: ImageSet,
    config: DataConfig,
    inventory: Inventory | None = None,
    *,
    unlabeled: ImageSet | None = None,
) -> DataModule:
    """Split the samples of image sets, and compute mean and standard deviation unless the config sets them.

    Args:
        train: The training split.
        val: The validation split; None = a part of the training split.
        test: The test split; the training split itself with `data.test_fraction`.
        config: The data settings.
        inventory: Inventory of the images; None = of this process alone.
        unlabeled: Training images without labels from a source of their own; None = there are none.

    Raises:
        UserError: If an image cannot be decoded, a held-out sample has no label, or there are fewer unlabeled samples than
            `data.unlabeled_ratio` asks for.
    """
    if config.label_column is not None:
        _refuse_unlabeled(train, val, test)
    splits = split_samples(
        train.labels,
        config,
        num_val=None if val is None else val.num_samples,
        num_test=None if test is train else test.num_samples,
    )
    inventory = inventory or Inventory(config.on_error, config.num_workers)
    by_split: dict[Split, ImageSet] = {"train": train, "val": train if val is None else val, "test": test}
    if unlabeled is not None:
        by_split["unlabeled"] = unlabeled
        splits = replace(splits, unlabeled=np.arange(unlabeled.num_samples))
    for images in {id(each): each for each in by_split.values()}.values():
        inventory.take(images)
    chosen, splits = splits, splits.without({split: images.unreadable for split, images in by_split.items()})
    left_out = {name: np.setdiff1d(samples, splits.by_name()[name]) for name, samples in chosen.by_name().items()}
    if config.mean is not None and config.std is not None:
        mean, std = config.mean, config.std
    else:
        mean, std = channel_statistics(train, splits.train, inventory)
    transform = ViewTransform.from_config(config)
    num_views = 1 if transform.is_identity else config.views
    return DataModule(
        **by_split,
        splits=splits,
        mean=mean,
        std=std,
        transform=transform,
        num_views=num_views,
        num_workers=config.num_workers,
        decoder=Decoder.from_config(config),
        left_out=left_out,
        inventory_notices=tuple(inventory.notices),
        unlabeled_per_epoch=samples_per_epoch(config.unlabeled_ratio, splits.train, splits.unlabeled),
    )


def _refuse_unlabeled(train: ImageSet, val: ImageSet | None, test: ImageSet) -> None:
    """Raise UserError for held-out samples without a label, on which nothing can be measured."""
    if val is not None:
        refuse_unlabeled(val.labels, split="validation", remedy="remove them, or set data.val_split to null")
    if test is not train:
        refuse_unlabeled(test.labels, split="test", remedy="remove them, or set data.test_split or data.test_fraction")


def keep_images_on_gpu(loader: TrainLoader, data: DataModule, device: torch.device) -> None:
    """Store the training images on `device` if it is a GPU with enough free memory that can compute the views."""
    needed_bytes = len(data.training_samples) * 3 * data.transform.image_size**2
    if device.type == "cuda" and data.transform.supports_device and fits_on_gpu(needed_bytes, device):
        loader.keep_images(images_on(device, data))


def fits_on_gpu(needed_bytes: int, device: torch.device) -> bool:
    """Return whether `needed_bytes` are at most half of a GPU's free memory; training needs the other half."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return 2 * needed_bytes <= free_bytes


def images_on(device: torch.device, data: DataModule) -> torch.Tensor:
    """Copy the training images to a device, in the order of `data.training_samples`.

    Returns:
        Images, uint8 [N, 3, S, S], channels_last.
    """
    indices, size = data.training_samples, data.transform.image_size
    images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
    shares = [(indices[start : start + _COPIED_SAMPLES], 0) for start in range(0, len(indices), _COPIED_SAMPLES)]
    batches = data.batch_loader.load("train", shares, is_augmented=False, pin_memory=device.type == "cuda")
    for number, batch in enumerate(batches):
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
