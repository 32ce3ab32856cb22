"""Cosine distance between the pixels of two feature maps.

Shapes: B batch, D channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_accel.losses.base import register
from kd_accel.losses.features import pool_to_common_size
from kd_accel.losses.layerwise import AlignedLoss, in_full_precision


@in_full_precision
def cosine_loss(student_map: Tensor, target_map: Tensor) -> Tensor:
    """Compute the mean cosine distance between the pixels [D] of two maps with the same channels.

    Maps of different sizes are average-pooled to the smaller height and the smaller width. The cosine with a pixel of zeros
    counts as 0.

    Args:
        student_map: Map of the student, [B, D, H, W].
        target_map: Map of the target, [B, D, H', W'].

    Returns:
        The mean of 1 - cosine over pixels and samples, a scalar from 0 to 2.
    """
    student, target = pool_to_common_size(student_map, target_map)
    lengths = torch.linalg.vector_norm(student, dim=1) * torch.linalg.vector_norm(target, dim=1)
    cosine = (student * target).sum(1) / torch.where(lengths > 0, lengths, 1)
    return 1 - cosine.mean()


@register("cosine")
class Cosine(AlignedLoss):
    """Cosine distance between the pixels of feature maps, summed over the layers; see `cosine_loss`.

    A learned 1x1 convolution maps the student's channels to the target's, in the layers where they differ. Chen et al. use this
    distance between the pooled features before the classifier.

    Formula:
        Sum over layers of mean over pixels of 1 - cos(projected student, target)

    References:
        Chen et al., "Improved Feature Distillation via Projector Ensemble", NeurIPS 2022 (direction alignment loss).
    """

    def compare(self, student_map: Tensor, target_map: Tensor) -> Tensor:
        """Compute `cosine_loss`; see `LayerwiseLoss.compare` for the arguments."""
        return cosine_loss(student_map, target_map)
