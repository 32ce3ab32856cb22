"""Base classes of losses: modules with settings, parameters and buffers, built before the shapes are known.

A loss becomes part of the one trained module (`Distiller`), so the DDP wrapper, the optimizer, checkpoints and resume include
its parameters and buffers. Temperature and weights are arguments of a step, from schedules; they are not settings of a loss.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from kd_accel.errors import UserError
from kd_accel.losses.targets import Identity, TargetFunction
from kd_accel.models.projectors import Shape

Class = TypeVar("Class", bound="type[_Loss]")


def register(name: str) -> Callable[[Class], Class]:
    """Give a loss class the name by which a config finds it. The registry reads the decorator from the source text."""

    def decorate(loss: Class) -> Class:
        loss.name = name
        return loss

    return decorate


class LossSettings(BaseModel):
    """Base of a loss's settings: strict types, frozen, unknown keys refused.

    The "Args:" of the class describe the settings to the user. A rule over several settings is a `model_validator` that raises
    `ValueError("setting: rule; remedy")`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Loss(nn.Module):
    """Base of both kinds: settings, validated by the class's own `Settings` model.

    The docstring of a loss has the sections "Formula:" and "References:", which the table of losses shows. Parameters are
    trained with the student. Buffers are part of each checkpoint; with several processes those of rank 0 are sent to all before
    each forward, so a loss that writes to a buffer must write the samples of all processes.
    """

    name: ClassVar[str] = ""
    per_sample: ClassVar[bool] = True
    """Whether the loss is a mean of terms of one sample each, and so equal on any number of processes and accumulation steps.

    Losses over pairs of the batch are not: they are computed over the micro-batch of one process.
    """
    uses_index: ClassVar[bool] = False
    """Whether `index` is needed; it is copied to the device only then."""

    class Settings(LossSettings):
        """No settings."""

    def __init__(self, **settings: Any) -> None:
        """Raises ValueError (pydantic's ValidationError) for unknown or wrong settings."""
        super().__init__()
        self.settings: Any = type(self).Settings(**settings)

    @classmethod
    def checked_settings(cls, args: Mapping[str, Any], *, field: str) -> dict[str, Any]:
        """Validate settings from a config. Raises UserError that lists every mistake by its dotted name."""
        try:
            cls.Settings(**args)
        except ValidationError as error:
            known = list(cls.Settings.model_fields)
            raise UserError("; ".join(_explained(mistake, known, field) for mistake in error.errors())) from None
        return dict(args)


class LogitLoss(_Loss):
    """A distance between the logits of student and teacher."""

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, labels: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of a micro-batch.

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            temperature: T of this step.
            labels: int64 [B].
            index: int64 [B], the samples' positions in their split, on the device; given where `uses_index`.

        Returns:
            A scalar, finite for finite logits.
        """
        raise NotImplementedError


class FeatureLoss(_Loss):
    """A distance between named feature maps of student and teacher, in two halves.

    `target_function` is the frozen half, applied to the teacher's map and stored by a cache. `build` creates the parameters of
    the other half once the shapes are known, `forward` compares.
    """

    def target_function(self, student_shape: Shape, teacher_shape: Shape) -> TargetFunction:
        """Return the function that is applied to the teacher's map of a layer pair, not fitted."""
        return Identity()

    def build(self, student_shapes: Mapping[str, Shape], target_shapes: Mapping[str, Shape], *, seed: int) -> None:
        """Create parameters and buffers. Both mappings have the student's layers as keys; the default has none to create."""

    def forward(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, index: Tensor | None = None) -> Tensor:
        """Compute the loss of a micro-batch.

        Args:
            features: the student's maps [B, D, H, W] by its layer.
            targets: the teacher's targets by the student's layer.
            index: int64 [B], the samples' positions in their split, on the device; given where `uses_index`.

        Returns:
            A scalar.
        """
        raise NotImplementedError


def _explained(mistake: Any, known: list[str], field: str) -> str:
    """Describe one of pydantic's errors: dotted name, value, rule, remedy."""
    path = [str(part) for part in mistake["loc"]]
    name, kind = ".".join([field, *path]), mistake["type"]
    if kind == "missing":
        return f"{name}: missing, and without a default; set it"
    if kind == "value_error":
        rule = str(mistake["ctx"]["error"])
        return f"{name}: {mistake['input']!r} is not valid: {rule}" if path else f"{name}.{rule}"
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], known, n=1)
        advice = f"did you mean {field}.{close[0]}?" if close else f"its settings are {', '.join(known) or 'none'}"
        return f"{name}: no such setting; {advice}"
    return f"{name}: {mistake['input']!r} is not valid: {mistake['msg'][:1].lower()}{mistake['msg'][1:]}"
