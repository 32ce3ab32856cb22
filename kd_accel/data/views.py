"""Torch datasets of images and of their views, for a plain DataLoader.

`ImageDataset` reads a source (or wraps a dataset that exists already), `ViewDataset` gives one augmented view of each training
sample, `EpochBatchSampler` the order in which `kd-accel train` sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import DataModule, load_data
from kd_accel.data.dataset import ImageSet, MemoryImages, empty_images
from kd_accel.data.decode import fit_array, fit_image
from kd_accel.data.loader import epoch_order
from kd_accel.data.splits import Split, channel_statistics, split_samples
from kd_accel.data.transforms import ViewTransform

Item = dict[str, Any]


class ImageDataset(Dataset[Item]):
    """Images of a source, split into train, val and test; as a torch dataset it is the training split, without augmentation.

    An item is {"image": uint8 tensor [3, S, S], "label": int, "index": int}; `index` is the sample's position in the source
    split, before any subset.

    Args:
        source: as `data.source` of a config (`hub:NAME`, `parquet:DIR`, `imagefolder:DIR`, `digits`), or a dataset with
            `__len__` and `__getitem__` whose items are pairs (image, label) or dicts; an image is a PIL image, or uint8
            [H, W, 3] or [3, H, W].
        test: dataset of the test samples, where `source` is a dataset; None for none.
        image_size: side of the square to which every image is resized, in pixels.
        image_column: key of the image in a dict, column of a source.
        label_column: key of the label in a dict, column of a source.
        class_names: by label, where `source` is a dataset; by default its `classes`, or the numbers.
        val_fraction: fraction of the training samples held out for validation.
        settings: further settings of a config's `data` section, such as `limit_train`.

    Raises:
        TypeError: an image or label of another type.
        ValueError: a source or setting that is not valid (`UserError`).
    """

    def __init__(
        self,
        source: Any,
        *,
        test: Any = None,
        image_size: int = 32,
        image_column: str = "image",
        label_column: str = "label",
        class_names: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        **settings: Any,
    ) -> None:
        shared: dict[str, Any] = {"image_size": image_size, "val_fraction": val_fraction, **settings}
        if isinstance(source, str):
            if ":" in source:
                shared |= {"image_column": image_column, "label_column": label_column}
            self.module = load_data(DataConfig(source=source, **shared))
            return
        config, columns = DataConfig(**shared), (image_column, label_column)
        names = class_names if class_names is not None else getattr(source, "classes", None)
        train = _wrapped(source, image_size, columns, names, argument="source")
        held_out = train if test is None else _wrapped(test, image_size, columns, train.label_names, argument="test")
        splits = split_samples(train.num_samples, 0 if test is None else held_out.num_samples, config)
        mean, std = channel_statistics(train, splits.train)
        self.module = DataModule(train, held_out, splits, mean, std, ViewTransform("none", image_size), 1)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, by label."""
        return self.module.label_names

    @property
    def mean(self) -> list[float]:
        """Channel means of the training samples, in 0..1."""
        return self.module.mean

    @property
    def std(self) -> list[float]:
        """Channel standard deviations of the training samples, in 0..1."""
        return self.module.std

    def split(self, name: Split) -> SplitDataset:
        """Return the samples of train, val or test, without augmentation."""
        return SplitDataset(self.module, name)

    def __len__(self) -> int:
        return len(self.split("train"))

    def __getitem__(self, position: int) -> Item:
        return self.split("train")[position]


