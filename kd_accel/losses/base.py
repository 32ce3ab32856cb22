"""Base classes of losses: modules that are built in two steps, first from their settings, then for feature shapes.

A loss is a submodule of the one trained module (`Distiller`), so the DDP wrapper, the optimizer, checkpoints and resume include
its parameters and buffers. Temperature and weights follow schedules: they are arguments of each step, not settings of a loss.

Shapes: B batch, C classes, D channels, H height, W width.
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

LossClass = TypeVar("LossClass", bound="type[_Loss]")


def register(name: str) -> Callable[[LossClass], LossClass]:
    """Register a loss class under the name that configs use.

    The registry reads the decorator from the source text, so that names are available without importing torch.
    """

    def decorate(loss: LossClass) -> LossClass:
        loss.name = name
        return loss

    return decorate


class LossSettings(BaseModel):
    """Base class of a loss's settings: frozen, strictly typed, without unknown keys.

    The "Args:" section of a subclass is the description that users read. A rule that involves several settings is a
    `model_validator` that raises `ValueError("setting: rule; remedy")`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Loss(nn.Module):
    """Common base of logit and feature losses, with settings validated by the nested class `Settings`.

    The docstring of a loss has the sections "Formula:" and "References:", which the table of losses shows.

    Parameters are trained with the student. Buffers are saved in each checkpoint. A loss that writes to a buffer what depends
    on the samples, such as a memory bank, must write the samples of all processes, which `gather` returns.

    Attributes:
        gather: Function from a tensor [B, ...] of this process to those of all processes, concatenated in the order of the
            ranks. Every rank must call it, with tensors of the same shape. The trainer sets it; by default it returns its
            argument, as is right for one process.
    """

    name: ClassVar[str] = ""
    per_sample: ClassVar[bool] = True
    """Whether the loss is a mean over samples, so that it does not depend on the number of processes or accumulation steps.

    False for losses that compare the samples of a batch with each other, over the micro-batch of one process.
    """
    uses_index: ClassVar[bool] = False
    """Whether `forward` needs `index`, which is copied to the device only then."""
    synchronizes_buffers: ClassVar[bool] = False
    """Whether the buffers of the loss and its submodules are equal on all ranks by themselves.

    If False, the buffers of rank 0 are broadcast before each forward.
    """
    supports_mixed_labels: ClassVar[bool] = True
    """Whether the loss is defined for samples mixed from two by mixup or cutmix.

    False for losses that need the one true class of each sample; a training with such a loss and mixed samples is refused.
    """

    class Settings(LossSettings):
        """Empty settings."""

    def __init__(self, **settings: Any) -> None:
        """Initialize the loss with its settings.

        Args:
            **settings: Fields of `Settings`.

        Raises:
            ValueError: If a setting is unknown or not valid (pydantic's `ValidationError`).
        """
        super().__init__()
        self.settings: Any = type(self).Settings(**settings)
        self.gather: Callable[[Tensor], Tensor] = _of_this_process
        self.is_built = False

    @classmethod
    def checked_settings(cls, args: Mapping[str, Any], *, field: str) -> dict[str, Any]:
        """Validate settings from a config, and return them as keyword arguments of the class.

        Args:
            args: Settings by name.
            field: Dotted name of the mapping in the config, for messages.

        Raises:
            UserError: If settings are unknown or not valid. The message lists all of them by dotted name.
        """
        try:
            cls.Settings(**args)
        except ValidationError as error:
            known = list(cls.Settings.model_fields)
            raise UserError("; ".join(_describe_mistake(mistake, known, field) for mistake in error.errors())) from None
        return dict(args)


class LogitLoss(_Loss):
    """Base class of losses that compare the logits of student and teacher."""

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        temperature: float | Tensor,
        labels: Tensor,
        index: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of a micro-batch.

        Args:
            student_logits: Logits of the student, [B, C].
            teacher_logits: Logits of the teacher, [B, C].
            temperature: Temperature T of this step, above 0: a number, or a scalar tensor on the device. A value that is read
                back (`if`, `item`) would keep the step from being captured as a CUDA graph.
            labels: Class indices, int64 [B]; -1 = no label. With mixup or cutmix, the probability of each class, float32
                [B, C], in rows that sum to 1; zeros = no label.
            index: Positions of the samples in their source split, int64 [B], on the device; None unless `uses_index`.

        Returns:
            The loss, a scalar that is finite for finite logits.
        """
        raise NotImplementedError


class FeatureLoss(_Loss):
    """Base class of losses that compare feature maps of student and teacher, in a frozen and a trained half.

    `target_function` returns the frozen half: a function of the teacher's map alone, whose result a cache can store. `build`
    creates the parameters of the trained half once the shapes are known. `forward` compares the student's maps with the
    targets.
    """

    def target_function(self, student_shape: Shape, teacher_shape: Shape) -> TargetFunction:
        """Return the function that is applied to the teacher's map of a layer pair, not fitted; by default the identity.

        Args:
            student_shape: Shape (D, H, W) of the student's map.
            teacher_shape: Shape (D, H, W) of the teacher's map.
        """
        return Identity()

    def set_samples(self, samples: Tensor) -> None:
        """Set the samples of the training, before `build`; by default they are ignored.

        A loss with something for each sample, such as a memory bank, needs their number and positions.

        Args:
            samples: Positions of all training samples in their source split, int64 [N], ascending, in host memory. Each `index`
                of a forward is one of them.
        """

    def build(self, student_shapes: Mapping[str, Shape], target_shapes: Mapping[str, Shape], *, seed: int) -> None:
        """Create parameters and buffers; by default none.

        Args:
            student_shapes: Shape (D, H, W) of the student's maps by student layer.
            target_shapes: Shape (D, H, W) of the targets by student layer.
            seed: Seed of the initial weights, which should depend on nothing else that is random.
        """

    def forward(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, index: Tensor | None = None) -> Tensor:
        """Compute the loss of a micro-batch.

        Args:
            features: Maps of the student, [B, D, H, W], by student layer.
            targets: Results of the target functions, [B, D, H, W] with their own D, H and W, by student layer.
            index: Positions of the samples in their source split, int64 [B], on the device; None unless `uses_index`.

        Returns:
            The loss, a scalar.
        """
        raise NotImplementedError


def _of_this_process(tensor: Tensor) -> Tensor:
    """Return the tensor itself: the samples of all processes, if there is one."""
    return tensor


def _describe_mistake(mistake: Any, known: list[str], field: str) -> str:
    """Describe one of pydantic's errors: dotted name, value, rule, remedy."""
    path = [str(part) for part in mistake["loc"]]
    name, kind = ".".join([field, *path]), mistake["type"]
    if kind == "missing":
        return f"{name}: missing, and without a default; set it"
    if kind == "value_error":
        rule = str(mistake["ctx"]["error"])
        # Errors of a model_validator have no location: their text begins with the name of the setting.
        return f"{name}: {mistake['input']!r} is not valid: {rule}" if path else f"{name}.{rule}"
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], known, n=1)
        if close:
            return f"{name}: no such setting; did you mean {field}.{close[0]}?"
        return f"{name}: no such setting; " + (f"use one of {', '.join(known)}" if known else "remove it: the loss has none")
    return f"{name}: {mistake['input']!r} is not valid: {mistake['msg'][:1].lower()}{mistake['msg'][1:]}"
