"""Losses on feature maps [B, D, H, W].

Half types are computed in float32, float64 stays float64; autocast is off inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from kd_accel.errors import UserError
from kd_accel.losses.base import FeatureLoss, LossSettings, register
from kd_accel.losses.logits import full_precision
from kd_accel.losses.targets import PCA, Identity, TargetFunction
from kd_accel.models.projectors import Shape, seeded_projector
from kd_accel.profiling import profiler_range

Direction = Literal["student_to_teacher", "teacher_to_student", "both"]
_RESERVED_KEYS = frozenset(dir(nn.ModuleDict()))


def mse_loss(student_map: Tensor, target_map: Tensor) -> Tensor:
    """Compute the mean squared error over all elements.

    The larger map is average-pooled to the smaller one's height and width.

    Args:
        student_map: [B, D, H, W].
        target_map: [B, D, H', W'], same channels.

    Returns:
        A scalar.
    """
    with torch.autocast(student_map.device.type, enabled=False):
        student, target = _meet(full_precision(student_map), full_precision(target_map))
        if student.is_contiguous(memory_format=torch.channels_last):
            student, target = student.movedim(1, -1), target.movedim(1, -1)  # in memory order, so that no copy is made
        loss: Tensor = _MeanSquare.apply(student, target)
        return loss


@register("mse")
class MSE(FeatureLoss):
    """Mean squared error between feature maps in the same channels, summed over the layers.

    The direction says which side is projected:

    - `student_to_teacher`: a learned 1x1 convolution brings the student's map to the teacher's channels (FitNets).
    - `teacher_to_student`: a frozen PCA brings the teacher's map to the student's channels.
    - `both`: that PCA, and a learned 1x1 convolution of the student's own width.

    Formula:
        sum over layers of mean((projected student - target)^2)

    References:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.
    """

    class Settings(LossSettings):
        """Settings of `mse`.

        Args:
            direction: which side is projected.
            pca_images: training images on which the PCA is fitted (view 0).
        """

        direction: Direction = "both"
        pca_images: int = Field(2048, ge=1)

        @model_validator(mode="after")
        def _refuse_images_without_a_fit(self) -> Self:
            if self.direction == "student_to_teacher" and "pca_images" in self.model_fields_set:
                raise ValueError("pca_images: has no effect (no PCA is fitted with direction student_to_teacher); leave it out")
            return self

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.projectors = nn.ModuleDict()

    def target_function(self, student_shape: Shape, teacher_shape: Shape) -> TargetFunction:
        """Return the identity or a PCA to the student's channels. Raises UserError if the PCA would have to add channels."""
        if self.settings.direction == "student_to_teacher":
            return Identity()
        student, teacher = student_shape[0], teacher_shape[0]
        if teacher < student:
            raise UserError(
                f"direction: {self.settings.direction} cannot bring the {teacher} channels of the teacher to {student}: "
                "a PCA only removes channels; use student_to_teacher"
            )
        return PCA(student, images=self.settings.pca_images)

    def build(self, student_shapes: Mapping[str, Shape], target_shapes: Mapping[str, Shape], *, seed: int) -> None:
        """Create the learned projectors of the student's side."""
        if self.settings.direction == "teacher_to_student":
            return
        for layer, shape in student_shapes.items():
            projector = seeded_projector(shape[0], target_shapes[layer][0], layer=layer, seed=seed)
            self.projectors[module_key(layer)] = projector

    def forward(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, index: Tensor | None = None) -> Tensor:
        """Return the sum over layers of `mse_loss`; arguments as in `FeatureLoss.forward`."""
        if self.projectors:
            with profiler_range("projector"):
                features = {layer: self.projectors[module_key(layer)](feature) for layer, feature in features.items()}
        return torch.stack([mse_loss(feature, targets[layer]) for layer, feature in features.items()]).sum()


def module_key(name: str) -> str:
    """Return the name of a layer or loss as a key of a ModuleDict, which takes no dots and none of its attributes' names."""
    key = name.replace(".", "/")
    return f"{key}/" if key in _RESERVED_KEYS else key


class _MeanSquare(torch.autograd.Function):
    """Mean of (student - target)^2, keeping their difference alone for the backward; torch's mse_loss keeps both maps."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor) -> Tensor:
        difference = student - target
        ctx.save_for_backward(difference)
        flat = difference.flatten()
        return flat.dot(flat) / flat.numel()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (difference,) = ctx.saved_tensors
        own = difference * (gradient * (2 / difference.numel()))
        return own if ctx.needs_input_grad[0] else None, -own if ctx.needs_input_grad[1] else None


def _meet(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    size = (min(student.shape[2], target.shape[2]), min(student.shape[3], target.shape[3]))
    return _pooled(student, size), _pooled(target, size)


def _pooled(feature: Tensor, size: tuple[int, int]) -> Tensor:
    if feature.shape[2:] == size:
        return feature
    if feature.is_cuda and torch.are_deterministic_algorithms_enabled():
        return pooled_by_products(feature, size)
    return functional.adaptive_avg_pool2d(feature, size)


def pooled_by_products(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `adaptive_avg_pool2d(feature, size)` as two matrix products: [B, D, H, W] -> [B, D, *size].

    CUDA has no deterministic backward of the pooling itself; its matrix products are deterministic. They are in float64, which
    TF32 does not touch.
    """
    samples, columns = (_window_means(n, out, feature.device) for n, out in zip(feature.shape[2:], size, strict=True))
    return (samples @ feature.double() @ columns.T).to(feature.dtype)


def _window_means(length: int, windows: int, device: torch.device) -> Tensor:
    """Return the weights of the means over the windows of adaptive pooling, float64 [windows, length]."""
    at, window = torch.arange(length, device=device), torch.arange(windows, device=device)[:, None]
    first, end = window * length // windows, -(-(window + 1) * length // windows)
    return ((at >= first) & (at < end)).double() / (end - first)
