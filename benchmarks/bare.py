"""Bare training loops in plain torch and torchvision on tensors in memory: upper limits of the speed of kd_accel.

The loops use kd_accel for three things only: the projectors (1x1 convolutions), the profiler ranges, and in the limits of a
distillation the prepared networks (the teacher's BatchNorm fused, the faster CPU kernels). The case `bare` trains
torchvision's network as it is.

In a launch of several processes each process takes its share of the batch, and DistributedDataParallel averages the gradients.
In bf16 the student runs under autocast, and the weights of the frozen teacher are stored in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import ResNet, resnet18

from benchmarks.jobs import CLASSES, IMAGE_SIZE, LAYERS, PLAIN, SGD, STUDENT, TEACHER, Bench, Size, random_teacher
from kd_accel.builders.teacher import teacher_on_device
from kd_accel.models.cuda_graphs import capture
from kd_accel.models.inference import image_memory_format, use_cpu_kernels, weight_memory_format
from kd_accel.models.projectors import FeatureProjector
from kd_accel.profiling import profiler_range

TEMPERATURE, ALPHA, FEATURE_WEIGHT = 4.0, 0.5, 0.1
Batches = Sequence[tuple[Tensor, Tensor]]
"""(normalized float images [B, 3, H, W], labels [B]) of each step, on the device."""
Output = tuple[Tensor, dict[str, Tensor]]
"""(logits [B, C], {layer: projected feature [B, D, H, W]})."""


@dataclass(frozen=True)
class Limit:
    """Training as a bare loop.

    Args:
        teacher: Source of the teacher's outputs: none, a live teacher, or outputs held in memory.
        with_features: Whether the loss has a feature term, with direction `both`.
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
    """ResNet-18 and its trained projectors, in one module for DistributedDataParallel."""

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.projectors = nn.ModuleDict({layer: FeatureProjector(STUDENT[layer][0], STUDENT[layer][0]) for layer in layers})

    def forward(self, images: Tensor) -> Output:
        return _forward_and_project(self.network, self.projectors, images)


