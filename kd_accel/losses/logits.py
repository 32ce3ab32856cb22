"""Distances between answers: the student's logits against labels and against the teacher's logits.

Shapes: logits [B, C]. Half types are computed in float32, float64 stays float64; autocast is off inside.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def full_precision(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the batch. labels: int64 class indices."""
    with torch.autocast(logits_BC.device.type, enabled=False):
        return functional.cross_entropy(full_precision(logits_BC), labels_B, label_smoothing=label_smoothing)


def kl_divergence(student_logits_BC: Tensor, teacher_logits_BC: Tensor, *, temperature: float, t_squared: bool) -> Tensor:
    """KL(teacher || student) of both softened by `temperature`: summed over classes, mean over the batch.

    Exactly 0 when the two agree; where they nearly agree rounding can leave it below 0 by the order of the dtype's epsilon.
    With `t_squared` the result is multiplied by the temperature squared, so that its gradient keeps its size as the
    temperature changes (Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2).
    """
    with torch.autocast(student_logits_BC.device.type, enabled=False):
        student_log = functional.log_softmax(full_precision(student_logits_BC) / temperature, dim=1)
        teacher_log = functional.log_softmax(full_precision(teacher_logits_BC) / temperature, dim=1)
        divergence = functional.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
        return divergence * temperature**2 if t_squared else divergence
