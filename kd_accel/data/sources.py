"""Image sources: the Hugging Face hub, Parquet files, image folders, the digits of scikit-learn, and the user's own code.

In: the data settings. Out: two `ImageSet`s, train and test. A set whose decoded images fit in `data.memory_limit_mib` is
decoded once; a larger one keeps the encoded bytes (memory-mapped Arrow) and is decoded on demand. The classes are those of the
training split.
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
from kd_accel.errors import UserError, describe_error
from kd_accel.io.user_code import PREFIX, call_import

_CHUNK_SAMPLES = 1024
_MAX_CLASSES = 1_000_000
"""Limit of labels without class names: a larger one is an identifier in the wrong column, and would need as many names."""


def load_splits(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Load the training and the test split of the source.

    Returns:
        (train, test).

    Raises:
        UserError: The source does not fit the settings.
    """
    kind, _, place = config.source.partition(":")
    if kind == "digits":
        return _digits(config)
    if config.source.startswith(PREFIX):
        return _own_code(config)
    train = _load_columns(kind, place, config, config.train_split)
    test = _load_columns(kind, place, config, config.test_split)
    names = _class_names(train, config)
    return _image_set(train, names, config, config.train_split), _image_set(test, names, config, config.test_split)


def _digits(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Load scikit-learn's 8x8 gray digits as RGB; every fifth sample (360 of 1,797) is in the test split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("data.source: digits needs scikit-learn; pip install 'kd-accel[demo]'") from None
    levels, labels = load_digits(return_X_y=True)
    _refuse_large(len(labels), config)
    gray = np.rint(levels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = np.stack([fit_array(np.repeat(image[:, :, None], 3, axis=2), config.image_size) for image in gray])
    is_test = np.arange(len(labels)) % 5 == 0
    names = [str(digit) for digit in range(10)]
    return tuple(  # type: ignore[return-value]
        MemoryImages(images[part], labels[part].astype(np.int64), names) for part in (~is_test, is_test)
    )


def _refuse_large(samples: int, config: DataConfig) -> None:
    """Raise UserError if a source that is always held in memory exceeds `data.memory_limit_mib`."""
    if (needed := samples * config.image_size**2 * 3) > config.memory_limit_mib * 2**20:
        raise UserError(
            f"data.image_size: {samples} images of {config.image_size} x {config.image_size} pixels take {needed // 2**20} MiB "
            f"of memory, more than data.memory_limit_mib: {config.memory_limit_mib}; lower the image size or raise the limit"
        )


def _own_code(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    train, test = (_own_split(_called(config, name), config, name) for name in (config.train_split, config.test_split))
    if train.label_names != test.label_names:
        raise UserError(
            f"data.source: {config.source} gives other label_names for the test split than for the training split; both need "
            "the same, in the same order"
        )
    return train, test


def _called(config: DataConfig, split: str) -> Any:
    return call_import(
        config.source,
        (split, config.image_size),
        {},
        field="data.source",
        called_with="the name of the split and the image size, in this order",
    )


def _own_split(content: Any, config: DataConfig, split: str) -> MemoryImages:
    where = f"data.source: {config.source}, split {split!r}"
    try:
        images, labels, names = (
            np.asarray(content["images"]),
            np.asarray(content["labels"]),
            [str(name) for name in content["label_names"]],
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: must return a mapping with images, labels and label_names") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{where}: images must be uint8 [N, H, W, 3] and labels [N]; they are {images.dtype} {list(images.shape)} "
            f"and {list(labels.shape)}"
        )
    if not images.size:
        raise UserError(f"{where}: has no samples, or images without pixels: {list(images.shape)}")
    _refuse_large(len(images), config)
    fitted = empty_images(len(images), config.image_size)
    for sample, image in enumerate(images):
        fitted[sample] = fit_array(image, config.image_size)
    return MemoryImages(fitted, _checked_labels(labels, len(names), where), names)


def _load_columns(kind: str, place: str, config: DataConfig, split: str) -> Any:
    """Load a split as a `datasets.Dataset` with the columns `image` (undecoded) and `label`.

    Args:
        kind: hub, parquet or imagefolder.
        place: Repository or directory, the rest of `data.source`.
        config: The data settings.
        split: Name of the split in the source.

    Raises:
        UserError: The split is not found, cannot be read or has no samples.
    """
    datasets = _datasets(config)
    datasets.disable_progress_bars()
    builder, arguments, available = _locate(kind, place, split)
    if split not in available:
        raise UserError(f"data.source: {config.source} has no split {split!r} (available: {', '.join(available) or 'none'})")
    if kind == "parquet":
        arguments = {"data_files": {split: _files_with_samples(arguments["data_files"][split], config, split)}}
    try:
        dataset = datasets.load_dataset(builder, split=split, **arguments)
    except Exception as error:  # each reader raises its own exceptions on damaged or unreachable files
        raise UserError(f"data.source: cannot read {config.source} ({describe_error(error.__cause__ or error)})") from None
    if not len(dataset):
        raise _no_samples(config, split)
    return _two_columns(dataset, config, split, is_folder=kind == "imagefolder")


def _datasets(config: DataConfig) -> Any:
    """Import Hugging Face `datasets`, which only some sources need. Raises UserError if it is not installed."""
    try:
        import datasets
        from datasets import load_dataset as load_dataset  # a directory `datasets` can be imported as an empty package
    except ImportError as error:
        raise UserError(
            f"data.source: {config.source} needs the package datasets ({error}); pip install datasets, or use a source "
            "without it: import:MODULE:FUNCTION"
        ) from None
    return datasets


def _locate(kind: str, place: str, split: str) -> tuple[str, dict[str, Any], list[str]]:
    """Return (builder of `datasets`, its arguments, names of the available splits)."""
    if kind == "hub":
        name, _, revision = place.partition("@")
        return name, {"revision": revision or None}, _hub_splits(name, revision or None)
    directory = Path(place).expanduser()
    if not directory.is_dir():
        raise UserError(f"data.source: directory {place!r} not found (paths are relative to the working directory)")
    if kind == "parquet":
        files: dict[str, list[str]] = {}
        for path in sorted(directory.glob("*.parquet")):
            files.setdefault(path.name.split(".")[0].split("-")[0], []).append(str(path))
        return "parquet", {"data_files": {split: files.get(split, [])}}, list(files)
    folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
    pattern = str(Path(glob.escape(str(directory / split))) / "**")
    return "imagefolder", {"data_files": {split: pattern}, "drop_labels": False, "drop_metadata": True}, folders


def _files_with_samples(paths: list[str], config: DataConfig, split: str) -> list[str]:
    """Return glob patterns of the files that have samples: `datasets` fails on a file without any."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        kept = [glob.escape(path) for path in paths if pq.read_metadata(path).num_rows]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data.source: cannot read {config.source} ({describe_error(error)})") from None
    if not kept:
        raise _no_samples(config, split)
    return kept


def _no_samples(config: DataConfig, split: str) -> UserError:
    return UserError(f"data.source: the {split} split of {config.source} has no samples; name another split or source")


def _hub_splits(name: str, revision: str | None) -> list[str]:
    """Return the names of the available splits.

    Raises:
        UserError: The repository cannot be reached, or the local copy is another revision than the one in the settings:
            without a network `datasets` takes its newest copy of any revision.
    """
    import datasets

    try:
        splits = datasets.get_dataset_split_names(name, revision=revision)
        builder = datasets.load_dataset_builder(name, revision=revision) if revision else None
    except Exception as error:  # each client raises its own exceptions without a network or for a wrong name
        raise UserError(
            f"data.source: cannot reach hub:{name} ({describe_error(error)}); check name and network, or use a copy: "
            "parquet:DIR"
        ) from None
    is_stored_copy = type(builder).__module__.startswith("datasets.packaged_modules.cache.")
    if builder is not None and is_stored_copy and builder.hash != revision:
        raise UserError(
            f"data.source: cannot reach hub:{name}, and the newest local copy is revision {builder.hash}, not {revision}; "
            "check the network, set that revision, or use a copy: parquet:DIR"
        )
    return splits


def _two_columns(dataset: Any, config: DataConfig, split: str, *, is_folder: bool) -> Any:
    import datasets

    columns = (
        {"image": "image", "label": "label"} if is_folder else {"image": config.image_column, "label": config.label_column}
    )
    if is_folder and "label" not in dataset.column_names:
        raise UserError(
            f"data.source: {config.source} has no class folders; it must hold {split}/CLASS/IMAGE files, and no metadata files"
        )
    for role, column in columns.items():
        if column not in dataset.column_names:
            raise UserError(
                f"data.{role}_column: the {split} split has no column {column!r} (available: {', '.join(dataset.column_names)})"
            )
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({column: role for role, column in columns.items() if column != role})
    try:
        return dataset.cast_column("image", datasets.Image(decode=False))
    except Exception as error:
        raise UserError(
            f"data.image_column: {columns['image']!r} of the {split} split holds no images ({describe_error(error)})"
        ) from None


def _class_names(train: Any, config: DataConfig) -> tuple[str, ...]:
    """Return the class names of the label column's type, else the numbers up to the largest training label."""
    names = getattr(train.features["label"], "names", None)
    if names is not None:
        return tuple(names)
    labels = _labels(train, f"data.label_column: the {config.train_split} split")
    return tuple(str(label) for label in range(int(labels.max()) + 1))


def _image_set(dataset: Any, names: tuple[str, ...], config: DataConfig, split: str) -> ImageSet:
    where = f"data.label_column: the {split} split"
    own_names = getattr(dataset.features["label"], "names", None)
    if own_names is not None and tuple(own_names) != names:
        raise UserError(f"{where} has other classes than the {config.train_split} split; both need the same, in the same order")
    labels = _checked_labels(_labels(dataset, where), len(names), where)
    encoded = EncodedImages(
        dataset.select_columns(["image"]), labels, names, split=split, image_size=config.image_size, roots=_roots(config)
    )
    decoded_bytes = len(labels) * config.image_size**2 * 3
    if decoded_bytes > config.memory_limit_mib * 2**20:
        return encoded
    samples = np.arange(len(labels))
    images = empty_images(len(labels), config.image_size)
    for start in range(0, len(samples), _CHUNK_SAMPLES):
        images[start : start + _CHUNK_SAMPLES] = encoded.pixels(samples[start : start + _CHUNK_SAMPLES])
    return MemoryImages(images, labels, names, encoded=encoded)


def _roots(config: DataConfig) -> list[Path]:
    """Return the directories in which a source's image files may lie: its own, and the caches of `datasets` and the hub."""
    import datasets.config
    from huggingface_hub.constants import HF_HUB_CACHE

    own = Path(config.source.partition(":")[2]).expanduser()
    kept = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    return [Path(os.path.abspath(path)) for path in (own, *kept)]  # noqa: PTH100  (as in EncodedImages)


def _labels(dataset: Any, where: str) -> np.ndarray:
    column = dataset.data.column("label") if dataset._indices is None else dataset.with_format("arrow")["label"]
    labels = column.to_pylist() if hasattr(column, "to_pylist") else list(column)
    return _checked_labels(labels, None, where)


def _checked_labels(labels: Any, num_classes: int | None, where: str) -> np.ndarray:
    """Return labels as int64 [N], each in 0..num_classes-1.

    Raises:
        UserError: A label is not; the message has the index of the first such sample.
    """
    for sample, label in enumerate(labels):
        if not isinstance(label, int | np.integer) or isinstance(label, bool):
            raise UserError(f"{where}: the label of sample {sample} is {label!r}, not a whole number; labels count from 0")
        if not 0 <= label < (_MAX_CLASSES if num_classes is None else num_classes):
            allowed = f"0 or above, below {_MAX_CLASSES}" if num_classes is None else f"0..{num_classes - 1}"
            raise UserError(f"{where}: the label of sample {sample} is {label}, but classes are {allowed}; fix or remove it")
    return np.asarray(labels, dtype=np.int64)
