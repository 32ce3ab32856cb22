"""A distillation loop as most people write it: torchvision's transforms for each picture, a DataLoader, hooks, `for x, y in`.

Nothing of this program's own, and nothing tuned: contiguous memory format, the optimizer as torch has it, and the loss read in
each step.
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
from benchmarks.jobs import CLASSES, LAYERS, OPTIM, STUDENT, TEACHER, Bench
from benchmarks.pictures import Pictures


def common_loop_case(bench: Bench, *, workers: int) -> Callable[[], float]:
    """Return a case: each call runs an epoch of hybrid distillation from a live teacher, and returns the number of images."""
    torch.manual_seed(0)
    device = bench.device
    student = resnet18(num_classes=CLASSES).to(device)
    teacher = resnet50(num_classes=CLASSES, zero_init_residual=True).to(device).eval()
    projectors = nn.ModuleDict({layer: nn.Conv2d(STUDENT[layer][0], TEACHER[layer][0], 1) for layer in LAYERS}).to(device)
    parameters = [*student.parameters(), *projectors.parameters()]
    optimizer = torch.optim.SGD(
        parameters, lr=OPTIM.lr, momentum=OPTIM.momentum, nesterov=True, weight_decay=OPTIM.weight_decay
    )
    kept, targets = _keep(student), _keep(teacher)
    loader = DataLoader(
        Pictures(bench),
        batch_size=bench.size.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def block() -> float:
        student.train()
        images_seen, running = 0, 0.0
        for batch, targets_of_batch in loader:
            images, labels = batch.to(device), targets_of_batch.to(device)
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = student(images)
            soft = functional.kl_div(
                functional.log_softmax(logits / TEMPERATURE, dim=1),
                functional.softmax(teacher_logits / TEMPERATURE, dim=1),
                reduction="batchmean",
            )
            loss = ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * functional.cross_entropy(logits, labels)
            for layer in LAYERS:
                loss = loss + FEATURE_WEIGHT * functional.mse_loss(projectors[layer](kept[layer]), targets[layer])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running += loss.item()
            images_seen += len(images)
        assert math.isfinite(running)
        return images_seen

    return block


def _keep(model: nn.Module) -> dict[str, Tensor]:
    """Record the layers of a ResNet. Returns {layer: its output in the latest forward}, filled by each forward."""
    kept: dict[str, Tensor] = {}

    def keeper(layer: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept[layer] = output

        return keep

    for layer in LAYERS:
        getattr(model, layer).register_forward_hook(keeper(layer))
    return kept
