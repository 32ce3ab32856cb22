"""Loops that anybody would write who wants to know what the hardware gives: torch and torchvision, tensors that lie in memory.

Nothing of this program's own is used here but the projectors, which are 1x1 convolutions, the marks of the parts of a step,
and, in the limits of a distillation, its networks: the teacher's BatchNorm folded, layers in the forms that are fast on a CPU.
`bare` has torchvision's own. In a launch of several processes each takes its share of the batch, and torch's
DistributedDataParallel exchanges the gradients. In bf16 the student runs under autocast, and the frozen teacher's weights are
bf16 from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import ResNet, resnet18

from benchmarks.jobs import CLASSES, IMAGE_SIZE, LAYERS, OPTIM, STUDENT, Size, build_student, frozen_projectors, fused_teacher
from kd_accel.models.memory_format import image_memory_format, weight_memory_format
from kd_accel.models.projectors import FeatureProjector
from kd_accel.profiling import profiler_range

TEMPERATURE, ALPHA, FEATURE_WEIGHT = 4.0, 0.5, 0.1
Batches = Sequence[tuple[Tensor, Tensor]]
"""[(normalized float images [B, 3, H, W], labels [B]), ...] on the device."""
Answer = tuple[Tensor, dict[str, Tensor]]
"""(the teacher's logits [B, C], {layer: its projected features})."""
LimitPrecision = Literal["no", "bf16"]


@dataclass(frozen=True)
class Limit:
    """teacher: none, one that answers for each batch, or answers that lie in memory. with_features: direction `both`."""

    teacher: Literal["none", "live", "memory"] = "none"
    with_features: bool = False


LIMITS = {
    "bare": Limit(),
    "limit_live_logits": Limit("live"),
    "limit": Limit("live", with_features=True),
    "limit_cached_logits": Limit("memory"),
    "limit_cached_hybrid": Limit("memory", with_features=True),
}


class _Student(nn.Module):
    """ResNet-18 and its learned projectors, in one module for DistributedDataParallel."""

    def __init__(self, layers: Sequence[str], device: torch.device, *, is_own: bool, forms: torch.device | None) -> None:
        super().__init__()
        self.network = build_student(device, forms=forms) if is_own else resnet18(num_classes=CLASSES)
        self.learned = nn.ModuleDict({layer: FeatureProjector(STUDENT[layer][0], STUDENT[layer][0]) for layer in layers})

    def forward(self, images: Tensor) -> Answer:
        if not self.learned:
            return self.network(images), {}
        logits, maps = _with_maps(self.network, images)
        return logits, {layer: projector(maps[layer]) for layer, projector in self.learned.items()}


def limit_case(
    limit: Limit,
    device: torch.device,
    size: Size,
    *,
    world_size: int = 1,
    precision: LimitPrecision = "no",
    forms: torch.device | None = None,
) -> Callable[[], float]:
    """A block of steps: the teacher's answer where there is one, forward, loss, backward, update, and nothing else.

    forms: as in `Bench`.
    """
    layers = list(LAYERS) if limit.with_features else []
    student = _student(device, layers, world_size, is_own=limit.teacher != "none", forms=forms)
    batches = random_batches(device, size, world_size, forms=forms)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=OPTIM.lr, momentum=OPTIM.momentum, nesterov=True, weight_decay=OPTIM.weight_decay, fused=True
    )
    answer = _teacher(limit, device, layers, batches, precision=precision, forms=forms)

    def block() -> float:
        for number, (images, labels) in enumerate(batches):
            with _autocast(device, precision):
                with profiler_range("teacher"):
                    target = answer(number, images)
                with profiler_range("student"):
                    logits, maps = student(images)
            with profiler_range("loss"):
                loss = _loss(logits, maps, labels, target)
            with profiler_range("backward"):
                loss.backward()
            with profiler_range("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return size.samples

    return block


def forward_case(device: torch.device, images: Sequence[Tensor]) -> Callable[[], float]:
    """The teacher's forward and the frozen projection of its features. images: normalized float."""
    teacher, frozen = fused_teacher(device), frozen_projectors(device)

    @torch.no_grad()
    def block() -> float:
        for batch in images:
            _projected(teacher, frozen, batch)
        return sum(len(batch) for batch in images)

    return block


def random_batches(device: torch.device, size: Size, world_size: int = 1, *, forms: torch.device | None = None) -> Batches:
    torch.manual_seed(0)
    share = size.batch_size // world_size
    images = torch.randn(size.steps, share, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.randint(0, CLASSES, (size.steps, share), device=device)
    memory_format = image_memory_format(None, forms or device)
    return [(batch.contiguous(memory_format=memory_format), own) for batch, own in zip(images, labels, strict=True)]


def _teacher(
    limit: Limit,
    device: torch.device,
    layers: Sequence[str],
    batches: Batches,
    *,
    precision: LimitPrecision,
    forms: torch.device | None,
) -> Callable[[int, Tensor], Answer | None]:
    """(number of the batch, images) -> what the teacher says."""
    if limit.teacher == "none":
        return lambda number, images: None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = fused_teacher(device, forms=forms).to(dtype)
    frozen = {layer: projector.to(dtype) for layer, projector in frozen_projectors(device).items() if layer in layers}

    @torch.no_grad()
    def live(number: int, images: Tensor) -> Answer:
        return _projected(model, frozen, images)

    if limit.teacher == "live":
        return live
    with _autocast(device, precision):
        answers = [_float(*live(number, images)) for number, (images, _) in enumerate(batches)]
    return lambda number, images: answers[number]


def _autocast(device: torch.device, precision: LimitPrecision) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _float(logits: Tensor, maps: Mapping[str, Tensor]) -> Answer:
    """The same in float32, in which losses are computed."""
    return logits.float(), {layer: value.float() for layer, value in maps.items()}


def _loss(logits: Tensor, maps: dict[str, Tensor], labels: Tensor, target: Answer | None) -> Tensor:
    logits, maps = _float(logits, maps)
    hard = functional.cross_entropy(logits, labels)
    if target is None:
        return hard
    target_logits, targets = _float(*target)
    soft, soft_target = (functional.log_softmax(answer / TEMPERATURE, dim=1) for answer in (logits, target_logits))
    response = functional.kl_div(soft, soft_target, reduction="batchmean", log_target=True) * TEMPERATURE**2
    loss = ALPHA * response + (1 - ALPHA) * hard
    if not maps:
        return loss
    return loss + FEATURE_WEIGHT * torch.stack([functional.mse_loss(maps[layer], targets[layer]) for layer in maps]).sum()


def _projected(teacher: nn.Module, frozen: Mapping[str, nn.Module], images: Tensor) -> Answer:
    if not frozen:
        return teacher(images), {}
    logits, maps = _with_maps(teacher, images)
    return logits, {layer: projector(maps[layer]) for layer, projector in frozen.items()}


def _student(
    device: torch.device, layers: Sequence[str], world_size: int, *, is_own: bool, forms: torch.device | None
) -> nn.Module:
    torch.manual_seed(0)
    student = _Student(layers, device, is_own=is_own, forms=forms).to(device)
    student = student.to(memory_format=weight_memory_format(None, forms or device)).train()
    return student if world_size == 1 else DistributedDataParallel(student, gradient_as_bucket_view=True)


def _with_maps(model: nn.Module, images: Tensor) -> Answer:
    """The ResNet's own forward, its stages kept."""
    assert isinstance(model, ResNet)
    hidden, maps = model.maxpool(model.relu(model.bn1(model.conv1(images)))), {}
    for layer in LAYERS:
        hidden = maps[layer] = getattr(model, layer)(hidden)
    return model.fc(torch.flatten(model.avgpool(hidden), 1)), maps
