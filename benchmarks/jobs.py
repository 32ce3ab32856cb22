"""Trainings on random images for the suites, built by the package's own builders from a RunConfig in memory.

The networks are those of the reference job: ResNet-50 teaches ResNet-18, both with the ImageNet stem and 10 classes, on 32x32
images in batches of 128. Features are compared in the student's 64, 128, 256 and 512 channels, with direction `both` unless
another is named. Weights and images are random, since no figure here depends on what they show. Frozen random projectors stand
in for the PCA, whose directions make no difference to the time. `open_bench` builds what the cases of a suite share.
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
from kd_accel.data.splits import Split, SplitSamples
from kd_accel.data.transforms import ViewTransform
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
OPTIM = OptimConfig(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
MEAN, STD = [0.5] * 3, [0.25] * 3
VIEWS = ViewTransform("crop_flip", IMAGE_SIZE)
STUDENT = {"layer1": (64, 8, 8), "layer2": (128, 4, 4), "layer3": (256, 2, 2), "layer4": (512, 1, 1)}
TEACHER = {"layer1": (256, 8, 8), "layer2": (512, 4, 4), "layer3": (1024, 2, 2), "layer4": (2048, 1, 1)}
LAYERS = list(STUDENT)
PLAIN = RunConfig(
    data=DataConfig(augment="crop_flip", val_fraction=0.0), optim=OPTIM, checkpoint=CheckpointConfig(every_epochs=None)
)
"""Plain training, without checkpoints and evaluation."""


@dataclass(frozen=True)
class Size:
    """Work of one block: `steps` batches of `batch_size` samples."""

    batch_size: int
    steps: int

    @property
    def samples(self) -> int:
        """Number of samples in a block."""
        return self.batch_size * self.steps


@dataclass(frozen=True)
class Bench:
    """Processes, precision and images that the cases of a suite share.

    Args:
        accelerator: of the launch.
        size: of a block.
        images: as many as a block has samples.
        precision: of all trainings.
        as_gpu: whether a CPU takes the code paths of a GPU: memory formats, kernels, images stored on the device.
    """

    accelerator: Accelerator
    size: Size
    images: MemoryImages
    precision: Precision
    as_gpu: bool = False

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    @property
    def kernel_device(self) -> torch.device:
        """Device for which memory formats and kernels are chosen."""
        return torch.device("cuda") if self.as_gpu else self.device

    @property
    def samples(self) -> np.ndarray:
        """Indices of all samples."""
        return np.arange(self.size.samples)

    def data(self, num_views: int | None = None) -> DataModule:
        """Return the images as a training split without held-out samples."""
        splits = SplitSamples(self.samples, self.samples[:0], self.samples[:0])
        return DataModule(self.images, self.images, splits, MEAN, STD, VIEWS, num_views)

    def batches(self, split: Split, shares: Sequence[tuple[np.ndarray, int]]) -> Iterator[Batch]:
        """Yield a batch on the device for each (indices, view), as a build of a cache loads them."""
        batches = self.data().batches(split, shares, pin_memory=self.device.type == "cuda")
        return (batch.to(self.device, non_blocking=True) for batch in batches)

    def adapted(self, config: RunConfig) -> RunConfig:
        """Return the config with batch size and precision of the bench, and with a GPU's choices if `as_gpu` is set."""
        of_gpu = {"channels_last": True, "cpu_kernels": "never"} if self.as_gpu else {}
        return with_settings(config, train={"batch_size": self.size.batch_size, "precision": self.precision, **of_gpu})


def open_bench(
    size: Size, *, precision: Precision = "float32", deterministic: bool = False, tf32: bool = True, as_gpu: bool = False
) -> Bench:
    """Join the launched processes, choose the kernels, and make random images."""
    choose_kernels(deterministic=deterministic, tf32=tf32)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (size.samples, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, size.samples)
    images = MemoryImages(pixels, labels, [str(label) for label in range(CLASSES)])
    return Bench(start_processes(precision), size, images, precision, as_gpu)


def with_settings(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    """Return the config with some settings of its sections replaced, as `train={"epochs": 3}`."""
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
    """Build a training at its first step.

    Args:
        bench: adapts the config.
        config: of the training.
        directory: made, for the lines of metrics.
        teacher: where the config has a teacher.
        keeps_images_on_host: even with a GPU; views are then made on the host, as for sets that are too large.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = bench.adapted(config).model_copy(update={"run_dir": str(directory)})
    data, losses = bench.data(config.data.views), build_losses(config)
    network, _ = build_student(config, data)
    shapes = teacher.target_shapes if teacher else {}
    distiller = build_distiller(config, data, network, losses, shapes, bench.device)
    distiller.start_recording()
    train_state = build_train_state(config, distiller, bench.accelerator)
    if bench.as_gpu:  # a CPU's weights stay contiguous for any config
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
    """Return a case: each call runs an epoch of the training with the next view, and returns the number of images."""

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
            projector = seeded_projector(TEACHER[layer][0], target.channels, layer=layer, seed=0)  # the same on all ranks
            target.load(projector.state_dict())
        target.to(bench.device)
    raw_shapes = layer_shapes(config, losses, teacher)
    network, normalize = teacher_on_device(config, teacher, bench.accelerator, list(targets))
    live = live_teacher(config, network, normalize, targets, bench.accelerator)
    shapes = {layer: target.output_shape(raw_shapes[layer]) for layer, target in targets.items()}
    return TeacherSetup(live, lambda split: live, "random", shapes, live=live, targets=targets)


def random_teacher() -> Teacher:
    """Build ResNet-50, whose blocks begin as the identity, so that random weights give numbers of an ordinary size."""
    arch, arguments = "torchvision/resnet50", {"zero_init_residual": True}
    return Teacher(build_model(arch, num_classes=CLASSES, arch_args=arguments), MEAN, STD, arch=arch, arch_args=arguments)
