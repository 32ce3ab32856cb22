"""Losses on logits: cross-entropy with labels, and KL divergence from the teacher's distribution.

Half-precision inputs are computed in float32, float64 inputs in float64; autocast is disabled inside.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kd_accel.losses.base import LogitLoss, LossSettings, register


def full_precision(tensor: Tensor) -> Tensor:
    """Cast half-precision tensors to float32; float32 and float64 tensors are returned unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, has_unlabeled: bool = False) -> Tensor:
    """Compute the cross-entropy with labels.

    A sample without a label counts as 0 in the mean over the batch. So each label has the same weight in every batch, and the
    loss does not depend on the number of processes or accumulation steps. A mean over the labeled samples of each batch would.

    Args:
        logits: Logits, [B, C].
        labels: Class indices, int64 [B]; -1 = no label. Or mixed labels, float [B, C]: the probability of each class, in rows
            that sum to 1; zeros = no label.
        label_smoothing: Probability mass of the target that is spread evenly over all classes, from 0 to 1.
        has_unlabeled: Whether class indices may be -1, which costs two kernel launches per step.

    Returns:
        The mean over the batch, a scalar.
    """
    with torch.autocast(logits.device.type, enabled=False):
        student = full_precision(logits)
        if labels.is_floating_point():
            return _cross_entropy_with_probabilities(student, labels.to(student.dtype), label_smoothing)
        if not has_unlabeled:
            return functional.cross_entropy(student, labels, label_smoothing=label_smoothing)
        total = functional.cross_entropy(student, labels, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
        return total / len(labels)


def _cross_entropy_with_probabilities(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    if label_smoothing:
        # Not torch's own smoothing, which gives a target to a row of zeros too.
        evenly = labels.sum(1, keepdim=True) / labels.shape[1]
        labels = (1 - label_smoothing) * labels + label_smoothing * evenly
    return functional.cross_entropy(logits, labels)


def kl_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, t_squared: bool = True) -> Tensor:
    """Compute the KL divergence KL(teacher || student) of the distributions softened by a temperature.

    The result is exactly 0 for equal logits. For nearly equal logits, rounding can make it negative by about the epsilon of the
    dtype.

    Args:
        student_logits: Logits of the student, [B, C].
        teacher_logits: Logits of the teacher, [B, C].
        temperature: Temperature T, above 0.
        t_squared: Whether to multiply by T squared, so that the magnitude of the gradients changes little with T.

    Returns:
        The sum over classes, averaged over the batch, a scalar.

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        student_log = functional.log_softmax(full_precision(student_logits) / temperature, dim=1)
        teacher_log = functional.log_softmax(full_precision(teacher_logits) / temperature, dim=1)
        divergence = functional.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
        return divergence * temperature**2 if t_squared else divergence


@register("kl")
class KL(LogitLoss):
    """KL divergence of the softened distributions of teacher and student; see `kl_loss`.

    Formula:
        T^2 * KL(softmax(teacher / T) || softmax(student / T))

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """

    class Settings(LossSettings):
        """Settings of `kl`.

        Args:
            t_squared: Multiply by T squared, as Hinton et al. do.
        """

        t_squared: bool = True

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, labels: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """Compute `kl_loss`; see `LogitLoss.forward` for the arguments."""
        return kl_loss(student_logits, teacher_logits, temperature=temperature, t_squared=self.settings.t_squared)
