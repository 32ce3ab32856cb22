"""Losses on logits: cross-entropy with labels, divergences from the teacher's distribution, and what logit losses share.

In: logits of student and teacher, labels, a temperature. Out: a scalar that is differentiable in the student's logits.
Half-precision inputs are computed in float32, float64 inputs in float64; autocast is disabled inside.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from kd_accel.losses.base import LogitLoss, LossSettings, register

_DEVIATION_EPSILON = 1e-7
"""Number that is added to the standard deviation, as in the code of Sun et al."""


def full_precision(tensor: Tensor) -> Tensor:
    """Cast half-precision tensors to float32; float32 and float64 tensors are returned unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    has_unlabeled: bool = False,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy with labels.

    A sample without a label counts as 0 in the mean over the batch. So each label has the same weight in every batch, and the
    loss does not depend on the number of processes or accumulation steps. A mean over the labeled samples of each batch would.

    For the same reason the sum of class_weights[c] * target[c] * -log p[c] over classes and samples is divided by the number of
    samples. PyTorch's mean with `weight` divides by the sum of the weights of the batch.

    Args:
        logits: Logits, [B, C].
        labels: Class indices, int64 [B]; -1 = no label. Or mixed labels, float [B, C]: the probability of each class, in rows
            that sum to 1; zeros = no label.
        label_smoothing: Probability mass of the target that is spread evenly over all classes, from 0 to 1.
        has_unlabeled: Whether class indices may be -1, which costs two kernel launches per step.
        class_weights: Factor of each class, [C]; None = 1.

    Returns:
        The mean over the batch, a scalar.
    """
    with torch.autocast(logits.device.type, enabled=False):
        student = full_precision(logits)
        weight = None if class_weights is None else class_weights.to(student.dtype)
        if labels.is_floating_point():
            return _cross_entropy_with_probabilities(student, labels.to(student.dtype), label_smoothing, weight)
        if weight is None and not has_unlabeled:
            return functional.cross_entropy(student, labels, label_smoothing=label_smoothing)
        total = functional.cross_entropy(
            student, labels, weight, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing
        )
        return total / len(labels)


class CrossEntropy(nn.Module):
    """Cross-entropy with labels as a module, which holds the class weights on its device; see `cross_entropy`.

    Args:
        label_smoothing: Probability mass of the target that is spread evenly over all classes, from 0 to 1.
        has_unlabeled: Whether class indices may be -1.
        class_weights: Factor of each class, C numbers; None = 1.
    """

    class_weights: Tensor | None

    def __init__(self, *, label_smoothing: float, has_unlabeled: bool, class_weights: Sequence[float] | None) -> None:
        super().__init__()
        self._label_smoothing, self._has_unlabeled = label_smoothing, has_unlabeled
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the cross-entropy of logits [B, C] with labels, a scalar."""
        return cross_entropy(
            logits,
            labels,
            label_smoothing=self._label_smoothing,
            has_unlabeled=self._has_unlabeled,
            class_weights=self.class_weights,
        )


def _cross_entropy_with_probabilities(
    logits: Tensor, labels: Tensor, label_smoothing: float, class_weights: Tensor | None
) -> Tensor:
    if label_smoothing:
        # Not torch's own smoothing, which gives a target to a row of zeros too.
        evenly = labels.sum(1, keepdim=True) / labels.shape[1]
        labels = (1 - label_smoothing) * labels + label_smoothing * evenly
    return functional.cross_entropy(logits, labels, class_weights)


def kl_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, t_squared: bool = True
) -> Tensor:
    """Compute the KL divergence KL(teacher || student) of the distributions softened by a temperature.

    The result is exactly 0 for equal logits. For nearly equal logits, rounding can make it negative by about the epsilon of the
    dtype.

    Args:
        student_logits: Logits of the student, [B, C].
        teacher_logits: Logits of the teacher, [B, C].
        temperature: Temperature T, above 0: a number or a scalar tensor.
        t_squared: Whether to multiply by T squared, so that the magnitude of the gradients changes little with T.

    Returns:
        The sum over classes, averaged over the batch, a scalar.

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        student_log, teacher_log = _softened(student_logits, teacher_logits, temperature)
        divergence = kl_divergence(student_log, teacher_log)
        return divergence * temperature**2 if t_squared else divergence


def reverse_kl_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, t_squared: bool = True
) -> Tensor:
    """Compute the KL divergence KL(student || teacher) of the softened distributions; see `kl_loss` for the arguments.

    It penalizes probability of the student where the teacher has none. `kl_loss` penalizes the opposite.

    Returns:
        The sum over classes, averaged over the batch, a scalar.

    References:
        Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024.
    """
    return kl_loss(teacher_logits, student_logits, temperature=temperature, t_squared=t_squared)


def js_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, t_squared: bool = True
) -> Tensor:
    """Compute the Jensen-Shannon divergence of the softened distributions; see `kl_loss` for the arguments.

    It is the mean of the KL divergences of student and teacher from the mean of both distributions. It is symmetric and,
    without the factor T squared, at most log 2.

    Returns:
        The sum over classes, averaged over the batch, a scalar.

    References:
        Lin, "Divergence Measures Based on the Shannon Entropy", IEEE Transactions on Information Theory 37(1), 1991.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        student_log, teacher_log = _softened(student_logits, teacher_logits, temperature)
        # The logarithm of a mean of probabilities would be -inf where both are rounded to 0.
        mean_log = torch.logaddexp(student_log, teacher_log) - math.log(2)
        divergence = (kl_divergence(mean_log, student_log) + kl_divergence(mean_log, teacher_log)) / 2
        return divergence * temperature**2 if t_squared else divergence


