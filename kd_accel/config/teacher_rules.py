"""Rules of the teacher's settings: where it comes from, its classes, and the source of its outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from kd_accel.config.data_schema import has_transform
from kd_accel.config.rules import RUN_WEIGHTS, arch_problems, at_least, no_effect, pixel_statistics
from kd_accel.config.schema import MAX_IMAGE_SIZE, RunConfig, TeacherConfig


def teacher_problems(config: RunConfig, *, has_own_classes: bool = False) -> Iterator[str]:
    """Yield a message for each broken rule of `teacher`, in a config with one teacher.

    Args:
        config: The config.
        has_own_classes: Whether data without labels has the classes of another teacher, the first of several.
    """
    teacher = config.teacher
    assert teacher is not None, "called for each teacher"
    if teacher.run is not None and teacher.arch is not None:
        yield "teacher: set either teacher.run (a run directory) or teacher.arch with teacher.weights, not both"
    elif teacher.is_stored:
        yield from _stored_teacher(teacher)
    elif teacher.run is not None:
        yield from no_effect(
            teacher, "teacher", ("stem", "weights", "arch_args", "mean", "std"), because="teacher.run determines it"
        )
    else:
        yield from _own_teacher(teacher)
    yield from _preprocessing(teacher, data_size=config.data.image_size)
    if config.data.label_column is None:
        settings = ("min_accuracy",) if has_own_classes else ("class_map", "min_accuracy")
        yield from no_effect(teacher, "teacher", settings, because="with data.label_column null the classes are the teacher's")
    yield from _classes_and_accuracy(teacher)
    yield from _outputs(config, teacher)


def _stored_teacher(teacher: TeacherConfig) -> Iterator[str]:
    """Check a teacher of which only the stored outputs exist."""
    described = ("stem", "weights", "arch_args", "mean", "std", "image_size", "interpolation", "crop_pct", "class_map")
    if teacher.outputs == "cached":
        yield from no_effect(teacher, "teacher", described, because="without teacher.run and teacher.arch the cache decides")
    else:
        yield (
            "teacher: set either teacher.run (a run directory) or teacher.arch with teacher.weights; without a teacher, set "
            "teacher.outputs to cached and teacher.cache.dir to a cache of its outputs"
        )


def _preprocessing(teacher: TeacherConfig, *, data_size: int) -> Iterator[str]:
    """Check the size of the images that the teacher sees. That interpolation has an effect is checked with its weights."""
    yield from at_least(teacher, "teacher", 1, "image_size")
    size, crop_pct = teacher.image_size or data_size, 1.0 if teacher.crop_pct is None else teacher.crop_pct
    if not 0 < crop_pct <= 1:
        yield f"teacher.crop_pct: {crop_pct} must be above 0 and at most 1"
    elif size > MAX_IMAGE_SIZE:
        yield f"teacher.image_size: {size} must be at most {MAX_IMAGE_SIZE}"
    elif size / crop_pct > MAX_IMAGE_SIZE:
        yield (
            f"teacher.crop_pct: {crop_pct} resizes views to {size / crop_pct:.0f} pixels, of which the teacher sees {size}; at "
            f"most {MAX_IMAGE_SIZE} are supported: raise it, or lower teacher.image_size"
        )


def _classes_and_accuracy(teacher: TeacherConfig) -> Iterator[str]:
    if teacher.class_map is not None and not teacher.class_map:
        yield f"teacher.class_map: {teacher.class_map} must name at least one class, or be auto or null"
    minimum = teacher.min_accuracy
    if minimum is not None and minimum != "auto" and not 0 <= minimum <= 1:
        yield f"teacher.min_accuracy: {minimum} must be at least 0 and at most 1 (a fraction), or auto, or null for no check"


def _outputs(config: RunConfig, teacher: TeacherConfig) -> Iterator[str]:
    cache, outputs = teacher.cache, teacher.outputs
    yield from at_least(cache, "teacher.cache", 1, "batch_size")
    if not (math.isfinite(cache.shard_mib) and cache.shard_mib > 0):
        yield f"teacher.cache.shard_mib: {cache.shard_mib} must be above 0"
    if outputs == "live":
        yield from no_effect(cache, "teacher.cache", ("dtype", "shard_mib", "batch_size"), because="with teacher.outputs live")
        return
    if cache.dir is None:
        yield f"teacher.cache.dir: missing; with teacher.outputs {outputs} set the directory of the cache"
    if config.data.views is None and has_transform(config.data):
        yield f"data.views: null means new views in each epoch; with teacher.outputs {outputs} set the number of cached views"
    if outputs == "mixed" and (config.distill is None or not config.distill.features):
        yield "teacher.outputs: mixed differs from cached only in the features; without distill.features use cached"


def _own_teacher(teacher: TeacherConfig) -> Iterator[str]:
    yield from arch_problems("teacher.arch", str(teacher.arch))
    if teacher.weights is None:
        yield "teacher.weights: null, but a teacher must be trained; set a .safetensors file or the name of pretrained weights"
    if (teacher.mean is None) != (teacher.std is None):
        yield "teacher.mean and teacher.std: one of them is set; set both or none"
    weights = Path(teacher.weights or "")
    if teacher.mean is None and weights.suffix == ".safetensors" and weights.name not in RUN_WEIGHTS:
        yield "teacher.mean and teacher.std: missing; with a weights file set those with which the teacher was trained, in 0..1"
    yield from pixel_statistics("teacher", teacher.mean, teacher.std)
