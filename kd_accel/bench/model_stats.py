"""Model statistics: parameters, bytes, and multiply-adds (MACs) per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count the elements of a model's parameters.

    Returns:
        {"parameters": number of all elements, "trainable_parameters": number of those that require gradients}.
    """
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return {"parameters": sum(parameter.numel() for parameter in parameters), "trainable_parameters": trainable}


def model_bytes(model: nn.Module) -> int:
    """Compute the size of a model's parameters and buffers in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def count_macs(model: nn.Module, images: Tensor) -> int:
    """Count the multiply-adds per image of one forward.

    As in papers, convolutions and matrix products are counted; normalization, activations and pooling are not.

    Args:
        model: Model to measure.
        images: Input, float32 [B, 3, H, W], on the model's device.
    """
    with FlopCounterMode(display=False) as counter:
        model(images)
    # The counter has two operations per multiply-add.
    return counter.get_total_flops() // 2 // len(images)
