"""Replacement of `layers: auto` by the pairs of layers that it stands for.

In: the config of a distillation. Out: the same config with explicit pairs, so that caches, checkpoints and config.yaml are
those of a config that names the pairs itself.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from kd_accel.builders.teacher import refuse_absent_run
from kd_accel.config.schema import RunConfig, TeacherConfig
from kd_accel.models.auto_layers import pair_layers
from kd_accel.models.factory import build_model
from kd_accel.models.weights import load_run_model

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
    features = config.distill.features if config.distill else {}
    chosen = [name for name, feature in features.items() if feature.layers == "auto"]
    if config.distill is None or config.teacher is None or not chosen:
        return config
    model = config.model
    student = build_model(model.arch, num_classes=_NUM_CLASSES, stem=model.stem, arch_args=model.arch_args)
    field = f"distill.features.{chosen[0]}.layers"
    pairs = pair_layers(student, _teacher(config.teacher), image_size=config.data.image_size, field=field)
    replaced = {name: features[name].model_copy(update={"layers": pairs}) for name in chosen}
    distill = config.distill.model_copy(update={"features": {**features, **replaced}})
    return config.model_copy(update={"distill": distill})


def _teacher(teacher: TeacherConfig) -> nn.Module:
    """Build the teacher's network. Raises UserError if its run is not on this machine."""
    refuse_absent_run(teacher)
    if teacher.run is not None:
        return load_run_model(Path(teacher.run), field="teacher")[0]
    assert teacher.arch, "checked by config/validation.py"
    return build_model(teacher.arch, num_classes=_NUM_CLASSES, stem=teacher.stem, arch_args=teacher.arch_args, field="teacher")
