"""Masked generative distillation: the teacher's map, generated from the student's map without a part of its pixels.

Shapes: B batch, D channels, H height, W width.

References:
    Yang et al., "Masked Generative Distillation", ECCV 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_accel.losses.base import LossSettings, register
from kd_accel.losses.draws import WORD_BITS, hash_words
from kd_accel.losses.features import module_key, pool_to_common_size
from kd_accel.losses.layerwise import AlignedLoss
from kd_accel.losses.logits import full_precision
from kd_accel.models.projectors import Shape, seeded_weights
from kd_accel.profiling import profiler_range


@register("mgd")
class MGD(AlignedLoss):
    """Squared error of the teacher's map, generated from the masked map of the student, summed over the layers.

    A random share of the student's pixels is set to zero, and two learned 3x3 convolutions generate the teacher's map. In the
    layers where the channels differ, a learned 1x1 convolution aligns the student's before. The errors are summed over channels
    and pixels and averaged over the batch, as in the paper, whose weight of the loss for image classification is 7e-5.

    A mask is a function of (seed, number of the micro-batch, index of the sample). So it is the same for any number of
    processes, and after a resume. With gradient accumulation, the micro-batches of a step draw other masks than a single batch.

    Formula:
        Sum over layers of 1 / B * sum of (conv(relu(conv(mask * projected student))) - target)^2, mask = 0 with lambda_mgd

    References:
        Yang et al., "Masked Generative Distillation", ECCV 2022.
    """

    uses_index = True
    synchronizes_buffers = True  # its one buffer is a number of micro-batches
    drawn: Tensor

    class Settings(LossSettings):
        """Settings of `mgd`.

        Args:
            lambda_mgd: Probability with which a pixel of the student is masked, from 0 to below 1.
        """

        lambda_mgd: float = Field(0.15, ge=0, lt=1)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.generators = nn.ModuleDict()
        # A buffer, because checkpoints save it, and a captured CUDA graph increments it in each replay.
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))
        self._seed = 0

    def build(self, student_shapes: Mapping[str, Shape], target_shapes: Mapping[str, Shape], *, seed: int) -> None:
        """Create projectors and generators; see `FeatureLoss.build` for the arguments. `seed` decides the masks too."""
        super().build(student_shapes, target_shapes, seed=seed)
        self._seed = seed
        for layer in student_shapes:
            channels = target_shapes[layer][0]
            with seeded_weights(f"{layer}/generator", seed):
                self.generators[module_key(layer)] = nn.Sequential(
                    nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
                )

    def forward(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, index: Tensor | None = None) -> Tensor:
        """Compute the loss; in training mode, count the micro-batch. See `FeatureLoss.forward` for the arguments.

        Raises:
            ValueError: If `index` is None.
        """
        if index is None:
            raise ValueError("index: missing; mgd masks pixels by the positions of the samples, int64 [B]")
        aligned = self.aligned(features)
        pairs = {
            layer: pool_to_common_size(full_precision(feature), full_precision(targets[layer]))
            for layer, feature in aligned.items()
        }
        masks = self._masks(index, [student.shape[2:] for student, _ in pairs.values()])
        losses = []
        for (layer, (student, target)), mask in zip(pairs.items(), masks, strict=True):
            with profiler_range("projector"):
                generated = self.generators[module_key(layer)](student * mask)
            with torch.autocast(target.device.type, enabled=False):
                losses.append((full_precision(generated) - target).square().sum() / len(target))
        return torch.stack(losses).sum()

    def _masks(self, index: Tensor, sizes: Sequence[torch.Size]) -> list[Tensor]:
        """Draw a mask bool [B, 1, H, W] for each size (H, W), False at masked pixels. In training mode, count."""
        pixels = [size.numel() for size in sizes]
        words = hash_words(self._seed, self.drawn, index, sum(pixels))
        if self.training:
            self.drawn.add_(1)
        kept = words >= int(self.settings.lambda_mgd * 2**WORD_BITS)
        parts = kept.split(pixels, dim=1)
        return [part.unflatten(1, (1, *size)) for part, size in zip(parts, sizes, strict=True)]
