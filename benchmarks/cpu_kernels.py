"""Speed of the same network with different kernels and memory formats: `python -m benchmarks.cpu_kernels`.

A training step of the student (forward, cross-entropy, backward, fused SGD) and a forward of the teacher, on tensors in memory:
    student, teacher        the defaults of a training on this machine: memory format, CPU kernels, BatchNorm fused
    ..._torch               contiguous, with the kernels of torch
    ..._channels_last       channels_last, with the kernels of torch
    student_compiled        `student` with torch.compile; omitted without a compiler
    teacher_apart           `teacher_torch` without fusion of BatchNorm
The result is images/s; the cases take turns. Some ratios are reversed for other networks and larger images: see `--teacher`,
`--student` and `--image_size`, with fewer images in a batch. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Result, benchmark_parser, finish, has_compiler, measure_in_turns
from benchmarks.jobs import CLASSES, IMAGE_SIZE, SGD
from kd_accel.models.factory import build_model
from kd_accel.models.inference import CpuKernels, fuse_conv_bn, image_memory_format, use_cpu_kernels, weight_memory_format

RATIOS = [
    ("student", "student_torch"),
    ("student_channels_last", "student_torch"),
    ("student_compiled", "student"),
    ("teacher", "teacher_torch"),
    ("teacher_channels_last", "teacher_torch"),
    ("teacher_torch", "teacher_apart"),
]


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=15, steps=2)
    parser.add_argument("--student", default="torchvision/resnet18", help="architecture of the student")
    parser.add_argument("--teacher", default="torchvision/resnet50", help="architecture of the teacher")
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE, help="height and width of the images in pixels")
    parser.add_argument("--cases", nargs="+", help="cases to measure (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=device)
    student, teacher = (build_model(arch, num_classes=CLASSES) for arch in (arguments.student, arguments.teacher))
    cases = {**student_cases(student.to(device), images), **teacher_cases(teacher.eval(), images)}
    repeated = {
        name: _repeated(case, images, arguments.steps) for name, case in cases.items() if name in (arguments.cases or cases)
    }
    rates = measure_in_turns(repeated, repeats=arguments.repeats, warm_up=2)
    notes = {name: getattr(arguments, name) for name in ("student", "teacher", "image_size", "batch_size")}
    result = Result.of_repeats("cpu-kernels", rates, notes=notes)
    for numerator, denominator in RATIOS:
        if numerator in rates and denominator in rates:
            result.add_ratio(numerator, denominator)
    finish(result)


def student_cases(model: nn.Module, images: Tensor) -> dict[str, Callable[[], object]]:
    """Return the student's cases, each a training step.

    Args:
        model: Network on the device of the images.
        images: Normalized float images [B, 3, H, W].
    """
    device, labels = images.device, torch.randint(0, CLASSES, (len(images),), device=images.device)

    def case(*, channels_last: bool | None, cpu_kernels: CpuKernels, compiles: bool = False) -> Callable[[], object]:
        network = copy.deepcopy(model).to(memory_format=weight_memory_format(channels_last, device)).train()
        inputs = images.contiguous(memory_format=image_memory_format(channels_last, device))
        use_cpu_kernels(network, device, cpu_kernels)
        optimizer = torch.optim.SGD(network.parameters(), **SGD, fused=True)
        if compiles:
            network.compile()

        def step() -> None:
            functional.cross_entropy(network(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    cases = {
        "student": case(channels_last=None, cpu_kernels="auto"),
        "student_torch": case(channels_last=False, cpu_kernels="never"),
        "student_channels_last": case(channels_last=True, cpu_kernels="never"),
    }
    if has_compiler():
        cases["student_compiled"] = case(channels_last=None, cpu_kernels="auto", compiles=True)
    return cases


def teacher_cases(model: nn.Module, images: Tensor) -> dict[str, Callable[[], object]]:
    """Return the teacher's cases, each a forward.

    Args:
        model: Network on the CPU, where BatchNorm is fused without TF32.
        images: Normalized float images [B, 3, H, W].
    """
    device, fused = images.device, fuse_conv_bn(model, layers=[], image_size=images.shape[-1])

    def case(source: nn.Module, *, channels_last: bool | None, cpu_kernels: CpuKernels = "never") -> Callable[[], object]:
        network = copy.deepcopy(source).to(device).to(memory_format=image_memory_format(channels_last, device))
        inputs = images.contiguous(memory_format=image_memory_format(channels_last, device))
        use_cpu_kernels(network, device, cpu_kernels)
        return torch.no_grad()(lambda: network(inputs))

    default = model if fused is None else fused
    cases = {
        "teacher": case(default, channels_last=None, cpu_kernels="auto"),
        "teacher_torch": case(default, channels_last=False),
        "teacher_channels_last": case(default, channels_last=True),
    }
    return cases if fused is None else {**cases, "teacher_apart": case(model, channels_last=False)}


def _repeated(case: Callable[[], object], images: Tensor, steps: int) -> Callable[[], float]:
    def block() -> float:
        for _ in range(steps):
            case()
        return steps * len(images)

    return block


if __name__ == "__main__":
    main()
