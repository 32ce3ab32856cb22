"""1x1 convolutions that map features to another number of channels (FitNets, Romero et al., ICLR 2015)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

Shape = tuple[int, int, int]
"""Shape (D, H, W) of a layer's output for one image."""


class FeatureProjector(nn.Module):
    """1x1 convolution with bias.

    A 1x1 convolution is a matrix product over the channels. Channels_last maps use one matrix product. Contiguous maps on a CPU
    use one product per image, unless the weight gradient of an image would be larger than its map. `nn.Conv2d` is slower in
    these cases and computes all other cases.

    Shape:
        [B, in_channels, H, W] -> [B, out_channels, H, W], in the memory format of the input.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, feature: Tensor) -> Tensor:
        """Project maps [B, in_channels, H, W] to [B, out_channels, H, W]."""
        weight, bias = self.conv.weight.flatten(1), self.conv.bias
        assert bias is not None
        if feature.is_contiguous(memory_format=torch.channels_last):
            return functional.linear(feature.movedim(1, -1), weight, bias).movedim(-1, 1)
        height, width = feature.shape[2:]
        if feature.device.type != "cpu" or len(weight) > height * width:
            return self.conv(feature)
        weights = weight.expand(len(feature), -1, -1)
        return torch.baddbmm(bias[:, None], weights, feature.flatten(2)).unflatten(2, (height, width))


@contextmanager
def seeded_weights(layer: str, seed: int) -> Iterator[None]:
    """Inside the `with` block, initial weights depend only on (seed, layer); the global generator is not advanced."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the generators of the GPUs, which fork_rng does not restore here.
        torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{layer}".encode()))
        yield


def seeded_projector(in_channels: int, out_channels: int, *, layer: str, seed: int) -> FeatureProjector:
    """Build a projector whose initial weights depend only on (seed, layer); the global generator is not advanced."""
    with seeded_weights(layer, seed):
        return FeatureProjector(in_channels, out_channels)
