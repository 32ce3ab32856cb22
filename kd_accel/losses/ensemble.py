"""Several teachers as one: the mean of their outputs, weighted by teacher and, if wanted, by sample.

In: the logits of each teacher for a batch. Out: one set of logits, with which any logit loss compares the student.

Shapes: B batch, C classes, K teachers.

References:
    You, Xu, Xu, Tao, "Learning from Multiple Teacher Networks", KDD 2017 (mean of softened probabilities).
    Zhang, Chen, Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", ICASSP 2022 (weights of each sample).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kd_accel.losses.logits import full_precision

Mean = Literal["probabilities", "logits"]
_LEAST_CONFIDENCE = 1e-20
"""Confidence of a teacher whose cross-entropy is far above that of the others, so that it can be the only one with a weight."""


def combine_logits(logits: Tensor, weights: Tensor, *, temperature: float | Tensor, mean: Mean = "probabilities") -> Tensor:
    """Compute the weighted mean of several teachers, as logits.

    Args:
        logits: Logits of each teacher, [K, B, C].
        weights: Weights of the teachers, [K], or of the teachers in each sample, [K, B]: at least 0, and above 0 in one teacher
            of each sample. They are divided by their sum.
        temperature: Temperature T at which probabilities are averaged.
        mean: `probabilities`: the result divided by T has the mean of the teachers' probabilities at T. `logits`: mean of the
            logits, which does not depend on T.

    Returns:
        Logits [B, C], float32 or float64.
    """
    with torch.autocast(logits.device.type, enabled=False):
        values = full_precision(logits)
        weights = weights.to(values.dtype).view(len(values), -1, 1)
        shares = weights / weights.sum(0)
        if mean == "logits":
            return (shares * values).sum(0)
        return temperature * torch.logsumexp(shares.log() + functional.log_softmax(values / temperature, dim=2), dim=0)


def confidences(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the confidence of each teacher in the label of each sample, relative to the other teachers.

    Args:
        logits: Logits of each teacher, [K, B, C], with K of at least 2.
        labels: Class indices, int64 [B], or mixed labels, float [B, C]. All teachers are equally confident in a sample without
            a label (-1, or a row of zeros).

    Returns:
        (1 - softmax over the teachers of their cross-entropy) / (K - 1), float32 or float64 [K, B], with the sum 1 over the
        teachers. The paper has it as equation (3).
    """
    with torch.autocast(logits.device.type, enabled=False):
        values = full_precision(logits)
        losses = torch.stack([_sample_losses(own, labels) for own in values])
        return (1 - losses.softmax(0)) / (len(values) - 1)


def _sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of each sample, [B]; 0 without a label."""
    if labels.is_floating_point():
        return functional.cross_entropy(logits, labels.to(logits.dtype), reduction="none")
    return functional.cross_entropy(logits, labels, reduction="none", ignore_index=-1)


@dataclass(frozen=True)
class Ensemble:
    """Combination of the logits of several teachers.

    Args:
        names: Names of the teachers, two or more.
        mean: Averaged quantity; see `combine_logits`.
        confidence: Whether the weight of a teacher in a sample is multiplied by its confidence; see `confidences`.

    Raises:
        ValueError: If there are fewer than two names, or two are equal.
    """

    names: Sequence[str]
    mean: Mean = "probabilities"
    confidence: bool = False

    def __post_init__(self) -> None:
        """Check the names. Raises ValueError."""
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(f"names: {list(self.names)} must be two or more different names")

    def __call__(
        self,
        members: Mapping[str, Tensor],
        weights: Mapping[str, float | Tensor],
        *,
        temperature: float | Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Combine the logits of the teachers for one batch.

        Args:
            members: Logits [B, C] by name of the teacher.
            weights: Weight of each teacher by name, numbers or scalar tensors on the device; 1 for a name that is missing.
            temperature: Temperature of the logit loss.
            labels: Labels of the samples, as in `confidences`; None = no weights of samples.

        Returns:
            Logits [B, C], float32 or float64.

        Raises:
            ValueError: If the logits of a teacher are missing.
        """
        if missing := [name for name in self.names if name not in members]:
            raise ValueError(f"target.members: lacks the logits of {', '.join(missing)}; pass those of all teachers by name")
        logits = torch.stack([full_precision(members[name]) for name in self.names])
        given = torch.stack([_scalar(weights.get(name, 1.0), logits) for name in self.names])
        if self.confidence and labels is not None:
            given = given[:, None] * confidences(logits, labels).clamp(min=_LEAST_CONFIDENCE)
        return combine_logits(logits, given, temperature=temperature, mean=self.mean)


def _scalar(weight: float | Tensor, like: Tensor) -> Tensor:
    """Return a weight as a scalar on the device of `like`, without a copy from the host."""
    return weight.to(like.dtype) if isinstance(weight, Tensor) else torch.full((), weight, dtype=like.dtype, device=like.device)
