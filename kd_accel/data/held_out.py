"""Data for the evaluation of a trained model, whose classes are known: a test split is read without the training split.

Input: the data settings, with mean and standard deviation, and the classes of the model. Output: a data module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kd_accel.config.data_schema import DataConfig
from kd_accel.data.datamodule import DataModule, build_module, load_data
from kd_accel.data.dataset import ImageSet, MemoryImages, empty_images
from kd_accel.data.folders import quoted
from kd_accel.data.inventory import Inventory
from kd_accel.data.labels import UNLABELED, LabelEncoding, LabelSource, no_labels, refuse_unlabeled
from kd_accel.data.passes import Peers
from kd_accel.data.source_splits import EncodedSplit, SourceSplit
from kd_accel.data.sources import open_source
from kd_accel.data.splits import HeldOutSplit
from kd_accel.errors import UserError

if TYPE_CHECKING:
    from kd_accel.distributed import Accelerator


def load_held_out(
    config: DataConfig, split: HeldOutSplit, label_names: Sequence[str], accelerator: Accelerator | None = None
) -> DataModule:
    """Load the data to evaluate a model on.

    Args:
        config: The data settings, with mean and standard deviation.
        split: The split to evaluate on.
        label_names: Class names of the model, in the order of its logits.
        accelerator: Accelerator of a launch, as for `load_data`.

    Returns:
        The data. If the test split is one of the source's own, the other splits are not read and have no samples.

    Raises:
        UserError: If the source cannot be read, or has other classes than the model.
    """
    test = _test_split(config, label_names) if split == "test" else None
    if test is None:
        data = load_data(config, accelerator, class_names=label_names, reads_unlabeled=False)
        _refuse_other_classes(data.label_names, label_names)
        return data
    train = MemoryImages(empty_images(0, config.image_size), np.empty(0, dtype=np.int64), label_names)
    return build_module(train, None, test, config, Inventory(config.on_error, config.num_workers, Peers(accelerator)))


def _test_split(config: DataConfig, label_names: Sequence[str]) -> ImageSet | None:
    """Load the test split; None if its samples or their classes depend on the training split."""
    if config.source == "digits" or config.test_fraction is not None:
        return None
    source = open_source(config)
    if source.split_names is not None and config.test_split not in source.split_names:
        return None
    split = source.read(config.test_split, train=_named(label_names))
    labels = _class_indices(split, config, label_names)
    return split.image_set(labels, label_names, config, notices=split.notices)


def _named(label_names: Sequence[str]) -> SourceSplit:
    """Return a stand-in for the training split, of which the class names are known."""
    return EncodedSplit(
        LabelSource("model.json", "train"), [], tuple(label_names), (), column=None, roots=[Path()], files=lambda: []
    )


def _class_indices(split: SourceSplit, config: DataConfig, label_names: Sequence[str]) -> np.ndarray:
    """Map the labels of a split to the classes of the model, int64 [N].

    A source without class names has the labels themselves as names, as in a training, and may lack some of them.
    """
    if config.label_column is None:
        return no_labels(len(split.labels))
    if split.label_names is not None:
        _refuse_other_classes(split.label_names, label_names)
    rule = config.labels if split.label_names is None else "keep"
    own = LabelEncoding.fit(split.labels, source=split.origin, names=split.label_names, rule=rule)
    indices = own.encode(split.labels, source=split.origin)
    position = {name: index for index, name in enumerate(label_names)}
    present = [own.label_names[index] for index in np.unique(indices[indices >= 0])]
    if unknown := [name for name in present if name not in position]:
        raise UserError(
            f"{split.origin.field}: the {split.origin.split} split of {config.source} has labels that are not classes of the "
            f"model: {quoted(unknown)}; evaluate on data with the classes {quoted(list(label_names))}"
        )
    indices = np.array([*(position.get(name, UNLABELED) for name in own.label_names), UNLABELED], dtype=np.int64)[indices]
    refuse_unlabeled(indices, split="test", remedy="remove them, or set data.test_split or data.test_fraction")
    return indices


def _refuse_other_classes(names: Sequence[str], expected: Sequence[str]) -> None:
    """Raise UserError if the classes of the data differ from those of the model."""
    if tuple(names) == tuple(expected):
        return
    missing, unknown = [name for name in expected if name not in names], [name for name in names if name not in expected]
    parts = [f"missing in the data: {quoted(missing)}"] if missing else []
    parts += [f"not in the model: {quoted(unknown)}"] if unknown else []
    if not parts:
        index = next(index for index, pair in enumerate(zip(names, expected, strict=True)) if pair[0] != pair[1])
        parts = [f"class {index} is {ascii(names[index])} in the data and {ascii(expected[index])} in the model"]
    raise UserError(
        f"data.source: the classes differ from those in model.json ({'; '.join(parts)}); both must have the same classes in "
        "the same order"
    )
