"""Loading of a teacher: from a run of this program, or from an architecture and its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor
from pathlib import Path
from typing import Any

from torch import nn

from kd_accel.config.rules import BEST_WEIGHTS
from kd_accel.config.schema import Stem
from kd_accel.config.teacher_schema import TeacherInterpolation
from kd_accel.errors import UserError
from kd_accel.io.files import is_directory
from kd_accel.models.factory import build_model
from kd_accel.models.inference import outputs_agree
from kd_accel.models.pretrained import WeightsInfo, run_info, weights_info
from kd_accel.models.weights import count_classes, load_run_model, load_weights
from kd_accel.teacher.classes import ClassMap, class_notices
from kd_accel.teacher.teacher import Teacher


@dataclass(frozen=True)
class Preprocessing:
    """Settings of the images that a teacher sees; None = as its weights were trained.

    Attributes:
        image_size: Height and width in pixels; None = those of the weights, if they are known.
        interpolation: Interpolation of the resizing; None = that of the weights, else bilinear.
        crop_pct: Side of the central square, as a fraction of the side of the view; None = 1, the complete view.
    """

    image_size: int | None = None
    interpolation: TeacherInterpolation | None = None
    crop_pct: float | None = None

    def arguments(self, info: WeightsInfo, arch_args: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `Teacher`, completed by what is known of the weights."""
        return {
            "image_size": own_image_size(info, arch_args) if self.image_size is None else self.image_size,
            "interpolation": self.interpolation or info.interpolation or "bilinear",
            "crop_pct": 1.0 if self.crop_pct is None else self.crop_pct,
        }


_OF_WEIGHTS = Preprocessing()
_ROUNDING = 1e-4
"""Difference of the logits, as a fraction of the largest, that two networks of the same function may have."""


def load_run_teacher(
    directory: Path, *, class_map: ClassMap | None = None, preprocessing: Preprocessing = _OF_WEIGHTS
) -> Teacher:
    """Load the model of a finished run. Raises UserError if the directory has no intact model."""
    network, card = load_run_model(directory, field="teacher")
    info = run_info(directory)
    return Teacher(
        network,
        card.mean,
        card.std,
        tuple(card.label_names),
        card.arch,
        card.stem,
        card.arch_args,
        class_map,
        **preprocessing.arguments(info, card.arch_args),
        info=info,
    )


def load_own_teacher(  # noqa: PLR0913  (everything that decides the outputs)
    arch: str,
    weights: str,
    *,
    class_names: Sequence[str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    stem: Stem = "imagenet",
    arch_args: Mapping[str, Any] | None = None,
    class_map: ClassMap | None = None,
    preprocessing: Preprocessing = _OF_WEIGHTS,
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
        preprocessing: Settings of the images that the teacher sees.

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
    if other := info.other_network(arch, stem, arch_args or {}):
        _refuse_other_outputs(network, info, weights, other)
    names = info.class_names if class_map is not None else _comparable_names(info, class_names)
    return Teacher(
        network,
        list(mean),
        list(std),
        names,
        arch,
        stem,
        dict(arch_args or {}),
        class_map,
        **preprocessing.arguments(info, arch_args or {}),
        info=info,
    )


def _refuse_other_outputs(network: nn.Module, info: WeightsInfo, weights: str, other: str) -> None:
    """Raise UserError if a network computes other logits than that of the run whose weights it has.

    Stem and arguments can change the outputs without changing a tensor's shape, so that the weights fit. Many do not, as those
    of the initial weights.
    """
    run = Path(weights) if is_directory(Path(weights)) else Path(weights).parent
    original, card = load_run_model(run, field="teacher")
    if Path(weights).name == BEST_WEIGHTS:
        load_weights(original, weights, arch=card.arch, is_exact=True, field="teacher")
    if not outputs_agree(original, network.eval(), card.image_size, tolerance=_ROUNDING):
        raise UserError(
            f"teacher.weights: {weights} was trained with {other}, and this network has other outputs; set these under "
            "teacher, or teacher.run in place of arch and weights"
        )


def own_image_size(info: WeightsInfo, arch_args: Mapping[str, Any]) -> int | None:
    """Return the image size of weights in pixels; None if unknown.

    Args:
        info: What is known of the weights.
        arch_args: Arguments of the architecture's builder. A network that is built for one size accepts no other.
    """
    built = arch_args.get("img_size", arch_args.get("image_size"))
    return built if isinstance(built, int) else info.image_size


def _shortened(crop_pct: float, size: int) -> float:
    """Return a fraction with the fewest digits with which an image of `size` pixels is cut out of one of the same size."""
    rounded = (floor(crop_pct * 10**digits) / 10**digits for digits in range(2, 9))
    return next((value for value in rounded if floor(size / value) == floor(size / crop_pct)), crop_pct)


def teacher_notices(teacher: Teacher, class_names: Sequence[str], *, image_size: int) -> list[str]:
    """Return lines for the user: selected classes, an order of classes that is likely to differ, preprocessing of its own.

    Args:
        teacher: The teacher, as `Teacher.for_classes` returns it.
        class_names: Class names of the data, by label.
        image_size: Height and width of the data's images in pixels.
    """
    has_map = teacher.class_map is not None
    notices = class_notices(teacher.class_indices, teacher.class_names, class_names, has_map=has_map)
    return notices + _preprocessing_notices(teacher, teacher.info or WeightsInfo(), image_size=image_size)


def _preprocessing_notices(teacher: Teacher, info: WeightsInfo, *, image_size: int) -> list[str]:
    """Return lines about the image size and the crop of the teacher, and about those of its weights."""
    notices, size = [], teacher.input_size(image_size)
    if (resize := teacher.resize_for(image_size)) is not None:
        crop = "" if resize.side == size else f" to {resize.side}, of which it sees the central {size}"
        remedy = f"; {image_size} shows them as they are" if size != image_size else ""
        notices.append(
            f"teacher.image_size: {size}, so that the views of {image_size} pixels are resized for the teacher{crop} "
            f"({resize.interpolation}){remedy}"
        )
    if info.image_size is not None and info.image_size != size:
        notices.append(
            f"teacher.image_size: {size}, but the teacher was trained on images of {info.image_size} pixels, and may be less "
            f"accurate at another size; set it to {info.image_size}, or use a teacher that was trained at {size}"
        )
    if info.crop_pct is not None and floor(size / info.crop_pct) != floor(size / teacher.crop_pct):
        stated = _shortened(info.crop_pct, size)
        notices.append(
            f"teacher.crop_pct: {teacher.crop_pct:.4g}, but the card of the weights states {stated}, for photos that are not "
            "cropped; with another value than 1 teacher and student see different parts of a view"
        )
    return notices


def _comparable_names(info: WeightsInfo, class_names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the class names of weights; None if they are those of a library, in words that differ from those of the data.

    ImageNet's first class is `tench` in torchvision, and `n01440764` or `tench, Tinca tinca` in data sets.
    """
    names = info.class_names
    return names if names is None or info.is_of_run or set(class_names) <= set(names) else None
