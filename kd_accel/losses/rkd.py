"""Relational knowledge distillation: differences between the distances and between the angles of the samples in a batch.

Shapes: B batch, D channels, H height, W width.

References:
    Park et al., "Relational Knowledge Distillation", CVPR 2019.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from kd_accel.losses.base import LossSettings, register
from kd_accel.losses.layerwise import LayerwiseLoss, embedding, in_full_precision
from kd_accel.losses.targets import SpatialMean, TargetFunction
from kd_accel.models.projectors import Shape


@in_full_precision
def rkd_loss(student_map: Tensor, target_map: Tensor, *, lambda_d: float = 25.0, lambda_a: float = 50.0) -> Tensor:
    """Compute the weighted sum of the distance-wise and the angle-wise loss of the samples' embeddings.

    The embedding of a sample is the mean of its map over the pixels. Differences are compared by the Huber loss with delta 1.
    As in the authors' code, the means are over all B^2 pairs and B^3 triples; those in which a sample occurs twice count as 0.
    A batch of one or two samples, with at most one distance and no angle, has a loss of 0. The cosine of an angle between equal
    embeddings counts as 0.

    Args:
        student_map: Map of the student, [B, D, H, W].
        target_map: Map of the target, [B, D', H', W'].
        lambda_d: Weight of the distance-wise loss.
        lambda_a: Weight of the angle-wise loss; 0 = not computed, because it needs B^3 values.

    Returns:
        The loss, a scalar.
    """
    student, target = _differences(embedding(student_map)), _differences(embedding(target_map))
    student_distances, target_distances = (torch.linalg.vector_norm(each, dim=2) for each in (student, target))
    loss = lambda_d * functional.huber_loss(_relative(student_distances), _relative(target_distances))
    if lambda_a > 0:
        angles = _cosines(student, student_distances), _cosines(target, target_distances)
        loss = loss + lambda_a * functional.huber_loss(*angles)
    return loss


def _differences(embeddings: Tensor) -> Tensor:
    """Compute the difference of each pair of embeddings [B, D], to [B, B, D]: exactly 0 for equal embeddings."""
    return embeddings - embeddings[:, None]


def _relative(distances: Tensor) -> Tensor:
    """Divide distances [B, B] by the mean of the positive distances."""
    number = (distances > 0).sum()
    mean = distances.sum() / number.clamp(min=1)
    return distances / torch.where(number > 0, mean, 1)


def _cosines(differences: Tensor, distances: Tensor) -> Tensor:
    """Compute the cosine of the angle at sample i between the samples j and k, [i, j, k]; 0 for an undefined angle."""
    directions = differences / torch.where(distances > 0, distances, 1)[:, :, None]
    return directions @ directions.mT


@register("rkd")
class RKD(LayerwiseLoss):
    """Differences between the distances and the angles of the samples in a batch, summed over the layers; see `rkd_loss`.

    The target is the teacher's map averaged over its pixels. Memory grows with B^2 D and B^3, for B samples with D channels.

    Formula:
        Sum over layers of lambda_d * mean over pairs of huber(d_S, d_T) + lambda_a * mean over triples of huber(cos_S, cos_T)

    References:
        Park et al., "Relational Knowledge Distillation", CVPR 2019.
    """

    per_sample = False

    class Settings(LossSettings):
        """Settings of `rkd`.

        Args:
            lambda_d: Weight of the distance-wise loss; distances are relative to their mean.
            lambda_a: Weight of the angle-wise loss; 0 saves its B^3 values.
        """

        lambda_d: float = Field(25.0, ge=0, allow_inf_nan=False)
        lambda_a: float = Field(50.0, ge=0, allow_inf_nan=False)

        @model_validator(mode="after")
        def _refuse_no_loss(self) -> Self:
            if self.lambda_d == self.lambda_a == 0:
                raise ValueError("lambda_d: 0 leaves no loss, because lambda_a is 0 too; set one of them above 0")
            return self

    def target_function(self, student_shape: Shape, teacher_shape: Shape) -> TargetFunction:
        """Return the mean over the pixels of the teacher's map; see `FeatureLoss.target_function` for the arguments."""
        return SpatialMean()

    def compare(self, student_map: Tensor, target_map: Tensor) -> Tensor:
        """Compute `rkd_loss`; see `LayerwiseLoss.compare` for the arguments."""
        return rkd_loss(student_map, target_map, lambda_d=self.settings.lambda_d, lambda_a=self.settings.lambda_a)
