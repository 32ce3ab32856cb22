"""Losses on logits: cross-entropy against labels, and distances to the teacher's logits.

Shapes: logits [B, C]. Half types are computed in float32, float64 stays float64; autocast is off inside.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kd_accel.losses.base import LogitLoss, LossSettings, register


def full_precision(tensor: Tensor) -> Tensor:
    """Cast half types to float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy, mean over the batch.

    Args:
        logits: [B, C].
        labels: int64 [B], class indices.
        label_smoothing: share of the target that is spread over all classes.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(full_precision(logits), labels, label_smoothing=label_smoothing)


def kl_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, t_squared: bool = True) -> Tensor:
    """Compute KL(teacher || student) of both distributions softened by the temperature.

    The result is exactly 0 where the two agree; where they nearly agree rounding can leave it below 0 by the order of the
    dtype's epsilon.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: T, above 0.
        t_squared: multiply by T squared, so that the gradient keeps its size as T changes.

    Returns:
        A scalar: summed over classes, mean over the batch.

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
    """KL divergence between softened distributions: `kl_loss` as a module.

    Formula:
        T^2 * KL(softmax(teacher / T) || softmax(student / T))

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """

    class Settings(LossSettings):
        """Settings of `kl`.

        Args:
            t_squared: multiply by T squared (Hinton's convention).
        """

        t_squared: bool = True

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, labels: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """Return `kl_loss` of the logits; arguments as in `LogitLoss.forward`."""
        return kl_loss(student_logits, teacher_logits, temperature=temperature, t_squared=self.settings.t_squared)
