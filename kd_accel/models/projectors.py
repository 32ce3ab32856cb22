"""Projectors that bring teacher and student features into the same channels: learned 1x1 convolutions, and a frozen PCA.

direction            student's side            teacher's side
student_to_teacher   learned, up               raw                        (FitNets, Romero et al. 2015)
teacher_to_student   nothing                   frozen PCA, down
both                 learned, same width       frozen PCA, down
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from kd_accel.config.schema import Direction
from kd_accel.errors import UserError

Shape = tuple[int, int, int]
"""(D, H, W) of a layer."""


class FeatureProjector(nn.Module):
    """A 1x1 convolution with bias: [B, in_channels, H, W] -> [B, out_channels, H, W].

    That is one matrix product over the channels, and where these lie innermost it is computed as one; on a CPU, where the maps
    are contiguous and no image's gradient of the weights is larger than its map, as a product for each image. Convolutions
    are slower there.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, feature: Tensor) -> Tensor:
        weight, bias = self.conv.weight.flatten(1), self.conv.bias
        assert bias is not None
        if feature.is_contiguous(memory_format=torch.channels_last):
            return functional.linear(feature.movedim(1, -1), weight, bias).movedim(-1, 1)
        height, width = feature.shape[2:]
        if feature.device.type != "cpu" or len(weight) > height * width:
            return self.conv(feature)
        weights = weight.expand(len(feature), -1, -1)
        return torch.baddbmm(bias[:, None], weights, feature.flatten(2)).unflatten(2, (height, width))


@dataclass(frozen=True)
class Projectors:
    """Projectors of a direction, by the student's layer.

    Args:
        student: learned projectors of the student's features, trained with the student.
        pca_channels: number of channels to which a frozen PCA, part of the teacher, reduces the teacher's features.
    """

    student: dict[str, FeatureProjector] = field(default_factory=dict)
    pca_channels: dict[str, int] = field(default_factory=dict)


def build_projectors(
    student_shapes: Mapping[str, Shape],
    teacher_shapes: Mapping[str, Shape],
    *,
    direction: Direction,
    seed: int = 0,
) -> Projectors:
    """Build the projectors of pairs of layers; initial weights depend on (seed, layer) alone, not on the global generator.

    Args:
        student_shapes: shapes of the student's features by the student's layer.
        teacher_shapes: shapes of the teacher's features by the student's layer.
        direction: which side is projected.
        seed: of the initial weights of the learned projectors.

    Raises:
        UserError: a PCA would have to add channels.
    """
    widths = {layer: (student_shapes[layer][0], teacher_shapes[layer][0]) for layer in student_shapes}
    if direction == "student_to_teacher":
        return Projectors(student={t: _learned(t, s, d, seed) for t, (s, d) in widths.items()})
    for layer, (student, teacher) in widths.items():
        if teacher < student:
            raise UserError(
                f"distill.feature.direction: {direction} cannot bring the teacher's {teacher} channels at {layer} to the "
                f"student's {student}: a PCA only removes channels; use student_to_teacher"
            )
    pca_channels = {layer: student for layer, (student, _) in widths.items()}
    if direction == "teacher_to_student":
        return Projectors(pca_channels=pca_channels)
    return Projectors(
        student={t: _learned(t, s, s, seed) for t, (s, _) in widths.items()},
        pca_channels=pca_channels,
    )


class PcaFit:
    """Principal directions of a teacher's features, from sums in float64 over batches given in a fixed order.

    Sums are taken around the mean of the first batch, so that nothing cancels. Every pixel of every image is one sample. They
    are taken on the device of the features, and the eigenvectors on the CPU.
    """

    def __init__(self, channels: int) -> None:
        self._channels, self._count = channels, 0
        self._origin: Tensor | None = None
        self._sum: Tensor
        self._outer: Tensor

    def update(self, feature: Tensor) -> None:
        """Add features [B, D, H, W]."""
        samples = feature.detach().double().movedim(1, -1).reshape(-1, self._channels)
        if self._origin is None:
            self._origin = samples.mean(0)
            self._sum, self._outer = torch.zeros_like(self._origin), samples.new_zeros(self._channels, self._channels)
        centred = samples - self._origin
        self._count += len(centred)
        self._sum += centred.sum(0)
        self._outer += centred.T @ centred

    def finish(self, out_channels: int, *, layer: str) -> tuple[FeatureProjector, float]:
        """(frozen projector of the leading directions, explained share of the variance).

        Each direction's entry of largest magnitude is positive; the mean is the convolution's bias. Raises UserError when
        there were fewer samples than `out_channels` + 1, with which the directions would be arbitrary.
        """
        if self._count <= out_channels:
            raise UserError(
                f"distill.feature.pca_images: {self._count} samples at {layer}, but {out_channels} directions need more than "
                "that many; raise pca_images (an image gives height times width samples)"
            )
        assert self._origin is not None
        mean, origin = self._sum.cpu() / self._count, self._origin.cpu()
        covariance = self._outer.cpu() / self._count - mean.outer(mean)
        values, vectors = torch.linalg.eigh(covariance)
        directions = _signed(vectors.flip(1)[:, :out_channels].T)
        values = values.flip(0).clamp(min=0)
        projector = FeatureProjector(len(mean), out_channels).requires_grad_(False)
        with torch.no_grad():
            projector.conv.weight.copy_(directions[:, :, None, None])
            projector.conv.bias.copy_(-directions @ (mean + origin))  # type: ignore[union-attr]
        total = values.sum().item()
        return projector, values[:out_channels].sum().item() / total if total > 0 else 1.0


def _signed(directions: Tensor) -> Tensor:
    """Each sample with its entry of largest magnitude made positive, so that a fit is one and not one of 2^D."""
    largest = directions.abs().argmax(1, keepdim=True)
    return directions * directions.gather(1, largest).sign()


def _learned(layer: str, channels_in: int, channels_out: int, seed: int) -> FeatureProjector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed}/{layer}".encode()))
        return FeatureProjector(channels_in, channels_out)
