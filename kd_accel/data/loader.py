"""Training and evaluation loaders: the sample order, its partition into steps, ranks and micro-batches, and the batches.

The order is a pure function of (seed, epoch) for any number of processes. With G samples per optimizer step, step b uses the
positions from b*G to (b+1)*G of the order. Each rank has a contiguous share of these positions, and each micro-batch a
contiguous part of its rank's share. So 1 x 4, 2 x 2 and 4 x 1 processes and accumulation steps use the same samples in the same
step, and an epoch can start at any step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from kd_accel.data.batches import BatchLoader
from kd_accel.data.hashing import hashed_order
from kd_accel.data.sampling import balanced_samples, check_balance
from kd_accel.data.splits import HeldOutSplit
from kd_accel.data.unlabeled import Turns
from kd_accel.errors import UserError
from kd_accel.types import Batch

_ORDER, _BALANCED_ORDER = 21, 25
"""Hash keys of the sample order, different from the keys of all other uses of `hash_words`."""


def epoch_order(
    samples: np.ndarray, *, seed: int, epoch: int, turns: Turns | None = None, labels: np.ndarray | None = None
) -> np.ndarray:
    """Return the sample indices in the order of an epoch.

    Args:
        samples: Indices of the samples of every epoch, int64 [N].
        seed: Seed of the order.
        epoch: Number of the epoch.
        turns: Samples of which each epoch has some; None = no such samples.
        labels: Classes of `samples`, int64 [N], of each of which the epoch has as many; None = it has each sample once.
    """
    drawn = samples if labels is None else balanced_samples(samples, labels, seed=seed, epoch=epoch)
    drawn = drawn if turns is None else np.concatenate([drawn, turns.at(epoch, seed=seed)])
    if labels is None:
        return hashed_order((_ORDER, seed, epoch), drawn)
    # By position: copies of a sample have the same hash, and would be neighbors.
    return drawn[hashed_order((_BALANCED_ORDER, seed, epoch), np.arange(len(drawn)))]


class TrainLoader:
    """Loader of one rank's training batches, one view per epoch.

    Batches are in host memory, or on the device of the images after `keep_images`.
    """

    def __init__(  # noqa: PLR0913  (each argument decides the order or the share of this rank)
        self,
        batches: BatchLoader,
        *,
        samples: np.ndarray,
        turns: Turns | None = None,
        labels: np.ndarray | None = None,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        grad_accum_steps: int = 1,
        seed: int = 0,
        views: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Create the loader, and check the batch size against samples, ranks and accumulation steps.

        Args:
            batches: Loader of the batches of any samples.
            samples: Indices of the training samples in their source split, int64 [N], ascending.
            turns: Unlabeled samples, of which each epoch has some; None = no such samples.
            labels: Classes of `samples`, int64 [N], of each of which an epoch has as many; None = it has each sample once.
            batch_size: Number of samples per optimizer step, over all ranks and accumulation steps.
            rank: Rank of this process.
            world_size: Number of processes.
            grad_accum_steps: Number of micro-batches per optimizer step.
            seed: Seed of the sample order.
            views: Number of different views of each sample (view = epoch mod views); None = a new view in each epoch.
            pin_memory: Whether batches are in page-locked memory.

        Raises:
            UserError: If the batch size is not divisible by ranks and accumulation steps, or exceeds the number of samples; if
                `labels` has no effect, because the classes have equally many samples.
        """
        parts = world_size * grad_accum_steps
        if batch_size % parts:
            raise UserError(
                f"train.batch_size: {batch_size} must be a multiple of {parts} ({world_size} processes x {grad_accum_steps} "
                "accumulation steps), because it counts the samples of one optimizer step over all processes"
            )
        self._epoch_samples = len(samples) + (turns.per_epoch if turns else 0)
        if self._epoch_samples < batch_size:
            raise UserError(f"train.batch_size: {batch_size} is more than the {self._epoch_samples} training samples; lower it")
        if labels is not None:
            check_balance(labels)
        self._batches, self._samples, self._turns, self._labels = batches, samples, turns, labels
        self._every_sample = samples if turns is None else np.concatenate([samples, turns.samples])
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._grad_accum_steps, self._seed, self._views = grad_accum_steps, seed, views
        self._pin_memory = pin_memory
        self._device_images: Tensor | None = None

    def keep_images(self, images: Tensor) -> None:
        """Compute all later views from `images`, on the device that holds them.

        Args:
            images: Images of the samples and of those that take turns, in this order, uint8 [N + M, 3, S, S].
        """
        assert self._batches.transform.supports_device and len(images) == len(self._every_sample)
        self._device_images = images

    @property
    def is_in_memory(self) -> bool:
        """True if all images are decoded already, so that no batch can fail."""
        return self._device_images is not None or self._batches.images["train"].is_in_memory

    @property
    def steps_per_epoch(self) -> int:
        """Number of complete optimizer steps per epoch; the remaining samples, different in each epoch, are dropped."""
        return self._epoch_samples // self._batch_size

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each optimizer step of an epoch, from `start_step` on."""
        view = epoch if self._views is None else epoch % self._views
        shares = self._shares(epoch, start_step)
        if self._device_images is not None:
            # Mixed labels are [N, C]: those of an epoch may be too large for the device.
            chunks = [[share] for share in shares] if self._batches.transform.mixing else [shares]
            batches: Iterator[Batch] = chain.from_iterable(self._batches_on_device(chunk, view) for chunk in chunks)
        else:
            batches = self._batches.load("train", [(share, view) for share in shares], pin_memory=self._pin_memory)
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(batches) for _ in range(self._grad_accum_steps)]

    def _shares(self, epoch: int, start_step: int) -> list[np.ndarray]:
        """Return the sample indices of each of this rank's micro-batches."""
        order = epoch_order(self._samples, seed=self._seed, epoch=epoch, turns=self._turns, labels=self._labels)
        order = order[: self.steps_per_epoch * self._batch_size]
        # Axes [steps, ranks, micro-batches, samples]. With the rank axis before the micro-batch axis a rank's share is
        # contiguous, so any factorization of ranks x micro-batches divides a step into the same pieces in the same order.
        micro_batches = order.reshape(self.steps_per_epoch, self._world_size, self._grad_accum_steps, -1)
        return list(micro_batches[start_step:, self._rank].reshape(-1, micro_batches.shape[3]))

    def _batches_on_device(self, shares: Sequence[np.ndarray], view: int) -> Iterator[Batch]:
        """Yield the batches of shares of one size. Labels and random choices of all are copied to the device at the start."""
        transform, indices, size = self._batches.transform, np.concatenate(shares), len(shares[0])
        labels = self._to_device(transform.labels(self._batches.images["train"], indices, view)).split(size)
        tables = self._table(indices, view).split(size, dim=1)
        for share, labels_of_share, table in zip(shares, labels, tables, strict=True):
            images, mix = self._view_on_device(table), transform.mix(share, view)
            if mix is not None:
                images = mix.on_device(images, self._view_on_device(self._table(mix.partners, view)))
            yield Batch(images, labels_of_share, torch.from_numpy(share), view)

    def _table(self, indices: np.ndarray, view: int) -> Tensor:
        """Return positions among the images on the device, and random choices, of one view of samples, int64 [..., n]."""
        positions = np.searchsorted(self._every_sample, indices)
        return self._to_device(np.stack([positions, *self._batches.transform.placements(indices, view)]))

    def _view_on_device(self, table: Tensor) -> Tensor:
        """Compute one view of samples, before they are mixed. Returns uint8 [n, 3, S, S]."""
        assert self._device_images is not None
        return self._batches.transform.placed(self._device_images[table[0]], table[1:])

    def _to_device(self, array: np.ndarray) -> Tensor:
        assert self._device_images is not None
        # A blocking copy to a GPU would synchronize with all queued work.
        return torch.from_numpy(array).to(self._device_images.device, non_blocking=True)


class EvalLoader:
    """Loader of one rank's contiguous share of a split, without augmentation. Each sample is in the share of exactly one rank.

    Args:
        batches: Loader of the batches of any samples.
        split: Name of the split.
        samples: Sample indices in the source split, int64 [N].
        batch_size: Number of samples per batch of one rank; the last batch may be smaller.
        rank: Rank of this process.
        world_size: Number of processes.
        pin_memory: Whether batches are in page-locked memory.
    """

    def __init__(
        self,
        batches: BatchLoader,
        split: HeldOutSplit,
        *,
        samples: np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        share = np.array_split(samples, world_size)[rank]
        self._shares = [(share[start : start + batch_size], 0) for start in range(0, len(share), batch_size)]
        self._batches, self._split = batches, split
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(self._shares)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches, as view 0."""
        return self._batches.load(self._split, self._shares, pin_memory=self._pin_memory)