def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the mean squared error between logits, without a temperature.

    Args:
        student_logits: Logits of the student, [B, C].
        teacher_logits: Logits of the teacher, [B, C].

    Returns:
        The mean over classes and batch, a scalar.

    References:
        Ba, Caruana, "Do Deep Nets Really Need to be Deep?", NIPS 2014.
        Kim et al., "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", IJCAI 2021.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        return functional.mse_loss(full_precision(student_logits), full_precision(teacher_logits))


def kl_divergence(log_probabilities: Tensor, target_log_probabilities: Tensor) -> Tensor:
    """Compute KL(target || other) of log probabilities [B, C]: the sum over classes, averaged over the batch, a scalar."""
    return functional.kl_div(log_probabilities, target_log_probabilities, reduction="batchmean", log_target=True)


def _softened(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the log probabilities [B, C] of student and teacher at a temperature."""
    student_log = functional.log_softmax(full_precision(student_logits) / temperature, dim=1)
    return student_log, functional.log_softmax(full_precision(teacher_logits) / temperature, dim=1)


def standardized(logits: Tensor) -> Tensor:
    """Compute the z-scores of the logits of each sample over the classes: mean 0, standard deviation 1.

    They do not change if a constant is added to the logits of a sample, or if these are multiplied by a positive number (above
    the epsilon of 1e-7 that is added to the standard deviation). Equal logits have no z-scores: they become 0, with gradient 0.

    Args:
        logits: Logits, [B, C].

    Returns:
        The z-scores, [B, C], in float32 or float64.

    References:
        Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    with torch.autocast(logits.device.type, enabled=False):
        values = full_precision(logits)
        # The estimate with C - 1 is that of the authors' code. One class has a deviation of 0 all the same.
        deviation, mean = torch.std_mean(values, dim=1, correction=min(1, logits.shape[1] - 1), keepdim=True)
        return torch.where(deviation > 0, (values - mean) / (deviation + _DEVIATION_EPSILON), 0.0)


def true_class_mask(labels: Tensor, classes: int) -> Tensor:
    """Return a mask [B, C] that is True at the class of each sample, and nowhere in the row of a sample without a label.

    Args:
        labels: Class indices, int64 [B]; -1 = no label.
        classes: Number of classes C.

    Raises:
        ValueError: If the labels are mixed labels.
    """
    if labels.is_floating_point():
        raise ValueError("labels: must be the class of each sample, int64 [B], not mixed labels (float [B, C])")
    return torch.arange(classes, device=labels.device) == labels[:, None]


def log_softmax_outside(mask: Tensor, logits: Tensor) -> Tensor:
    """Compute the log probabilities [B, C] of the distribution over the classes outside of a mask [B, C].

    Masked entries are the lowest finite number. Its exponential is 0, and a product with 0 is 0, which that of -inf is not.
    """
    return functional.log_softmax(logits.masked_fill(mask, torch.finfo(logits.dtype).min), dim=1)


class StandardizableLoss(LogitLoss):
    """Base class of logit losses that can compare z-scores in place of logits; `compare` is the loss."""

    class Settings(LossSettings):
        """Settings of these losses.

        Args:
            standardize: Replace the logits of each sample by their z-scores before the division by T (Sun et al., CVPR 2024).
        """

        standardize: bool = False

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        temperature: float | Tensor,
        labels: Tensor,
        index: Tensor | None = None,
    ) -> Tensor:
        """Compute `compare` of the logits or of their z-scores; see `LogitLoss.forward` for the arguments."""
        if self.settings.standardize:
            student_logits, teacher_logits = standardized(student_logits), standardized(teacher_logits)
        return self.compare(student_logits, teacher_logits, temperature=temperature, labels=labels)

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a scalar; see `LogitLoss.forward` for the arguments."""
        raise NotImplementedError


_DIVERGENCES = {"kl": kl_loss, "reverse": reverse_kl_loss, "js": js_loss}


@register("kl")
class KL(StandardizableLoss):
    """KL divergence of the softened distributions of teacher and student, or another divergence of them.

    `divergence` selects it:

    - `kl`: KL(teacher || student); see `kl_loss`.
    - `reverse`: KL(student || teacher); see `reverse_kl_loss`.
    - `js`: the Jensen-Shannon divergence; see `js_loss`.
    - `mse`: the mean squared error of the logits, which are not divided by T; see `logit_mse_loss`.

    Formula:
        T^2 * KL(softmax(teacher / T) || softmax(student / T))

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """

    class Settings(StandardizableLoss.Settings):
        """Settings of `kl`.

        Args:
            standardize: Replace the logits of each sample by their z-scores before the division by T (Sun et al., CVPR 2024).
            t_squared: Multiply by T squared, as Hinton et al. do.
            divergence: Divergence kl, reverse, js or mse; mse does not use T.
        """

        t_squared: bool = True
        divergence: Literal["kl", "reverse", "js", "mse"] = "kl"

        @model_validator(mode="after")
        def _refuse_t_squared_without_temperature(self) -> Self:
            if self.divergence == "mse" and "t_squared" in self.model_fields_set:
                raise ValueError("t_squared: has no effect (logits are not divided by T with divergence mse); leave it out")
            return self

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor, labels: Tensor) -> Tensor:
        """Compute the divergence; see `LogitLoss.forward` for the arguments."""
        if self.settings.divergence == "mse":
            return logit_mse_loss(student_logits, teacher_logits)
        loss = _DIVERGENCES[self.settings.divergence]
        return loss(student_logits, teacher_logits, temperature=temperature, t_squared=self.settings.t_squared)