class SplitDataset(Dataset[Item]):
    """One split without augmentation; items as those of `ImageDataset`."""

    def __init__(self, module: DataModule, split: Split) -> None:
        self._images = module.test if split == "test" else module.train
        self._indices = module.splits.by_name()[split]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Item:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Return several items at once, as a DataLoader asks for a batch."""
        indices = self._indices[np.asarray(positions)]
        return _items(self._images.pixels(indices), self._images.labels[indices], indices)


class ViewDataset(Dataset[Item]):
    """One augmented view of each training sample: a pure function of (view_seed, view, index).

    An item is {"image": uint8 tensor [3, S, S], "label": int, "index": int, "view": int}. `set_view` chooses the view, also for
    workers that live on.

    Args:
        data: the images.
        transform: how a view is made of an image (`kd_accel.transforms`).
        num_views: number of different views of each sample; None = without limit.
        view_seed: seed of the views.
    """

    def __init__(
        self, data: ImageDataset, transform: ViewTransform, *, num_views: int | None = None, view_seed: int = 0
    ) -> None:
        if num_views is not None and num_views < 1:
            raise ValueError(f"num_views: {num_views} must be at least 1, or None")
        size = data.module.transform.image_size
        if transform.image_size != size:
            raise ValueError(f"transform: made for images of {transform.image_size} pixels, but data has {size}; use the same")
        transform = replace(transform, view_seed=view_seed)
        self.module = replace(data.module, transform=transform, num_views=1 if transform.augment == "none" else num_views)
        self._view = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def num_views(self) -> int | None:
        """Number of different views of each sample."""
        return self.module.num_views

    @property
    def view(self) -> int:
        """The view that items have now."""
        return int(self._view)

    def set_view(self, view: int) -> None:
        """Choose the view of the items from here on. Raises ValueError if it is not one of `num_views`."""
        if view < 0 or (self.num_views is not None and view >= self.num_views):
            raise ValueError(f"view: {view} must be at least 0 and below num_views ({self.num_views})")
        self._view.fill_(view)

    def set_epoch(self, epoch: int) -> None:
        """Choose the view of an epoch, as a training does: epoch mod num_views."""
        self.set_view(epoch if self.num_views is None else epoch % self.num_views)

    def __len__(self) -> int:
        return len(self.module.splits.train)

    def __getitem__(self, position: int) -> Item:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Return several items at once, as a DataLoader asks for a batch."""
        indices, view = self.module.splits.train[np.asarray(positions)], self.view
        pixels = self.module.transform(self.module.train.pixels(indices), indices, view)
        return [{**item, "view": view} for item in _items(pixels, self.module.train.labels[indices], indices)]


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of positions in a `ViewDataset`, in the order of `kd-accel train`: a pure function of (seed, epoch).

    Args:
        views: the dataset.
        batch_size: samples of one optimizer step over all processes.
        seed: of the order.
        rank: number of this process.
        world_size: number of processes; each gets a contiguous share of every batch.
    """

    def __init__(self, views: ViewDataset, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size: {batch_size} must be a positive multiple of world_size ({world_size})")
        if batch_size > len(views):
            raise ValueError(f"batch_size: {batch_size} is more than the {len(views)} training samples")
        self._indices, self._batch_size, self._seed = views.module.splits.train, batch_size, seed
        self._rank, self._world_size, self._epoch = rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._indices) // self._batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self._indices, seed=self._seed, epoch=self._epoch)[: len(self) * self._batch_size]
        positions = np.searchsorted(self._indices, order).reshape(len(self), self._world_size, -1)
        return iter(positions[:, self._rank].tolist())


def _items(pixels: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> list[Item]:
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    columns = zip(images, labels.tolist(), indices.tolist(), strict=True)
    return [{"image": image, "label": label, "index": index} for image, label, index in columns]


def _wrapped(
    dataset: Any,
    image_size: int,
    columns: tuple[str, str],
    class_names: Sequence[str] | None,
    *,
    argument: str,
) -> ImageSet:
    """Read a dataset of pairs or dicts into memory, resized."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"{argument}: must be a source name or a dataset with __len__ and __getitem__, not {type(dataset).__name__}"
        )
    images = empty_images(len(dataset), image_size)
    labels = np.empty(len(dataset), dtype=np.int64)
    for position in range(len(dataset)):
        where = f"{argument}: item {position}"
        image, label = _parts(dataset[position], *columns, where)
        images[position] = _pixels(image, image_size, where)
        if not isinstance(label, int | np.integer | Tensor) or isinstance(label, bool):
            raise TypeError(f"{where}: the label is {type(label).__name__}, not an integer")
        labels[position] = int(label)
    if not len(labels):
        raise ValueError(f"{argument}: has no items")
    names = [str(name) for name in (range(int(labels.max()) + 1) if class_names is None else class_names)]
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"{argument}: labels must be in 0..{len(names) - 1}, they are in {labels.min()}..{labels.max()}")
    return MemoryImages(images, labels, names)


def _parts(item: Any, image_column: str, label_column: str, where: str) -> tuple[Any, Any]:
    """Return (image, label) of a pair or a dict."""
    if isinstance(item, dict):
        missing = [name for name in (image_column, label_column) if name not in item]
        if missing:
            raise ValueError(f"{where}: has no column {missing[0]!r} (it has {', '.join(map(str, item))})")
        return item[image_column], item[label_column]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    raise TypeError(f"{where}: must be a pair (image, label) or a dict, not {type(item).__name__}")


def _pixels(image: Any, image_size: int, where: str) -> np.ndarray:
    """Return uint8 [S, S, 3] of a PIL image, an array or a tensor."""
    if hasattr(image, "convert"):
        return fit_image(image, image_size)
    array = image.numpy() if isinstance(image, Tensor) else image
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        kind = f"{array.dtype} array" if isinstance(array, np.ndarray) else type(image).__name__
        raise TypeError(f"{where}: the image is a {kind}; it must be a PIL image, or uint8 [H, W, 3] or [3, H, W]")
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3:
        raise TypeError(f"{where}: the image has shape {array.shape}; it must be uint8 [H, W, 3] or [3, H, W]")
    return fit_array(np.ascontiguousarray(array), image_size)
