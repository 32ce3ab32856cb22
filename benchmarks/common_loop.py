"""The distillation loop that most people write: torchvision's transforms for each picture, a DataLoader, hooks, `for x, y in`.

Nothing of this program's own, and nothing tuned: contiguous layout, the optimizer as torch has it, and the loss read in each
step.
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
from benchmarks.jobs import CLASSES, OPTIM, STUDENT, TEACHER, Bench
from benchmarks.pictures import Pictures

STAGES = list(STUDENT)


def common_loop_case(bench: Bench, *, workers: int) -> Callable[[], float]:
    """Each call is an epoch of hybrid distillation from a live teacher. Returns the number of images."""
    torch.manual_seed(0)
    device = bench.device
    student = resnet18(num_classes=CLASSES).to(device)
    teacher = resnet50(num_classes=CLASSES, zero_init_residual=True).to(device).eval()
    projectors = nn.ModuleDict(
        {profiler_range: nn.Conv2d(STUDENT[profiler_range][0], TEACHER[profiler_range][0], 1) for profiler_range in STAGES}
    ).to(device)
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
            for profiler_range in STAGES:
                loss = loss + FEATURE_WEIGHT * functional.mse_loss(
                    projectors[profiler_range](kept[profiler_range]), targets[profiler_range]
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running += loss.item()
            images_seen += len(images)
        assert math.isfinite(running)
        return images_seen

    return block


def _keep(model: nn.Module) -> dict[str, Tensor]:
    """{stage: what it gave in the latest forward}."""
    kept: dict[str, Tensor] = {}

    def keeper(profiler_range: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept[profiler_range] = output

        return keep

    for profiler_range in STAGES:
        getattr(model, profiler_range).register_forward_hook(keeper(profiler_range))
    return kept
