"""Loading of a teacher: from a run of this program, or from an architecture and a weights file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_accel.config.schema import Stem
from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.weights import load_run_model, load_weights
from kd_accel.teacher.teacher import Teacher


def load_run_teacher(directory: Path) -> Teacher:
    """Load the model of a finished run. Raises UserError if the directory has no intact model."""
    network, card = load_run_model(directory, field="teacher")
    return Teacher(network, card.mean, card.std, tuple(card.label_names), card.arch, card.stem, card.arch_args)


def load_own_teacher(
    arch: str,
    weights: str,
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    stem: Stem = "imagenet",
    arch_args: Mapping[str, Any] | None = None,
) -> Teacher:
    """Build an architecture and load weights into it.

    Args:
        arch: Name of the architecture, as `teacher.arch` of a config.
        weights: Run directory, .safetensors file or name of pretrained weights, as `teacher.weights` of a config.
        num_classes: Number of classes, C.
        mean: Channel means in 0..1 with which the network was trained.
        std: Channel standard deviations in 0..1 with which the network was trained.
        stem: Stem of a ResNet.
        arch_args: Further arguments of the architecture's builder.

    Raises:
        UserError: If the weights do not fit the architecture exactly.
    """
    network = build_model(arch, num_classes=num_classes, stem=stem, arch_args=arch_args, field="teacher")
    load_weights(network, weights, arch=arch, is_exact=True, field="teacher")
    return Teacher(network, list(mean), list(std), None, arch, stem, dict(arch_args or {}))


def refuse_other_classes(teacher: Teacher, class_names: Sequence[str], *, run: str | None) -> None:
    """Check that a teacher has the classes of the data.

    Args:
        teacher: The teacher; without class names nothing is checked.
        class_names: Class names of the data, by label.
        run: Run directory of the teacher, for the message.

    Raises:
        UserError: If the classes or their order differ.
    """
    if teacher.class_names is None or teacher.class_names == tuple(class_names):
        return
    if len(teacher.class_names) != len(class_names):
        raise UserError(
            f"teacher.run: {run} has {len(teacher.class_names)} classes, the data has {len(class_names)}; use a teacher that "
            "was trained on the classes of the data"
        )
    pairs = zip(teacher.class_names, class_names, strict=True)
    index, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise UserError(
        f"teacher.run: class {index} is {theirs!r} in {run}, but {ours!r} in the data; teacher and data need the same classes "
        "in the same order"
    )
