"""The memory layout of images, maps and weights: it changes the speed, and sums in their last bits."""

from __future__ import annotations

import torch


def image_memory_format(channels_last: bool | None, device: torch.device) -> torch.memory_format:
    """Of images, and so of all feature maps. channels_last: None = on GPUs.

    There the kernels of half precision are made for it. On a CPU it makes maps of few pixels slower (docs/profile.md).
    """
    is_last = device.type == "cuda" if channels_last is None else channels_last
    return torch.channels_last if is_last else torch.contiguous_format


def weight_memory_format(channels_last: bool | None, device: torch.device) -> torch.memory_format:
    """Of trained weights. A CPU's kernels give the gradients of weights contiguous, whatever the maps are: the weights lie
    likewise, or each gradient is laid out anew (a twentieth of a ResNet's training step)."""
    return image_memory_format(channels_last, device) if device.type == "cuda" else torch.contiguous_format
