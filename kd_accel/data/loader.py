"""The order of the samples, cut into optimizer steps, ranks and micro-batches; and the batches themselves.

The order is a pure function of (seed, epoch), the same for any number of processes: step b takes samples b*G..(b+1)*G of it, each
rank a contiguous share of those, each micro-batch a contiguous share of that. So 1 x 4, 2 x 2 and 4 x 1 processes and
accumulation steps see the same samples in the same step, and an epoch can be entered at any step. Nothing here touches a global
generator: PyTorch's own loaders draw from it at every start, which shifts the dropout of a resumed run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd_accel.data.hashing import hashed_order
from kd_accel.data.sources import ImageSet
from kd_accel.data.transforms import ViewTransform
from kd_accel.errors import UserError
from kd_accel.types import Batch

_ORDER = 21


def epoch_order(samples: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The samples in the order of an epoch."""
    return hashed_order((_ORDER, seed, epoch), samples)


class TrainLoader:
    """Training batches of one rank, view after view. Batches are on the CPU, or where `keep_images` was told to keep them."""

    def __init__(  # noqa: PLR0913  (each says where this rank stands in the order)
        self,
        images: ImageSet,
        transform: ViewTransform,
        *,
        samples: np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        grad_accum_steps: int = 1,
        seed: int = 0,
        views: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """samples: int64, ascending. batch_size: samples of one optimizer step over all ranks. views: None = new ones each epoch."""
        parts = world_size * grad_accum_steps
        if batch_size % parts:
            raise UserError(
                f"train.batch_size: {batch_size} does not divide by {world_size} processes x {grad_accum_steps} accumulation "
                f"steps; it is the samples of one optimizer step over all of them: use a multiple of {parts}"
            )
        if len(samples) < batch_size:
            raise UserError(f"train.batch_size: {batch_size} is more than the {len(samples)} training samples; lower it")
        self._images, self._transform, self._samples = images, transform, samples
        self._batch_size, self._rank, self._world_size, self._parts = batch_size, rank, world_size, grad_accum_steps
        self._seed, self._views = seed, views
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._device_images: Tensor | None = None

    def keep_images(self, images: Tensor) -> None:
        """Make all views from these, on their device. images: uint8 [N, 3, S, S], those of the loader's samples in their order."""
        assert self._transform.supports_device and len(images) == len(self._samples)
        self._device_images = images

    @property
    def steps_per_epoch(self) -> int:
        """Whole optimizer steps; the samples that do not fill one are left out, other ones in each epoch."""
        return len(self._samples) // self._batch_size

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step, from `start_step` on."""
        view = epoch if self._views is None else epoch % self._views
        shares = self._shares(epoch, start_step)
        if self._device_images is not None:
            batches: Iterator[Batch] = (self._batch_on_device(share, view) for share in shares)
        else:
            batches = load_batches(
                self._images,
                self._transform,
                [(share, view) for share in shares],
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
            )
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(batches) for _ in range(self._parts)]

    def _shares(self, epoch: int, start_step: int) -> list[np.ndarray]:
        """The samples of each micro-batch of this rank."""
        order = epoch_order(self._samples, seed=self._seed, epoch=epoch)[: self.steps_per_epoch * self._batch_size]
        micro_batches = order.reshape(self.steps_per_epoch, self._world_size, self._parts, -1)
        return list(micro_batches[start_step:, self._rank].reshape(-1, micro_batches.shape[3]))

    def _batch_on_device(self, samples: np.ndarray, view: int) -> Batch:
        assert self._device_images is not None
        arrays = np.searchsorted(self._samples, samples), self._images.labels[samples]
        device = self._device_images.device
        # non_blocking: a plain copy to a GPU waits for the work that is queued there
        at, labels = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
        images = self._transform.on_device(self._device_images[at], samples, view)
        return Batch(images, labels, torch.from_numpy(samples), view)


class EvalLoader:
    """Each sample exactly once over all ranks: this rank's contiguous share, view 0, without augmentation."""

    def __init__(
        self,
        images: ImageSet,
        *,
        samples: np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        share = np.array_split(samples, world_size)[rank]
        self._shares = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        self._images = images
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[Batch]:
        shares = [(share, 0) for share in self._shares]
        return load_batches(self._images, None, shares, num_workers=self._num_workers, pin_memory=self._pin_memory)


Share = tuple[np.ndarray, int]
"""(samples int64 [n], view): what one batch is made of."""

_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, int]
"""(pixels uint8 [n, S, S, 3], labels int64 [n], samples int64 [n], view)."""


def load_batches(
    images: ImageSet,
    transform: ViewTransform | None,
    shares: Sequence[Share],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """A batch for each share, in their order. views_of: None = the images as they are, whatever the view."""
    planned = _BatchDataset(images, transform, shares)
    if num_workers == 0 or not shares:
        for index in range(len(shares)):
            batch = _as_batch(planned[index])
            yield batch.pin_memory() if pin_memory else batch
        return
    loader = DataLoader(
        _InWorker(planned),
        batch_size=None,
        num_workers=min(num_workers, len(shares)),
        pin_memory=pin_memory,
        generator=torch.Generator(),
        collate_fn=_as_batch_or_error,  # type: ignore[arg-type]
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


class _BatchDataset(Dataset[_Arrays]):
    """One item a share."""

    def __init__(self, images: ImageSet, transform: ViewTransform | None, shares: Sequence[Share]) -> None:
        self._images, self._transform, self._shares = images, transform, shares

    def __len__(self) -> int:
        return len(self._shares)

    def __getitem__(self, index: int) -> _Arrays:
        samples, view = self._shares[index]
        pixels = self._images.pixels(samples)
        if self._transform is not None:
            pixels = self._transform(pixels, samples, view)
        return pixels, self._images.labels[samples], samples, view


class _InWorker(Dataset[_Arrays | UserError]):
    """The same in a worker process. A user's mistake is handed over: raised there, its text would become a traceback."""

    def __init__(self, planned: _BatchDataset) -> None:
        self._planned = planned

    def __len__(self) -> int:
        return len(self._planned)

    def __getitem__(self, index: int) -> _Arrays | UserError:
        try:
            return self._planned[index]
        except UserError as error:
            return error


def _as_batch_or_error(item: _Arrays | UserError) -> Batch | UserError:
    """item: arrays, or the mistake that stands in their place."""
    return item if isinstance(item, UserError) else _as_batch(item)


def _as_batch(arrays: _Arrays) -> Batch:
    pixels, labels, samples, view = arrays
    return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels), torch.from_numpy(samples), view)
