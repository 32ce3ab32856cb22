"""Probabilistic knowledge transfer: KL divergence between the neighborhoods of the samples in a batch.

Shapes: B batch, D channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_accel.losses.base import register
from kd_accel.losses.layerwise import LayerwiseLoss, embedding, in_full_precision, unit
from kd_accel.losses.targets import SpatialMean, TargetFunction
from kd_accel.models.projectors import Shape

_LEAST_SIMILARITY = 1e-7
"""Similarity of samples in opposite directions, for which the logarithm is finite."""


@in_full_precision
def pkt_loss(student_map: Tensor, target_map: Tensor) -> Tensor:
    """Compute the KL divergence of the probabilities with which each sample chooses another one as its neighbor.

    The probabilities are the similarities (1 + cosine) / 2 of the samples' embeddings, divided by their sum over the other
    samples of the batch. The embedding of a sample is the mean of its map over the pixels. A batch of one or two samples has
    no choice of a neighbor, and a loss of 0.

    Args:
        student_map: Map of the student, [B, D, H, W].
        target_map: Map of the target, [B, D', H', W'].

    Returns:
        The divergence KL(target || student), averaged over the batch, a scalar.
    """
    student, target = (_neighbor_probabilities(embedding(each)) for each in (student_map, target_map))
    # A sample is not its own neighbor: on the diagonal, where both probabilities are 0, log(0 + 1) = 0.
    itself = torch.eye(len(student), dtype=student.dtype, device=student.device)
    return (target * ((target + itself).log() - (student + itself).log())).sum(1).mean()


def _neighbor_probabilities(embeddings: Tensor) -> Tensor:
    """Compute the probability of each other sample [B, B] as the neighbor of a sample; rows sum to 1, with a diagonal of 0."""
    directions = unit(embeddings, 1)
    similarities = ((1 + directions @ directions.T) / 2).clamp(min=_LEAST_SIMILARITY)
    others = 1 - torch.eye(len(embeddings), dtype=embeddings.dtype, device=embeddings.device)
    similarities = similarities * others
    # The sum over the other samples of a batch of one is 0.
    return similarities / similarities.sum(1, keepdim=True).clamp(min=_LEAST_SIMILARITY)


@register("pkt")
class PKT(LayerwiseLoss):
    """KL divergence between the neighborhoods of the samples in a batch, summed over the layers; see `pkt_loss`.

    The target is the teacher's map averaged over its pixels.

    Formula:
        Sum over layers of 1 / B * sum over i != j of p_j|i * log(p_j|i / q_j|i), with p, q = (1 + cos) / 2 / its sum over j

    References:
        Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018 (cosine kernel).
    """

    per_sample = False

    def target_function(self, student_shape: Shape, teacher_shape: Shape) -> TargetFunction:
        """Return the mean over the pixels of the teacher's map; see `FeatureLoss.target_function` for the arguments."""
        return SpatialMean()

    def compare(self, student_map: Tensor, target_map: Tensor) -> Tensor:
        """Compute `pkt_loss`; see `LayerwiseLoss.compare` for the arguments."""
        return pkt_loss(student_map, target_map)
