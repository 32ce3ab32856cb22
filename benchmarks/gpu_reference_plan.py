"""Trainings of gpu_reference: their settings, and the number of epochs that fit into the time budget.

Part `reference` takes its settings from configs/cifar10, which has the exact values of the reference job. Part `pair` is a
recipe for a GPU: bf16, batch 512, and a stem after which a 32x32 image has 4 times (`no_pool`) or 16 times (`cifar`) as many
pixels.

`no_pool` is the default because of an estimate for ResNet-50 at batch 512 on an H100. Kernel launches take about 5 ms of a
step; arithmetic and memory traffic take 8 ms with `no_pool` and four times as much with `cifar`. Thirty epochs of 87 steps then
take 25 s or 90 s. The `cifar` stem leaves too little of four minutes, because five commands in sequence take about 20 s each to
start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent
_CONFIGS = ROOT / "configs" / "cifar10"

Flags = Mapping[str, Any]
Stem = Literal["no_pool", "cifar"]

_CACHED_COST = 1.5
"""Estimated time of a step with cached features, in plain steps: 1.4 times as many operators, and the reading."""
_CONCURRENT_COST = 0.5
"""Estimated share of its own time by which a training delays a concurrent one: launches overlap on a GPU, kernels do not."""
_CACHED_S_PER_BYTE = 4.3e-9
"""Time of the host in `cache build`: 15,000 samples and views of 15,380 bytes per second."""
_SLACK = 1.1
"""Safety factor on estimated times."""
_LEAST_EPOCHS_OF_ALL_SEEDS = 10


@dataclass(frozen=True)
class Row:
    """Training that is a row of the table.

    Args:
        name: Name of the training and of its run directory.
        flags: Settings in addition to those that all trainings of the part share.
        seed: Seed of the training.
    """

    name: str
    flags: Flags
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """Trainings of one part.

    Args:
        name: `pair` or `reference`.
        epochs: Epochs of every training.
        shared: Settings of all trainings.
        teacher: Teacher of all distilled rows.
        students: Students trained on labels alone; the first one is stopped and resumed.
        distilled: Students trained with the cached outputs of the teacher.
        precision: Precision of the trainings and of the latencies.
        batch_size: Batch size of the trainings.
        views: Views of each sample for the students; the teacher is trained on a new view in every epoch.
        sample_bytes: Bytes of one sample and view in the cache.
        timed_steps: Steps of the timed trainings, one cached and one live.
        reserves_timed: Whether time is reserved for the timed trainings, at the cost of epochs.
    """

    name: str
    epochs: int
    shared: Flags
    teacher: Row
    students: tuple[Row, ...]
    distilled: tuple[Row, ...]
    precision: str
    batch_size: int
    views: int
    sample_bytes: int
    timed_steps: int
    reserves_timed: bool

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return all trainings in the order of the table."""
        return (self.teacher, *self.students, *self.distilled)

    def of_first_seed(self) -> Part:
        """Return the part with the students of the first seed alone."""
        first = self.students[0].seed
        students, distilled = (tuple(row for row in rows if row.seed == first) for rows in (self.students, self.distilled))
        return replace(self, students=students, distilled=distilled)


@dataclass(frozen=True)
class FirstRates:
    """Times of the first steps of teacher and student, which run concurrently.

    Args:
        startup_s: Time from the start of the teacher's command to its first step.
        trained_s: Time from the teacher's first step until now.
        steps_per_epoch: Steps in an epoch of every training.
        teacher_step_s: Time of a step of the teacher.
        student_step_s: Time of a step of the plain student.
    """

    startup_s: float
    trained_s: float
    steps_per_epoch: int
    teacher_step_s: float
    student_step_s: float


@dataclass(frozen=True)
class Choice:
    """Part with the epochs and seeds that fit into the budget.

    Args:
        part: The part with these epochs and seeds.
        restarts: Whether the running trainings must be started again, with fewer epochs.
    """

    part: Part
    restarts: bool


def choose(part: Part, rates: FirstRates, *, left_s: float) -> Choice:
    """Choose epochs and seeds from the first rates.

    In this order of preference:

    1. All epochs of all seeds.
    2. All epochs of the first seed.
    3. Ten epochs or more of all seeds; teacher and student are restarted.
    4. One epoch or more of the first seed; teacher and student are restarted.

    Args:
        part: The planned part.
        rates: First rates of teacher and student.
        left_s: Time for everything except bench and report, in seconds.
    """
    first = part.of_first_seed()
    for candidate in (part, first):
        if fitting_epochs(candidate, rates, left_s=left_s + rates.trained_s) >= part.epochs:
            return Choice(candidate, restarts=False)
    left_s -= rates.startup_s
    epochs = min(part.epochs, fitting_epochs(part, rates, left_s=left_s))
    if epochs >= _LEAST_EPOCHS_OF_ALL_SEEDS:
        return Choice(replace(part, epochs=epochs), restarts=True)
    epochs = min(part.epochs, fitting_epochs(first, rates, left_s=left_s))
    return Choice(replace(first, epochs=max(1, epochs)), restarts=True)


