"""Batches of given samples and views, prepared in the calling process or in worker processes.

Input: image sets by split, the augmentation, and shares (indices, view). Output: one `Batch` per share, in their order. Worker
processes are started at the first batch, prepare the batches of all splits, and live as long as the `BatchLoader`.

No global random generator is used. PyTorch's DataLoader draws its seed from the global generator at every start, which would
change the dropout masks of a resumed run.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kd_accel.data.dataset import ImageReader
from kd_accel.data.splits import Split
from kd_accel.data.transforms import ViewTransform
from kd_accel.errors import UserError
from kd_accel.types import Batch

Share = tuple[np.ndarray, int]
"""(sample indices int64 [n], view): the content of one batch."""

_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, int]
"""(pixels [n, S, S, 3], labels int64 [n] or float32 [n, C], sample indices int64 [n], view)."""


@dataclass(frozen=True)
class _Request:
    """Batch to prepare."""

    split: Split
    share: Share
    is_augmented: bool


class BatchLoader:
    """Loader of batches of any split. Only one iteration at a time can use the worker processes.

    Args:
        images: Image set of each split.
        transform: Augmentation of the training samples.
        num_workers: Number of worker processes; 0 = the calling process prepares the batches.
    """

    def __init__(self, images: Mapping[Split, ImageReader], transform: ViewTransform, *, num_workers: int = 0) -> None:
        self.images = images
        self.transform = transform
        self.num_workers = num_workers
        self._dataset = _BatchDataset(images, transform)
        self._requests = _Requests()
        self._workers: dict[bool, DataLoader[Batch | UserError]] = {}
        self._iteration = 0
        # Unlike __del__, it stops the workers before a garbage collection can close their queues.
        weakref.finalize(self, _stop, self._workers, os.getpid())

    def load(
        self, split: Split, shares: Sequence[Share], *, is_augmented: bool = True, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """Yield a batch for each share, in the order of the shares.

        Args:
            split: Name of the split.
            shares: Sample indices, int64 [n], and view of each batch.
            is_augmented: Whether training samples are augmented; samples of other splits never are.
            pin_memory: Whether batches are in page-locked memory.

        Raises:
            UserError: If an image cannot be decoded.
        """
        requests = [_Request(split, share, is_augmented) for share in shares]
        if self.num_workers == 0 or not requests:
            for request in requests:
                batch = make_batch(*self._dataset.arrays(request))
                yield batch.pin_memory() if pin_memory else batch
            return
        self._iteration += 1
        iteration, self._requests.requests = self._iteration, requests
        for item in self._loader(pin_memory):
            if isinstance(item, UserError):
                try:
                    raise item
                finally:
                    # A frame that its own error refers to is a cycle; workers in a cycle are not stopped in order.
                    del item
            yield item
            if iteration != self._iteration:
                raise RuntimeError(
                    "a second iteration has started before the end of this one; both need the same worker processes"
                )

    def close(self) -> None:
        """Stop the worker processes; a later batch starts them again."""
        _stop(self._workers, os.getpid())

    def _loader(self, pin_memory: bool) -> DataLoader[Batch | UserError]:
        if pin_memory not in self._workers:
            self._workers[pin_memory] = DataLoader(
                self._dataset,  # type: ignore[arg-type]
                batch_size=None,
                sampler=self._requests,
                num_workers=self.num_workers,
                persistent_workers=True,
                pin_memory=pin_memory,
                generator=torch.Generator(),
                collate_fn=_batch_or_error,  # type: ignore[arg-type]
            )
        return self._workers[pin_memory]


def _stop(loaders: dict[bool, DataLoader[Batch | UserError]], owner: int) -> None:
    """Stop the workers of loaders, in the process that has started them."""
    if os.getpid() == owner:
        for loader in loaders.values():
            # Without its iterator a DataLoader has no workers; it offers no other way to stop them.
            loader._iterator = None
        loaders.clear()


def make_batch(pixels: np.ndarray, labels: np.ndarray, indices: np.ndarray, view: int) -> Batch:
    """Wrap arrays as a batch, without a copy.

    Args:
        pixels: Images, uint8 or float32 [n, S, S, 3].
        labels: Class indices, int64 [n], or the share of each class, float32 [n, C].
        indices: Positions in the source split, int64 [n].
        view: Number of the view.
    """
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(indices), view)


@dataclass
class _Requests(Sampler[_Request]):
    """Requests of the present iteration. A DataLoader sends them to its workers, which know the images only."""

    requests: Sequence[_Request] = field(default_factory=list)

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class _BatchDataset(Dataset[_Arrays | UserError]):
    """Dataset of complete batches by request. A UserError is an item; raised in a worker, it would become a traceback."""

    def __init__(self, images: Mapping[Split, ImageReader], transform: ViewTransform) -> None:
        self._images, self._transform = images, transform

    def arrays(self, request: _Request) -> _Arrays:
        """Prepare the arrays of a batch. Raises UserError if an image cannot be decoded."""
        images, (indices, view) = self._images[request.split], request.share
        if not request.is_augmented or request.split != "train":
            return images.pixels(indices), images.labels_of(indices), indices, view
        transform = self._transform
        return transform.view(images, indices, view), transform.labels(images, indices, view), indices, view

    def __getitem__(self, request: _Request) -> _Arrays | UserError:
        try:
            return self.arrays(request)
        except UserError as error:
            return error


def _batch_or_error(item: _Arrays | UserError) -> Batch | UserError:
    return item if isinstance(item, UserError) else make_batch(*item)