def limit_case(
    limit: Limit, bench: Bench, *, teacher_network: nn.Module | None = None, is_compiled: bool = False
) -> Callable[[], float]:
    """Return a case that runs a block of steps: teacher's output if any, forward, loss, backward and update, nothing else.

    Args:
        limit: The training.
        bench: Processes, precision, and the size of a block.
        teacher_network: Result of `fused_teacher`, which several cases can share; None = a new one, if the limit has a teacher.
        is_compiled: Whether the student is compiled by torch.compile, in the first call of the case.
    """
    layers = LAYERS if limit.with_features else []
    student, batches = _student(bench, layers, with_cpu_kernels=limit.teacher != "none"), random_batches(bench)
    optimizer = torch.optim.SGD(student.parameters(), **SGD, fused=True)
    teacher = _teacher(limit, bench, layers, batches, teacher_network)
    if is_compiled:
        student.compile(dynamic=False)

    def block() -> float:
        for number, (images, labels) in enumerate(batches):
            with _autocast(bench):
                with profiler_range("teacher"):
                    target = teacher(number, images)
                with profiler_range("student"):
                    output = student(images)
            with profiler_range("loss"):
                loss = _loss(output, labels, target)
            with profiler_range("backward"):
                loss.backward()
            with profiler_range("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return bench.size.samples

    return block


def graph_case(bench: Bench) -> Callable[[], float]:
    """Return the case `bare` with its step recorded as a CUDA graph; without a GPU the step is called instead of replayed.

    All steps have the same batch, so that none is copied. The loops with a teacher have no such case.
    """
    step = limit_case(LIMITS["bare"], replace(bench, size=Size(bench.size.batch_size, 1)))
    run = capture(step, bench.device) if bench.device.type == "cuda" else step

    def block() -> float:
        for _ in range(bench.size.steps):
            run()
        return bench.size.samples

    return block


def forward_case(bench: Bench, images: Sequence[Tensor]) -> Callable[[], float]:
    """Return a case that runs the teacher's forward and projects its features.

    Args:
        bench: The device, and the size of a block.
        images: Batches of normalized float images [B, 3, H, W] on the device.
    """
    teacher, projectors = fused_teacher(bench), _frozen_projectors(bench, LAYERS)

    @torch.no_grad()
    def block() -> float:
        for batch in images:
            _forward_and_project(teacher, projectors, batch)
        return sum(len(batch) for batch in images)

    return block


def random_batches(bench: Bench) -> Batches:
    """Make the batches of a block, each with the samples of one process."""
    torch.manual_seed(0)
    steps, share = bench.size.steps, bench.size.batch_size // bench.accelerator.num_processes
    images = torch.randn(steps, share, 3, IMAGE_SIZE, IMAGE_SIZE, device=bench.device)
    labels = torch.randint(0, CLASSES, (steps, share), device=bench.device)
    memory_format = image_memory_format(None, bench.kernel_device)
    return [(batch.contiguous(memory_format=memory_format), targets) for batch, targets in zip(images, labels, strict=True)]


def _teacher(
    limit: Limit, bench: Bench, layers: Sequence[str], batches: Batches, network: nn.Module | None
) -> Callable[[int, Tensor], Output | None]:
    """Return a function that maps (index of the batch in `batches`, its images) to the teacher's output."""
    if limit.teacher == "none":
        return lambda number, images: None
    dtype = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    network = (fused_teacher(bench) if network is None else network).to(dtype)
    projectors = _frozen_projectors(bench, layers).to(dtype)

    @torch.no_grad()
    def live(number: int, images: Tensor) -> Output:
        return _forward_and_project(network, projectors, images)

    if limit.teacher == "live":
        return live
    with _autocast(bench):
        outputs = [_to_float32(live(number, images)) for number, (images, _) in enumerate(batches)]
    return lambda number, images: outputs[number]


def fused_teacher(bench: Bench) -> nn.Module:
    """Build the teacher's network as in a training: BatchNorm fused, kernels and memory format chosen for the device."""
    network, _ = teacher_on_device(bench.adapted(PLAIN), random_teacher(), bench.accelerator, LAYERS)
    return network.eval().requires_grad_(False)


def _frozen_projectors(bench: Bench, layers: Sequence[str]) -> nn.ModuleDict:
    """Build random projectors from the teacher's channels to the student's; their values do not affect the time."""
    projectors = {layer: FeatureProjector(TEACHER[layer][0], STUDENT[layer][0]) for layer in layers}
    return nn.ModuleDict(projectors).to(bench.device).requires_grad_(False)


def _autocast(bench: Bench) -> AbstractContextManager[object]:
    assert bench.precision != "fp16", "the bare loops have no loss scaler"
    return torch.autocast(bench.device.type, torch.bfloat16) if bench.precision == "bf16" else nullcontext()


def _to_float32(output: Output) -> Output:
    """Cast an output to float32, in which losses are computed."""
    logits, features = output
    return logits.float(), {layer: feature.float() for layer, feature in features.items()}


def _loss(output: Output, labels: Tensor, target: Output | None) -> Tensor:
    """Compute the loss of Hinton et al. (2015) and the mean squared errors of the features.

    Args:
        output: The student's.
        labels: Classes [B].
        target: The teacher's output; None = cross-entropy alone.

    Returns:
        Scalar.
    """
    logits, features = _to_float32(output)
    cross_entropy = functional.cross_entropy(logits, labels)
    if target is None:
        return cross_entropy
    target_logits, target_features = _to_float32(target)
    log_probs, target_log_probs = (functional.log_softmax(each / TEMPERATURE, dim=1) for each in (logits, target_logits))
    kl = functional.kl_div(log_probs, target_log_probs, reduction="batchmean", log_target=True) * TEMPERATURE**2
    loss = ALPHA * kl + (1 - ALPHA) * cross_entropy
    if not features:
        return loss
    errors = [functional.mse_loss(features[layer], target_features[layer]) for layer in features]
    return loss + FEATURE_WEIGHT * torch.stack(errors).sum()


def _student(bench: Bench, layers: Sequence[str], *, with_cpu_kernels: bool) -> nn.Module:
    torch.manual_seed(0)
    network = resnet18(num_classes=CLASSES)
    use_cpu_kernels(network, bench.kernel_device, "auto" if with_cpu_kernels else "never")
    student: nn.Module = _Student(network, layers)
    student = student.to(bench.device).to(memory_format=weight_memory_format(None, bench.kernel_device)).train()
    return student if bench.accelerator.num_processes == 1 else DistributedDataParallel(student, gradient_as_bucket_view=True)


def _forward_and_project(network: nn.Module, projectors: nn.ModuleDict, images: Tensor) -> Output:
    """Run a network and project the outputs of the layers that have a projector."""
    if not projectors:
        return network(images), {}
    logits, features = _logits_and_features(network, images)
    return logits, {layer: projector(features[layer]) for layer, projector in projectors.items()}


def _logits_and_features(network: nn.Module, images: Tensor) -> Output:
    """Run the forward of a ResNet and keep the output of each stage."""
    assert isinstance(network, ResNet)
    hidden, features = network.maxpool(network.relu(network.bn1(network.conv1(images)))), {}
    for layer in LAYERS:
        hidden = features[layer] = getattr(network, layer)(hidden)
    return network.fc(torch.flatten(network.avgpool(hidden), 1)), features
