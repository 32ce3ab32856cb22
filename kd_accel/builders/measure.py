"""Measurement of a config's views, teacher and student on this machine, for the cost estimate of live and cached outputs."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_accel.builders.labels import ClassNames
from kd_accel.builders.layers import with_layers
from kd_accel.builders.student import build_distiller, build_losses, build_student
from kd_accel.builders.teacher import build_targets, layer_shapes, live_teacher, load_teacher, teacher_on_device
from kd_accel.builders.trainer import build_schedule, build_train_loader
from kd_accel.cache.estimate import Measured, PlannedTraining, disk_rates, estimate, sample_bytes, stored_kind
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import DataModule, keep_images_on_gpu, load_data
from kd_accel.distributed import Accelerator
from kd_accel.losses.distiller import Distiller
from kd_accel.losses.targets import PCA, TargetFunction
from kd_accel.models.feature_extractor import compile_with_hooks
from kd_accel.models.inference import weight_memory_format
from kd_accel.models.projectors import FeatureProjector, Shape
from kd_accel.teacher.teacher import LiveTeacher, Teacher
from kd_accel.training.optim import build_optimizer
from kd_accel.types import Batch

_MEASURED_S = 2.0
"""Total time of the measured calls of one function."""
_MAX_CALLS, _MIN_CALLS = 50, 3


def estimate_costs(config: RunConfig, accelerator: Accelerator, *, class_names: ClassNames) -> dict[str, Any]:
    """Measure the parts of a training for some seconds, and estimate its cost with a live and with a cached teacher.

    Args:
        config: Config of the training, with a teacher.
        accelerator: Accelerator of the launch.
        class_names: Class names of data without labels; None if the data has labels.

    Returns:
        The estimate, as returned by `cache.estimate.estimate`.

    Raises:
        UserError: If data, teacher, student and losses do not fit together.
    """
    config = with_layers(config)
    assert config.teacher is not None
    losses = build_losses(config)
    data = load_data(config.data, accelerator, class_names=class_names)
    student, _ = build_student(config, data)
    teacher = load_teacher(config, data)
    targets, shapes = build_targets(config, losses, student, teacher), layer_shapes(config, losses, teacher)
    directory = _nearest_existing(Path(config.teacher.cache.dir or config.directory))
    target_shapes = {layer: target.output_shape(shapes[layer]) for layer, target in targets.items()}
    distiller = build_distiller(config, data, student, losses, target_shapes, accelerator.device)
    measured = _measure(config, data, teacher, distiller, _with_random_tensors(targets, shapes), accelerator, directory)
    dtype = config.teacher.cache.dtype or "float16"
    kinds = sample_bytes(len(data.label_names), shapes, targets, dtype)
    kind = stored_kind(targets if config.teacher.outputs != "mixed" else {})
    steps = max(1, data.epoch_samples // config.train.batch_size)
    epochs = math.ceil(build_schedule(config, steps_per_epoch=steps).total_steps / steps)
    views = data.num_views or config.train.epochs
    training = PlannedTraining(
        len(data.training_samples), views, epochs, accelerator.num_processes, kinds[kind], data.epoch_samples
    )
    free_bytes = shutil.disk_usage(directory).free
    return estimate(measured, training, kinds=kinds, kind=kind, dtype=dtype, free_bytes=free_bytes)


def _measure(
    config: RunConfig,
    data: DataModule,
    teacher: Teacher,
    distiller: Distiller,
    targets: Mapping[str, TargetFunction],
    accelerator: Accelerator,
    directory: Path,
) -> Measured:
    batches = _batches(config, data, accelerator)
    view_s = _seconds(lambda: next(batches), accelerator)
    batch = next(batches)
    network, normalize = teacher_on_device(config, teacher, accelerator, list(targets))
    for target in targets.values():
        target.to(accelerator.device)
    live = live_teacher(config, network, normalize, targets, accelerator)
    distiller.to(accelerator.device).to(memory_format=weight_memory_format(config.train.channels_last, accelerator.device))
    if config.train.compile:
        compile_with_hooks(distiller.student, dynamic=False)
    distiller.train().start_recording()
    try:
        teacher_s = _seconds(lambda: live(batch), accelerator)
        student_s = _seconds(_step(config, distiller, batch, live, accelerator), accelerator)
    finally:
        distiller.stop_recording()
        live.close()
    samples = len(batch.index)
    return Measured(view_s / samples, teacher_s / samples, student_s / samples, *disk_rates(directory))


def _step(
    config: RunConfig, distiller: Distiller, batch: Batch, live: LiveTeacher, accelerator: Accelerator
) -> Callable[[], None]:
    """Return a function that runs the student's optimizer step on one batch, with precomputed outputs of the teacher."""
    target = live(batch)
    optimizer = build_optimizer(distiller.parameters(), config.optim)
    weights = build_schedule(config, steps_per_epoch=1).weights_at(0, 0)
    index = batch.index.to(accelerator.device) if distiller.uses_index else None

    def step() -> None:
        with accelerator.autocast():
            output = distiller(batch.images, target, batch.labels, weights, index=index)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _with_random_tensors(targets: Mapping[str, TargetFunction], shapes: Mapping[str, Shape]) -> dict[str, TargetFunction]:
    """Load random components into each PCA in place: they take the time of fitted components, but no fit."""
    for layer, target in targets.items():
        if isinstance(target, PCA):
            target.load(FeatureProjector(shapes[layer][0], target.channels).state_dict())
    return dict(targets)


def _batches(config: RunConfig, data: DataModule, accelerator: Accelerator) -> Iterator[Batch]:
    loader = build_train_loader(config, data, accelerator)
    # Otherwise all images would be decoded first, which can take longer than the measurement.
    if data.training_images.is_in_memory:
        keep_images_on_gpu(loader, data, accelerator.device)
    for epoch in itertools.count():
        for micro_batches in loader.epoch(epoch):
            for batch in micro_batches:
                yield batch.to(accelerator.device, non_blocking=True)


def _seconds(work: Callable[[], object], accelerator: Accelerator) -> float:
    """Measure the median duration of a call in seconds, after one warm-up call."""
    times: list[float] = []
    work()
    _synchronize(accelerator)
    while sum(times) < _MEASURED_S and len(times) < _MAX_CALLS or len(times) < _MIN_CALLS:
        started_at = time.perf_counter()
        work()
        _synchronize(accelerator)
        times.append(time.perf_counter() - started_at)
    return float(np.median(times))


def _synchronize(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _nearest_existing(directory: Path) -> Path:
    """Return the directory or its nearest existing parent, which is on the same disk."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())
