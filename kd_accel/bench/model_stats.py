"""What a model weighs: parameters, bytes, and multiply-adds of one image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"parameters", "trainable_parameters"}: whole numbers."""
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return {"parameters": sum(parameter.numel() for parameter in parameters), "trainable_parameters": trainable}


def model_bytes(model: nn.Module) -> int:
    """Parameters and buffers, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds per image of convolutions and matrix products, as papers count them (normalization etc. left out).

    images: float [B, 3, H, W] on the model's device. PyTorch's counter gives two operations per multiply-add.
    """
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2 // len(images)
