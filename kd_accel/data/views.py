"""PyTorch datasets of images and of their views, for a `torch.utils.data.DataLoader`.

`ImageDataset` reads a source or wraps an existing dataset. `ViewDataset` contains one augmented view of each training sample.
`EpochBatchSampler` yields the samples in the order of `kd-accel train`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from kd_accel.config.parsing import build_config
from kd_accel.config.schema import DataConfig, RunConfig
from kd_accel.data.datamodule import DataModule, build_module, load_data
from kd_accel.data.dataset import MemoryImages, empty_images
from kd_accel.data.labels import LabelSource
from kd_accel.data.loader import epoch_order
from kd_accel.data.sampling import check_balance
from kd_accel.data.source_splits import Role, image_sets
from kd_accel.data.sources import load_unlabeled
from kd_accel.data.splits import Split
from kd_accel.data.transforms import ViewTransform
from kd_accel.data.wrapped import Columns, dataset_split

Item = dict[str, Any]

_VIEW_SETTINGS = ("transform", "views", "view_seed")
_WRAPPED = "import:this_program:datasets"
"""Stand-in for the name of a source; without spaces, which separate the names of allowed code."""
_FROM_ORIGINALS = "resized_crop_flip"
"""Setting of the transform with which a source keeps its original images."""
_SOURCE_SETTINGS = ("train_split", "val_split", "test_split")


class ImageDataset(Dataset[Item]):
    """Images of a source, split into train, val and test.

    The items are the samples of the training split, without augmentation; `split` returns the dataset of any split. An item is
    {"image": uint8 tensor [3, S, S], "label": int, "index": int}, where `index` is the sample's position in its source split,
    before any subset. The channel statistics, classes and splits equal those of a run with the same settings.

    Args:
        source: `hub:NAME`, `parquet:DIR`, `imagefolder:DIR` or `digits`, as `data.source` of a config; or a dataset with
            `__len__` and `__getitem__` whose items are pairs (image, label) or dicts. Its images are PIL images, or uint8
            arrays or tensors [H, W, 3] or [3, H, W]. They are read once, into memory, if they fit in `memory_limit_mib`;
            otherwise each is read when it is used, so that the dataset must return the same image at each call.
        test: Dataset of the test samples if `source` is a dataset; None = no test samples, or `test_fraction` of `source`.
        image_size: S, the side of the square to which every image is resized, in pixels.
        image_column: Key of the image in a dict, or column of a source.
        label_column: Key of the label in a dict, or column of a source.
        class_names: Class names by label if `source` is a dataset. None = its attribute `classes`, the names of its label
            feature (Hugging Face), or those that its labels determine, as `data.labels` of a config.
        val_fraction: Fraction of the training samples held out for validation.
        keep_originals: Whether views can be cut from the original images, as `RandomResizedCrop` does in a run; images of
            another size are then read from the source at each use, and not held in memory.
        settings: Further settings of a config's `data` section: `labels`, `background`, `pixel_range`, `limit_train`,
            `limit_test`, `mean`, `std`, `memory_limit_mib`, `num_workers` (for the batches of a cache build), `test_fraction`,
            `unlabeled` with `unlabeled_split` and `unlabeled_ratio`, and, for a source, `train_split`, `val_split`,
            `test_split`. Only `ViewDataset` has the unlabeled samples among the others: label -1, index from 2**40 on.

    Raises:
        TypeError: If an image has another type, or `source` is neither a name nor a dataset.
        ValueError: If a source, label or setting is not valid (`UserError`).
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
        keep_originals: bool = False,
        **settings: Any,
    ) -> None:
        shared: dict[str, Any] = {"image_size": image_size, "val_fraction": val_fraction, **settings}
        if refused := settings.keys() & set(_VIEW_SETTINGS):
            raise ValueError(f"{min(refused)}: is a setting of the views; pass it to ViewDataset or to its transform")
        if keep_originals and source == "digits":
            raise ValueError("keep_originals: has no effect with digits, whose images are in memory; leave it out")
        if "sampling" in settings:
            raise ValueError("sampling: is a setting of the order; pass is_balanced to EpochBatchSampler")
        if isinstance(source, str):
            if test is not None or class_names is not None:
                name = "test" if test is not None else "class_names"
                raise ValueError(f"{name}: has no effect with the source {source!r}, which has its own; leave it out")
            names = {"image_column": image_column, "label_column": label_column}
            config = _check_settings({"source": source, **names, **shared})
        else:
            if refused := settings.keys() & set(_SOURCE_SETTINGS):
                raise ValueError(f"{min(refused)}: has no effect with a dataset; pass its splits as source and test")
            if test is None and settings.get("limit_test") is not None and settings.get("test_fraction") is None:
                raise ValueError("limit_test: has no effect without test or test_fraction; leave it out")
            config = _check_settings({"source": _WRAPPED, **shared}).model_copy(update={"image_column": image_column})
        config = config.model_copy(update={"transform": _FROM_ORIGINALS if keep_originals else "none"})
        if isinstance(source, str):
            module = load_data(config)
        else:
            columns = Columns(image_column, label_column, prefix="")
            module = _wrap_datasets(source, test, config, columns, class_names)
        self.module = replace(module, transform=ViewTransform((), image_size), num_views=1)
        self.may_be_reduced = not keep_originals and source != "digits" and module.training_images.is_in_memory
        for notice in self.module.notices:
            warnings.warn(notice, stacklevel=2)

    @classmethod
    def from_module(cls, module: DataModule) -> ImageDataset:
        """Create the dataset from the data of a config."""
        dataset = cls.__new__(cls)
        dataset.module, dataset.may_be_reduced = module, False
        return dataset

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
        """Return the dataset of train, val, test or unlabeled, without augmentation. Raises ValueError for another name."""
        if name not in (splits := self.module.splits.by_name()):
            raise ValueError(f"name: {name!r} is not a split; use one of {', '.join(splits)}")
        return SplitDataset(self.module, name)

    def __len__(self) -> int:
        return len(self.split("train"))

    def __getitem__(self, position: int) -> Item:
        return self.split("train")[position]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Return several items at once, as a DataLoader requests a batch."""
        return self.split("train").__getitems__(positions)


class SplitDataset(Dataset[Item]):
    """Dataset of one split, without augmentation, with items like those of `ImageDataset`.

    Args:
        module: The data.
        split: Name of the split.
    """

    def __init__(self, module: DataModule, split: Split) -> None:
        part = module.parts()[split]
        self._images, self._indices = part.images, part.samples

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Item:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Return several items at once, as a DataLoader requests a batch."""
        indices = self._indices[np.asarray(positions, dtype=np.int64)]
        return _make_items(self._images.pixels(indices), self._images.labels[indices], indices)


