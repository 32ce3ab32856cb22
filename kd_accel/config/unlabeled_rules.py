"""Rules of training images without labels: all of them (`data.label_column: null`), or those of `data.unlabeled`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from kd_accel.config.loss_weights import labels_without_weight
from kd_accel.config.rules import WithoutEffect
from kd_accel.config.schema import DataConfig, RunConfig
from kd_accel.config.transform_schema import transform_config

_MIXING = ("mixup", "cutmix")


def label_column_problems(config: RunConfig) -> Iterator[str]:
    """Yield a message for each setting that does not fit data without labels (`data.label_column: null`)."""
    if config.data.label_column is not None:
        return
    if not config.has_teacher:
        yield "data.label_column: null means that no labels are read, which needs a teacher; set teacher.run, or a column"
        return
    if labels_without_weight(config) is None:
        yield (
            "distill.label_weight: the cross-entropy has a weight, but with data.label_column null no sample has a label; set "
            "distill.label_weight to 0"
        )
    if config.data.labels != "keep":
        yield WithoutEffect("data.labels: has no effect with data.label_column null; leave it out")


def unlabeled_problems(config: RunConfig, *, sources: Sequence[str]) -> Iterator[str]:
    """Yield a message for each setting that does not fit a second source of images without labels.

    Args:
        config: The config.
        sources: Prefixes of the sources of files and user code.
    """
    data = config.data
    if data.unlabeled is None:
        for name in ("unlabeled_split", "unlabeled_ratio"):
            if getattr(data, name) != getattr(DataConfig(), name):
                yield WithoutEffect(f"data.{name}: has no effect (without data.unlabeled); leave it out")
        return
    if not data.unlabeled.startswith(tuple(sources)):
        yield f"data.unlabeled: {data.unlabeled!r} must start with one of {', '.join(sources)}, or be null"
    if data.unlabeled_ratio is not None and not 0 < data.unlabeled_ratio < math.inf:
        yield f"data.unlabeled_ratio: {data.unlabeled_ratio} must be above 0, or null"
    if not config.has_teacher:
        yield WithoutEffect(
            "data.unlabeled: has no effect without a teacher, the only thing to learn from images without labels; set "
            "teacher.run, or leave it out"
        )
    if mixing := [name for name, _ in transform_config(data.transform).items() if name in _MIXING]:
        yield (
            f"data.transform.{mixing[0]}: mixes labeled training samples alone, and cannot be used with data.unlabeled; leave "
            "one of them out"
        )
