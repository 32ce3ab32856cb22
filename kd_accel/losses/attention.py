"""Attention transfer: difference between the normalized attention maps of student and teacher.

The attention of a pixel is the sum over its channels of |A|^p. The teacher's attention map is the target, so a cache stores one
channel.

Shapes: B batch, D channels, H height, W width.

References:
    Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kd_accel.errors import UserError
from kd_accel.losses.base import LossSettings, register
from kd_accel.losses.features import pool_to_common_size
from kd_accel.losses.layerwise import LayerwiseLoss, in_full_precision, unit
from kd_accel.losses.targets import TargetFunction
from kd_accel.models.projectors import Shape

_PIXELS = (2, 3)


class AttentionMap(TargetFunction):
    """Attention map of a feature map: the sum over channels of |A|^p, of length 1 over the pixels of each image.

    It is computed in float32, or in float64 for a float64 map. A map of zeros has an attention map of zeros.

    Args:
        p: Power of the activations, at least 1.

    Raises:
        ValueError: If `p` is below 1 or not finite.

    Shape:
        [B, D, H, W] -> [B, 1, H, W].
    """

    def __init__(self, p: float = 2.0) -> None:
        super().__init__()
        # A float, because 2 and 2.0 have different digests in the description.
        self.p = float(p)
        if not 1 <= self.p < math.inf:
            raise ValueError(f"p must be at least 1 and finite, got {p}")

    def description(self) -> dict[str, Any]:
        """Return the name `attention` and the power."""
        return {"name": "attention", "p": self.p}

    def output_shape(self, shape: Shape) -> Shape:
        """Return (1, H, W) for a map of shape (D, H, W)."""
        return (1, *shape[1:])

    def forward(self, feature: Tensor) -> Tensor:
        """Compute the attention map [B, 1, H, W] of maps [B, D, H, W]."""
        return unit(_attention(feature, self.p), _PIXELS)


def _attention(feature: Tensor, p: float) -> Tensor:
    """Compute the sum over channels of |A|^p, [B, 1, H, W], relative to the largest sum in each image."""
    dtype = torch.promote_types(feature.dtype, torch.float32)
    norms = torch.linalg.vector_norm(feature, ord=p, dim=1, keepdim=True, dtype=dtype)
    # Relative to the largest, their powers cannot overflow. The map is normalized later, so the factor needs no gradient.
    largest = norms.detach().amax(_PIXELS, keepdim=True)
    attention: Tensor = (norms / torch.where(largest > 0, largest, 1)).pow(p)
    return attention


@in_full_precision
def at_loss(student_map: Tensor, target_attention: Tensor, *, p: float = 2.0) -> Tensor:
    """Compute the distance between the normalized attention maps of student and teacher.

    Attention maps of different sizes are average-pooled to the smaller height and the smaller width. The distance is that of
    the paper's equation (2), not its square, so the length of its gradient does not decrease near agreement.

    Args:
        student_map: Map of the student, [B, D, H, W].
        target_attention: Attention map of the teacher, [B, 1, H', W'], of any positive scale.
        p: Power of the student's activations, at least 1.

    Returns:
        The Euclidean norm of the difference, averaged over the batch, a scalar from 0 to the square root of 2.
    """
    student, target = pool_to_common_size(_attention(student_map, p), target_attention)
    difference = unit(student, _PIXELS) - unit(target, _PIXELS)
    distance: Tensor = torch.linalg.vector_norm(difference, dim=(1, *_PIXELS))
    return distance.mean()


@register("at")
class AT(LayerwiseLoss):
    """Distance between the normalized attention maps of student and teacher, summed over the layers; see `at_loss`.

    Formula:
        Sum over layers of mean over samples of ||Q_S / ||Q_S|| - Q_T / ||Q_T||||, with Q = sum over channels of |A|^p

    References:
        Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, equation (2).
    """

    class Settings(LossSettings):
        """Settings of `at`.

        Args:
            p: Power of the activations, from 1 to 4; a larger power weights the strongest channels more.
        """

        p: float = Field(2.0, ge=1, le=4)

    def target_function(self, student_shape: Shape, teacher_shape: Shape) -> TargetFunction:
        """Return the attention map of the teacher.

        Args:
            student_shape: Shape (D, H, W) of the student's map.
            teacher_shape: Shape (D, H, W) of the teacher's map.

        Raises:
            UserError: If a map has one pixel, whose normalized attention is always 1.
        """
        if min(student_shape[1], teacher_shape[1]) == min(student_shape[2], teacher_shape[2]) == 1:
            raise UserError(
                "p: has no effect on maps of one pixel, whose normalized attention is always 1; compare layers with larger maps"
            )
        return AttentionMap(self.settings.p)

    def compare(self, student_map: Tensor, target_map: Tensor) -> Tensor:
        """Compute `at_loss`; see `LayerwiseLoss.compare` for the arguments."""
        return at_loss(student_map, target_map, p=self.settings.p)
