"""Header of a start: what runs, where, on which data and from which position, printed before the first step.

One aligned line for each fact, with the same names in each run; docs/start.md explains them. Facts that call for attention are
notices, which are printed below the header.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kd_accel.builders.run import Run
from kd_accel.config.loss_weights import notices_of_weights
from kd_accel.config.schema import RunConfig, TeacherConfig
from kd_accel.data.datamodule import DataModule
from kd_accel.data.splits import HeldOutSplit
from kd_accel.distributed import Accelerator, gathered, launch_notices, missing_gpu
from kd_accel.io.safe_yaml import dump_yaml
from kd_accel.models.pretrained import WeightsInfo, weights_info
from kd_accel.teacher.teacher import Teacher

_WIDTH = 11
"""Width of the longest name, in letters."""


def header_text(lines: Mapping[str, str]) -> str:
    """Return the lines of a header, {name: value}, with the values aligned."""
    return "\n".join(f"{name:{_WIDTH}} {value}" for name, value in lines.items())


def training_header(run: Run) -> dict[str, str]:
    """Return the header of a training, without the line of the teacher. Every rank must call it.

    Args:
        run: The training, before its first step.

    Returns:
        {name of a line: its value}, in the order of the lines.
    """
    config, trainer = run.config, run.trainer
    return {
        "run": f"{config.name} ({config.shown_role}) in {run.directory.path}",
        **processes_header(config, trainer.accelerator),
        "model": described_model(config.model.arch, run.distiller.student),
        **_layers(config),
        **data_header(config, run.data),
        "steps": _steps(run),
        "start": _start(run),
    }


def build_header(config: RunConfig, data: DataModule, teacher: Teacher, accelerator: Accelerator) -> dict[str, str]:
    """Return the header of the build of a cache. Every rank must call it.

    Args:
        config: Config of the training that will read the cache.
        data: Data of the run.
        teacher: The teacher.
        accelerator: Accelerator of the launch.
    """
    assert config.teacher is not None, "checked by config/validation.py"
    name, model = config.teacher.run, described_model(teacher.arch or "network", teacher.network)
    return {
        "cache": str(config.teacher.cache.dir),
        **processes_header(config, accelerator),
        **data_header(config, data),
        "teacher": model if name is None else f"{name}, {model}",
        **_layers(config),
    }


def evaluation_header(
    directory: Path, config: RunConfig, data: DataModule, split: HeldOutSplit, network: nn.Module, accelerator: Accelerator
) -> dict[str, str]:
    """Return the header of an evaluation. Every rank must call it.

    Args:
        directory: Directory of the run.
        config: Config of the evaluation.
        data: Its data.
        split: The held-out split.
        network: The trained network.
        accelerator: Accelerator of the launch.
    """
    return {
        "run": f"{config.name} in {directory}",
        **processes_header(config, accelerator),
        "model": described_model(config.model.arch, network),
        "data": _source(config),
        "samples": f"{len(data.splits.by_name()[split]):,} {split}",
        "teacher": ", ".join(_stated_teacher(own.teacher) for own in config.by_teacher().values() if own.teacher) or "none",
    }


def processes_header(config: RunConfig, accelerator: Accelerator) -> dict[str, str]:
    """Return the lines of device, processes and precision. Every rank must call it."""
    precision = config.train.precision
    if precision != "float32":
        precision_text = f"{precision} (autocast)"
    else:
        has_tf32 = accelerator.device.type == "cuda" and config.train.tf32
        precision_text = "float32, convolutions and matrix products in TF32" if has_tf32 else "float32"
    return {"device": _devices(accelerator), "processes": str(accelerator.num_processes), "precision": precision_text}


def data_header(config: RunConfig, data: DataModule) -> dict[str, str]:
    """Return the lines of the data: source, samples of each split, classes with their training samples, and views."""
    samples = ", ".join(f"{len(samples):,} {split}" for split, samples in data.splits.by_name().items())
    unlabeled = len(data.unlabeled_samples)
    return {
        "data": _source(config),
        "samples": f"{samples}; {unlabeled:,} train without a label" if unlabeled else samples,
        **({"unlabeled": f"{config.data.unlabeled}, {data.unlabeled_per_epoch:,} samples in each epoch"} if data.turns else {}),
        "classes": _classes(data),
        "views": _views(data),
    }


def _layers(config: RunConfig) -> dict[str, str]:
    """Return the line of the compared layers of each feature loss, as the config has them; empty without such a loss."""
    features = config.distill.features if config.distill else {}
    settings = (dump_yaml({name: feature.layers}, in_one_line=True) for name, feature in features.items())
    return {"layers": ", ".join(" ".join(text.split())[1:-1] for text in settings)} if features else {}


def _source(config: RunConfig) -> str:
    return f"{config.data.source}, {config.data.image_size}x{config.data.image_size} pixels"


def described_model(arch: str, network: nn.Module) -> str:
    """Return the architecture of a network and its number of parameters."""
    return f"{arch}, {sum(parameter.numel() for parameter in network.parameters()):,} parameters"


def described_teacher(teacher: TeacherConfig | None, accuracy: float | None) -> str:
    """Return the teacher, the source of its outputs, and its accuracy on the test samples, a fraction of 1."""
    if teacher is None:
        return "none"
    outputs = {
        "live": "live",
        "cached": f"cached in {teacher.cache.dir}",
        "mixed": f"logits cached in {teacher.cache.dir}, features live",
    }[teacher.outputs]
    measured = "" if accuracy is None else f", accuracy {100 * accuracy:.2f} % on the test samples{_stated_accuracy(teacher)}"
    return f"{_teacher_name(teacher)}, {outputs}{measured}"


def _stated_accuracy(teacher: TeacherConfig) -> str:
    """Return the accuracy that the teacher's run or the card of its weights states, in parentheses; empty if none is known."""
    weights = teacher.run or teacher.weights
    info = weights_info(weights, teacher.arch or "") if weights else WeightsInfo()
    if info.accuracy is None:
        return ""
    where = "in its own run" if info.is_of_run else f"on {info.data}, as the card of its weights states"
    return f" ({100 * info.accuracy:.2f} % {where})"


