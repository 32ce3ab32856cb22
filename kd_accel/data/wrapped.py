"""Data sets of user code: arrays, Hugging Face data sets, and anything with `__len__` and `__getitem__`.

Input: the object, whose items are pairs (image, label) or dicts. Output: its split. A small data set is read once, into memory;
the items of a large one are read when they are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kd_accel.config.data_schema import DataConfig
from kd_accel.data.dataset import ImageSet, MemoryImages, empty_images
from kd_accel.data.decode import Crop, Decoder
from kd_accel.data.encoded import EncodedImages
from kd_accel.data.inventory import in_memory
from kd_accel.data.labels import LabelSource, no_labels
from kd_accel.data.source_splits import SourceSplit, fits_in_memory, needs_originals
from kd_accel.data.tables import table_split
from kd_accel.errors import IneffectiveSetting, UserError, describe_error
from kd_accel.io.user_code import call_import


class UnexpectedItemError(TypeError):
    """Data set, item or image of another type or shape than is read."""


@dataclass(frozen=True)
class Columns:
    """Names of the image and the label in an item that is a dict.

    Attributes:
        image: Key of the image.
        label: Key of the label; None = labels are not read.
        prefix: Prefix of the settings `image_column` and `label_column` in messages; empty for the arguments of a call.
    """

    image: str
    label: str | None
    prefix: str = "data."


@dataclass(frozen=True)
class Items:
    """Images and labels of a data set by position.

    Attributes:
        dataset: The data set.
        columns: Keys of an item.
        where: Setting or argument that the data set comes from, for messages.
        split: Name of the split, for messages.
    """

    dataset: Any
    columns: Columns
    where: str
    split: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        """Return (image, label) of an item. Raises UserError or TypeError for an item of another form."""
        item, where = self.dataset[position], self.name(position)
        if isinstance(item, Mapping):
            for setting, column in (("image_column", self.columns.image), ("label_column", self.columns.label)):
                if column is not None and column not in item:
                    raise UserError(
                        f"{self.columns.prefix}{setting}: {where} has no key {column!r}; use one of {', '.join(map(str, item))}"
                    )
            return item[self.columns.image], None if self.columns.label is None else _plain_label(item[self.columns.label])
        if isinstance(item, tuple | list) and len(item) == 2:
            return item[0], _plain_label(item[1])
        raise UnexpectedItemError(f"{where}: must be a pair (image, label) or a dict, not {type(item).__name__}")

    def name(self, position: int) -> str:
        """Return the name of an item for messages."""
        return f"{self.where}: item {position}" + (f" of the {self.split} split" if self.columns.prefix else "")

    def targets(self) -> Sequence[Any] | None:
        """Return the labels of a torchvision data set, whose items need not be read for them; None = they are not available."""
        labels = getattr(self.dataset, "targets", None)
        if labels is None or getattr(self.dataset, "target_transform", None) is not None:
            return None
        labels = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
        is_usable = isinstance(labels, list | tuple) and len(labels) == len(self) and isinstance(labels[0], int)
        return labels if is_usable else None


@dataclass(frozen=True)
class ArrayItems:
    """Images of one array with their labels, as a data set.

    Attributes:
        images: Images, uint8 [N, H, W, 3].
        targets: Labels, by sample.
    """

    images: np.ndarray
    targets: Any

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[np.ndarray, Any]:
        return self.images[position], self.targets[position]


class WrappedImages(EncodedImages):
    """Image set of a user's data set, whose items are read and resized when they are used. Digests are those of the pixels.

    Args:
        items: The items.
        labels: Class indices, int64 [N].
        label_names: Class names, by label.
        raw_labels: Label of each item when the labels were read; None = the labels are not used.
        decoder: Conversion of an image to pixels.
        notices: Lines for the user about the data set.
    """

    can_be_forked = False

    def __init__(
        self,
        items: Items,
        labels: np.ndarray,
        label_names: Sequence[str],
        *,
        raw_labels: Sequence[Any] | None,
        decoder: Decoder,
        notices: Sequence[str] = (),
    ) -> None:
        super().__init__(None, labels, label_names, split=items.split, decoder=decoder, roots=[Path()], notices=notices)
        self._items, self._raw_labels = items, raw_labels

    def _cells(self, samples: np.ndarray) -> list[int]:
        return samples.tolist()

    def _cropped(self, sample: int, cell: int, crop: Crop) -> np.ndarray:
        return self._guarded(sample, cell, lambda: self._read(cell, crop))

    def _read(self, cell: int, crop: Crop | None = None) -> Any:
        """Return the pixels of an item, uint8 [S, S, 3]. Raises ValueError if it cannot be read, or has changed its label."""
        try:
            image, label = self._items[cell]
            pixels = square_pixels(image, self.decoder, crop, where=self._items.name(cell))
        except Exception as error:
            # User code raises any exception.
            raise ValueError(describe_error(error)) from error
        if self._raw_labels is not None and label != (expected := self._raw_labels[cell]):
            raise ValueError(f"its label is {label!r}, but was {expected!r} when the labels were read")
        return np.ascontiguousarray(pixels)

    def _decode(self, content: Any, crop: Crop | None = None) -> np.ndarray:
        pixels: np.ndarray = content
        return pixels


@dataclass(frozen=True)
class WrappedSplit(SourceSplit):
    """Split of a user's data set.

    Attributes:
        items: The items.
        pixels: Images, uint8 [N, S, S, 3], if they were read together with the labels; None = they are read later.
    """

    items: Items
    pixels: np.ndarray | None

    def image_set(
        self, labels: np.ndarray, label_names: Sequence[str], config: DataConfig, *, notices: Sequence[str]
    ) -> ImageSet:
        """Create the image set; see `SourceSplit.image_set`."""
        if self.pixels is not None:
            return MemoryImages(self.pixels, labels, label_names, notices=notices)
        items, decoder = replace(self.items, split=self.origin.split), Decoder.from_config(config)
        raw = None if config.label_column is None else self.labels
        images = WrappedImages(items, labels, label_names, raw_labels=raw, decoder=decoder, notices=notices)
        if fits_in_memory(len(labels), config) and not needs_originals(config):
            return in_memory(images, on_error=config.on_error, num_workers=config.num_workers)
        _refuse_random_items(images, self.items.name(0))
        return images


def _refuse_random_items(images: WrappedImages, name: str) -> None:
    """Raise UserError if the first item differs between two reads, as with a random transform."""
    first = np.array([0])
    if not np.array_equal(images.pixels(first), images.pixels(first)):
        raise UserError(
            f"{name} has other pixels at each call; remove the random transform, because data.transform makes the views"
        )


@dataclass(frozen=True)
class UserSource:
    """Source of the user's function `import:package.module:function`, which returns the data set of a split.

    Attributes:
        config: The data settings.
        split_names: None, because the names are the function's own.
    """

    config: DataConfig
    split_names: None = None

    def read(self, split: str, *, train: SourceSplit | None) -> SourceSplit:
        """Call the function for a split; see `Source.read`."""
        source = self.config.source
        content = call_import(
            source,
            (split, self.config.image_size),
            {},
            field="data.source",
            called_with="the name of the split and the image size, in this order",
        )
        origin = LabelSource("data.source", split)
        columns = Columns(self.config.image_column, self.config.label_column)
        if isinstance(content, Mapping):
            items, names = self._arrays(content, split)
            self._refuse_columns("arrays")
            return dataset_split(items, origin, self.config, columns=columns, label_names=names)
        try:
            found = dataset_split(content, origin, self.config, columns=columns)
        except UserError:
            raise
        except UnexpectedItemError as error:
            raise UserError(f"{error}; {source} must return a data set of pairs or dicts, or a mapping of arrays") from None
        except Exception as error:
            # User code raises any exception.
            raise UserError(
                f"data.source: {source} returns a data set for the {split} split that cannot be read "
                f"({describe_error(error)}); fix the function"
            ) from error
        if not is_table(content) and not isinstance(content[0], Mapping):
            self._refuse_columns("pairs")
        return found

    def _refuse_columns(self, contents: str) -> None:
        defaults = type(self.config)()
        # The column of the images may be that of the other source.
        for setting in ("label_column", *(() if self.config.unlabeled else ("image_column",))):
            if getattr(self.config, setting) not in (getattr(defaults, setting), None):
                reason = f"has no effect ({self.config.source} returns {contents}, not dicts); leave it out"
                raise IneffectiveSetting(f"data.{setting}", reason)

    def _arrays(self, content: Mapping[str, Any], split: str) -> tuple[ArrayItems, list[str] | None]:
        """Check a mapping with images, labels and label_names. Returns the images with their labels, and the class names."""
        function = f"data.source: {self.config.source}"
        try:
            images, names = np.asanyarray(content["images"]), content.get("label_names")
            labels = no_labels(len(images)) if self.config.label_column is None else content["labels"]
            names = None if names is None else [str(name) for name in names]
            num_labels = len(labels)
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{function} must return for the {split} split a mapping with images, labels and label_names, or a data set "
                "with __len__ and __getitem__ of pairs (image, label) or dicts; fix the function"
            ) from None
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or num_labels != len(images):
            raise UserError(
                f"{function} returns images {images.dtype} {list(images.shape)} and {num_labels} labels for the {split} split; "
                "images must be uint8 [N, H, W, 3] and labels [N]"
            )
        if not images.size or names == []:
            raise UserError(
                f"{function} returns images {list(images.shape)} and label_names {names} for the {split} split; at least one "
                "sample, one pixel per image and one class are required"
            )
        return ArrayItems(images, np.asarray(labels) if hasattr(labels, "__array__") else labels), names


def dataset_split(
    dataset: Any, origin: LabelSource, config: DataConfig, *, columns: Columns, label_names: Sequence[str] | None = None
) -> SourceSplit:
    """Read the labels of a data set, and its images if they are small.

    Args:
        dataset: Object with `__len__` and `__getitem__`.
        origin: Setting or argument that the data set comes from, and the name of its split.
        config: The data settings.
        columns: Keys of an item that is a dict.
        label_names: Class names; None = those that the data set defines, if it does.

    Raises:
        TypeError: If the object or one of its items has another form.
        UserError: If the data set is empty, or a key is not found.
    """
    _check_dataset(dataset, origin.field)
    names = class_names(dataset, columns.label) if label_names is None else list(label_names)
    own = None if names is None else tuple(names)
    if is_table(dataset):
        columns_set = config.model_copy(update={"image_column": columns.image, "label_column": columns.label})
        return replace(table_split(dataset, origin, columns_set, roots=[Path(Path.cwd().anchor)]), label_names=own)
    items = Items(dataset, columns, origin.field, origin.split)
    if isinstance(dataset, ArrayItems):
        pixels = _read_items(items, config)[1] if fits_in_memory(len(items), config) else None
        return WrappedSplit(origin, dataset.targets, own, (), items, pixels)
    targets = items.targets()
    if targets is not None and (config.on_error == "skip" or not fits_in_memory(len(items), config)):
        return WrappedSplit(origin, targets, own, (), items, None)
    labels, pixels = _read_items(items, config)
    return WrappedSplit(origin, labels, own, (), items, pixels)


def _read_items(items: Items, config: DataConfig) -> tuple[list[Any], np.ndarray | None]:
    """Read the labels of all items, and the images if they fit in memory and none may be left out."""
    is_small = fits_in_memory(len(items), config) and config.on_error == "stop"
    decoder, labels = Decoder.from_config(config), []
    pixels = empty_images(len(items), config.image_size) if is_small else None
    for position in range(len(items)):
        image, label = items[position]
        labels.append(label)
        if pixels is not None:
            pixels[position] = square_pixels(image, decoder, where=items.name(position))
            if needs_originals(config) and (config.crop_pct < 1 or _size(image) != (config.image_size, config.image_size)):
                pixels = None
    return labels, pixels


def _check_dataset(dataset: Any, argument: str) -> None:
    """Raise TypeError for an object without positions, UserError for an empty dataset."""
    has_positions = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, Mapping)
    if not has_positions:
        remedy = "; pass its splits as source and test" if isinstance(dataset, Mapping) else ""
        name = "the name of a source or " if argument == "source" else ""
        raise UnexpectedItemError(
            f"{argument}: must be {name}a dataset with __len__ and __getitem__, not {type(dataset).__name__}{remedy}"
        )
    if not len(dataset):
        raise UserError(f"{argument}: the dataset has no items; at least one is required")


def is_table(dataset: Any) -> bool:
    """Return whether a data set is a Hugging Face `Dataset` without a transform, whose images need not be decoded."""
    return hasattr(dataset, "select_columns") and hasattr(dataset, "cache_files") and dataset.format["type"] != "custom"


def class_names(dataset: Any, label_column: str | None) -> list[str] | None:
    """Return the class names of a torchvision or Hugging Face data set; None if it does not define them."""
    features = getattr(dataset, "features", None)
    label = features.get(label_column) if isinstance(features, Mapping) else None
    names = getattr(dataset, "classes", None) or getattr(label, "names", None)
    return None if names is None else [str(name) for name in names]


def _size(image: Any) -> tuple[int, int]:
    """Return width and height of an image that `square_pixels` accepts."""
    if hasattr(image, "convert"):
        return (image.width, image.height)
    height, width = image.shape[1:] if image.shape[0] == 3 and image.shape[2] != 3 else image.shape[:2]
    return (width, height)


def square_pixels(image: Any, decoder: Decoder, crop: Crop | None = None, *, where: str) -> np.ndarray:
    """Convert one image to RGB and resize it.

    Args:
        image: PIL image, or uint8 array or tensor [H, W, 3] or [3, H, W].
        decoder: Conversion to RGB and S, the size in pixels.
        crop: Part of the image; None = the central square.
        where: Argument and position of the image, for error messages.

    Returns:
        Resized image, uint8 [S, S, 3].

    Raises:
        TypeError: If the image has another type or shape.
    """
    if hasattr(image, "convert"):
        try:
            return decoder.fit_image(image, crop)
        except ValueError as error:
            raise ValueError(f"{where}: the image cannot be converted to RGB ({error})") from None
    array = image.numpy(force=True) if isinstance(image, Tensor) else image
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        kind = f"{array.dtype} array" if isinstance(array, np.ndarray) else type(image).__name__
        raise UnexpectedItemError(f"{where}: the image must be a PIL image or a uint8 array or tensor, not {kind}")
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UnexpectedItemError(f"{where}: the image must have the shape [H, W, 3] or [3, H, W], not {list(array.shape)}")
    return decoder.fit_array(np.ascontiguousarray(array), crop)


def _plain_label(label: Any) -> Any:
    """Return the value of a tensor or array; that of its only element if it has one element."""
    if not isinstance(label, Tensor | np.ndarray):
        return label
    return label.item() if math.prod(label.shape) == 1 else label.tolist()
