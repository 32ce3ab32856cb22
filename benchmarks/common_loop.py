"""Typical distillation loop in plain PyTorch: torchvision transforms per image, a DataLoader, forward hooks, one loop.

The loop uses nothing of kd_accel and is not tuned: contiguous memory format, the default implementation of SGD, and
`loss.item()` in each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.models import resnet18, resnet50

from benchmarks.bare import ALPHA, FEATURE_WEIGHT, TEMPERATURE
from benchmarks.jobs import CLASSES, LAYERS, SGD, STUDENT, TEACHER, Bench
from benchmarks.pil_images import PilImages


def common_loop_case(bench: Bench, *, workers: int) -> Callable[[], float]:
    """Return a case: each call runs an epoch of hybrid distillation with a live teacher and returns the number of images."""
    torch.manual_seed(0)
    device = bench.device
    student = resnet18(num_classes=CLASSES).to(device)
    teacher = resnet50(num_classes=CLASSES, zero_init_residual=True).to(device).eval()
    projectors = nn.ModuleDict({layer: nn.Conv2d(STUDENT[layer][0], TEACHER[layer][0], 1) for layer in LAYERS}).to(device)
    optimizer = torch.optim.SGD([*student.parameters(), *projectors.parameters()], **SGD)
    features, target_features = _record_features(student), _record_features(teacher)
    loader = DataLoader(
        PilImages(bench),
        batch_size=bench.size.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def block() -> float:
        student.train()
        num_images, running_loss = 0, 0.0
        for host_images, host_labels in loader:
            images, labels = host_images.to(device), host_labels.to(device)
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = student(images)
            kl = functional.kl_div(
                functional.log_softmax(logits / TEMPERATURE, dim=1),
                functional.softmax(teacher_logits / TEMPERATURE, dim=1),
                reduction="batchmean",
            )
            loss = ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * functional.cross_entropy(logits, labels)
            for layer in LAYERS:
                loss = loss + FEATURE_WEIGHT * functional.mse_loss(projectors[layer](features[layer]), target_features[layer])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            num_images += len(images)
        assert math.isfinite(running_loss)
        return num_images

    return block


def _record_features(model: nn.Module) -> dict[str, Tensor]:
    """Register forward hooks on the layers of a ResNet; return {layer: output of the last forward}, filled by each forward."""
    features: dict[str, Tensor] = {}

    def recorder(layer: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            features[layer] = output

        return record

    for layer in LAYERS:
        getattr(model, layer).register_forward_hook(recorder(layer))
    return features
