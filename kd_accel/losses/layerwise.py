"""Parts that several feature losses share: sums over layers, aligned channels, full precision, embeddings and unit vectors.

Shapes: B batch, D channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn

from kd_accel.losses.base import FeatureLoss
from kd_accel.losses.features import module_key
from kd_accel.losses.logits import full_precision
from kd_accel.models.projectors import Shape, seeded_projector
from kd_accel.profiling import profiler_range

Settings = ParamSpec("Settings")
MapLoss = Callable[Concatenate[Tensor, Tensor, Settings], Tensor]


def in_full_precision(loss: MapLoss[Settings]) -> MapLoss[Settings]:
    """Decorate a loss of two maps: half-precision maps are cast to float32, and autocast is disabled inside."""

    @wraps(loss)
    def computed(student_map: Tensor, target_map: Tensor, /, *args: Settings.args, **settings: Settings.kwargs) -> Tensor:
        with torch.autocast(student_map.device.type, enabled=False):
            return loss(full_precision(student_map), full_precision(target_map), *args, **settings)

    return computed


def embedding(feature: Tensor) -> Tensor:
    """Average maps [B, D, H, W] over their pixels, to [B, D]."""
    return feature.mean((2, 3))


def unit(vectors: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Divide vectors by their length; a vector of zeros stays zero, with the gradient of a vector of length 1.

    An epsilon in the denominator would multiply that gradient by 1 / epsilon.

    Args:
        vectors: Tensor of any shape.
        dim: Dimension of the components, or several.
    """
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(length > 0, length, 1)


class LayerwiseLoss(FeatureLoss):
    """Base class of losses that are the sum over layers of one function of two maps."""

    def compare(self, student_map: Tensor, target_map: Tensor) -> Tensor:
        """Compute the loss of one layer.

        Args:
            student_map: Map of the student, [B, D, H, W].
            target_map: Result of the target function, [B, D', H', W'].

        Returns:
            The loss, a scalar.
        """
        raise NotImplementedError

    def forward(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, index: Tensor | None = None) -> Tensor:
        """Compute the sum of `compare` over the layers; see `FeatureLoss.forward` for the arguments."""
        return torch.stack([self.compare(feature, targets[layer]) for layer, feature in features.items()]).sum()


class AlignedLoss(LayerwiseLoss):
    """Base class of losses that compare maps with the same channels.

    A learned 1x1 convolution maps the student's channels to those of the target, in the layers where they differ.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.projectors = nn.ModuleDict()

    def build(self, student_shapes: Mapping[str, Shape], target_shapes: Mapping[str, Shape], *, seed: int) -> None:
        """Create the learned projectors; see `FeatureLoss.build` for the arguments."""
        for layer, shape in student_shapes.items():
            channels = target_shapes[layer][0]
            if shape[0] != channels:
                self.projectors[module_key(layer)] = seeded_projector(shape[0], channels, layer=layer, seed=seed)

    def aligned(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the features of the student, [B, D, H, W], to the channels of their targets."""
        with profiler_range("projector"):
            return {layer: self._align(layer, feature) for layer, feature in features.items()}

    def _align(self, layer: str, feature: Tensor) -> Tensor:
        key = module_key(layer)
        return self.projectors[key](feature) if key in self.projectors else feature

    def forward(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, index: Tensor | None = None) -> Tensor:
        """Compute the sum of `compare` over the layers, with aligned channels; see `FeatureLoss.forward` for the arguments."""
        return super().forward(self.aligned(features), targets, index=index)
