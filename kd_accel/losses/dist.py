"""Distillation from a stronger teacher (DIST): correlation of probabilities in place of equal probabilities.

In: logits of student and teacher, a temperature. Out: a scalar. Half-precision inputs are computed in float32, float64 inputs
in float64; autocast is disabled inside.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from kd_accel.losses.base import register
from kd_accel.losses.logits import StandardizableLoss, full_precision

_LEAST_DEVIATION = 1e-12
"""Standard deviation of probabilities up to which they count as equal."""


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """Compute the correlation loss T^2 * (beta * inter-class + gamma * intra-class) of the softened probabilities.

    The inter-class part is the `pearson_distance` over the classes of each sample. The intra-class part is that over the
    samples of each class, and is 0 for a batch of one sample. The loss is exactly 0 for equal logits. The factor T^2 is that of
    the authors' code.

    Args:
        student_logits: Logits of the student, [B, C].
        teacher_logits: Logits of the teacher, [B, C].
        temperature: Temperature T, above 0: a number or a scalar tensor.
        beta: Weight of the inter-class part.
        gamma: Weight of the intra-class part.

    Returns:
        The loss of the batch, a scalar.

    References:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = (
            functional.softmax(full_precision(logits) / temperature, dim=1) for logits in (student_logits, teacher_logits)
        )
        inter, intra = pearson_distance(student, teacher, dim=1), pearson_distance(student, teacher, dim=0)
        return (beta * inter + gamma * intra) * temperature**2


def pearson_distance(first: Tensor, second: Tensor, *, dim: int) -> Tensor:
    """Compute 1 - Pearson correlation along a dimension, averaged over the other one.

    It does not change if vectors along `dim` are multiplied by positive numbers, or if numbers are added to them. Equal values
    have no correlation: a pair of vectors counts as 1/2 if the values of one of them are equal, as 0 if those of both are, and
    has the gradient 0.

    Args:
        first: Matrix, float32 or float64 [N, M].
        second: Matrix of the same shape and dtype.
        dim: Dimension of the vectors that are correlated, 0 or 1.

    Returns:
        The mean of the distances, a scalar from 0 to 2.
    """
    # For z-scores u and v, 1 - mean(u * v) is mean((u - v)^2) / 2, which keeps its digits and is 0 for equal vectors.
    return (_z_scores(first, dim) - _z_scores(second, dim)).square().mean() / 2


def _z_scores(values: Tensor, dim: int) -> Tensor:
    """Subtract the mean along a dimension, and divide by the standard deviation; zeros where the values are equal."""
    # std_mean updates a running mean, which equal values do not change: their deviation is exactly 0. A sum would be rounded.
    deviation, mean = torch.std_mean(values, dim=dim, correction=0, keepdim=True)
    return torch.where(deviation > _LEAST_DEVIATION, (values - mean) / deviation.clamp_min(_LEAST_DEVIATION), 0.0)


@register("dist")
class DIST(StandardizableLoss):
    """Pearson correlation of the softened probabilities, over classes and over the samples of the batch; see `dist_loss`.

    The student need not match the teacher's probabilities, only their relations. So it can learn from a teacher that is much
    more confident.

    Formula:
        T^2 * (beta * mean over samples of (1 - r over classes) + gamma * mean over classes of (1 - r over samples)); r =
        Pearson correlation of softmax(student / T) and softmax(teacher / T)

    References:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.
    """

    per_sample = False

    class Settings(StandardizableLoss.Settings):
        """Settings of `dist`.

        Args:
            standardize: Replace the logits of each sample by their z-scores before the division by T (Sun et al., CVPR 2024).
            beta: Weight of the inter-class part, the correlation over the classes of each sample, at least 0.
            gamma: Weight of the intra-class part, the correlation over the samples of each class, at least 0.
        """

        beta: float = Field(1.0, ge=0, allow_inf_nan=False)
        gamma: float = Field(1.0, ge=0, allow_inf_nan=False)

        @model_validator(mode="after")
        def _refuse_loss_without_parts(self) -> Self:
            if self.beta == 0 and self.gamma == 0:
                raise ValueError("beta: beta and gamma are 0, so that the loss is always 0; set one of them above 0")
            return self

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor, labels: Tensor) -> Tensor:
        """Compute `dist_loss`; see `LogitLoss.forward` for the arguments."""
        beta, gamma = self.settings.beta, self.settings.gamma
        return dist_loss(student_logits, teacher_logits, temperature=temperature, beta=beta, gamma=gamma)
