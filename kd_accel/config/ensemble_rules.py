"""Rules of several teachers: their names, weights and directories, and the teacher of each feature loss."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kd_accel.config.loss_weights import value_range
from kd_accel.config.rules import WithoutEffect, no_effect
from kd_accel.config.schedule_rules import schedule_problems
from kd_accel.config.schema import DistillConfig, EnsembleConfig, RunConfig, Schedule

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SETTING = re.compile(r"(?<![\w./-])(--)?teacher(?=\.[a-z]|:)")


def ensemble_problems(config: RunConfig) -> Iterator[str]:
    """Yield a message for each broken rule of `teachers`, and of what only several teachers need."""
    distill = config.distill or DistillConfig()
    if not config.teachers:
        yield from no_effect(distill.ensemble, "distill.ensemble", ("mean", "confidence"), because="without teachers")
        for name, feature in distill.features.items():
            if feature.teacher is not None:
                yield WithoutEffect(f"distill.features.{name}.teacher: has no effect (without teachers); leave it out")
        return
    if config.teacher is not None:
        yield "teacher: set either teacher, or teachers, to which a single one belongs too"
    if len(config.teachers) == 1:
        yield f"teachers: {next(iter(config.teachers))} is the only one; write its settings under teacher, or add another"
    for name in config.teachers:
        if not _NAME.fullmatch(name):
            yield f"teachers: the name {name!r} must have letters, digits, hyphens and underscores only"
    yield from _weights(config, distill)
    yield from _directories(config)
    yield from _features(config, distill)
    yield from _combination(config, distill.ensemble, distill)


def of_teacher(message: str, name: str) -> str:
    """Return a message about a setting of `teacher` for one of several: `teachers.NAME` in place of `teacher`.

    Args:
        message: Message for a user.
        name: Name of the teacher; the empty string for a single one, whose messages stay as they are.
    """
    if not name:
        return message
    renamed = _SETTING.sub(rf"\g<1>teachers.{name}", message.replace("--teacher null", "--teachers null"))
    return WithoutEffect(renamed) if isinstance(message, WithoutEffect) else renamed


def _weights(config: RunConfig, distill: DistillConfig) -> Iterator[str]:
    ranges = {}
    for name, teacher in config.teachers.items():
        yield from schedule_problems(f"teachers.{name}.weight", teacher.weight)
        ranges[name] = value_range(teacher.weight)
        has_features = any(feature.teacher == name for feature in distill.features.values())
        if distill.logits is None:
            yield from no_effect(teacher, f"teachers.{name}", ("weight",), because="with distill.logits null")
            if not has_features:
                yield WithoutEffect(
                    f"teachers.{name}: has no effect, because distill.logits is null and no feature loss compares its layers; "
                    f"remove it with teachers.{name}: null"
                )
        elif ranges[name][1] == 0 and not has_features:
            message = f"teachers.{name}.weight: 0, so that the teacher has no effect; remove it with teachers.{name}: null"
            yield WithoutEffect(message, f"teachers.{name}")
    # A schedule can be 0 at its beginning, and from its end on.
    if not all(map(any, zip(*(_ends(teacher.weight) for teacher in config.teachers.values()), strict=True))):
        yield "teachers: the weight of one of them must be above 0 at every step, because the weights are divided by their sum"


def _ends(weight: float | Schedule) -> tuple[float, float]:
    """Return the first and the last value of a weight, up to its sign."""
    if not isinstance(weight, Schedule) or weight.kind == "constant":
        value = weight.start if isinstance(weight, Schedule) else weight
        return value, value
    if weight.kind == "exponential":
        return max(weight.start, weight.floor or 0), max(weight.start, weight.floor or 0)
    return weight.start, weight.start if weight.end is None else weight.end


def _directories(config: RunConfig) -> Iterator[str]:
    names: dict[str, str] = {}
    for name, teacher in config.teachers.items():
        directory = teacher.cache.dir if teacher.outputs != "live" else None
        if directory is not None and directory in names:
            yield (
                f"teachers.{name}.cache.dir: {directory} is that of teachers.{names[directory]} too, but a cache holds the "
                "outputs of one teacher; set another directory"
            )
        elif directory is not None:
            names[directory] = name


def _features(config: RunConfig, distill: DistillConfig) -> Iterator[str]:
    names = ", ".join(config.teachers)
    for name, feature in distill.features.items():
        if feature.teacher is None:
            yield f"distill.features.{name}.teacher: missing; name the teacher whose layers are compared ({names})"
        elif feature.teacher not in config.teachers:
            yield f"distill.features.{name}.teacher: {feature.teacher!r} is not the name of a teacher ({names})"


def _combination(config: RunConfig, ensemble: EnsembleConfig, distill: DistillConfig) -> Iterator[str]:
    if distill.logits is None:
        yield from no_effect(ensemble, "distill.ensemble", ("mean", "confidence"), because="with distill.logits null")
    elif distill.logits.args.get("divergence") == "mse" and ensemble.mean == "probabilities":
        yield "distill.ensemble.mean: probabilities have no logits, which divergence mse compares; set it to logits"
    if ensemble.confidence and config.data.label_column is None:
        yield WithoutEffect(
            "distill.ensemble.confidence: has no effect with data.label_column null, because it needs labels; leave it out"
        )
