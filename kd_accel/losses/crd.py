"""Contrastive representation distillation: a sample's embeddings by student and teacher are close, those of others are not.

Memory banks hold both embeddings of each training sample, among which the others are drawn.

Shapes: B batch, D channels, H height, W width, N training samples, E components of an embedding.

References:
    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kd_accel.losses.base import FeatureLoss, LossSettings, register
from kd_accel.losses.draws import hash_words
from kd_accel.losses.features import module_key
from kd_accel.losses.layerwise import embedding, unit
from kd_accel.losses.targets import SpatialMean, TargetFunction
from kd_accel.models.projectors import Shape, seeded_weights
from kd_accel.profiling import profiler_range

Gather = Callable[[Tensor], Tensor]


@register("crd")
class CRD(FeatureLoss):
    """Noise-contrastive loss of the embeddings of student and teacher, summed over the layers.

    The pooled maps of both networks are embedded by learned linear maps, as vectors of length 1. The student's embedding is
    compared with the memory bank of the teacher's embeddings, and the teacher's with that of the student: with the row of the
    same sample (positive), and with rows that are drawn uniformly and with replacement (negatives), as in the paper. The
    authors' code draws from the other classes instead, which needs labels.

    The negatives are a function of (seed, number of the micro-batch, index of the sample), Z is estimated in the first
    micro-batch, and both banks are updated by each micro-batch of a training, with the samples of all processes. So the loss is
    the same for any number of processes; with accumulation, a micro-batch meets the banks that the one before it has updated.

    A bank takes N * E numbers. The product of a batch and a bank is computed in full, [B, N], because that needs less memory
    than the rows that are drawn, [B, nce_k, E], if N is less than nce_k * E.

    Formula:
        Sum over layers and both anchors of mean over samples of -log h(positive) - sum over nce_k negatives of log(1 - h), with
        h = x / (x + nce_k / N), x = exp(anchor . memory / nce_t) / Z

    References:
        Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020.
    """

    per_sample = False
    uses_index = True
    synchronizes_buffers = True
    drawn: Tensor
    samples: Tensor

    class Settings(LossSettings):
        """Settings of `crd`.

        Args:
            feat_dim: Number of components of an embedding.
            nce_k: Number of negatives of each sample; may exceed the number of training samples.
            nce_t: Temperature of the similarities, above 0.
            nce_m: Share of a row of the memory banks that is kept when it is updated, from 0 to below 1.
        """

        feat_dim: int = Field(128, ge=1)
        nce_k: int = Field(16384, ge=1)
        nce_t: float = Field(0.07, gt=0, allow_inf_nan=False)
        nce_m: float = Field(0.5, ge=0, lt=1)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.contrasts = nn.ModuleDict()
        # A buffer, because checkpoints save it, and a captured CUDA graph increments it in each replay.
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))
        self.register_buffer("samples", torch.zeros(0, dtype=torch.int64), persistent=False)
        self._seed = 0

    def target_function(self, student_shape: Shape, teacher_shape: Shape) -> TargetFunction:
        """Return the mean over the pixels, since the loss compares pooled maps; see `FeatureLoss` for the arguments."""
        return SpatialMean()

    def set_samples(self, samples: Tensor) -> None:
        """Set the samples of the rows of the memory banks; see `FeatureLoss.set_samples`."""
        self.samples = samples

    def build(self, student_shapes: Mapping[str, Shape], target_shapes: Mapping[str, Shape], *, seed: int) -> None:
        """Create embeddings and memory banks; see `FeatureLoss.build`. `seed` decides the negatives too.

        Raises:
            ValueError: If `set_samples` was not called.
        """
        if not len(self.samples):
            raise ValueError(
                "samples: missing; call set_samples of the loss crd with the positions of all training samples, int64 [N], "
                "before its distiller is built"
            )
        self._seed = seed
        for layer, shape in student_shapes.items():
            with seeded_weights(f"{layer}/crd", seed):
                contrast = _Contrast(shape[0], target_shapes[layer][0], len(self.samples), self.settings)
            self.contrasts[module_key(layer)] = contrast

    def forward(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, index: Tensor | None = None) -> Tensor:
        """Compute the loss; in training mode, count the micro-batch and update the banks. See `FeatureLoss.forward`.

        Raises:
            ValueError: If `index` is None.
        """
        if index is None:
            raise ValueError("index: missing; crd finds rows of its memory banks by the positions of the samples, int64 [B]")
        rows = torch.searchsorted(self.samples, index)
        negatives = self._draw(index)
        losses = [
            self.contrasts[module_key(layer)](feature, targets[layer], rows, negatives, self.gather)
            for layer, feature in features.items()
        ]
        return torch.stack(losses).sum()

    def _draw(self, index: Tensor) -> Tensor:
        """Draw the negatives of each sample. Returns how often each row is drawn, float32 [B, N]."""
        drawn = hash_words(self._seed, self.drawn, index, self.settings.nce_k) % len(self.samples)
        if self.training:
            self.drawn.add_(1)
        counts = torch.zeros(len(index), len(self.samples), device=index.device)
        # Sums of ones are exact in any order, unlike the gradient of `gather`, whose order is not defined on a GPU.
        return counts.scatter_add_(1, drawn, torch.ones((), device=index.device).expand_as(drawn))


class _Contrast(nn.Module):
    """Embeddings, memory banks and loss of one layer.

    Attributes:
        memory: Memory banks of the student and of the teacher, [2, N, E].
        log_z: Logarithms of the constants Z of both banks, [2]; infinite before the first micro-batch.
    """

    memory: Tensor
    log_z: Tensor

    def __init__(self, student_channels: int, target_channels: int, samples: int, settings: CRD.Settings) -> None:
        super().__init__()
        self._settings = settings
        self.embed_s = nn.Linear(student_channels, settings.feat_dim)
        self.embed_t = nn.Linear(target_channels, settings.feat_dim)
        # The mean square of a row's length is 1, as in the authors' code.
        bound = math.sqrt(3 / settings.feat_dim)
        self.register_buffer("memory", torch.empty(2, samples, settings.feat_dim).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), torch.inf))

    def forward(self, student_map: Tensor, target_map: Tensor, rows: Tensor, negatives: Tensor, gather: Gather) -> Tensor:
        """Compute the loss of the layer.

        Args:
            student_map: Map of the student, [B, D, H, W].
            target_map: Map of the teacher, [B, D', H', W'].
            rows: Row of each sample, int64 [B].
            negatives: How often each row is a negative of each sample, float32 [B, N].
            gather: See `FeatureLoss.gather`.
        """
        with torch.autocast(rows.device.type, enabled=False):
            with profiler_range("projector"):
                student, teacher = self._embed(self.embed_s, student_map), self._embed(self.embed_t, target_map)
            # In the order of the banks with which they are compared.
            anchors = torch.stack([teacher, student])
            value, slope = self._contrast(anchors.detach(), rows, negatives.to(anchors.dtype), gather)
            return value + ((anchors - anchors.detach()) * slope).sum()

    @staticmethod
    def _embed(linear: nn.Linear, feature: Tensor) -> Tensor:
        """Return vectors of length 1, [B, E]."""
        embedded: Tensor = linear(embedding(feature.to(linear.weight.dtype)))
        return unit(embedded, 1)

    @torch.no_grad()
    def _contrast(self, anchors: Tensor, rows: Tensor, negatives: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
        """Compute the loss and its gradient with respect to the anchors, and update the banks.

        Automatic differentiation would need the banks as they were before the update, and keep tensors [B, N] until the
        backward pass.

        Args:
            anchors: Embeddings of the teacher and of the student, [2, B, E].
            rows: Row of each sample, int64 [B].
            negatives: How often each row is a negative of each sample, [B, N].
            gather: See `FeatureLoss.gather`.

        Returns:
            The loss, a scalar, and its gradient, [2, B, E].
        """
        settings, positions = self._settings, rows.expand(2, -1)[..., None]
        scores = anchors / settings.nce_t @ self.memory.mT
        positive = scores.gather(2, positions)
        totals = torch.logaddexp(positive[..., 0], (scores + negatives.log()).logsumexp(2))
        own = torch.cat([anchors[1], anchors[0], totals.T], 1)
        everyone = gather(own) if self.training else own
        log_z = self._constants(everyone[:, -2:])
        offset = (log_z + math.log(settings.nce_k / self.memory.shape[1]))[:, None, None]
        # Logarithms of x / (nce_k / N), so that h is their sigmoid.
        scores, positive = scores.sub_(offset), positive - offset
        losses = _softplus(-positive[..., 0]) + _softplus(scores).mul_(negatives).sum(2)
        slopes = scores.sigmoid_().mul_(negatives).scatter_add_(2, positions, -(-positive).sigmoid())
        slope = slopes @ self.memory / (settings.nce_t * len(rows))
        if self.training:
            self.log_z.copy_(log_z)
            self._update(gather(rows), everyone[:, :-2].unflatten(1, (2, -1)).movedim(1, 0))
        return losses.mean(1).sum(), slope

    def _constants(self, totals: Tensor) -> Tensor:
        """Return log Z of both banks, [2], where Z is N times the mean of exp(score) over the first micro-batch.

        Args:
            totals: Logarithm of the sum of exp(score) over the positive and the negatives of each sample, [B, 2].
        """
        scores = len(totals) * (self._settings.nce_k + 1)
        estimate = totals.logsumexp(0) + math.log(self.memory.shape[1] / scores)
        return torch.where(self.log_z.isfinite(), self.log_z, estimate)

    def _update(self, rows: Tensor, embeddings: Tensor) -> None:
        """Move the rows [B] of both banks toward embeddings [2, B, E], unless these are not finite."""
        # A balanced batch may have a sample twice, and the order of writes is not defined on a GPU: each writes the last one.
        last = torch.where(rows[:, None] == rows, torch.arange(len(rows), device=rows.device), 0).amax(1)
        kept = self.memory[:, rows]
        moved = unit(self._settings.nce_m * kept + (1 - self._settings.nce_m) * embeddings[:, last], 2)
        is_finite = moved.isfinite().all(2, keepdim=True)
        self.memory.index_copy_(1, rows, torch.where(is_finite, moved, kept))


def _softplus(values: Tensor) -> Tensor:
    """Compute log(1 + exp(values)), to the rounding also in float64."""
    return functional.softplus(values, threshold=40)
