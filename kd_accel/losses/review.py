"""Knowledge review: the student's maps, fused from deep to shallow layers, compared with the teacher's at several scales.

Shapes: B batch, D channels, H height, W width.

References:
    Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kd_accel.errors import UserError
from kd_accel.losses.base import FeatureLoss, LossSettings, register
from kd_accel.losses.features import module_key, pool, pool_to_common_size
from kd_accel.losses.layerwise import in_full_precision
from kd_accel.models.projectors import Shape, seeded_weights
from kd_accel.profiling import profiler_range

_PYRAMID = (4, 2, 1)
"""Heights and widths to which the maps are pooled."""


@in_full_precision
def hcl_loss(student_map: Tensor, target_map: Tensor) -> Tensor:
    """Compute the hierarchical context loss: the mean squared error at several scales.

    Maps of different sizes are average-pooled to the smaller height and the smaller width. Then they are compared in this size,
    with weight 1, and pooled to 4x4, 2x2 and 1x1 pixels, with weights 1/2, 1/4 and 1/8. Sizes that are not smaller than the map
    are left out, and do not halve the weights that follow.

    Args:
        student_map: Map of the student, [B, D, H, W].
        target_map: Map of the target, [B, D, H', W'].

    Returns:
        The weighted mean of the errors, a scalar.
    """
    student, target = pool_to_common_size(student_map, target_map)
    sizes = [size for size in _PYRAMID if size < min(student.shape[2:])]
    errors = [functional.mse_loss(student, target)]
    errors += [functional.mse_loss(pool(student, (size, size)), pool(target, (size, size))) for size in sizes]
    weights = [0.5**level for level in range(len(errors))]
    return torch.stack([weight * error for weight, error in zip(weights, errors, strict=True)]).sum() / sum(weights)


class Fusion(nn.Module):
    """Attention-based fusion of the student's map in a layer with the fused map of the next deeper layer.

    Args:
        in_channels: Channels of the student's map.
        mid_channels: Channels of the fused map.
        out_channels: Channels of the target.
        has_deeper: Whether a deeper layer exists.

    References:
        Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021 (attention based fusion, ABF).
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, has_deeper: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels))
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if has_deeper else None
        self.expand = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, feature: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fuse the maps of a layer.

        Args:
            feature: Map of the student, [B, in_channels, H, W].
            deeper: Fused map of the next deeper layer, [B, mid_channels, H', W']; None without `has_deeper`.

        Returns:
            The map to compare with the target, [B, out_channels, H, W], and the fused map, [B, mid_channels, H, W].
        """
        fused = self.reduce(feature)
        if self.attention is not None and deeper is not None:
            deeper = functional.interpolate(deeper, fused.shape[2:])
            own_share, deeper_share = self.attention(torch.cat([fused, deeper], 1)).sigmoid().split(1, dim=1)
            fused = own_share * fused + deeper_share * deeper
        return self.expand(fused), fused


@register("review")
class Review(FeatureLoss):
    """Hierarchical context loss between fused maps of the student and the teacher's maps, summed over the layers.

    The layers are listed from shallow to deep. Learned modules fuse the map of each layer with those of all deeper layers, and
    map it to the teacher's channels. Their BatchNorm uses the statistics of the micro-batch of one process.

    Formula:
        Sum over layers of HCL(fused student, target), the weighted mean of the MSE of the maps and of their 4x4, 2x2, 1x1 means

    References:
        Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021.
    """

    per_sample = False

    class Settings(LossSettings):
        """Settings of `review`.

        Args:
            mid_channels: Channels of the fused maps, at most those of the student's deepest layer.
        """

        mid_channels: int = Field(512, ge=1)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.fusions = nn.ModuleDict()
        self._from_deep_to_shallow: list[str] = []

    def build(self, student_shapes: Mapping[str, Shape], target_shapes: Mapping[str, Shape], *, seed: int) -> None:
        """Create the fusion modules.

        Args:
            student_shapes: Shape (D, H, W) of the student's maps by student layer, from shallow to deep.
            target_shapes: Shape (D, H, W) of the targets by student layer.
            seed: Seed of the initial weights.

        Raises:
            UserError: If a layer has larger maps than the layer before it.
        """
        _refuse_wrong_order(student_shapes)
        self._from_deep_to_shallow = list(student_shapes)[::-1]
        deepest = self._from_deep_to_shallow[0]
        mid_channels = min(self.settings.mid_channels, student_shapes[deepest][0])
        for layer, shape in student_shapes.items():
            with seeded_weights(layer, seed):
                fusion = Fusion(shape[0], mid_channels, target_shapes[layer][0], has_deeper=layer != deepest)
            self.fusions[module_key(layer)] = fusion

    def forward(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, index: Tensor | None = None) -> Tensor:
        """Compute the sum of `hcl_loss` over the layers; see `FeatureLoss.forward` for the arguments."""
        fused: Tensor | None = None
        losses = []
        for layer in self._from_deep_to_shallow:
            with profiler_range("projector"):
                compared, fused = self.fusions[module_key(layer)](features[layer], fused)
            losses.append(hcl_loss(compared, targets[layer]))
        return torch.stack(losses).sum()


def _refuse_wrong_order(shapes: Mapping[str, Shape]) -> None:
    """Raise UserError if the maps of a layer are larger than those of the layer before it."""
    layers = list(shapes)
    for shallow, deep in zip(layers, layers[1:], strict=False):
        if shapes[deep][1] > shapes[shallow][1] or shapes[deep][2] > shapes[shallow][2]:
            raise UserError(
                f"layers: the review loss fuses deep layers into shallow ones, but {deep} (maps of {shapes[deep][1]}x"
                f"{shapes[deep][2]}) follows {shallow} ({shapes[shallow][1]}x{shapes[shallow][2]}); list the layers from "
                "shallow to deep"
            )
