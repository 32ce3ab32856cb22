"""Losses on feature maps.

Half-precision inputs are computed in float32, float64 inputs in float64; autocast is disabled inside.

Shapes: B batch, D channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Compute the mean squared error between two maps with the same channels.

    Maps of different sizes are average-pooled to the smaller height and the smaller width. It has no second derivatives.

    Args:
        student_map: Map of the student, [B, D, H, W].
        target_map: Map of the target, [B, D, H', W'].

    Returns:
        The mean over all elements, a scalar.
    """
    return _summed_mse_loss([(student_map, target_map)])


@register("mse")
class MSE(FeatureLoss):
    """Mean squared error between feature maps with the same channels, summed over the layers.

    `direction` selects the side whose channels are projected:

    - `student_to_teacher`: a learned 1x1 convolution maps the student's channels to the teacher's (FitNets).
    - `teacher_to_student`: a frozen PCA maps the teacher's channels to the student's.
    - `both`: the PCA of `teacher_to_student`, and a learned 1x1 convolution that keeps the number of the student's channels.

    Formula:
        Sum over layers of mean((projected student - target)^2)

    References:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.
    """

    class Settings(LossSettings):
        """Settings of `mse`.

        Args:
            direction: Side whose channels are projected.
            pca_images: Number of training images, in view 0, on which the PCA is fitted.
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
        """Return the identity, or a PCA to the student's channels.

        Args:
            student_shape: Shape (D, H, W) of the student's map.
            teacher_shape: Shape (D, H, W) of the teacher's map.

        Raises:
            UserError: If a PCA is needed and the teacher's map has fewer channels than the student's.
        """
        if self.settings.direction == "student_to_teacher":
            return Identity()
        student_channels, teacher_channels = student_shape[0], teacher_shape[0]
        if teacher_channels < student_channels:
            raise UserError(
                f"direction: {self.settings.direction} cannot project the teacher's {teacher_channels} channels to the "
                f"student's {student_channels}, because a PCA cannot add channels; use student_to_teacher"
            )
        return PCA(student_channels, images=self.settings.pca_images)

    def build(self, student_shapes: Mapping[str, Shape], target_shapes: Mapping[str, Shape], *, seed: int) -> None:
        """Create the learned projectors of the student's layers; see `FeatureLoss.build` for the arguments.

        Raises:
            UserError: If a target has other channels than the student's map and nothing projects them.
        """
        if self.settings.direction == "teacher_to_student":
            for layer, shape in student_shapes.items():
                if shape[0] != (channels := target_shapes[layer][0]):
                    raise UserError(
                        f"direction: teacher_to_student compares equal channels, but {layer} has {shape[0]}, and its target "
                        f"{channels}; use PCA({shape[0]}) as the target function of the teacher's layer"
                    )
            return
        for layer, shape in student_shapes.items():
            projector = seeded_projector(shape[0], target_shapes[layer][0], layer=layer, seed=seed)
            self.projectors[module_key(layer)] = projector

    def forward(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, index: Tensor | None = None) -> Tensor:
        """Compute the sum of `mse_loss` over the layers; see `FeatureLoss.forward` for the arguments."""
        if self.projectors:
            with profiler_range("projector"):
                features = {layer: self.projectors[module_key(layer)](feature) for layer, feature in features.items()}
        return _summed_mse_loss([(feature, targets[layer]) for layer, feature in features.items()])


def module_key(name: str) -> str:
    """Convert the name of a layer or loss to a key of `nn.ModuleDict`, which may be neither dotted nor an attribute's name."""
    key = name.replace(".", "/")
    return f"{key}/" if key in _RESERVED_KEYS else key


def _summed_mse_loss(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute the sum of `mse_loss` over pairs of maps."""
    with torch.autocast(pairs[0][0].device.type, enabled=False):
        students, targets = zip(*(_aligned(*pair) for pair in pairs), strict=True)
        loss: Tensor = _MeanSquares.apply(*students, *targets)
        return loss


class _MeanSquares(torch.autograd.Function):
    """Sum over pairs of maps of the mean of (student - target)^2.

    It saves only the differences for the backward, where torch's mse_loss saves both maps, and uses one kernel for all pairs
    where there is one.
    """

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        number = len(maps) // 2
        differences = torch._foreach_sub(maps[:number], maps[number:])
        ctx.save_for_backward(*differences)
        flat = [difference.flatten() for difference in differences]
        means = torch._foreach_div([each.dot(each) for each in flat], [float(each.numel()) for each in flat])
        return torch.stack(means).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        differences = ctx.saved_tensors
        factors = torch._foreach_mul([gradient] * len(differences), [2 / difference.numel() for difference in differences])
        gradients = [difference * factor for difference, factor in zip(differences, factors, strict=True)]
        needed = ctx.needs_input_grad[len(gradients) :]
        return *gradients, *(-each if is_needed else None for each, is_needed in zip(gradients, needed, strict=True))


def _aligned(student_map: Tensor, target_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps in full precision, of one size, with their dimensions in memory order."""
    student, target = pool_to_common_size(full_precision(student_map), full_precision(target_map))
    # `_MeanSquares` flattens the maps, which would copy channels_last ones.
    if student.is_contiguous(memory_format=torch.channels_last):
        return student.movedim(1, -1), target.movedim(1, -1)
    return student, target


def pool_to_common_size(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps [B, D, H, W] to the smaller height and the smaller width of the two."""
    size = (min(student.shape[2], target.shape[2]), min(student.shape[3], target.shape[3]))
    return pool(student, size), pool(target, size)


def pool(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool maps [B, D, H, W] to [B, D, *size], with deterministic kernels where these are requested."""
    if feature.shape[2:] == size:
        return feature
    if feature.is_cuda and torch.are_deterministic_algorithms_enabled():
        return pooled_by_products(feature, size)
    return functional.adaptive_avg_pool2d(feature, size)


def pooled_by_products(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute `adaptive_avg_pool2d(feature, size)` as two matrix products.

    The backward of CUDA's pooling is not deterministic, that of its matrix products is. They are computed in float64, to which
    TF32 does not apply.

    Shape:
        [B, D, H, W] -> [B, D, *size].
    """
    rows, columns = (_pooling_weights(n, out, feature.device) for n, out in zip(feature.shape[2:], size, strict=True))
    return (rows @ feature.double() @ columns.T).to(feature.dtype)


def _pooling_weights(length: int, windows: int, device: torch.device) -> Tensor:
    """Return the matrix that averages over the windows of adaptive pooling, float64 [windows, length]."""
    position, window = torch.arange(length, device=device), torch.arange(windows, device=device)[:, None]
    first, end = window * length // windows, -(-(window + 1) * length // windows)
    return ((position >= first) & (position < end)).double() / (end - first)