class ViewDataset(Dataset[Item]):
    """Dataset of one augmented view of each training sample, a pure function of (view_seed, view, index).

    An item is {"image": uint8 tensor [3, S, S], "label": int, "index": int, "view": int}. With `MixUp` or `CutMix` the label is
    the share of each class, float32 tensor [C], and with `MixUp` the image is float32 in 0..255. `set_view` selects the view of
    all items, also in workers that are already running. Call it between two epochs, because a DataLoader prefetches.

    Args:
        data: The images.
        transform: Augmentation, one of `kd_accel.transforms`.
        num_views: Number of different views of each sample; None = no limit (1 without augmentation).
        view_seed: Seed of the views.

    Raises:
        TypeError: If `data` or `transform` has another type.
        ValueError: If an argument is not valid.
    """

    def __init__(
        self, data: ImageDataset, transform: ViewTransform, *, num_views: int | None = None, view_seed: int = 0
    ) -> None:
        if not isinstance(data, ImageDataset):
            raise TypeError(f"data: must be an ImageDataset, not {type(data).__name__}; wrap it as ImageDataset(data)")
        if not isinstance(transform, ViewTransform):
            raise TypeError(f"transform: must be one of kd_accel.transforms, not {type(transform).__name__}")
        size = data.module.transform.image_size
        if transform.image_size != size:
            raise ValueError(f"transform: image_size {transform.image_size} must equal that of data ({size})")
        if num_views is not None and num_views < 1:
            raise ValueError(f"num_views: {num_views} must be at least 1, or None")
        if view_seed < 0:
            raise ValueError(f"view_seed: {view_seed} must be at least 0")
        if transform.mixing and data.module.unlabeled is not None:
            raise ValueError("transform: MixUp and CutMix mix labeled samples alone; leave out unlabeled of data, or them")
        if transform.needs_originals and data.may_be_reduced:
            warnings.warn(
                f"transform: RandomResizedCrop cuts from the images of {size} pixels that data holds in memory; if the "
                "original images are larger, pass keep_originals=True to ImageDataset",
                stacklevel=2,
            )
        if transform.is_identity:
            if num_views not in (None, 1):
                raise ValueError(f"num_views: {num_views} views are all equal without augmentation; leave it out")
            num_views = 1
        self.module = replace(data.module, transform=replace(transform, view_seed=view_seed), num_views=num_views)
        self._view = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def num_views(self) -> int | None:
        """Number of different views of each sample; None = no limit."""
        return self.module.num_views

    @property
    def view(self) -> int:
        """Number of the current view."""
        return int(self._view)

    def set_view(self, view: int) -> None:
        """Select the view of all following items. Raises ValueError unless 0 <= view < num_views."""
        if view < 0 or (self.num_views is not None and view >= self.num_views):
            limit = "" if self.num_views is None else f" and below num_views ({self.num_views})"
            raise ValueError(f"view: {view} must be at least 0{limit}")
        self._view.fill_(view)

    def set_epoch(self, epoch: int) -> None:
        """Select the view of an epoch, as `kd-accel train` does: epoch mod num_views. Raises ValueError if epoch < 0."""
        if epoch < 0:
            raise ValueError(f"epoch: {epoch} must be at least 0")
        self.set_view(epoch if self.num_views is None else epoch % self.num_views)

    def __len__(self) -> int:
        return len(self.module.training_samples)

    def __getitem__(self, position: int) -> Item:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Return several items at once, as a DataLoader requests a batch."""
        indices, view = self.module.training_samples[np.asarray(positions, dtype=np.int64)], self.view
        transform, images = self.module.transform, self.module.training_images
        pixels, labels = transform.view(images, indices, view), transform.labels(images, indices, view)
        return [{**item, "view": view} for item in _make_items(pixels, labels, indices)]


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of positions in a `ViewDataset`, in the order of `kd-accel train`: a pure function of (seed, epoch).

    An incomplete last batch is dropped; its samples are different in each epoch.

    Args:
        views: The dataset.
        batch_size: Number of samples per optimizer step, over all processes.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Number of processes; each has a contiguous share of every batch.
        is_balanced: Whether an epoch has as many samples of each class, as with `data.sampling: balanced`.

    Raises:
        TypeError: If `views` has another type.
        ValueError: If an argument is not valid.
    """

    def __init__(
        self,
        views: ViewDataset,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        is_balanced: bool = False,
    ) -> None:
        if not isinstance(views, ViewDataset):
            raise TypeError(f"views: must be a ViewDataset, not {type(views).__name__}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} must be at least 0 and below world_size ({world_size})")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size: {batch_size} must be a positive multiple of world_size ({world_size})")
        if batch_size > (samples := views.module.epoch_samples):
            raise ValueError(f"batch_size: {batch_size} is more than the {samples} training samples; lower it")
        self._data, self._batch_size, self._seed = views.module, batch_size, seed
        self._labels = views.module.train.labels[views.module.splits.train] if is_balanced else None
        if self._labels is not None:
            check_balance(self._labels, setting="is_balanced", value=True)
        self._rank, self._world_size, self._epoch = rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines the order of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._data.epoch_samples // self._batch_size

    def __iter__(self) -> Iterator[list[int]]:
        turns, labels = self._data.turns, self._labels
        order = epoch_order(self._data.splits.train, seed=self._seed, epoch=self._epoch, turns=turns, labels=labels)
        order = order[: len(self) * self._batch_size]
        positions = np.searchsorted(self._data.training_samples, order).reshape(len(self), self._world_size, -1)
        return iter(positions[:, self._rank].tolist())


