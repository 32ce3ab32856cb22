"""What suites time: trainings of this program on random images, and a live teacher (caches.py: a real cache of what it says).

The networks are those of the reference job: ResNet-50 teaches ResNet-18, both with the ImageNet stem and 10 classes, on 32x32
images in batches of 128; features meet in the student's 64, 128, 256 and 512 channels (direction `both` unless
said: frozen projectors on the teacher's side, learned ones on the student's). Weights and images are random, since nothing
here depends on what they show. Everything is built once, by `open_bench`, and shared by the cases of a suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from kd_accel.cache.spec import Split
from kd_accel.commands.schedule import build_schedule
from kd_accel.config.schema import (
    CheckpointConfig,
    DataConfig,
    Direction,
    DistillConfig,
    FeatureConfig,
    OptimConfig,
    Precision,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from kd_accel.data.loader import TrainLoader, load_batches
from kd_accel.data.sources import MemoryImages
from kd_accel.data.transforms import ViewTransform
from kd_accel.distributed import Accelerator, start_processes
from kd_accel.models.cpu_kernels import use_cpu_kernels
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import compile_with_hooks
from kd_accel.models.fusion import fuse_conv_bn
from kd_accel.models.kernels import choose_kernels
from kd_accel.models.memory_format import image_memory_format, weight_memory_format
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import FeatureProjector, build_projectors
from kd_accel.models.student import StudentModule
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.training.average import MovingAverage
from kd_accel.training.checkpoint import CheckpointWriter
from kd_accel.training.job import Job
from kd_accel.training.metrics import Meters
from kd_accel.training.metrics_log import MetricsLog
from kd_accel.training.nonfinite import NonFiniteGuard
from kd_accel.training.optim import build_optimizer
from kd_accel.training.preemption import PreemptionHandler
from kd_accel.training.profile import StepProfiler
from kd_accel.training.progress import Progress
from kd_accel.training.state import TrainState
from kd_accel.training.trainer import train_epoch
from kd_accel.types import Batch, TeacherSource, no_teacher

CLASSES = 10
IMAGE_SIZE = 32
OPTIM = OptimConfig(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
MEAN, STD = [0.5] * 3, [0.25] * 3
VIEWS = ViewTransform("crop_flip", IMAGE_SIZE)
STUDENT = {"layer1": (64, 8, 8), "layer2": (128, 4, 4), "layer3": (256, 2, 2), "layer4": (512, 1, 1)}
TEACHER = {"layer1": (256, 8, 8), "layer2": (512, 4, 4), "layer3": (1024, 2, 2), "layer4": (2048, 1, 1)}
LAYERS = {layer: layer for layer in STUDENT}
Features = Literal["none", "raw", "projected"]
"""Of the teacher: as they come, or through the frozen projectors to the student's channels."""


@dataclass(frozen=True)
class Size:
    """What one block does: `steps` batches of `batch_size` samples."""

    batch_size: int
    steps: int

    @property
    def samples(self) -> int:
        return self.batch_size * self.steps


@dataclass(frozen=True)
class Bench:
    """What the cases of a suite share.

    images: as many as a block has samples. forms: the device for which layouts and forms of layers are chosen; None = `device`.
    """

    accelerator: Accelerator
    size: Size
    images: MemoryImages
    forms: torch.device | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def form_device(self) -> torch.device:
        return self.forms or self.device

    @property
    def samples(self) -> np.ndarray:
        return np.arange(self.size.samples)

    def batches(self, split: Split, shares: Sequence[tuple[np.ndarray, int]]) -> Iterator[Batch]:
        """Views of these samples on the device, as a build of a cache loads them."""
        batches = load_batches(self.images, VIEWS, shares, pin_memory=self.device.type == "cuda")
        return (batch.to(self.device, non_blocking=True) for batch in batches)


def open_bench(
    size: Size,
    *,
    precision: Precision = "no",
    deterministic: bool = False,
    tf32: bool = True,
    forms: torch.device | None = None,
) -> Bench:
    choose_kernels(deterministic=deterministic, tf32=tf32)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (size.samples, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, size.samples)
    images = MemoryImages(pixels, labels, [str(label) for label in range(CLASSES)])
    return Bench(start_processes(precision), size, images, forms)


def epochs_of(job: Job) -> Callable[[], float]:
    """A case: each call is an epoch of the program's own loop, with the next view. Returns the number of images."""

    def block() -> float:
        position = job.train_state.position
        train_epoch(job)
        position.epoch, position.step_in_epoch = position.epoch + 1, 0
        return job.schedule.steps_per_epoch * job.train.batch_size

    return block


def training_config(size: Size, *, epochs: int, views: int | None = None, distill: DistillConfig | None = None) -> RunConfig:
    """Without checkpoints and evaluation. distill: None = plain training."""
    return RunConfig(
        data=DataConfig(augment="crop_flip", val_fraction=0.0, views=views),
        teacher=TeacherConfig(run="teacher") if distill else None,
        distill=distill,
        optim=OPTIM,
        train=TrainConfig(epochs=epochs, batch_size=size.batch_size),
        checkpoint=CheckpointConfig(every_epochs=None),
    )


