"""Replacement of `layers: auto` by the pairs of layers that it stands for.

In: the config of a distillation. Out: the same config with explicit pairs, so that caches, checkpoints and config.yaml are
those of a config that names the pairs itself.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from kd_accel.builders.teacher import refuse_absent_run
from kd_accel.config.schema import FeatureLossConfig, RunConfig, TeacherConfig
from kd_accel.models.auto_layers import pair_layers
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import check_teacher_size
from kd_accel.models.pretrained import weights_info
from kd_accel.models.weights import load_run_model
from kd_accel.teacher.loading import own_image_size

_NUM_CLASSES = 10
"""Any number, because the pairs do not depend on the classifier."""


def with_layers(config: RunConfig) -> RunConfig:
    """Replace `auto` in `distill.features.NAME.layers` by the pairs of student and teacher.

    The networks are built for this alone, with other weights than those of the run, because the pairs must be known before
    the config is compared with that of a checkpoint.

    Args:
        config: Config of a training, with a teacher's network if a loss has `auto`.

    Returns:
        The config with explicit pairs; the same object if no loss has `auto`.

    Raises:
        UserError: If a network cannot be built, or none of its layers outputs a feature map.
    """
    replaced: dict[str, FeatureLossConfig] = {}
    for own in config.by_teacher().values():
        features = own.distill.features if own.distill else {}
        chosen = [name for name, feature in features.items() if feature.layers == "auto"]
        if config.distill is not None and chosen:
            pairs = _pairs(own, field=f"distill.features.{chosen[0]}.layers")
            replaced |= {name: config.distill.features[name].model_copy(update={"layers": pairs}) for name in chosen}
    if config.distill is None or not replaced:
        return config
    distill = config.distill.model_copy(update={"features": {**config.distill.features, **replaced}})
    return config.model_copy(update={"distill": distill})


def _pairs(config: RunConfig, *, field: str) -> dict[str, str]:
    """Pair the layers of the student with those of a single teacher."""
    assert config.teacher is not None, "each of these configs has a teacher"
    model = config.model
    student = build_model(model.arch, num_classes=_NUM_CLASSES, stem=model.stem, arch_args=model.arch_args)
    image_size = config.data.image_size
    teacher, own_size = _teacher(config.teacher)
    teacher_size = config.teacher.image_size or own_size or image_size
    check_teacher_size(teacher, teacher_size)
    return pair_layers(student, teacher, image_size=image_size, teacher_size=teacher_size, field=field)


def _teacher(teacher: TeacherConfig) -> tuple[nn.Module, int | None]:
    """Return the teacher's network and its own image size. Raises UserError if its run is not on this machine."""
    refuse_absent_run(teacher)
    if teacher.run is not None:
        network, card = load_run_model(Path(teacher.run), field="teacher")
        return network, card.image_size
    assert teacher.arch and teacher.weights, "checked by config/validation.py"
    arch_args = teacher.arch_args
    network = build_model(teacher.arch, num_classes=_NUM_CLASSES, stem=teacher.stem, arch_args=arch_args, field="teacher")
    return network, own_image_size(weights_info(teacher.weights, teacher.arch), arch_args)
