"""Trainings on random images for the benchmarks, built by the builders of kd_accel from a RunConfig in memory.

The networks are those of the reference job: a ResNet-50 teacher and a ResNet-18 student, both with the ImageNet stem and 10
classes, on 32x32 images in batches of 128. Features are compared in the student's 64, 128, 256 and 512 channels, with direction
`both` unless a case names another one.

Weights and images are random, because the measured times do not depend on their values. For the same reason frozen random
projectors replace the fitted PCA. `open_bench` makes the parts that all cases of a benchmark share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_accel.builders.student import build_distiller, build_losses, build_student
from kd_accel.builders.teacher import TeacherSetup, build_targets, layer_shapes, live_teacher, teacher_on_device
from kd_accel.builders.trainer import build_schedule, build_train_loader, build_train_state, build_trainer
from kd_accel.config.schema import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    FeatureLossConfig,
    OptimConfig,
    Precision,
    RunConfig,
    TeacherConfig,
)
from kd_accel.data.datamodule import DataModule, images_on
from kd_accel.data.dataset import MemoryImages
from kd_accel.data.decode import Decoder
from kd_accel.data.splits import Split, SplitSamples
from kd_accel.data.transforms import CropFlip
from kd_accel.distributed import Accelerator, start_processes
from kd_accel.losses.features import Direction
from kd_accel.losses.targets import PCA
from kd_accel.models.factory import build_model
from kd_accel.models.inference import choose_kernels
from kd_accel.models.projectors import seeded_projector
from kd_accel.teacher.teacher import Teacher
from kd_accel.training.progress import Progress
from kd_accel.training.trainer import Trainer
from kd_accel.types import Batch, no_teacher

CLASSES = 10
IMAGE_SIZE = 32
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
"""Arguments of torch.optim.SGD."""
MEAN, STD = [0.5] * 3, [0.25] * 3
VIEWS = CropFlip(IMAGE_SIZE)
STUDENT = {"layer1": (64, 8, 8), "layer2": (128, 4, 4), "layer3": (256, 2, 2), "layer4": (512, 1, 1)}
"""{layer: shape of its output (D, H, W)} of the student."""
TEACHER = {"layer1": (256, 8, 8), "layer2": (512, 4, 4), "layer3": (1024, 2, 2), "layer4": (2048, 1, 1)}
"""{layer: shape of its output (D, H, W)} of the teacher."""
LAYERS = list(STUDENT)
PLAIN = RunConfig(
    data=DataConfig(transform="crop_flip", val_fraction=0.0),
    optim=OptimConfig(**SGD),
    checkpoint=CheckpointConfig(every_epochs=None),
)
"""Training on labels alone, without checkpoints and evaluation."""


@dataclass(frozen=True)
class Size:
    """Size of a block: `steps` batches of `batch_size` samples, over all processes."""

    batch_size: int
    steps: int

    @property
    def samples(self) -> int:
        """Return the number of samples in a block."""
        return self.batch_size * self.steps


@dataclass(frozen=True)
class Bench:
    """Processes, precision and images that all cases of a benchmark share.

    Args:
        accelerator: The launch's `Accelerator`.
        size: Size of a block.
        images: As many images as a block has samples.
        precision: Precision of all trainings.
        as_gpu: Whether a CPU takes the code paths of a GPU: memory formats, kernels, images stored on the device.
    """

    accelerator: Accelerator
    size: Size
    images: MemoryImages
    precision: Precision
    as_gpu: bool = False

    @property
    def device(self) -> torch.device:
        """Return the device of this process."""
        return self.accelerator.device

    @property
    def kernel_device(self) -> torch.device:
        """Return the device for which memory formats and kernels are chosen."""
        return torch.device("cuda") if self.as_gpu else self.device

    @property
    def samples(self) -> np.ndarray:
        """Return the indices of all samples, int64 [N]."""
        return np.arange(self.size.samples)

    def data(self, num_views: int | None = None) -> DataModule:
        """Return the images as a training split without held-out samples."""
        splits = SplitSamples(self.samples, self.samples[:0], self.samples[:0])
        decoder = Decoder(VIEWS.image_size)
        return DataModule(self.images, self.images, self.images, splits, MEAN, STD, VIEWS, num_views, decoder=decoder)

    def batches(self, split: Split, shares: Sequence[tuple[np.ndarray, int]]) -> Iterator[Batch]:
        """Yield a batch on the device for each (indices, view) of `shares`, as `cache build` does."""
        batches = self.data().batches(split, shares, pin_memory=self.device.type == "cuda")
        return (batch.to(self.device, non_blocking=True) for batch in batches)

    def adapted(self, config: RunConfig) -> RunConfig:
        """Return the config with the batch size and precision of the bench, and with a GPU's settings if `as_gpu` is set."""
        gpu_settings = {"channels_last": True, "cpu_kernels": "never"} if self.as_gpu else {}
        return with_settings(config, train={"batch_size": self.size.batch_size, "precision": self.precision, **gpu_settings})


