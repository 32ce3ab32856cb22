"""Loops in plain torch and torchvision on tensors in memory, to measure what the hardware gives.

Nothing of this program's own is used but the projectors, which are 1x1 convolutions, the ranges of the profiler, and, in the
limits of a distillation, its networks: the teacher's BatchNorm fused, layers with the kernels that are fast on a CPU. `bare`
has torchvision's own. In a launch of several processes each takes its share of the batch, and torch's DistributedDataParallel
exchanges the gradients. In bf16 the student runs under autocast, and the frozen teacher's weights are bf16 from the beginning.
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

from benchmarks.jobs import CLASSES, IMAGE_SIZE, LAYERS, OPTIM, PLAIN, STUDENT, TEACHER, Bench, random_teacher
from kd_accel.builders.teacher import teacher_on_device
from kd_accel.models.inference import image_memory_format, use_cpu_kernels, weight_memory_format
from kd_accel.models.projectors import FeatureProjector
from kd_accel.profiling import profiler_range

TEMPERATURE, ALPHA, FEATURE_WEIGHT = 4.0, 0.5, 0.1
Batches = Sequence[tuple[Tensor, Tensor]]
"""[(normalized float images [B, 3, H, W], labels [B]), ...] on the device."""
Output = tuple[Tensor, dict[str, Tensor]]
"""(logits [B, C], {layer: projected features [B, D, H, W]})."""


@dataclass(frozen=True)
class Limit:
    """A training as a bare loop.

    Args:
        teacher: none, a live one, or outputs of one that lie in memory.
        with_features: whether features are compared, with direction `both`.
    """

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

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.learned = nn.ModuleDict({layer: FeatureProjector(STUDENT[layer][0], STUDENT[layer][0]) for layer in layers})

    def forward(self, images: Tensor) -> Output:
        if not self.learned:
            return self.network(images), {}
        logits, maps = _with_maps(self.network, images)
        return logits, {layer: projector(maps[layer]) for layer, projector in self.learned.items()}


def limit_case(limit: Limit, bench: Bench) -> Callable[[], float]:
    """Return a block of steps as a case: output of the teacher where used, forward, loss, backward, update, nothing else."""
    layers = LAYERS if limit.with_features else []
    student, batches = _student(bench, layers, is_own=limit.teacher != "none"), random_batches(bench)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=OPTIM.lr, momentum=OPTIM.momentum, nesterov=True, weight_decay=OPTIM.weight_decay, fused=True
    )
    teacher = _teacher(limit, bench, layers, batches)

    def block() -> float:
        for number, (images, labels) in enumerate(batches):
            with _autocast(bench):
                with profiler_range("teacher"):
                    target = teacher(number, images)
                with profiler_range("student"):
                    logits, maps = student(images)
            with profiler_range("loss"):
                loss = _loss(logits, maps, labels, target)
            with profiler_range("backward"):
                loss.backward()
            with profiler_range("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return bench.size.samples

    return block


def forward_case(bench: Bench, images: Sequence[Tensor]) -> Callable[[], float]:
    """Return the teacher's forward and the projection of its features as a case. images: normalized float."""
    teacher, frozen = _fused_teacher(bench), _frozen_projectors(bench, LAYERS)

    @torch.no_grad()
    def block() -> float:
        for batch in images:
            _projected(teacher, frozen, batch)
        return sum(len(batch) for batch in images)

    return block


def random_batches(bench: Bench) -> Batches:
    """Make the batches of a block: of each, the share of one process."""
    torch.manual_seed(0)
    steps, share = bench.size.steps, bench.size.batch_size // bench.accelerator.num_processes
    images = torch.randn(steps, share, 3, IMAGE_SIZE, IMAGE_SIZE, device=bench.device)
    labels = torch.randint(0, CLASSES, (steps, share), device=bench.device)
    memory_format = image_memory_format(None, bench.kernel_device)
    return [(batch.contiguous(memory_format=memory_format), own) for batch, own in zip(images, labels, strict=True)]


