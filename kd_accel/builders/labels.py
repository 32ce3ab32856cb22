"""Check of a run's labels against its teacher, the class names of data without labels, and the settings that mix labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from kd_accel.cache.stored_teacher import StoredTeacher
from kd_accel.config.fields import nearest
from kd_accel.config.schema import RunConfig
from kd_accel.config.transform_schema import MixingSettings, transform_config
from kd_accel.data.datamodule import DataModule
from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.pretrained import weights_info
from kd_accel.models.weights import count_classes, load_card


def check_labels(config: RunConfig, data: DataModule) -> None:
    """Raise UserError for training samples without a label in a run without a teacher, or for wrong class weights."""
    unlabeled = data.unlabeled_samples
    if not config.has_teacher and len(unlabeled):
        raise UserError(
            f"data.label_column: {len(unlabeled)} of {len(data.splits.train)} training samples have no label (null or -1; the "
            f"first is sample {unlabeled[0]} of the {config.data.train_split} split), and training on them needs a teacher; "
            "set teacher.run, or remove these samples (if -1 is a class, store names as strings)"
        )
    if config.data.label_column is not None and len(unlabeled) == len(data.splits.train):
        raise UserError(
            f"data.label_column: {config.data.label_column}, but no training sample has a label; use another column or split, "
            "or null, to learn from the teacher alone"
        )
    class_weights(config, data)


def class_weights(config: RunConfig, data: DataModule) -> list[float] | None:
    """Return the factor of the cross-entropy for each class, in the order of the classes; None for 1.

    `balanced` is N / (C * n) for a class with n of N labeled training samples and C classes, so that the mean over these
    samples is 1. Other weights are used as they are.

    Raises:
        UserError: If the weights do not fit the classes, or have no effect.
    """
    weights, names = config.train.class_weights, data.label_names
    if weights is None:
        return None
    if weights == "balanced":
        return _balanced_weights(data)
    if isinstance(weights, dict):
        found = [weights.get(name, 1.0) for name in names]
        if unknown := [name for name in weights if name not in names]:
            raise UserError(
                f"train.class_weights: {unknown[0]!r} is not one of the {len(names)} classes{nearest(unknown[0], names)}"
            )
    elif len(found := list(weights)) != len(names):
        raise UserError(
            f"train.class_weights: {len(weights)} weights for {len(names)} classes ({', '.join(names[:3])}, ...); list one for "
            "each class, or use {class name: weight}"
        )
    if not any(found):
        raise UserError("train.class_weights: 0 for every class, so that no label has an effect; give a class a weight above 0")
    return found


def _balanced_weights(data: DataModule) -> list[float]:
    labels = data.train.labels[data.splits.train]
    counts = np.bincount(labels[labels >= 0], minlength=len(data.label_names))
    if empty := [data.label_names[label] for label in np.flatnonzero(counts == 0)]:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            "train.class_weights: balanced divides by the number of training samples of each class, but there are none of "
            f"{empty[0]!r}{more}; remove the class, or use {{class name: weight}}"
        )
    if counts.min() == counts.max():
        raise UserError(
            f"train.class_weights: balanced has no effect (each class has {counts[0]} training samples); leave it out"
        )
    return (counts.sum() / (len(counts) * counts)).tolist()


def mixing_settings(config: RunConfig) -> list[str]:
    """Return the dotted names of the transforms that mix samples and their labels; empty without mixup and cutmix."""
    transforms = transform_config(config.data.transform).items()
    return [f"data.transform.{name}" for name, settings in transforms if isinstance(settings, MixingSettings)]


ClassNames = tuple[str, ...] | None
"""Class names of data without labels; None for data with labels, which have their own."""


def unlabeled_class_names(config: RunConfig) -> ClassNames:
    """Return the teacher's class names, which are those of data without labels; None if the data has labels.

    Classes without a name are numbered. Of several teachers, those of the first; the others are compared with the data later.

    Raises:
        UserError: If the teacher's run, weights or cache cannot be read.
    """
    if config.data.label_column is not None or not config.has_teacher:
        return None
    teacher = next(iter(config.by_teacher().values())).teacher
    assert teacher is not None, "each of these configs has a teacher"
    if teacher.is_stored:
        return StoredTeacher.read(Path(teacher.cache.dir or "")).class_names
    if teacher.run is not None:
        return tuple(load_card(Path(teacher.run)).label_names)
    assert teacher.arch and teacher.weights, "checked by config/validation.py"
    info = weights_info(teacher.weights, teacher.arch)
    if info.class_names is not None:
        return _distinct(info.class_names)
    num_classes = info.num_classes
    if num_classes is None:
        network = build_model(teacher.arch, num_classes=1, stem=teacher.stem, arch_args=teacher.arch_args, field="teacher")
        num_classes = count_classes(network, teacher.weights, arch=teacher.arch, field="teacher")
    return tuple(map(str, range(num_classes)))


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    """Add the class index to names that several classes have, as ImageNet's two `crane`s."""
    counts = Counter(names)
    return tuple(f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(names))
