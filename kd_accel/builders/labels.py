"""Check of a run's labels against its teacher, the class names of data without labels, and the settings that mix labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from kd_accel.cache.stored_teacher import StoredTeacher
from kd_accel.config.schema import RunConfig
from kd_accel.config.transform_schema import MixingSettings, transform_config
from kd_accel.data.datamodule import DataModule
from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.pretrained import weights_info
from kd_accel.models.weights import count_classes, load_card


def check_labels(config: RunConfig, data: DataModule) -> None:
    """Raise UserError for training samples without a label if the run has no teacher to learn from."""
    unlabeled = data.unlabeled_samples
    if config.teacher is None and len(unlabeled):
        raise UserError(
            f"data.label_column: {len(unlabeled)} of {len(data.splits.train)} training samples have no label (null or -1; the "
            f"first is sample {unlabeled[0]} of the {config.data.train_split} split), and training on them needs a teacher; "
            "set teacher.run, or remove these samples (if -1 is a class, store names as strings)"
        )


def mixing_settings(config: RunConfig) -> list[str]:
    """Return the dotted names of the transforms that mix samples and their labels; empty without mixup and cutmix."""
    transforms = transform_config(config.data.transform).items()
    return [f"data.transform.{name}" for name, settings in transforms if isinstance(settings, MixingSettings)]


def unlabeled_class_names(config: RunConfig) -> tuple[str, ...] | None:
    """Return the teacher's class names, which are those of data without labels; None if the data has labels.

    Classes without a name are numbered.

    Raises:
        UserError: If the teacher's run, weights or cache cannot be read.
    """
    teacher = config.teacher
    if config.data.label_column is not None or teacher is None:
        return None
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
