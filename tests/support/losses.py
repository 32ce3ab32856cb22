"""Losses of a user for `import:tests.support.losses:...`: a feature loss with a memory bank, and logit losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from kd_accel.losses import FeatureLoss, LogitLoss, LossSettings
from kd_accel.models.projectors import Shape, seeded_projector


class BankLoss(FeatureLoss):
    """Contrast of the student's embedding with a memory bank of the teacher's embeddings of all samples.

    Formula:
        CE over the bank's rows of cos(head(student), bank) * exp(scale), with the sample's own row as the class

    References:
        After Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018.
    """

    per_sample = False
    uses_index = True
    synchronizes_buffers = True

    class Settings(LossSettings):
        """Settings of the loss.

        Args:
            samples: Number of samples in the source's training split, which is that of the bank's rows.
            momentum: Share of a row that is kept when the row is updated.
        """

        samples: int = Field(ge=1)
        momentum: float = 0.5

        @field_validator("momentum")
        @classmethod
        def _refuse_constant_bank(cls, momentum: float) -> float:
            if not 0 <= momentum < 1:
                raise ValueError("must be at least 0 and below 1")
            return momentum

    def build(self, student_shapes: Mapping[str, Shape], target_shapes: Mapping[str, Shape], *, seed: int) -> None:
        (layer,) = student_shapes
        width = target_shapes[layer][0]
        self.head = seeded_projector(student_shapes[layer][0], width, layer=layer, seed=seed)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("bank", torch.zeros(self.settings.samples, width))

    def forward(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, index: Tensor | None = None) -> Tensor:
        assert index is not None
        (layer,) = features
        self._write(index, _embedding(targets[layer]))
        similarity = _embedding(self.head(features[layer])) @ self.bank.T
        return functional.cross_entropy(similarity * self.scale.exp(), index)

    @torch.no_grad()
    def _write(self, index: Tensor, embeddings: Tensor) -> None:
        index, embeddings = self.gather(index), self.gather(embeddings)
        momentum = self.settings.momentum
        self.bank[index] = functional.normalize(momentum * self.bank[index] + (1 - momentum) * embeddings)


class PowerLoss(LogitLoss):
    """Mean p-th power of the difference between the softened probabilities."""

    class Settings(LossSettings):
        """Settings of the loss.

        Args:
            power: Exponent of the absolute difference.
        """

        power: float = 2.0

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, labels: Tensor, index: Tensor | None = None
    ) -> Tensor:
        student, teacher = (functional.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
        return (student - teacher).abs().pow(self.settings.power).sum(1).mean()


class TrueClassLoss(LogitLoss):
    """Mean squared difference between the softened probabilities of the true class."""

    supports_mixed_labels = False

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, labels: Tensor, index: Tensor | None = None
    ) -> Tensor:
        student, teacher = (functional.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
        return (student - teacher).gather(1, labels[:, None]).square().mean()


class TrueClassFeatureLoss(FeatureLoss):
    """Feature loss that looks up the true class of each sample by its index."""

    supports_mixed_labels = False
    uses_index = True


class ClassShareLoss(LogitLoss):
    """Mean squared difference between the softened probabilities, weighted by the mixed labels."""

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, labels: Tensor, index: Tensor | None = None
    ) -> Tensor:
        student, teacher = (functional.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
        return (labels * (student - teacher).square()).sum(1).mean()


def _embedding(feature: Tensor) -> Tensor:
    return functional.normalize(feature.float().mean((2, 3)))
