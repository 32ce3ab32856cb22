"""The order of the rows, cut into optimizer steps, ranks and micro-batches; and the batches themselves.

The order is a pure function of (seed, epoch), the same for any number of processes: step b takes rows b*G..(b+1)*G of it, each
rank a contiguous share of those, each micro-batch a contiguous share of that. So 1 x 4, 2 x 2 and 4 x 1 processes and
accumulation steps see the same rows in the same step, and an epoch can be entered at any step. Nothing here touches a global
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
from kd_accel.data.views import ViewFunction
from kd_accel.types import Batch, UserError

_ORDER = 21


def epoch_order(rows: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The rows in the order of an epoch."""
    return hashed_order((_ORDER, seed, epoch), rows)


class TrainLoader:
    """Training batches of one rank, view after view. Batches are on the CPU, or where `keep_images` was told to keep them."""

    def __init__(  # noqa: PLR0913  (each says where this rank stands in the order)
        self,
        images: ImageSet,
        views_of: ViewFunction,
        *,
        rows: np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        grad_accum_steps: int = 1,
        seed: int = 0,
        views: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """rows: int64, ascending. batch_size: rows of one optimizer step over all ranks. views: None = new ones each epoch."""
        parts = world_size * grad_accum_steps
        if batch_size % parts:
            raise UserError(
                f"train.batch_size: {batch_size} does not divide by {world_size} processes x {grad_accum_steps} accumulation "
                f"steps; it is the rows of one optimizer step over all of them: use a multiple of {parts}"
            )
        if len(rows) < batch_size:
            raise UserError(f"train.batch_size: {batch_size} is more than the {len(rows)} training rows; lower it")
        self._images, self._views_of, self._rows = images, views_of, rows
        self._batch_size, self._rank, self._world_size, self._parts = batch_size, rank, world_size, grad_accum_steps
        self._seed, self._views = seed, views
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._device_images: Tensor | None = None

    def keep_images(self, images: Tensor) -> None:
        """Make all views from these, on their device. images: uint8 [N, 3, S, S], those of the loader's rows in their order."""
        assert self._views_of.has_device_form and len(images) == len(self._rows)
        self._device_images = images

    @property
    def steps_per_epoch(self) -> int:
        """Whole optimizer steps; the rows that do not fill one are left out, other ones in each epoch."""
        return len(self._rows) // self._batch_size

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step, from `start_step` on."""
        view = epoch if self._views is None else epoch % self._views
        shares = self._shares(epoch, start_step)
        if self._device_images is not None:
            batches: Iterator[Batch] = (self._batch_on_device(share, view) for share in shares)
        else:
            batches = load_batches(
                self._images,
                self._views_of,
                [(share, view) for share in shares],
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
            )
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(batches) for _ in range(self._parts)]

    def _shares(self, epoch: int, start_step: int) -> list[np.ndarray]:
        """The rows of each micro-batch of this rank."""
        order = epoch_order(self._rows, seed=self._seed, epoch=epoch)[: self.steps_per_epoch * self._batch_size]
        micro_batches = order.reshape(self.steps_per_epoch, self._world_size, self._parts, -1)
        return list(micro_batches[start_step:, self._rank].reshape(-1, micro_batches.shape[3]))

    def _batch_on_device(self, rows: np.ndarray, view: int) -> Batch:
        assert self._device_images is not None
        arrays = np.searchsorted(self._rows, rows), self._images.labels[rows]
        device = self._device_images.device
        # non_blocking: a plain copy to a GPU waits for the work that is queued there
        at, labels = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
        images = self._views_of.on_device(self._device_images[at], rows, view)
        return Batch(images, labels, torch.from_numpy(rows), view)


class EvalLoader:
    """Each row exactly once over all ranks: this rank's contiguous share, view 0, without augmentation."""

    def __init__(
        self,
        images: ImageSet,
        *,
        rows: np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        share = np.array_split(rows, world_size)[rank]
        self._shares = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        self._images = images
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[Batch]:
        shares = [(share, 0) for share in self._shares]
        return load_batches(self._images, None, shares, num_workers=self._num_workers, pin_memory=self._pin_memory)


Share = tuple[np.ndarray, int]
"""(rows int64 [n], view): what one batch is made of."""

_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, int]
"""(pixels uint8 [n, S, S, 3], labels int64 [n], rows int64 [n], view)."""


def load_batches(
    images: ImageSet,
    views_of: ViewFunction | None,
    shares: Sequence[Share],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """A batch for each share, in their order. views_of: None = the images as they are, whatever the view."""
    planned = _Planned(images, views_of, shares)
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


class _Planned(Dataset[_Arrays]):
    """One item a share."""

    def __init__(self, images: ImageSet, views_of: ViewFunction | None, shares: Sequence[Share]) -> None:
        self._images, self._views_of, self._shares = images, views_of, shares

    def __len__(self) -> int:
        return len(self._shares)

    def __getitem__(self, index: int) -> _Arrays:
        rows, view = self._shares[index]
        pixels = self._images.pixels(rows)
        if self._views_of is not None:
            pixels = self._views_of(pixels, rows, view)
        return pixels, self._images.labels[rows], rows, view


class _InWorker(Dataset[_Arrays | UserError]):
    """The same in a worker process. A user's mistake is handed over: raised there, its text would become a traceback."""

    def __init__(self, planned: _Planned) -> None:
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
    pixels, labels, rows, view = arrays
    return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels), torch.from_numpy(rows), view)
