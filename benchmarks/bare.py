"""Loops that anybody would write who wants to know what the hardware gives: torch and torchvision, tensors that lie in memory.

Nothing of this program's own is used here but the projectors, which are 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import ResNet, resnet18

from benchmarks.jobs import CLASSES, IMAGE_SIZE, OPTIM, STUDENT, TAPS, Size, build_teacher, frozen_projectors
from kd_accel.models.projectors import FeatureProjector

TEMPERATURE, ALPHA, FEATURE_WEIGHT = 4.0, 0.5, 0.1
Batches = Sequence[tuple[Tensor, Tensor]]
"""[(normalised float images [B, 3, H, W], labels [B]), ...] on the device."""


def bare_case(device: torch.device, size: Size) -> Callable[[], float]:
    """Training on labels: forward, backward, step."""
    student, batches = _student(device), random_batches(device, size)
    optimizer = _optimizer(student)

    def block() -> float:
        for images, labels in batches:
            functional.cross_entropy(student(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return size.rows

    return block


def limit_case(device: torch.device, size: Size) -> Callable[[], float]:
    """Hybrid distillation from a live teacher: its forward, then the student's step with projectors and losses."""
    student, teacher, batches = _student(device), build_teacher(device), random_batches(device, size)
    frozen = frozen_projectors(device)
    learned = nn.ModuleDict({tap: FeatureProjector(shape[0], shape[0]) for tap, shape in STUDENT.items()})
    optimizer = _optimizer(student, learned.to(device).to(memory_format=_weights_layout(device)))

    def block() -> float:
        for images, labels in batches:
            with torch.no_grad():
                target_logits, targets = projected(teacher, frozen, images)
            logits, maps = _with_maps(student, images)
            distances = [functional.mse_loss(learned[tap](maps[tap]), targets[tap]) for tap in TAPS]
            soft, soft_target = (functional.log_softmax(answer / TEMPERATURE, dim=1) for answer in (logits, target_logits))
            response = functional.kl_div(soft, soft_target, reduction="batchmean", log_target=True) * TEMPERATURE**2
            hard = functional.cross_entropy(logits, labels)
            (ALPHA * response + (1 - ALPHA) * hard + FEATURE_WEIGHT * torch.stack(distances).sum()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return size.rows

    return block


def forward_case(device: torch.device, images: Sequence[Tensor]) -> Callable[[], float]:
    """The teacher's forward and the frozen projection of its features. images: normalised float, channels_last."""
    teacher, frozen = build_teacher(device), frozen_projectors(device)

    @torch.no_grad()
    def block() -> float:
        for batch in images:
            projected(teacher, frozen, batch)
        return sum(len(batch) for batch in images)

    return block


def projected(teacher: nn.Module, frozen: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits, maps = _with_maps(teacher, images)
    return logits, {tap: projector(maps[tap]) for tap, projector in frozen.items()}


def random_batches(device: torch.device, size: Size) -> Batches:
    torch.manual_seed(0)
    images = torch.randn(size.steps, size.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.randint(0, CLASSES, (size.steps, size.batch_size), device=device)
    return [(batch.contiguous(memory_format=torch.channels_last), own) for batch, own in zip(images, labels, strict=True)]


def _student(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return resnet18(num_classes=CLASSES).to(device).to(memory_format=_weights_layout(device)).train()


def _weights_layout(device: torch.device) -> torch.memory_format:
    """With channels_last images, what is fastest: a CPU's kernels give gradients of weights contiguous."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def _optimizer(*modules: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.SGD(
        parameters, lr=OPTIM.lr, momentum=OPTIM.momentum, nesterov=True, weight_decay=OPTIM.weight_decay, fused=True
    )


def _with_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The ResNet's own forward, its stages kept."""
    assert isinstance(model, ResNet)
    hidden, maps = model.maxpool(model.relu(model.bn1(model.conv1(images)))), {}
    for tap in TAPS:
        hidden = maps[tap] = getattr(model, tap)(hidden)
    return model.fc(torch.flatten(model.avgpool(hidden), 1)), maps