def fitting_epochs(part: Part, rates: FirstRates, *, left_s: float) -> int:
    """Return the number of epochs that fit into the time; 0 or less if the time does not suffice for one."""
    fixed_s = 2 * rates.startup_s + _build_s(part, rates)
    if part.reserves_timed:
        fixed_s += 2 * rates.startup_s + part.timed_steps * (rates.teacher_step_s + 2 * rates.student_step_s)
    teacher_s = _SLACK * rates.steps_per_epoch * rates.teacher_step_s
    during_build_s = _CONCURRENT_COST * epoch_s(rates, plain=len(part.students) - 1)
    return int((left_s - fixed_s) / (teacher_s + during_build_s + epoch_s(rates, distilled=len(part.distilled))))


def epoch_s(rates: FirstRates, *, plain: int = 0, distilled: int = 0) -> float:
    """Estimate the time of an epoch of concurrent students, in seconds."""
    costs = [1.0] * plain + [_CACHED_COST] * distilled
    longest = max(costs, default=0.0)
    return _SLACK * rates.steps_per_epoch * rates.student_step_s * (longest + _CONCURRENT_COST * (sum(costs) - longest))


def _build_s(part: Part, rates: FirstRates) -> float:
    """Estimate the time of `cache build` without its start, in seconds."""
    # The held-out samples count as one more view. A forward takes a third of a training step.
    samples = (part.views + 1) * rates.steps_per_epoch * part.batch_size
    return samples * (rates.teacher_step_s / (3 * part.batch_size) + _CACHED_S_PER_BYTE * part.sample_bytes)


def pair(stem: Stem, seeds: Sequence[int]) -> Part:
    """Return part `pair`, ResNet-50 to ResNet-18, with the feature of layer4 alone, which suffices by docs/experiments.md."""
    data = {"data.transform": "crop_flip", "data.mean": [0.4914, 0.4822, 0.4465], "data.std": [0.2470, 0.2435, 0.2616]}
    teacher = {"role": "teacher", "model.arch": "torchvision/resnet50", "model.arch_args": {"zero_init_residual": True}}
    student = {"model.arch": "torchvision/resnet18"}
    features = {"mse": {"weight": 0.1, "layers": ["layer4"], "args": {"direction": "both"}}}
    distill = {"temperature": 4.0, "alpha": 0.9, "features": features}
    optim = {"optim.lr": 0.2, "optim.nesterov": True, "train.batch_size": 512, "train.precision": "bf16"}
    pixels = {"no_pool": 4, "cifar": 16}[stem]
    return Part(
        name="pair",
        epochs=30,
        shared={**data, **optim, "model.stem": stem},
        teacher=Row("teacher", teacher),
        students=tuple(Row(f"plain-{seed}", student, seed) for seed in seeds),
        distilled=tuple(Row(f"distilled-{seed}", {**student, "distill": distill}, seed) for seed in seeds),
        precision="bf16",
        batch_size=512,
        views=8,
        sample_bytes=2 * 10 + 2 * 512 * pixels,
        timed_steps=160,
        reserves_timed=True,
    )


def reference() -> Part:
    """Return part `reference`, the four rows of the reference job.

    The teacher is trained from random weights, because the weights of ImageNet would have to be downloaded.
    """
    teacher, student, fixed, scheduled = (
        Row(name, {"config": str(_CONFIGS / f"{file}.yaml")})
        for name, file in (
            ("teacher", "teacher_scratch"),
            ("student", "student"),
            ("hybrid-fixed", "hybrid_fixed"),
            ("hybrid-scheduled", "hybrid_scheduled"),
        )
    )
    return Part(
        name="reference",
        epochs=30,
        shared={},
        teacher=teacher,
        students=(student,),
        distilled=(fixed, scheduled),
        precision="float32",
        batch_size=128,
        views=10,
        sample_bytes=15_380,
        timed_steps=400,
        reserves_timed=False,
    )


def scaled_down(part: Part) -> Part:
    """Return the part with small settings for a CPU: ResNet-18 as teacher and student, two epochs, two views, one layer."""
    small = {"train.batch_size": 4, "train.log_every_steps": 1, "train.precision": "float32"}
    # Two epochs of a few images leave the teacher at chance.
    layers = {
        "distill.features.mse.layers": ["layer1"],
        "distill.features.mse.args.pca_images": 16,
        "teacher.min_accuracy": None,
    }
    return replace(
        part,
        epochs=2,
        shared={**part.shared, **small},
        teacher=replace(part.teacher, flags={**part.teacher.flags, "model.arch": "torchvision/resnet18"}),
        distilled=tuple(replace(row, flags={**row.flags, **layers}) for row in part.distilled),
        precision="float32",
        batch_size=4,
        views=2,
        timed_steps=5,
    )


def as_arguments(flags: Flags) -> list[str]:
    """Return flags as command-line arguments, the config file first, because later arguments override earlier ones."""
    ordered = sorted(flags.items(), key=lambda item: item[0] != "config")
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in ordered]
