"""The loss that a step minimizes: labels alone, or alpha * response + (1 - alpha) * hard + weight * feature."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kd_accel.losses.features import feature_loss
from kd_accel.losses.logits import cross_entropy, kl_divergence
from kd_accel.types import LossFunction, LossTerms, StudentOutput, TeacherOutput


def plain_loss(label_smoothing: float) -> LossFunction:
    """Cross-entropy against the labels."""

    def loss(output: StudentOutput, teacher_output: TeacherOutput, labels: Tensor) -> LossTerms:
        hard = cross_entropy(output.logits, labels, label_smoothing=label_smoothing)
        return LossTerms(total=hard, hard=hard)

    return loss


@dataclass(frozen=True)
class DistillationLoss:
    """The combination of the reference job, for one step's values of T, alpha and the feature weight (lambda).

    feature_weight: None where there is no feature term. A weight of 0 keeps the term, so that every projector still gets a
    (zero) gradient and the ranks exchange the same parameters at each step.
    """

    temperature: float
    alpha: float
    feature_weight: float | None = None
    t_squared: bool = True
    label_smoothing: float = 0.0

    def __call__(self, output: StudentOutput, teacher_output: TeacherOutput, labels: Tensor) -> LossTerms:
        assert teacher_output.logits is not None, "a distillation needs the teacher's logits"
        hard = cross_entropy(output.logits, labels, label_smoothing=self.label_smoothing)
        response = kl_divergence(output.logits, teacher_output.logits, temperature=self.temperature, t_squared=self.t_squared)
        total = self.alpha * response + (1 - self.alpha) * hard
        if self.feature_weight is None:
            return LossTerms(total=total, hard=hard, response=response)
        feature = feature_loss(output.pairs)
        return LossTerms(total + self.feature_weight * feature, hard, response, feature)
