"""Builders of the parts of a training from a `RunConfig`: loaders, schedules, trained state and trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from kd_accel.builders.labels import mixing_settings
from kd_accel.config.schema import DistillConfig, RunConfig
from kd_accel.data.datamodule import DataModule
from kd_accel.data.loader import TrainLoader
from kd_accel.data.splits import HeldOutSplit
from kd_accel.distributed import Accelerator
from kd_accel.errors import UserError
from kd_accel.losses.distiller import Distiller
from kd_accel.models.feature_extractor import compile_with_hooks
from kd_accel.models.inference import weight_memory_format
from kd_accel.profiling import StepProfiler
from kd_accel.training.average import MovingAverage
from kd_accel.training.evaluation import HeldOut
from kd_accel.training.graphed import DeviceWeights, GraphedStep
from kd_accel.training.metrics import Meters, MetricsLog, Tracker
from kd_accel.training.nonfinite import NonFiniteGuard
from kd_accel.training.optim import build_optimizer, prepare_for_capture
from kd_accel.training.preemption import PreemptionHandler
from kd_accel.training.progress import Progress
from kd_accel.training.saving import CheckpointSaver
from kd_accel.training.schedules import TrainingSchedule
from kd_accel.training.state import TrainState, wrap_for_training
from kd_accel.training.step import TrainStep
from kd_accel.training.trainer import Trainer
from kd_accel.types import TeacherSource


def build_train_loader(config: RunConfig, data: DataModule, accelerator: Accelerator) -> TrainLoader:
    """Build the loader of this rank's training batches. Raises UserError if the samples do not fill a batch."""
    return data.train_loader(
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        grad_accum_steps=config.train.grad_accum_steps,
        seed=config.seed,
        pin_memory=accelerator.device.type == "cuda",
        is_balanced=config.data.sampling == "balanced",
    )


def build_schedule(config: RunConfig, *, steps_per_epoch: int) -> TrainingSchedule:
    """Build the schedules of learning rate, temperature and weights, which end after all epochs or after `train.max_steps`."""
    steps = config.train.epochs * steps_per_epoch
    steps = steps if config.train.max_steps is None else min(steps, config.train.max_steps)
    distill = config.distill or DistillConfig() if config.has_teacher else None
    teachers = {name: teacher.weight for name, teacher in config.teachers.items()}
    return TrainingSchedule(config.optim, steps_per_epoch, steps, distill, teachers)


def build_train_state(
    config: RunConfig, distiller: Distiller, accelerator: Accelerator, *, has_unlabeled: bool = False
) -> TrainState:
    """Move the distiller to the device, and wrap it with its optimizer. has_unlabeled: some training samples have no label."""
    distiller.to(accelerator.device).to(memory_format=weight_memory_format(config.train.channels_last, accelerator.device))
    decay = config.train.ema_decay
    average = None if decay is None else MovingAverage(distiller.student, decay=decay)
    if config.train.compile:
        compile_with_hooks(distiller.student, dynamic=False)
    optimizer = build_optimizer(distiller.parameters(), config.optim)
    if replays_steps(config, accelerator):
        prepare_for_capture(optimizer)
    module, wrapped = wrap_for_training(accelerator, distiller, optimizer)
    meters = Meters(
        accelerator.device,
        terms=distiller.term_names,
        has_teacher=config.has_teacher,
        counts_overflows=accelerator.scaler is not None,
        has_unlabeled=has_unlabeled,
        has_mixed_labels=bool(mixing_settings(config)),
    )
    return TrainState(module, wrapped, meters, average)


def build_trainer(  # noqa: PLR0913  (the parts of a training)
    config: RunConfig,
    train_state: TrainState,
    loader: TrainLoader,
    source: TeacherSource,
    schedule: TrainingSchedule,
    accelerator: Accelerator,
    *,
    trackers: Sequence[Tracker] = (),
    extra_state: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, dict[str, Tensor]] | None = None,
) -> Trainer:
    """Build the trainer of a config, which writes to the run directory of the config.

    Args:
        config: Config of the run.
        train_state: Wrapped module, optimizer, meters and position.
        loader: Training batches.
        source: Source of the teacher's outputs.
        schedule: Schedules over the steps.
        accelerator: Accelerator of the launch.
        trackers: Experiment trackers that receive the metrics in addition to metrics.jsonl.
        extra_state: Plain values that are added to each checkpoint.
        extra_tensors: Tensors, by file name, that are added to each checkpoint.
    """
    is_main, directory = accelerator.is_main_process, config.directory
    progress = Progress(config.name, total_steps=schedule.total_steps, done_steps=train_state.position.step, is_main=is_main)
    guard = NonFiniteGuard(accelerator, train_state.module, train_state.optimizer)
    step = TrainStep(accelerator, train_state, source, guard, clip_norm=config.optim.clip_norm)
    if replays_steps(config, accelerator):
        weights = DeviceWeights(accelerator.device, schedule.scheduled)
        step.replay = GraphedStep(step, weights, partial(_refuse_graph, config.train.cuda_graph, progress.say))
    return Trainer(
        accelerator=accelerator,
        step=step,
        loader=loader,
        schedule=schedule,
        settings=config.train,
        checkpoints=CheckpointSaver(
            accelerator, directory / "checkpoints", config.checkpoint, extra_state or {}, extra_tensors or {}
        ),
        metrics_log=MetricsLog(directory / "metrics.jsonl", is_main=is_main, trackers=trackers),
        progress=progress,
        profiler=StepProfiler(directory / "profile", steps=config.profile, rank=accelerator.process_index, say=progress.say),
        preemption=PreemptionHandler(accelerator, timeout_s=config.train.timeout_s, every_step=not loader.is_in_memory),
    )


def replays_steps(config: RunConfig, accelerator: Accelerator) -> bool:
    """Return whether the steps of a training are replayed as a CUDA graph, unless that turns out to be impossible.

    Raises:
        UserError: If `train.cuda_graph` is `always` and this launch cannot.
    """
    train = config.train
    obstacles = {
        "no GPU was found": accelerator.device.type != "cuda",
        f"the launch has {accelerator.num_processes} processes": accelerator.num_processes > 1,
    }
    reasons = [reason for reason, applies in obstacles.items() if applies]
    if train.cuda_graph == "always" and reasons:
        raise UserError(f"train.cuda_graph: always needs one process with a GPU, but {' and '.join(reasons)}; use auto")
    return train.cuda_graph != "never" and not train.compile and not reasons


def _refuse_graph(choice: str, say: Callable[[str], None], reason: str) -> None:
    """Say why a step cannot be captured. Raises UserError if `train.cuda_graph` is `always`."""
    if choice == "always":
        raise UserError(f"train.cuda_graph: the step cannot be captured ({reason}); use auto, which then trains without it")
    say(f"train.cuda_graph: the step cannot be captured ({reason}), so each kernel is launched on its own, which is slower")


def build_held_out(
    config: RunConfig, data: DataModule, split: HeldOutSplit, source: TeacherSource | None, accelerator: Accelerator
) -> HeldOut:
    """Build a held-out split for evaluation.

    Args:
        config: Config of the run.
        data: Data of the run.
        split: Name of the split, val or test.
        source: Source of the teacher's outputs on this split; None without a teacher.
        accelerator: Accelerator of the launch.
    """
    loader = data.eval_loader(
        split,
        batch_size=config.train.eval_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    return HeldOut(loader, teacher=source, padded_to=config.train.eval_batch_size if config.train.compile else None)