def open_bench(
    size: Size, *, precision: Precision = "float32", deterministic: bool = False, tf32: bool = True, as_gpu: bool = False
) -> Bench:
    """Join the processes of the launch, choose the kernels, and make random images."""
    choose_kernels(deterministic=deterministic, tf32=tf32)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (size.samples, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, size.samples)
    images = MemoryImages(pixels, labels, [str(label) for label in range(CLASSES)])
    return Bench(start_processes(precision), size, images, precision, as_gpu)


def with_settings(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    """Return the config with some settings of its sections replaced, for example `train={"epochs": 3}`."""
    updated = {name: getattr(config, name).model_copy(update=dict(settings)) for name, settings in sections.items()}
    return config.model_copy(update=updated)


def distilled(distill: DistillConfig) -> RunConfig:
    """Return the config of a distillation from a live teacher."""
    return PLAIN.model_copy(update={"teacher": TeacherConfig(run="teacher"), "distill": distill})


def hybrid(direction: Direction = "both") -> RunConfig:
    """Return the config of a distillation on logits and features from a live teacher."""
    return distilled(DistillConfig(features={"mse": FeatureLossConfig(args={"direction": direction})}))


def build_training(
    bench: Bench,
    config: RunConfig,
    directory: Path,
    *,
    teacher: TeacherSetup | None = None,
    keeps_images_on_host: bool = False,
) -> Trainer:
    """Build a trainer at its first step.

    Args:
        bench: Processes, precision and images.
        config: Config of the training; batch size and precision are replaced by those of the bench.
        directory: Run directory, created if it does not exist; receives metrics.jsonl.
        teacher: Teacher of a distillation; None for a training on labels alone.
        keeps_images_on_host: Whether images stay in host memory even with a GPU. Views are then made on the host, as for data
            sets that do not fit on the GPU.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = bench.adapted(config).model_copy(update={"run_dir": str(directory)})
    data, losses = bench.data(config.data.views), build_losses(config)
    network, _ = build_student(config, data)
    shapes = teacher.target_shapes if teacher else {}
    distiller = build_distiller(config, data, network, losses, shapes, bench.device)
    distiller.start_recording()
    train_state = build_train_state(config, distiller, bench.accelerator)
    if bench.as_gpu:
        # On a CPU `build_train_state` leaves weights contiguous, regardless of the config.
        for module in filter(None, (train_state.module, train_state.average)):
            module.to(memory_format=torch.channels_last)
    loader = build_train_loader(config, data, bench.accelerator)
    if bench.kernel_device.type == "cuda" and not keeps_images_on_host:
        loader.keep_images(images_on(bench.device, data))
    schedule = build_schedule(config, steps_per_epoch=loader.steps_per_epoch)
    source = teacher.source if teacher else no_teacher
    trainer = build_trainer(config, train_state, loader, source, schedule, bench.accelerator)
    trainer.progress = Progress(config.name, total_steps=schedule.total_steps, done_steps=0, is_main=False)
    return trainer


def epochs_of(trainer: Trainer) -> Callable[[], float]:
    """Return a case: each call runs the next epoch of the training and returns the number of images."""

    def block() -> float:
        position = trainer.train_state.position
        trainer.fit_epoch()
        position.epoch, position.step_in_epoch = position.epoch + 1, 0
        return trainer.schedule.steps_per_epoch * trainer.settings.batch_size

    return block


def build_live_teacher(bench: Bench, config: RunConfig) -> TeacherSetup:
    """Build the live teacher of a config, with random projectors in place of fitted ones."""
    config = bench.adapted(config)
    losses, teacher = build_losses(config), random_teacher()
    student, _ = build_student(config, bench.data())
    targets = build_targets(config, losses, student, teacher)
    for layer, target in targets.items():
        if isinstance(target, PCA):
            # Seeded, so that all ranks have the same projector.
            projector = seeded_projector(TEACHER[layer][0], target.channels, layer=layer, seed=0)
            target.load(projector.state_dict())
        target.to(bench.device)
    raw_shapes = layer_shapes(config, losses, teacher)
    network, normalize = teacher_on_device(config, teacher, bench.accelerator, list(targets))
    live = live_teacher(config, network, normalize, targets, bench.accelerator)
    shapes = {layer: target.output_shape(raw_shapes[layer]) for layer, target in targets.items()}
    return TeacherSetup(live, lambda split: live, "random", shapes, live=live, targets=targets)


def random_teacher() -> Teacher:
    """Build a teacher with random weights, whose residual blocks are initialized to the identity to keep outputs in range."""
    arch, arch_args = "torchvision/resnet50", {"zero_init_residual": True}
    return Teacher(build_model(arch, num_classes=CLASSES, arch_args=arch_args), MEAN, STD, arch=arch, arch_args=arch_args)