def _teacher(limit: Limit, bench: Bench, layers: Sequence[str], batches: Batches) -> Callable[[int, Tensor], Output | None]:
    """Return (number of the batch, images) -> output of the teacher."""
    if limit.teacher == "none":
        return lambda number, images: None
    dtype = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    model, frozen = _fused_teacher(bench).to(dtype), _frozen_projectors(bench, layers).to(dtype)

    @torch.no_grad()
    def live(number: int, images: Tensor) -> Output:
        return _projected(model, frozen, images)

    if limit.teacher == "live":
        return live
    with _autocast(bench):
        outputs = [_float(*live(number, images)) for number, (images, _) in enumerate(batches)]
    return lambda number, images: outputs[number]


def _fused_teacher(bench: Bench) -> nn.Module:
    """Build the teacher's network as a training runs it."""
    network, _ = teacher_on_device(bench.adapted(PLAIN), random_teacher(), bench.accelerator, LAYERS)
    return network.eval().requires_grad_(False)


def _frozen_projectors(bench: Bench, layers: Sequence[str]) -> nn.ModuleDict:
    """Build random projectors from the teacher's channels to the student's."""
    projectors = {layer: FeatureProjector(TEACHER[layer][0], STUDENT[layer][0]) for layer in layers}
    return nn.ModuleDict(projectors).to(bench.device).requires_grad_(False)


def _autocast(bench: Bench) -> AbstractContextManager[object]:
    assert bench.precision != "fp16", "the bare loops have no loss scaler"
    return torch.autocast(bench.device.type, torch.bfloat16) if bench.precision == "bf16" else nullcontext()


def _float(logits: Tensor, maps: Mapping[str, Tensor]) -> Output:
    """Return the same in float32, in which losses are computed."""
    return logits.float(), {layer: value.float() for layer, value in maps.items()}


def _loss(logits: Tensor, maps: dict[str, Tensor], labels: Tensor, target: Output | None) -> Tensor:
    logits, maps = _float(logits, maps)
    cross_entropy = functional.cross_entropy(logits, labels)
    if target is None:
        return cross_entropy
    target_logits, targets = _float(*target)
    soft, soft_target = (functional.log_softmax(one / TEMPERATURE, dim=1) for one in (logits, target_logits))
    kl = functional.kl_div(soft, soft_target, reduction="batchmean", log_target=True) * TEMPERATURE**2
    loss = ALPHA * kl + (1 - ALPHA) * cross_entropy
    if not maps:
        return loss
    return loss + FEATURE_WEIGHT * torch.stack([functional.mse_loss(maps[layer], targets[layer]) for layer in maps]).sum()


def _projected(teacher: nn.Module, frozen: nn.ModuleDict, images: Tensor) -> Output:
    if not frozen:
        return teacher(images), {}
    logits, maps = _with_maps(teacher, images)
    return logits, {layer: projector(maps[layer]) for layer, projector in frozen.items()}


def _student(bench: Bench, layers: Sequence[str], *, is_own: bool) -> nn.Module:
    torch.manual_seed(0)
    network = resnet18(num_classes=CLASSES)
    use_cpu_kernels(network, bench.kernel_device, "auto" if is_own else "never")
    student: nn.Module = _Student(network, layers)
    student = student.to(bench.device).to(memory_format=weight_memory_format(None, bench.kernel_device)).train()
    return student if bench.accelerator.num_processes == 1 else DistributedDataParallel(student, gradient_as_bucket_view=True)


def _with_maps(model: nn.Module, images: Tensor) -> Output:
    """Run the ResNet's own forward and keep the output of its stages."""
    assert isinstance(model, ResNet)
    hidden, maps = model.maxpool(model.relu(model.bn1(model.conv1(images)))), {}
    for layer in LAYERS:
        hidden = maps[layer] = getattr(model, layer)(hidden)
    return model.fc(torch.flatten(model.avgpool(hidden), 1)), maps
