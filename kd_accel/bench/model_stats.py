"""Model statistics: parameters, bytes, and multiply-adds (MACs) per image."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
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

    As in papers, convolutions and matrix products are counted, those of attention included; normalization, activations and
    pooling are not. The count is the same on every device. The forward runs on the meta device, in a copy of the model that
    computes shapes alone. A forward that needs values, or a model that cannot be copied, runs once with its own tensors.

    Args:
        model: Model to measure.
        images: Input, float32 [B, 3, H, W], on the model's device.
    """
    try:
        with torch.device("meta"):
            operations = _operations(_on_meta(model), torch.empty_like(images, device="meta"))
    except Exception:
        operations = _operations(model, images)
    # The counter has two operations per multiply-add.
    return operations // 2 // len(images)


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its parameters and buffers on the meta device, where they take no memory."""
    copies = {id(parameter): nn.Parameter(parameter.to("meta"), parameter.requires_grad) for parameter in model.parameters()}
    return copy.deepcopy(model, {**copies, **{id(buffer): buffer.to("meta") for buffer in model.buffers()}})


def _operations(model: nn.Module, images: Tensor) -> int:
    with _plain_attention(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Compute attention as two matrix products, which the counter has formulas for.

    Otherwise the device chooses a kernel: the fast path of `nn.MultiheadAttention` (in evaluation mode), which takes its
    projections too, or a fused `scaled_dot_product_attention`. The counter lacks the first, and the second on CPUs.
    """
    is_fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(is_fast)
