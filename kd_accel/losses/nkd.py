"""Normalized knowledge distillation: a cross-entropy of the true class, and one of the distributions over the others.

In: logits of student and teacher, labels, a temperature. Out: a scalar. Half-precision inputs are computed in float32, float64
inputs in float64; autocast is disabled inside.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kd_accel.losses.base import register
from kd_accel.losses.logits import StandardizableLoss, full_precision, log_softmax_outside, true_class_mask


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    gamma: float = 1.5,
) -> Tensor:
    """Compute the normalized distillation loss: target part + gamma * T^2 * non-target part.

    The target part is -p log q, where p and q are the probabilities of the true class of teacher and student, without a
    temperature. The non-target part is the cross-entropy of the distributions over the other classes, each of which sums to 1,
    softened by T. It is least, but not 0, for equal distributions.

    A sample without a label has only other classes: its target part is 0, and its non-target part is the cross-entropy over all
    classes.

    Args:
        student_logits: Logits of the student, [B, C].
        teacher_logits: Logits of the teacher, [B, C].
        labels: Class indices, int64 [B]; -1 = no label.
        temperature: Temperature T of the non-target part, above 0: a number or a scalar tensor.
        gamma: Weight of the non-target part.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: If the labels are mixed labels.

    References:
        Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
        Customized Soft Labels", ICCV 2023.
    """
    is_true = true_class_mask(labels, student_logits.shape[1])
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = full_precision(student_logits), full_precision(teacher_logits)
        target = functional.softmax(teacher, dim=1) * functional.log_softmax(student, dim=1)
        others = log_softmax_outside(is_true, teacher / temperature).exp() * log_softmax_outside(is_true, student / temperature)
        target, others = target.masked_fill(~is_true, 0).sum(1).mean(), others.sum(1).mean()
        return -target - gamma * temperature**2 * others


@register("nkd")
class NKD(StandardizableLoss):
    """Normalized distillation: cross-entropy of the true class, and of the distributions over the others; see `nkd_loss`.

    The temperature softens only the distributions over the other classes. The paper calls it lambda, and sets it to 1. The loss
    is not 0 for equal logits.

    A sample without a label has no true class: it counts with gamma * T^2 times the cross-entropy over all classes.

    Formula:
        -p * log(q) - gamma * T^2 * sum over the other classes of p_i * log(q_i); p, q = probabilities of the true class of
        teacher and student; p_i, q_i = those of the other classes, softened by T, with the sum 1

    References:
        Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
        Customized Soft Labels", ICCV 2023.
    """

    supports_mixed_labels = False

    class Settings(StandardizableLoss.Settings):
        """Settings of `nkd`.

        Args:
            standardize: Replace the logits of each sample by their z-scores before the division by T (Sun et al., CVPR 2024).
            gamma: Weight of the part of the other classes, at least 0.
        """

        gamma: float = Field(1.5, ge=0, allow_inf_nan=False)

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor, labels: Tensor) -> Tensor:
        """Compute `nkd_loss`; see `LogitLoss.forward` for the arguments."""
        gamma = self.settings.gamma
        return nkd_loss(student_logits, teacher_logits, labels, temperature=temperature, gamma=gamma)