def _stated_teacher(teacher: TeacherConfig) -> str:
    """Return the name of a teacher and its stated accuracy."""
    return f"{_teacher_name(teacher)}{_stated_accuracy(teacher)}"


def described_teachers(config: RunConfig, accuracies: Mapping[str, float], accuracy: float | None) -> str:
    """Return the teacher of a run as `described_teacher`, or several with their weights.

    Args:
        config: Config of the run.
        accuracies: Accuracy of each of several teachers by name, fractions of 1.
        accuracy: Accuracy of the teacher, or of the mean of several.
    """
    if not config.teachers:
        return described_teacher(config.teacher, accuracy)
    members = (f"{name}: {described_teacher(own, accuracies.get(name))}" for name, own in config.teachers.items())
    mean = "" if accuracy is None else f"; their mean: accuracy {100 * accuracy:.2f} %"
    return "; ".join(members) + mean


def _teacher_name(teacher: TeacherConfig) -> str:
    return teacher.run or teacher.arch or "not at hand"


def start_notices(config: RunConfig, accelerator: Accelerator) -> list[str]:
    """Return the notices of a start that concern the launch and the settings rather than a part of the run."""
    return [*launch_notices(accelerator), *notices_of_weights(config)]


def _devices(accelerator: Accelerator) -> str:
    """Return the kind and number of the devices. Every rank must call it."""
    if accelerator.device.type == "cuda":
        names = Counter(gathered([torch.cuda.get_device_name(accelerator.device)]))
        return ", ".join(f"{count} x {name}" for name, count in names.items())
    threads = torch.get_num_threads()
    used = f"CPU, {threads} {'thread' if threads == 1 else 'threads'} per process of {os.cpu_count()}"
    return f"{used} (no GPU: {missing_gpu()})"


def _classes(data: DataModule) -> str:
    """Return the number of classes, and their least and largest number of training samples."""
    labels = data.train.labels[data.splits.train]
    counts = np.bincount(labels[labels >= 0], minlength=len(data.label_names))
    filled = np.flatnonzero(counts)
    if not len(filled):
        return f"{len(counts)}, without labeled training samples"
    least, most = (int(filled[position]) for position in (counts[filled].argmin(), counts[filled].argmax()))
    empty = f"{len(counts) - len(filled)} empty"
    if counts[least] == counts[most]:
        return f"{len(counts)}, each with {counts[least]:,} training samples, {empty}"
    ends = (f"{counts[label]:,} ({data.label_names[label][:40]!r})" for label in (least, most))
    return f"{len(counts)}, with {' to '.join(ends)} training samples, {empty}"


def _views(data: DataModule) -> str:
    """Return the transforms, and the number of views of each training sample."""
    transform = data.transform.fingerprint_fields()["transform"]
    arguments = {name: ", ".join(f"{key}={value}" for key, value in settings.items()) for name, settings in transform.items()}
    names = [f"{name}({text})" for name, text in arguments.items()]
    if not names:
        return "none, each sample without a transform"
    number = "new ones in each epoch" if data.num_views is None else f"{data.num_views} of each training sample"
    return f"{', '.join(names)}; {number}"


def _steps(run: Run) -> str:
    schedule, settings = run.trainer.schedule, run.config.train
    parts = f" in {settings.grad_accum_steps} parts" if settings.grad_accum_steps > 1 else ""
    return (
        f"{schedule.total_steps:,} in total, {schedule.steps_per_epoch:,} per epoch, {settings.batch_size:,} samples "
        f"each{parts}"
    )


def _start(run: Run) -> str:
    """Return the position at which the training starts."""
    position = run.trainer.train_state.position
    if not position.step:
        return "from scratch"
    return f"resumed after step {position.step:,} of {run.trainer.schedule.total_steps:,} (epoch {position.epoch + 1})"
