"""Loading of a teacher: from a run of this program, or from an architecture with weights of its own."""

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
    """Load the model of a finished run. Raises UserError if the directory holds none, or a damaged one."""
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
    """Build an architecture and fill it with weights, which must fit exactly. Raises UserError if they do not."""
    network = build_model(arch, num_classes=num_classes, stem=stem, arch_args=arch_args, field="teacher")
    load_weights(network, weights, arch=arch, is_exact=True, field="teacher")
    return Teacher(network, list(mean), list(std), None, arch, stem, dict(arch_args or {}))


def refuse_other_classes(teacher: Teacher, class_names: Sequence[str], *, run: str | None) -> None:
    """Raise UserError for a teacher of other classes than those of the data. run: its run directory, for the message."""
    if teacher.class_names is None or teacher.class_names == tuple(class_names):
        return
    if len(teacher.class_names) != len(class_names):
        raise UserError(
            f"teacher.run: {run} has {len(teacher.class_names)} classes, the data has {len(class_names)}; use a teacher that "
            "was trained on these classes"
        )
    pairs = zip(teacher.class_names, class_names, strict=True)
    index, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise UserError(
        f"teacher.run: class {index} of {run} is {theirs!r}, but {ours!r} in the data; both need the same classes in the same "
        "order"
    )
