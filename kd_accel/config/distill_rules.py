"""Rules of the distillation objective: temperature, weights, losses and layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kd_accel.config.fields import nearest
from kd_accel.config.loss_weights import value_range
from kd_accel.config.rules import WithoutEffect, no_effect
from kd_accel.config.schedule_rules import schedule_problems
from kd_accel.config.schema import DistillConfig, FeatureLossConfig, RunConfig
from kd_accel.io.user_code import PREFIX

# At 0.01 a softmax over the usual logits is already one-hot, and at 1,000 uniform, so that a teacher's output has no content.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.01, 1000.0


def distill_problems(config: RunConfig) -> Iterator[str]:
    """Yield a message for each broken rule of `distill`."""
    distill = config.distill
    if distill is None:
        return
    yield from schedule_problems("distill.temperature", distill.temperature, least=_LEAST_TEMPERATURE, most=_MOST_TEMPERATURE)
    if distill.label_weight is None:
        yield from schedule_problems("distill.alpha", distill.alpha, most=1.0)
    else:
        yield from schedule_problems("distill.alpha", distill.alpha)
        yield from schedule_problems("distill.label_weight", distill.label_weight)
    if distill.logits is None:
        yield from _without_logits(distill)
    elif distill.logits.loss == "kl" and distill.logits.args.get("divergence") == "mse":
        yield from no_effect(distill, "distill", ("temperature",), because="with distill.logits.args.divergence mse")
    for name, feature in distill.features.items():
        teacher = config.teachers.get(feature.teacher or "", config.teacher)
        yield from _feature(f"distill.features.{name}", feature, has_teacher=teacher is None or not teacher.is_stored)


def _without_logits(distill: DistillConfig) -> Iterator[str]:
    yield from no_effect(distill, "distill", ("temperature", "alpha"), because="with distill.logits null")
    if distill.label_weight is None:
        yield "distill.label_weight: null means 1 - alpha, but distill.logits is null; set a number, such as 1"
    if not distill.features:
        yield "distill: logits is null and features is empty, so that nothing is distilled; set one of them, or teacher to null"


def _feature(name: str, feature: FeatureLossConfig, *, has_teacher: bool) -> Iterator[str]:
    yield from schedule_problems(f"{name}.weight", feature.weight)
    if value_range(feature.weight)[1] == 0:
        yield WithoutEffect(f"{name}.weight: 0, so that the term has no effect; remove it with {name}: null", name)
    if feature.layers == "auto":
        if not has_teacher:
            yield (
                f"{name}.layers: auto needs the teacher's network, but neither teacher.run nor teacher.arch is set; write the "
                "pairs that `kd-accel cache build` has printed, as {student's module: teacher's module}"
            )
        return
    layers = list(feature.layers)
    if not layers or len(set(layers)) < len(layers):
        yield f"{name}.layers: {layers} must name at least one module, each once"


def unknown_losses(distill: DistillConfig, losses: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a message for each name of a loss that is not registered. losses: registered names by kind."""
    named = [("distill.logits.loss", "logits", distill.logits.loss)] if distill.logits else []
    for name, feature in distill.features.items():
        field = f"distill.features.{name}"
        named.append((f"{field}.loss" if feature.loss else field, "features", feature.loss or name))
    for field, kind, loss in named:
        known = losses[kind]
        if loss not in known and not loss.startswith(PREFIX):
            listed = ", ".join([*known, f"{PREFIX}package.module:Class"])
            yield f"{field}: {loss!r} is not the name of a loss between {kind}{nearest(loss, known)} (known: {listed})"