def _make_items(pixels: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> list[Item]:
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    own = labels.tolist() if labels.ndim == 1 else torch.from_numpy(labels)
    columns = zip(images, own, indices.tolist(), strict=True)
    return [{"image": image, "label": label, "index": index} for image, label, index in columns]


def _check_settings(settings: Mapping[str, Any]) -> DataConfig:
    """Check settings by the rules of a run's `data` section. Raises UserError."""
    # Unlabeled images need a teacher, which a loop of the caller's own has.
    teacher = {"teacher": {"run": "own"}} if settings.get("unlabeled") is not None else {}
    return build_config(RunConfig, {"data": settings, **teacher}, {}, losses={}).data


def _wrap_datasets(
    source: Any, test: Any, config: DataConfig, columns: Columns, class_names: Sequence[str] | None
) -> DataModule:
    """Split datasets of pairs or dicts as a source. Small datasets are read into memory."""
    if class_names is not None and len(set(class_names)) < len(class_names):
        raise ValueError("class_names: two classes have the same name; rename one of them")
    if test is not None and config.test_fraction is not None:
        raise ValueError("test_fraction: has no effect with test; leave one of them out")
    datasets: dict[Role, tuple[Any, str]] = {"train": (source, "source")}
    if test is not None:
        datasets["test"] = (test, "test")
    splits = {
        role: dataset_split(dataset, LabelSource(argument, role, "labels"), config, columns=columns, label_names=class_names)
        for role, (dataset, argument) in datasets.items()
    }
    images = image_sets(splits, config)
    train = images["train"]
    unlabeled = load_unlabeled(config, train.label_names)
    if config.test_fraction is not None:
        return build_module(train, None, train, config, unlabeled=unlabeled)
    nothing = MemoryImages(empty_images(0, config.image_size), np.empty(0, dtype=np.int64), train.label_names)
    return build_module(train, None, images.get("test", nothing), config, unlabeled=unlabeled)
