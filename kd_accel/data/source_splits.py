"""Splits of a source as they are stored, and their conversion to image sets.

Input: undecoded images, with labels in the terms of the source. Output: one `ImageSet` per split. A split whose decoded images
fit in `data.memory_limit_mib` is decoded once; a larger one is decoded on demand. The classes are those of the training split.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from kd_accel.config.data_schema import DataConfig
from kd_accel.config.transform_schema import transform_config
from kd_accel.data.dataset import ImageSet
from kd_accel.data.decode import Decoder
from kd_accel.data.encoded import EncodedImages
from kd_accel.data.folders import quoted
from kd_accel.data.inventory import in_memory, stamp_of
from kd_accel.data.labels import LabelEncoding, LabelSource, no_labels
from kd_accel.data.passes import over_samples
from kd_accel.errors import UserError

Role = Literal["train", "val", "test"]


@dataclass(frozen=True)
class SourceSplit(ABC):
    """Images and labels of one split.

    Attributes:
        origin: Name of the split, and the setting that its labels come from.
        labels: Label of each sample, as in the source.
        label_names: Class names that the source defines; None = those that the labels determine.
        notices: Lines for the user about the split, such as files that are left out.
    """

    origin: LabelSource
    labels: Any
    label_names: tuple[str, ...] | None
    notices: tuple[str, ...]

    @abstractmethod
    def image_set(
        self, labels: np.ndarray, label_names: Sequence[str], config: DataConfig, *, notices: Sequence[str]
    ) -> ImageSet:
        """Create the image set.

        Args:
            labels: Class indices, int64 [N].
            label_names: Class names, by label.
            config: The data settings.
            notices: Lines for the user about the split.
        """


@dataclass(frozen=True)
class EncodedSplit(SourceSplit):
    """Split of encoded images.

    Attributes:
        column: Images, as `EncodedImages` takes them.
        roots: Absolute paths of the directories that may contain image files.
        files: Function that returns the paths of all files behind the split, in a fixed order.
        selection: Names of the split and its columns within these files.
    """

    column: Any
    roots: Sequence[Path]
    files: Callable[[], Sequence[str | Path]]
    selection: Sequence[str] = ()

    def image_set(
        self, labels: np.ndarray, label_names: Sequence[str], config: DataConfig, *, notices: Sequence[str]
    ) -> ImageSet:
        """Create the image set; see `SourceSplit.image_set`."""
        encoded = EncodedImages(
            self.column,
            labels,
            label_names,
            split=self.origin.split,
            decoder=Decoder.from_config(config),
            roots=self.roots,
            notices=notices,
        )
        if fits_in_memory(len(labels), config) and not (needs_originals(config) and has_other_sizes(encoded, config)):
            return in_memory(encoded, on_error=config.on_error, num_workers=config.num_workers)
        encoded.stamp = stamp_of(self.files(), selection=self.selection)
        return encoded


class Source(Protocol):
    """Source of images."""

    @property
    def split_names(self) -> Sequence[str] | None:
        """Names of its splits; None = a split of any name can be read."""
        ...

    def read(self, split: str, *, train: SourceSplit | None) -> SourceSplit:
        """Read a split.

        Args:
            split: Name of the split.
            train: The training split; None = this is the training split.

        Raises:
            UserError: If it cannot be read.
        """
        ...


def fits_in_memory(samples: int, config: DataConfig) -> bool:
    """Return whether the decoded images of a split are held in memory."""
    return samples * config.image_size**2 * 3 <= config.memory_limit_mib * 2**20


def needs_originals(config: DataConfig) -> bool:
    """Return whether views are cut from the original images, of which those in memory keep only a square."""
    return transform_config(config.transform).random_resized_crop is not None


def has_other_sizes(encoded: EncodedImages, config: DataConfig) -> bool:
    """Return whether an original image is not a square of the image size, or only its center would be held in memory."""
    samples = np.arange(encoded.num_samples)
    if config.crop_pct < 1 or not encoded.are_of_image_size(samples[:1]):
        return True
    title = f"sizes of {encoded.split}"
    workers = config.num_workers or None
    return not all(over_samples(encoded.are_of_image_size, samples, num_workers=workers, title=title))


def image_sets(
    splits: Mapping[Role, SourceSplit], config: DataConfig, class_names: Sequence[str] | None = None
) -> dict[Role, ImageSet]:
    """Map the labels of all splits to class indices, then create their image sets.

    Args:
        splits: The splits by role, `train` first.
        config: The data settings.
        class_names: Class names of data without labels (`data.label_column: null`).

    Raises:
        UserError: If a split has other classes than the training split, or an image or label is not valid.
    """
    if config.label_column is None:
        splits = {role: _without_labels(split, class_names) for role, split in splits.items()}
    train = splits["train"]
    encoding = LabelEncoding.fit(train.labels, source=train.origin, names=train.label_names, rule=config.labels)
    labels = {}
    for role, split in splits.items():
        _refuse_other_classes(split, train.origin, encoding.label_names)
        labels[role] = encoding.encode(split.labels, source=split.origin)
    found = {}
    for role, split in splits.items():
        notices = (*split.notices, *encoding.notices(labels[role], source=split.origin))
        found[role] = split.image_set(labels[role], encoding.label_names, config, notices=notices)
    return found


def _without_labels(split: SourceSplit, class_names: Sequence[str] | None) -> SourceSplit:
    names = None if class_names is None else tuple(class_names)
    return replace(split, labels=no_labels(len(split.labels)), label_names=names)


def _refuse_other_classes(split: SourceSplit, train: LabelSource, expected: tuple[str, ...]) -> None:
    """Raise UserError if a split has class names of its own, and they differ from those of the training split."""
    if split.label_names not in (None, expected):
        difference = class_difference(split.label_names, expected=expected)
        raise UserError(
            f"{split.origin.field}: the classes of the {split.origin.split} split differ from those of the {train.split} split "
            f"({difference}); both must have the same classes in the same order"
        )


def class_difference(names: Sequence[str], *, expected: Sequence[str]) -> str:
    """Describe how class names differ from those of the training split; look-alike names are escaped."""
    missing = [name for name in expected if name not in names]
    unknown = [name for name in names if name not in expected]
    if not missing and not unknown:
        index = next(index for index, pair in enumerate(zip(names, expected, strict=True)) if pair[0] != pair[1])
        return f"class {index} is {ascii(names[index])} here and {ascii(expected[index])} in the training split"
    parts = [f"missing here: {quoted(missing)}"] if missing else []
    return "; ".join([*parts, *([f"not in the training split: {quoted(unknown)}"] if unknown else [])])


def existing_directory(location: str) -> Path:
    """Return the directory of a source. Raises UserError if it is not found."""
    directory = Path(location).expanduser()
    if not directory.is_dir():
        raise UserError(f"data.source: directory {location!r} not found; check the path, relative to the working directory")
    return directory


def absolute(path: Path) -> Path:
    """Return the absolute path; links are not resolved, as in `EncodedImages`."""
    return Path(os.path.abspath(path))  # noqa: PTH100
