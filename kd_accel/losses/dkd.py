"""Decoupled knowledge distillation: the KL divergence in two parts with a weight each.

In: logits of student and teacher, labels, a temperature. Out: a scalar. Half-precision inputs are computed in float32, float64
inputs in float64; autocast is disabled inside.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from kd_accel.losses.base import register
from kd_accel.losses.logits import StandardizableLoss, full_precision, kl_divergence, log_softmax_outside, true_class_mask


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Compute the decoupled distillation loss T^2 * (alpha * TCKD + beta * NCKD).

    TCKD is the KL divergence of the two probabilities "true class" and "any other class". NCKD is that of the distributions
    over the other classes, each of which sums to 1. With weights 1 and 1 - p, where p is the teacher's probability of the true
    class, their sum is `kl_loss`. The loss is exactly 0 for equal logits.

    A sample without a label has only other classes: its TCKD is 0, up to rounding, and its NCKD is the KL divergence over all
    classes.

    Args:
        student_logits: Logits of the student, [B, C].
        teacher_logits: Logits of the teacher, [B, C].
        labels: Class indices, int64 [B]; -1 = no label.
        temperature: Temperature T, above 0: a number or a scalar tensor.
        alpha: Weight of TCKD.
        beta: Weight of NCKD.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: If the labels are mixed labels.

    References:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022.
    """
    is_true = true_class_mask(labels, student_logits.shape[1])
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = full_precision(student_logits) / temperature, full_precision(teacher_logits) / temperature
        target = kl_divergence(_true_or_other(is_true, student), _true_or_other(is_true, teacher))
        others = kl_divergence(log_softmax_outside(is_true, student), log_softmax_outside(is_true, teacher))
        return (alpha * target + beta * others) * temperature**2


def _true_or_other(is_true: Tensor, logits: Tensor) -> Tensor:
    """Return the log probabilities [B, 2] of the true class, and of any other class."""
    log_probabilities = functional.log_softmax(logits, dim=1)
    lowest = torch.finfo(logits.dtype).min
    # The sum over the other classes has all digits, where 1 - p has none for a confident network.
    parts = [log_probabilities.masked_fill(mask, lowest).logsumexp(1) for mask in (~is_true, is_true)]
    return torch.stack(parts, dim=1)


@register("dkd")
class DKD(StandardizableLoss):
    """Decoupled knowledge distillation: KL divergence with own weights of the true class and of the others; see `dkd_loss`.

    `alpha` and `beta` are those of the paper, and weigh the two parts of this loss. `distill.alpha` is the weight of their sum
    in the objective. The warm-up of the authors' code, in which this weight rises from 0 over the first epochs, is a schedule
    of `distill.alpha`.

    A sample without a label has no true class: it counts with beta * T^2 times the KL divergence over all classes.

    Formula:
        T^2 * (alpha * KL of (true class, others) + beta * KL within the others), teacher || student, softened by T

    References:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022.
    """

    supports_mixed_labels = False

    class Settings(StandardizableLoss.Settings):
        """Settings of `dkd`.

        Args:
            standardize: Replace the logits of each sample by their z-scores before the division by T (Sun et al., CVPR 2024).
            alpha: Weight of the divergence between the true class and the others (TCKD), at least 0.
            beta: Weight of the divergence within the other classes (NCKD), at least 0.
        """

        alpha: float = Field(1.0, ge=0, allow_inf_nan=False)
        beta: float = Field(8.0, ge=0, allow_inf_nan=False)

        @model_validator(mode="after")
        def _refuse_loss_without_parts(self) -> Self:
            if self.alpha == 0 and self.beta == 0:
                raise ValueError("alpha: alpha and beta are 0, so that the loss is always 0; set one of them above 0")
            return self

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor, labels: Tensor) -> Tensor:
        """Compute `dkd_loss`; see `LogitLoss.forward` for the arguments."""
        alpha, beta = self.settings.alpha, self.settings.beta
        return dkd_loss(student_logits, teacher_logits, labels, temperature=temperature, alpha=alpha, beta=beta)
