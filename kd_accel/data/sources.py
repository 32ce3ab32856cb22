"""Image sources: the Hugging Face Hub, Parquet files, image folders, CSV lists, scikit-learn's digits, and user code.

Input: the data settings. Output: the image sets of train, val and test. The modules `tables`, `file_sources` and `wrapped` read
each kind of source, `source_splits` maps the labels to class indices, and this one decides which split is used for what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kd_accel.config.data_schema import DataConfig
from kd_accel.data.dataset import ImageSet as ImageSet
from kd_accel.data.dataset import MemoryImages as MemoryImages
from kd_accel.data.decode import Decoder
from kd_accel.data.file_sources import CsvSource, FolderSource, UnlabeledFolder
from kd_accel.data.labels import LabelSource, no_labels, refuse_remap
from kd_accel.data.source_splits import Role, Source, SourceSplit, fits_in_memory, image_sets
from kd_accel.data.tables import TableSource
from kd_accel.data.wrapped import UserSource
from kd_accel.errors import IneffectiveSetting, UnreadableImage, UserError
from kd_accel.io.user_code import PREFIX

_AUTO = "auto"
_VALIDATION_NAMES = ("val", "validation", "valid", "dev")


def load_splits(config: DataConfig, class_names: Sequence[str] | None = None) -> tuple[ImageSet, ImageSet | None, ImageSet]:
    """Load the training, the validation and the test split of the source.

    Args:
        config: The data settings.
        class_names: Class names of data without labels (`data.label_column: null`).

    Returns:
        (train, val, test); val is None if the validation samples are drawn from train; test is train if the test samples are.

    Raises:
        UserError: If the source cannot be read or does not match the settings.
    """
    if config.source == "digits":
        train, test = _digits(config)
        return train, None, test
    source = open_source(config)
    names, notices = choose_splits(config, source.split_names)
    splits: dict[Role, SourceSplit] = {"train": source.read(names["train"], train=None)}
    splits |= {
        role: _read_held_out(source, role, name, splits["train"], config) for role, name in names.items() if role != "train"
    }
    splits["train"] = replace(splits["train"], notices=(*notices, *splits["train"].notices))
    images = image_sets(splits, config, class_names)
    return images["train"], images.get("val"), images.get("test", images["train"])


def load_unlabeled(config: DataConfig, label_names: Sequence[str]) -> ImageSet | None:
    """Load the source of training images without labels, `data.unlabeled`; None if it is not set.

    Args:
        config: The data settings.
        label_names: Class names of the labeled data.

    Raises:
        UserError: If the source cannot be read.
    """
    if config.unlabeled is None:
        return None
    own = config.model_copy(update={"source": config.unlabeled, "train_split": config.unlabeled_split, "label_column": None})
    try:
        source = _open_unlabeled(own)
        split = source.read(_unlabeled_split(own, source.split_names), train=None)
        split = replace(split, origin=LabelSource("data.unlabeled", "unlabeled"))
        notices = tuple(map(_of_unlabeled, split.notices))
        return split.image_set(no_labels(len(split.labels)), label_names, own, notices=notices)
    except UnreadableImage as error:
        description, remedy, sample, _ = error.args
        raise UnreadableImage(description, remedy, sample, "data.unlabeled") from None
    except UserError as error:
        raise UserError(_of_unlabeled(str(error))) from None


def _of_unlabeled(message: str) -> str:
    """Return a message about a source with the names of the settings of the unlabeled one."""
    return message.replace("data.source", "data.unlabeled").replace("data.train_split", "data.unlabeled_split")


def _open_unlabeled(config: DataConfig) -> Source:
    """Find a source that is read without labels; the images of a folder need no class folders."""
    kind, _, location = config.source.partition(":")
    return UnlabeledFolder.open(location, config) if kind == "imagefolder" else open_source(config)


def _unlabeled_split(config: DataConfig, available: Sequence[str] | None) -> str:
    """Return the name of the split to read: that of the setting, or the only one if the setting has its default."""
    is_default = config.unlabeled_split == DataConfig.model_fields["unlabeled_split"].default
    if available is None or config.unlabeled_split in available:
        return config.unlabeled_split
    if is_default and len(available) == 1:
        return available[0]
    raise _missing_split(config, "train", config.unlabeled_split, available)


def _read_held_out(source: Source, role: Role, name: str, train: SourceSplit, config: DataConfig) -> SourceSplit:
    try:
        return source.read(name, train=train)
    except UserError as error:
        if role == "val" and config.val_split == _AUTO:
            # Without the setting the user may not know of this split, such as Tiny ImageNet's val/ without class folders.
            raise UserError(f"{error}; or set data.val_split to null to validate on training samples") from None
        raise


def open_source(config: DataConfig) -> Source:
    """Find the source of the settings, and the names of its splits. Raises UserError if it is not found."""
    kind, _, location = config.source.partition(":")
    if config.source.startswith(PREFIX):
        return UserSource(config)
    if kind == "imagefolder":
        return FolderSource.open(location, config)
    return CsvSource.open(location, config) if kind == "csv" else TableSource.open(kind, location, config)


def choose_splits(config: DataConfig, available: Sequence[str] | None) -> tuple[dict[Role, str], list[str]]:
    """Decide which splits of the source are used.

    Args:
        config: The data settings.
        available: Names of the splits of the source; None = not known, so that the settings decide alone.

    Returns:
        (name of the split by role, notices). Without `val` or `test`, these samples are drawn from the training split.

    Raises:
        UserError: If a split is not found, or `data.val_fraction` has no effect.
    """
    names: dict[Role, str] = {"train": config.train_split}
    notices = []
    if config.test_fraction is None:
        names["test"] = config.test_split
    elif config.test_split in (available or ()):
        notices.append(f"data.test_fraction: the split {config.test_split!r} of {config.source} is not used")
    found = [name for name in _VALIDATION_NAMES if name in (available or ()) and name not in names.values()]
    if config.val_split == _AUTO and found:
        if config.val_fraction != type(config)().val_fraction:
            raise IneffectiveSetting(
                "data.val_fraction",
                f"{config.val_fraction} has no effect, because {config.source} has the split {found[0]!r} to validate on; "
                "leave it out, or set data.val_split to null",
            )
        names["val"] = found[0]
        notices.append(
            f"data.val_split: {config.source} has the split {found[0]!r}, so it is used for validation (null = a part of the "
            "training samples)"
        )
    elif config.val_split not in (None, _AUTO):
        names["val"] = config.val_split
    for role, name in names.items():
        if available is not None and name not in available:
            raise _missing_split(config, role, name, available)
    return names, notices


def _missing_split(config: DataConfig, role: Role, name: str, available: Sequence[str]) -> UserError:
    remedy = f"use one of {', '.join(sorted(available))}" if available else "the source has no splits; use another source"
    if role == "test" and config.train_split in available:
        held_out = [each for each in _VALIDATION_NAMES if each in available and each != config.train_split]
        first = f"set data.test_split: {held_out[0]} to test on that split, or " if held_out else "set "
        remedy += f"; {first}data.test_fraction: 0.2 to hold out a part of the {config.train_split} split"
    return UserError(f"data.{role}_split: {config.source} has no split {name!r}; {remedy}")


def _digits(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Load scikit-learn's 8x8 gray digits as RGB.

    Every fifth sample (360 of 1,797) is in the test split. With `data.test_fraction` all are in one split, which is both.
    """
    refuse_remap(config.labels, setting="data.labels", because="the source defines the class names")
    _refuse_decoding_settings(config)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("data.source: digits needs scikit-learn; pip install 'kd-accel[demo]'") from None
    levels, labels = load_digits(return_X_y=True)
    if not fits_in_memory(len(labels), config):
        raise UserError(
            f"data.image_size: {len(labels)} images of {config.image_size}x{config.image_size} pixels take more memory than "
            f"data.memory_limit_mib: {config.memory_limit_mib}; lower data.image_size or raise data.memory_limit_mib"
        )
    gray = np.rint(levels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    decoder = Decoder.from_config(config)
    images = np.stack([decoder.fit_array(np.repeat(image[:, :, None], 3, axis=2)) for image in gray])
    names, labels = [str(digit) for digit in range(10)], labels.astype(np.int64)
    if config.test_fraction is not None:
        everything = MemoryImages(images, labels, names)
        return everything, everything
    is_test = np.arange(len(labels)) % 5 == 0
    train, test = (MemoryImages(images[part], labels[part], names) for part in (~is_test, is_test))
    return train, test


def _refuse_decoding_settings(config: DataConfig) -> None:
    """Raise UserError for settings of the decoding, which have no effect on opaque 8-bit images."""
    # Unlabeled images may be of any type.
    for name in () if config.unlabeled else ("background", "pixel_range"):
        if (value := getattr(config, name)) != DataConfig.model_fields[name].default:
            raise UserError(f"data.{name}: {value} has no effect with source digits, whose images are opaque; leave it out")
