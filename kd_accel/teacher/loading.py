"""Loading of a teacher: from a run of this program, or from an architecture and its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kd_accel.config.schema import Stem
from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.pretrained import WeightsInfo, weights_info
from kd_accel.models.weights import count_classes, load_run_model, load_weights
from kd_accel.teacher.classes import ClassMap, class_notices
from kd_accel.teacher.teacher import Teacher


def load_run_teacher(directory: Path, *, class_map: ClassMap | None = None) -> Teacher:
    """Load the model of a finished run. Raises UserError if the directory has no intact model."""
    network, card = load_run_model(directory, field="teacher")
    return Teacher(
        network,
        card.mean,
        card.std,
        tuple(card.label_names),
        card.arch,
        card.stem,
        card.arch_args,
        class_map=class_map,
        image_size=card.image_size,
    )


def load_own_teacher(
    arch: str,
    weights: str,
    *,
    class_names: Sequence[str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    stem: Stem = "imagenet",
    arch_args: Mapping[str, Any] | None = None,
    class_map: ClassMap | None = None,
) -> Teacher:
    """Build an architecture and load weights into it.

    Args:
        arch: Name of the architecture, as `teacher.arch` of a config.
        weights: Run directory, .safetensors file or name of pretrained weights, as `teacher.weights` of a config.
        class_names: Class names of the data, by label. Without a class map the weights must have as many classes.
        mean: Channel means in 0..1 with which the network was trained; None = those of the weights' run or library.
        std: Channel standard deviations in 0..1; None = those of the weights' run or library.
        stem: Stem of a ResNet.
        arch_args: Further arguments of the architecture's builder.
        class_map: The teacher's class for each class of the data, as in `Teacher`.

    Raises:
        UserError: If the weights do not fit the architecture exactly, or mean and std are not known.
    """
    info = weights_info(weights, arch)
    mean, std = (info.mean, info.std) if mean is None or std is None else (mean, std)
    if mean is None or std is None:
        raise UserError(
            f"teacher.mean and teacher.std: missing, and {weights} does not contain them; set those with which the teacher was "
            "trained, in 0..1"
        )
    build = partial(build_model, arch, stem=stem, arch_args=arch_args, field="teacher")
    network = build(num_classes=len(class_names))
    if class_map is not None:
        network = build(num_classes=info.num_classes or count_classes(network, weights, arch=arch, field="teacher"))
    load_weights(network, weights, arch=arch, is_exact=True, field="teacher")
    names = info.class_names if class_map is not None else _comparable_names(info, class_names)
    return Teacher(
        network,
        list(mean),
        list(std),
        names,
        arch,
        stem,
        dict(arch_args or {}),
        class_map=class_map,
        image_size=info.image_size,
    )


def teacher_notices(teacher: Teacher, class_names: Sequence[str], *, image_size: int) -> list[str]:
    """Return lines for the user: selected classes, an order of classes that is likely to differ, another image size.

    Args:
        teacher: The teacher, as `Teacher.for_classes` returns it.
        class_names: Class names of the data, by label.
        image_size: Height and width of the data's images in pixels.
    """
    has_map = teacher.class_map is not None
    notices = class_notices(teacher.class_indices, teacher.class_names, class_names, has_map=has_map)
    trained = teacher.image_size
    if trained is not None and trained != image_size:
        notices.append(
            f"data.image_size: {image_size}, but the teacher was trained on images of {trained} pixels, and may be less "
            f"accurate at another size; set data.image_size to {trained}, or use a teacher that was trained at {image_size}"
        )
    return notices


def _comparable_names(info: WeightsInfo, class_names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the class names of weights; None if they are those of a library, in words that differ from those of the data.

    ImageNet's first class is `tench` in torchvision, and `n01440764` or `tench, Tinca tinca` in data sets.
    """
    names = info.class_names
    return names if names is None or info.is_of_run or set(class_names) <= set(names) else None
