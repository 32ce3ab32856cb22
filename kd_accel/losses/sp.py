"""Similarity-preserving distillation: difference between the similarities of the samples in a batch.

Shapes: B batch, D channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kd_accel.losses.base import register
from kd_accel.losses.layerwise import LayerwiseLoss, in_full_precision, unit


@in_full_precision
def sp_loss(student_map: Tensor, target_map: Tensor) -> Tensor:
    """Compute the mean squared difference between the normalized similarities of the samples.

    The similarity of two samples is the inner product of their maps; each row of the matrix of similarities [B, B] is divided
    by its length. The maps may differ in channels and size. One sample alone has a loss of 0.

    Args:
        student_map: Map of the student, [B, D, H, W].
        target_map: Map of the target, [B, D', H', W'].

    Returns:
        The squared Frobenius norm of the difference, divided by B^2, a scalar.
    """
    return functional.mse_loss(_similarities(student_map), _similarities(target_map))


def _similarities(feature: Tensor) -> Tensor:
    """Compute the inner products of the samples of a map, [B, B], in rows of length 1."""
    samples = feature.flatten(1)
    products = samples @ samples.T
    # Relative to the largest of the row, their squares cannot overflow. Rows are normalized, so the factor needs no gradient.
    largest = products.detach().abs().amax(1, keepdim=True)
    return unit(products / torch.where(largest > 0, largest, 1), 1)


@register("sp")
class SP(LayerwiseLoss):
    """Mean squared difference between the similarities of the samples in a batch, summed over the layers; see `sp_loss`.

    Formula:
        Sum over layers of 1 / B^2 * ||G_S - G_T||_F^2, with G = rows of Q Q^T, each of length 1, and Q = flattened maps

    References:
        Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.
    """

    per_sample = False

    def compare(self, student_map: Tensor, target_map: Tensor) -> Tensor:
        """Compute `sp_loss`; see `LayerwiseLoss.compare` for the arguments."""
        return sp_loss(student_map, target_map)
