"""Networks for images of 32x32 pixels with which the papers compare methods: ResNet-20, 56, 8x4, 32x4, WRN-16-2 and 40-2.

A config names them as `import:examples.cifar_networks:resnet20`. Images [B, 3, 32, 32] become maps of 32x32, 16x16 and 8x8
pixels in `layer1` to `layer3`, and logits [B, num_classes]. Depths, widths and shortcuts are those of Tian et al., "Contrastive
Representation Distillation", ICLR 2020.

References:
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

Block = Callable[[int, int, int], nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the input or to its projection, then ReLU.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution and of the projection.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        inner = functional.relu(self.bn1(self.conv1(maps)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(maps))


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, added to the input or to the projection of its activation.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution and of the projection.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _convolution(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 1)
        is_same = stride == 1 and in_channels == channels
        self.projection = None if is_same else nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        active = functional.relu(self.bn1(maps))
        inner = functional.relu(self.bn2(self.conv1(active)))
        return self.conv2(inner) + (maps if self.projection is None else self.projection(active))


class CifarNetwork(nn.Module):
    """A 3x3 convolution, three stages of blocks, pooling and a classifier.

    Args:
        block: Builder of a block from (channels of the input, channels, stride).
        blocks: Number of blocks in a stage.
        widths: Channels of the first convolution and of the three stages.
        num_classes: Number of logits.
        is_preactivated: Whether the blocks begin with BatchNorm and ReLU. These then follow the last block, and not the first
            convolution.
    """

    def __init__(
        self, block: Block, blocks: int, widths: Sequence[int], num_classes: int, *, is_preactivated: bool = False
    ) -> None:
        super().__init__()
        self.conv = _convolution(3, widths[0], 1)
        norm = nn.BatchNorm2d(widths[-1] if is_preactivated else widths[0])
        self.stem_norm: nn.Module = nn.Identity() if is_preactivated else nn.Sequential(norm, nn.ReLU())
        stages = [
            nn.Sequential(block(in_channels, channels, stride), *(block(channels, channels, 1) for _ in range(blocks - 1)))
            for in_channels, channels, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
        ]
        self.layer1, self.layer2, self.layer3 = stages
        self.last_norm: nn.Module = nn.Sequential(norm, nn.ReLU()) if is_preactivated else nn.Identity()
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits [B, num_classes] of normalized images [B, 3, H, W]."""
        maps = self.layer3(self.layer2(self.layer1(self.stem_norm(self.conv(images)))))
        return self.fc(self.last_norm(maps).mean((2, 3)))


def resnet20(num_classes: int) -> CifarNetwork:
    """Build ResNet-20: three blocks in a stage, 16 to 64 channels."""
    return CifarNetwork(BasicBlock, 3, (16, 16, 32, 64), num_classes)


def resnet56(num_classes: int) -> CifarNetwork:
    """Build ResNet-56: nine blocks in a stage, 16 to 64 channels."""
    return CifarNetwork(BasicBlock, 9, (16, 16, 32, 64), num_classes)


def resnet8x4(num_classes: int) -> CifarNetwork:
    """Build ResNet-8x4: one block in a stage, 64 to 256 channels."""
    return CifarNetwork(BasicBlock, 1, (32, 64, 128, 256), num_classes)


def resnet32x4(num_classes: int) -> CifarNetwork:
    """Build ResNet-32x4: five blocks in a stage, 64 to 256 channels."""
    return CifarNetwork(BasicBlock, 5, (32, 64, 128, 256), num_classes)


def wrn_16_2(num_classes: int) -> CifarNetwork:
    """Build WRN-16-2: two blocks in a stage, 32 to 128 channels."""
    return CifarNetwork(WideBlock, 2, (16, 32, 64, 128), num_classes, is_preactivated=True)


def wrn_40_2(num_classes: int) -> CifarNetwork:
    """Build WRN-40-2: six blocks in a stage, 32 to 128 channels."""
    return CifarNetwork(WideBlock, 6, (16, 32, 64, 128), num_classes, is_preactivated=True)


def _convolution(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
