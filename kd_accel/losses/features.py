"""Distances between feature maps [B, D, H, W] that are already in the same channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kd_accel.losses.logits import full_precision

Pairs = Mapping[str, tuple[Tensor, Tensor]]


def feature_mse(student_map: Tensor, target_map: Tensor) -> Tensor:
    """Mean squared error over all elements; the larger map is average-pooled to the smaller's height and width."""
    with torch.autocast(student_map.device.type, enabled=False):
        student, target = _meet(full_precision(student_map), full_precision(target_map))
        if student.is_contiguous(memory_format=torch.channels_last):
            student, target = student.movedim(1, -1), target.movedim(1, -1)  # as they lie, so that no copy is made
        return _MeanSquare.apply(student, target)


def feature_loss(pairs: Pairs) -> Tensor:
    """Sum of the distances over the layers."""
    distances = [feature_mse(student, target) for student, target in pairs.values()]
    return torch.stack(distances).sum()


class _MeanSquare(torch.autograd.Function):
    """Mean of (student - target)^2, keeping their difference alone for the backward; torch's mse_loss keeps both maps."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor) -> Tensor:
        difference = student - target
        ctx.save_for_backward(difference)
        flat = difference.flatten()
        return flat.dot(flat) / flat.numel()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (difference,) = ctx.saved_tensors
        own = difference * (gradient * (2 / difference.numel()))
        return own if ctx.needs_input_grad[0] else None, -own if ctx.needs_input_grad[1] else None


def _meet(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    size = (min(student.shape[2], target.shape[2]), min(student.shape[3], target.shape[3]))
    return _pooled(student, size), _pooled(target, size)


def _pooled(feature: Tensor, size: tuple[int, int]) -> Tensor:
    if feature.shape[2:] == size:
        return feature
    if feature.is_cuda and torch.are_deterministic_algorithms_enabled():
        return pooled_by_products(feature, size)
    return functional.adaptive_avg_pool2d(feature, size)


def pooled_by_products(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `adaptive_avg_pool2d(feature, size)` as two matrix products: [B, D, H, W] -> [B, D, *size].

    CUDA has no deterministic backward of the pooling itself; its matrix products are deterministic. They are in float64, which
    TF32 does not touch.
    """
    samples, columns = (_window_means(n, out, feature.device) for n, out in zip(feature.shape[2:], size, strict=True))
    return (samples @ feature.double() @ columns.T).to(feature.dtype)


def _window_means(length: int, windows: int, device: torch.device) -> Tensor:
    """Return the weights of the means over the windows that adaptive pooling has, one sample each: float64 [windows, length]."""
    at, window = torch.arange(length, device=device), torch.arange(windows, device=device)[:, None]
    first, end = window * length // windows, -(-(window + 1) * length // windows)
    return ((at >= first) & (at < end)).double() / (end - first)
