"""Image sources: the Hugging Face Hub, Parquet files, image folders, scikit-learn's digits, and user code.

Input: the data settings. Output: two `ImageSet`s, train and test. A split whose decoded images fit in `data.memory_limit_mib`
is decoded once. A larger split keeps its encoded bytes in memory-mapped Arrow files and is decoded on demand. The classes are
those of the training split.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

import numpy as np

from kd_accel.config.schema import DataConfig
from kd_accel.data.dataset import EncodedImages as EncodedImages
from kd_accel.data.dataset import ImageSet as ImageSet
from kd_accel.data.dataset import MemoryImages as MemoryImages
from kd_accel.data.dataset import empty_images
from kd_accel.data.decode import fit_array
from kd_accel.data.folders import FileColumn, FolderSplit, read_folder
from kd_accel.errors import UserError, describe_error
from kd_accel.io.user_code import PREFIX, call_import

_CHUNK_SAMPLES = 1024
_MAX_CLASSES = 1_000_000
"""Limit of labels without class names; a larger label is probably an identifier from another column."""


def load_splits(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Load the training and the test split of the source.

    Returns:
        (train, test).

    Raises:
        UserError: If the source cannot be read or does not match the settings.
    """
    kind, _, location = config.source.partition(":")
    if kind == "digits":
        return _digits(config)
    if config.source.startswith(PREFIX):
        return _user_splits(config)
    if kind == "imagefolder":
        return _folder_splits(location, config)
    train = _load_columns(kind, location, config, config.train_split)
    test = _load_columns(kind, location, config, config.test_split)
    names = _class_names(train, config)
    return _image_set(train, names, config, config.train_split), _image_set(test, names, config, config.test_split)