def build_job(
    bench: Bench, config: RunConfig, directory: Path, *, teacher: TeacherSource = no_teacher, keeps_images_on_host: bool = False
) -> Job:
    """directory: for the lines of metrics; must be there. signals: whoever teaches where the config says how to listen.

    keeps_images_on_host: even where there is a GPU; views are then made on the host, as for sets that are too large.
    """
    memory_format = weight_memory_format(config.train.channels_last, bench.form_device)
    module = _student_module(config, bench).to(bench.device).to(memory_format=memory_format)
    average = None if config.train.ema_decay is None else MovingAverage(module.student, decay=config.train.ema_decay)
    module.start_recording()
    if config.train.compile:
        compile_with_hooks(module.student)
    module, optimizer = bench.accelerator.prepare(module, build_optimizer(module.parameters(), config.optim))
    loader = _loader(bench, config, keeps_images_on_host=keeps_images_on_host)
    schedule = build_schedule(config, steps_per_epoch=loader.steps_per_epoch)
    progress = Progress("benchmark", total_steps=schedule.total_steps, done_steps=0, is_main=False)
    return Job(
        accelerator=bench.accelerator,
        train=config.train,
        checkpoint=config.checkpoint,
        train_state=TrainState(module, optimizer, Meters(bench.device), average),
        guard=NonFiniteGuard(bench.accelerator, module, optimizer),
        loader=loader,
        teacher=teacher,
        schedule=schedule,
        metrics_log=MetricsLog(directory / "metrics.jsonl", is_main=bench.accelerator.is_main_process),
        progress=progress,
        profiler=StepProfiler(directory, steps=None, rank=0, say=progress.say),
        preemption=PreemptionHandler(bench.accelerator),
        writer=CheckpointWriter(),
        checkpoint_dir=directory / "checkpoints",
        checkpoint_extra={},
        checkpoint_tensors={},
    )


def hybrid(direction: Direction = "both") -> DistillConfig:
    """Response and feature term; frozen projectors on the teacher's side where the direction has any."""
    return DistillConfig(feature=FeatureConfig(direction=direction))


def normalization(device: torch.device, *, forms: torch.device | None = None) -> Normalize:
    """In the layout that a training gives its maps there. forms: here and below as in `Bench`."""
    return Normalize(MEAN, STD, memory_format=image_memory_format(None, forms or device)).to(device)


def build_student(device: torch.device, *, forms: torch.device | None = None) -> nn.Module:
    """As a training has it, its layers in the forms that are fast on a CPU."""
    model = build_model("torchvision/resnet18", num_classes=CLASSES)
    use_cpu_kernels(model, forms or device)
    return model.to(device)


def build_teacher() -> nn.Module:
    """Its blocks begin as the identity, so that random weights give numbers of an ordinary size. On the CPU."""
    model = build_model("torchvision/resnet50", num_classes=CLASSES, arch_args={"zero_init_residual": True})
    return model.eval().requires_grad_(False)


def fused_teacher(device: torch.device, *, forms: torch.device | None = None) -> nn.Module:
    """The same network as a training has it answer: BatchNorm in the convolutions, forms that are fast on a CPU."""
    model = fuse_conv_bn(
        build_teacher(), layers=LAYERS, image_size=IMAGE_SIZE
    )  # on the CPU: in TF32 both would differ beyond rounding
    assert model is not None
    use_cpu_kernels(model, forms or device)
    return model.to(device).to(memory_format=image_memory_format(None, forms or device))


def frozen_projectors(device: torch.device) -> dict[str, FeatureProjector]:
    """In place of a PCA, whose directions make no difference to the time."""
    widths = {layer: (TEACHER[layer][0], STUDENT[layer][0]) for layer in LAYERS}
    projectors = {layer: FeatureProjector(teacher, student) for layer, (teacher, student) in widths.items()}
    return {layer: projector.to(device).requires_grad_(False) for layer, projector in projectors.items()}


def live_teacher(bench: Bench, features: Features = "projected") -> LiveTeacher:
    """Answers with logits and such features, in the precision of the bench; its recorder is open."""
    normalize, layers = normalization(bench.device, forms=bench.forms), {} if features == "none" else LAYERS
    projectors = frozen_projectors(bench.device) if features == "projected" else {}
    model = fused_teacher(bench.device, forms=bench.forms)
    return LiveTeacher(model, normalize, layers=layers, projectors=projectors, autocast=bench.accelerator.autocast)


def _student_module(config: RunConfig, bench: Bench) -> StudentModule:
    normalize = normalization(bench.device, forms=bench.forms)
    student = build_student(bench.device, forms=bench.forms)
    if config.distill is None or config.distill.feature is None:
        return StudentModule(student, normalize)
    projectors = build_projectors(STUDENT, TEACHER, direction=config.distill.feature.direction)
    return StudentModule(student, normalize, layers=list(LAYERS), student_projectors=projectors.student)


def _loader(bench: Bench, config: RunConfig, *, keeps_images_on_host: bool) -> TrainLoader:
    """On a GPU the images lie there, as in a training."""
    stored = None
    if bench.form_device.type == "cuda" and not keeps_images_on_host:
        stored = torch.from_numpy(bench.images.pixels(bench.samples)).permute(0, 3, 1, 2)
        stored = stored.to(bench.device, memory_format=torch.channels_last, copy=True)
    loader = TrainLoader(
        bench.images,
        VIEWS,
        samples=bench.samples,
        batch_size=config.train.batch_size,
        rank=bench.accelerator.process_index,
        world_size=bench.accelerator.num_processes,
        views=config.data.views,
        pin_memory=bench.device.type == "cuda",
    )
    if stored is not None:
        loader.keep_images(stored)
    return loader