def _digits(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Load scikit-learn's 8x8 gray digits as RGB; every fifth sample (360 of 1,797) is in the test split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("data.source: digits needs scikit-learn; pip install 'kd-accel[demo]'") from None
    levels, labels = load_digits(return_X_y=True)
    _check_memory_limit(len(labels), config)
    gray = np.rint(levels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = np.stack([fit_array(np.repeat(image[:, :, None], 3, axis=2), config.image_size) for image in gray])
    is_test = np.arange(len(labels)) % 5 == 0
    names = [str(digit) for digit in range(10)]
    return tuple(  # type: ignore[return-value]
        MemoryImages(images[part], labels[part].astype(np.int64), names) for part in (~is_test, is_test)
    )


def _check_memory_limit(samples: int, config: DataConfig) -> None:
    """Raise UserError if a source that is always held in memory exceeds `data.memory_limit_mib`."""
    size = config.image_size
    if (needed_bytes := samples * size**2 * 3) > config.memory_limit_mib * 2**20:
        raise UserError(
            f"data.image_size: {samples} images of {size}x{size} pixels take {needed_bytes // 2**20} MiB of memory, more than "
            f"data.memory_limit_mib: {config.memory_limit_mib}; lower data.image_size or raise data.memory_limit_mib"
        )


def _user_splits(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Call the user's function once for each split."""
    train, test = (_user_split(_call(config, name), config, name) for name in (config.train_split, config.test_split))
    if train.label_names != test.label_names:
        raise UserError(
            f"data.source: {config.source} returns different label_names for the {config.train_split} split and the "
            f"{config.test_split} split; both must have the same classes in the same order"
        )
    return train, test


def _call(config: DataConfig, split: str) -> Any:
    return call_import(
        config.source,
        (split, config.image_size),
        {},
        field="data.source",
        called_with="the name of the split and the image size, in this order",
    )


def _user_split(content: Any, config: DataConfig, split: str) -> MemoryImages:
    """Check what the user's function returned for a split, and resize its images."""
    function = f"data.source: {config.source}"
    try:
        images, labels, names = (
            np.asarray(content["images"]),
            np.asarray(content["labels"]),
            [str(name) for name in content["label_names"]],
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{function} must return a mapping with images, labels and label_names for the {split} split; fix the function"
        ) from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{function} returns images {images.dtype} {list(images.shape)} and labels {list(labels.shape)} for the {split} "
            "split; images must be uint8 [N, H, W, 3] and labels [N]"
        )
    if not images.size or not names:
        raise UserError(
            f"{function} returns images {list(images.shape)} and {len(names)} label_names for the {split} split; at least one "
            "sample, one pixel per image and one class are required"
        )
    _check_memory_limit(len(images), config)
    fitted = empty_images(len(images), config.image_size)
    for sample, image in enumerate(images):
        fitted[sample] = fit_array(image, config.image_size)
    return MemoryImages(fitted, _check_labels(labels, len(names), field="data.source", split=split), names)


def _folder_splits(location: str, config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """List the files of both splits before any is decoded."""
    directory = _directory(location)
    train = _folder_split(directory, config, config.train_split)
    test = _folder_split(directory, config, config.test_split, label_names=train.label_names)
    return tuple(  # type: ignore[return-value]
        _in_memory_if_small(
            EncodedImages(
                FileColumn(found.paths),
                found.labels,
                found.label_names,
                split=split,
                image_size=config.image_size,
                roots=[_absolute(directory)],
                notices=found.notices,
            ),
            config,
        )
        for split, found in ((config.train_split, train), (config.test_split, test))
    )


def _folder_split(
    directory: Path, config: DataConfig, split: str, *, label_names: tuple[str, ...] | None = None
) -> FolderSplit:
    """List the files of a split. label_names: classes of the training split; None = this is the training split."""
    available = sorted(path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if split not in available:
        raise _missing_split(config, split, available)
    if metadata := sorted(path.name for path in (directory / split).glob("metadata.*")):
        raise UserError(
            f"data.source: {directory / split} has the file {metadata[0]}, which is not read: the labels of an image folder "
            f"are the names of its directories; remove this file if they are right ({split}/CLASS/IMAGE)"
        )
    return read_folder(directory / split, split=split, label_names=label_names)


def _load_columns(kind: str, location: str, config: DataConfig, split: str) -> Any:
    """Load a split as a `datasets.Dataset` with the columns `image` (undecoded) and `label`.

    Args:
        kind: Kind of the source: hub or parquet.
        location: Repository or directory, the part of `data.source` after the colon.
        config: The data settings.
        split: Name of the split in the source.

    Raises:
        UserError: If the split is not found, cannot be read or has no samples.
    """
    datasets = _datasets(config)
    datasets.disable_progress_bars()
    builder, arguments, available = _locate(kind, location, split)
    if split not in available:
        raise _missing_split(config, split, available)
    if kind == "parquet":
        arguments = {"data_files": {split: _files_with_samples(arguments["data_files"][split], config, split)}}
    try:
        dataset = datasets.load_dataset(builder, split=split, **arguments)
    except Exception as error:
        # Each reader raises its own exceptions on damaged or unreachable files.
        raise _unreadable(config, error.__cause__ or error) from None
    if not len(dataset):
        raise _no_samples(config, split)
    return _two_columns(dataset, config, split)


def _missing_split(config: DataConfig, split: str, available: list[str]) -> UserError:
    setting = "data.train_split" if split == config.train_split else "data.test_split"
    remedy = f"use one of {', '.join(available)}" if available else "the source has no splits; use another source"
    return UserError(f"{setting}: {config.source} has no split {split!r}; {remedy}")


def _directory(location: str) -> Path:
    directory = Path(location).expanduser()
    if not directory.is_dir():
        raise UserError(f"data.source: directory {location!r} not found; check the path, relative to the working directory")
    return directory


def _datasets(config: DataConfig) -> Any:
    """Import Hugging Face `datasets`, which only some sources use. Raises UserError if it is not installed."""
    try:
        import datasets

        # Fails for a directory `datasets` in the working directory, which Python imports as an empty package.
        from datasets import load_dataset as load_dataset
    except ImportError as error:
        raise UserError(
            f"data.source: {config.source} needs the package datasets ({error}); pip install datasets, or use a source "
            "that works without it (import:MODULE:FUNCTION)"
        ) from None
    return datasets


def _locate(kind: str, location: str, split: str) -> tuple[str, dict[str, Any], list[str]]:
    """Return the builder for `datasets.load_dataset`, its arguments, and the names of the available splits."""
    if kind == "hub":
        name, _, revision = location.partition("@")
        return name, {"revision": revision or None}, _hub_splits(name, revision or None)
    files: dict[str, list[str]] = {}
    for path in sorted(_directory(location).glob("*.parquet")):
        files.setdefault(path.name.split(".")[0].split("-")[0], []).append(str(path))
    return "parquet", {"data_files": {split: files.get(split, [])}}, list(files)


def _files_with_samples(paths: list[str], config: DataConfig, split: str) -> list[str]:
    """Return glob patterns of the files that have samples; `datasets` raises an error for a file without samples."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        kept = [glob.escape(path) for path in paths if pq.read_metadata(path).num_rows]
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(config, error) from None
    if not kept:
        raise _no_samples(config, split)
    return kept


def _unreadable(config: DataConfig, error: BaseException) -> UserError:
    return UserError(f"data.source: cannot read {config.source} ({describe_error(error)}); check that its files are intact")


def _no_samples(config: DataConfig, split: str) -> UserError:
    return UserError(f"data.source: the {split} split of {config.source} has no samples; use another split or source")


def _hub_splits(name: str, revision: str | None) -> list[str]:
    """Return the names of the available splits.

    Raises:
        UserError: If the repository cannot be reached, or the local copy has another revision than the settings. Without
            network access `datasets` uses its newest local copy, regardless of the revision.
    """
    import datasets

    try:
        splits = datasets.get_dataset_split_names(name, revision=revision)
        builder = datasets.load_dataset_builder(name, revision=revision) if revision else None
    except Exception as error:
        # Each HTTP client raises its own exceptions without network access or for an unknown name.
        raise UserError(
            f"data.source: cannot reach hub:{name} ({describe_error(error)}); check the name and the network access, or use "
            "a local copy (parquet:DIR)"
        ) from None
    is_local_copy = type(builder).__module__.startswith("datasets.packaged_modules.cache.")
    if builder is not None and is_local_copy and builder.hash != revision:
        raise UserError(
            f"data.source: cannot reach hub:{name}, and the newest local copy is revision {builder.hash}, not {revision}; "
            "check the network access, set that revision, or use another local copy (parquet:DIR)"
        )
    return splits


def _two_columns(dataset: Any, config: DataConfig, split: str) -> Any:
    import datasets

    columns = {"image": config.image_column, "label": config.label_column}
    for role, column in columns.items():
        if column not in dataset.column_names:
            raise UserError(
                f"data.{role}_column: the {split} split has no column {column!r}; use one of {', '.join(dataset.column_names)}"
            )
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({column: role for role, column in columns.items() if column != role})
    try:
        return dataset.cast_column("image", datasets.Image(decode=False))
    except Exception as error:
        raise UserError(
            f"data.image_column: column {columns['image']!r} of the {split} split does not contain images "
            f"({describe_error(error)}); use another column"
        ) from None


def _class_names(train: Any, config: DataConfig) -> tuple[str, ...]:
    """Return the class names that the label column defines, else the numbers up to the largest training label."""
    names = getattr(train.features["label"], "names", None)
    if names is not None:
        return tuple(names)
    labels = _read_labels(train, field="data.label_column", split=config.train_split)
    return tuple(str(label) for label in range(int(labels.max()) + 1))


def _image_set(dataset: Any, names: tuple[str, ...], config: DataConfig, split: str) -> ImageSet:
    field = "data.label_column"
    own_names = getattr(dataset.features["label"], "names", None)
    if own_names is not None and tuple(own_names) != names:
        raise UserError(
            f"{field}: the {config.train_split} split and the {split} split have different classes; both must have the same "
            "classes in the same order"
        )
    labels = _check_labels(_read_labels(dataset, field=field, split=split), len(names), field=field, split=split)
    encoded = EncodedImages(
        dataset.select_columns(["image"]), labels, names, split=split, image_size=config.image_size, roots=_roots(config)
    )
    return _in_memory_if_small(encoded, config)


def _in_memory_if_small(encoded: EncodedImages, config: DataConfig) -> ImageSet:
    """Decode all images of a split if they fit in `data.memory_limit_mib`."""
    samples = np.arange(encoded.num_samples)
    if len(samples) * config.image_size**2 * 3 > config.memory_limit_mib * 2**20:
        return encoded
    images = empty_images(len(samples), config.image_size)
    for start in range(0, len(samples), _CHUNK_SAMPLES):
        images[start : start + _CHUNK_SAMPLES] = encoded.pixels(samples[start : start + _CHUNK_SAMPLES])
    return MemoryImages(images, encoded.labels, encoded.label_names, encoded=encoded)


def _roots(config: DataConfig) -> list[Path]:
    """Return the directories that may contain image files: the source's own, and the caches of `datasets` and the Hub."""
    import datasets.config
    from huggingface_hub.constants import HF_HUB_CACHE

    directory = Path(config.source.partition(":")[2]).expanduser()
    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    return [_absolute(Path(path)) for path in (directory, *caches)]


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (links are not resolved, as in EncodedImages)


def _read_labels(dataset: Any, *, field: str, split: str) -> np.ndarray:
    column = dataset.data.column("label") if dataset._indices is None else dataset.with_format("arrow")["label"]
    labels = column.to_pylist() if hasattr(column, "to_pylist") else list(column)
    return _check_labels(labels, None, field=field, split=split)


def _check_labels(labels: Any, num_classes: int | None, *, field: str, split: str) -> np.ndarray:
    """Return labels as int64 [N], each at least 0 and below `num_classes` (None = below `_MAX_CLASSES`).

    Raises:
        UserError: If a label is not an integer of this range; the message contains the index of the first such sample.
    """
    limit = _MAX_CLASSES if num_classes is None else num_classes
    for sample, label in enumerate(labels):
        if not isinstance(label, int | np.integer) or isinstance(label, bool):
            value = f"{label!r} ({type(label).__name__})"
        elif not 0 <= label < limit:
            value = str(label)
        else:
            continue
        raise UserError(
            f"{field}: the label of sample {sample} of the {split} split is {value}, but labels must be integers, at least 0 "
            f"and below {limit}; fix the label or remove the sample"
        )
    return np.asarray(labels, dtype=np.int64)
