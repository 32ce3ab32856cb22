"""From a RunConfig to a training that is ready to fit, in a new run directory or continued from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kd_accel.builders.student import Losses, build_distiller, build_losses, build_student
from kd_accel.builders.teacher import TeacherSetup, build_teacher_setup, load_teacher
from kd_accel.config.schema import DistillConfig, RunConfig
from kd_accel.data.datamodule import DataModule, keep_images_on_gpu, load_data, notices_of_small_batches
from kd_accel.data.loader import TrainLoader
from kd_accel.data.splits import HeldOutSplit
from kd_accel.distributed import Accelerator, on_main_process
from kd_accel.errors import UserError, describe_error
from kd_accel.losses.distiller import Distiller
from kd_accel.models.feature_extractor import compile_with_hooks
from kd_accel.models.inference import weight_memory_format
from kd_accel.profiling import StepProfiler
from kd_accel.training.average import MovingAverage
from kd_accel.training.checkpoint import Checkpoint, load_checkpoint
from kd_accel.training.evaluation import HeldOut
from kd_accel.training.metrics import Meters, MetricsLog
from kd_accel.training.nonfinite import NonFiniteGuard
from kd_accel.training.optim import build_optimizer
from kd_accel.training.preemption import PreemptionHandler
from kd_accel.training.progress import Progress
from kd_accel.training.run_dir import RunDirectory, refuse_other_cache, refuse_other_data, refuse_other_teacher
from kd_accel.training.saving import CheckpointSaver
from kd_accel.training.schedules import TrainingSchedule
from kd_accel.training.state import TrainState, restore, wrap_for_training
from kd_accel.training.trainer import Trainer
from kd_accel.training.wandb_tracker import WandbTracker, missing_package_notices, refuse_missing_package
from kd_accel.types import TeacherSource, no_teacher


@dataclass(frozen=True)
class Run:
    """A training that is ready to start.

    Args:
        config: of the run.
        directory: of the run.
        data: images and splits.
        distiller: the trained module, not wrapped.
        trainer: fits it.
        test: the test split.
        teacher: the teacher's side, None without one.
        tracker: W&B.
        notices: lines for the user.
    """

    config: RunConfig
    directory: RunDirectory
    data: DataModule
    distiller: Distiller
    trainer: Trainer
    test: HeldOut
    teacher: TeacherSetup | None
    tracker: WandbTracker
    notices: list[str]


@dataclass(frozen=True)
class _Start:
    """What a run begins with: losses, data, schedule, and the checkpoint from which it continues."""

    config: RunConfig
    directory: RunDirectory
    losses: Losses
    data: DataModule
    loader: TrainLoader
    schedule: TrainingSchedule
    checkpoint: Checkpoint | None


def role(config: RunConfig) -> str:
    """Return the role of a run in tables and in W&B: teacher, student or distilled."""
    return config.role if config.teacher is None else "distilled"


def run_directory(config: RunConfig) -> RunDirectory:
    """Return the directory of a run with its settings."""
    settings, checkpoint = config.model_dump(mode="json"), config.checkpoint
    return RunDirectory(config.directory, settings, checkpoint.resume, checkpoint.stop_after_steps)


def build_run(config: RunConfig, accelerator: Accelerator, stack: ExitStack) -> Run | None:
    """Build the training of a config.

    Args:
        config: of the run.
        accelerator: of the launch.
        stack: receives what must be closed at the end.

    Returns:
        The training, or None if the run is finished.

    Raises:
        UserError: settings, data, teacher, cache, checkpoint or run directory do not fit together.
    """
    start = _open(config, accelerator)
    if start is None:
        return None
    network, notices = build_student(config, start.data)
    notices += notices_of_small_batches(
        accelerator.device,
        batch_size=config.train.batch_size,
        image_size=config.data.image_size,
        processes=accelerator.num_processes,
        grad_accum_steps=config.train.grad_accum_steps,
    )
    teacher = None
    if config.teacher is not None:
        teacher = build_teacher_setup(
            config, start.data, network, start.losses, accelerator=accelerator, checkpoint=start.checkpoint
        )
        stack.callback(teacher.close)
        notices += teacher.notices
    _refuse_another_start(start, teacher)
    shapes = teacher.target_shapes if teacher else {}
    distiller = build_distiller(config, start.data, network, start.losses, shapes, accelerator.device)
    distiller.start_recording()
    stack.callback(distiller.stop_recording)
    _hold_directory(start, accelerator, stack)
    tracker = _start_tracker(config, accelerator, start.checkpoint)
    stack.callback(tracker.finish)
    if accelerator.is_main_process:
        notices += missing_package_notices(config.tracking)
    trainer, more = _build_trainer(start, distiller, teacher, tracker, accelerator)
    for close in (trainer.progress.close, trainer.profiler.close, trainer.checkpoints.writer.close):
        stack.callback(close)
    test = _held_out(start, "test", teacher, accelerator)
    return Run(config, start.directory, start.data, distiller, trainer, test, teacher, tracker, [*notices, *more])


def build_train_loader(config: RunConfig, data: DataModule, accelerator: Accelerator) -> TrainLoader:
    """Build the training batches of this rank. Raises UserError if the samples do not fill one."""
    return data.train_loader(
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        grad_accum_steps=config.train.grad_accum_steps,
        seed=config.seed,
        pin_memory=accelerator.device.type == "cuda",
    )


def build_schedule(config: RunConfig, *, steps_per_epoch: int) -> TrainingSchedule:
    """Build the schedules over all epochs, or to `train.max_steps` if that comes earlier."""
    steps = config.train.epochs * steps_per_epoch
    steps = steps if config.train.max_steps is None else min(steps, config.train.max_steps)
    distill = None if config.teacher is None else config.distill or DistillConfig()
    return TrainingSchedule(config.optim, steps_per_epoch, steps, distill)


def build_train_state(config: RunConfig, distiller: Distiller, accelerator: Accelerator) -> TrainState:
    """Move the distiller to the device and wrap it, with its optimizer, for training."""
    distiller.to(accelerator.device).to(memory_format=weight_memory_format(config.train.channels_last, accelerator.device))
    decay = config.train.ema_decay
    average = None if decay is None else MovingAverage(distiller.student, decay=decay)
    if config.train.compile:
        compile_with_hooks(distiller.student)
    module, optimizer = wrap_for_training(accelerator, distiller, build_optimizer(distiller.parameters(), config.optim))
    meters = Meters(
        accelerator.device,
        terms=distiller.term_names,
        has_teacher=config.teacher is not None,
        counts_overflows=accelerator.scaler is not None,
    )
    return TrainState(module, optimizer, meters, average)


def build_trainer(  # noqa: PLR0913  (the parts of a training)
    config: RunConfig,
    train_state: TrainState,
    loader: TrainLoader,
    source: TeacherSource,
    schedule: TrainingSchedule,
    accelerator: Accelerator,
    *,
    tracker: WandbTracker | None = None,
    extra_state: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, dict[str, Tensor]] | None = None,
) -> Trainer:
    """Build the trainer of a config, in the run directory that the config names."""
    is_main, directory = accelerator.is_main_process, config.directory
    progress = Progress(config.name, total_steps=schedule.total_steps, done_steps=train_state.position.step, is_main=is_main)
    return Trainer(
        accelerator=accelerator,
        train_state=train_state,
        loader=loader,
        teacher=source,
        schedule=schedule,
        settings=config.train,
        checkpoints=CheckpointSaver(
            accelerator, directory / "checkpoints", config.checkpoint, extra_state or {}, extra_tensors or {}
        ),
        metrics_log=MetricsLog(directory / "metrics.jsonl", is_main=is_main, tracker=tracker),
        progress=progress,
        profiler=StepProfiler(directory / "profile", steps=config.profile, rank=accelerator.process_index, say=progress.say),
        preemption=PreemptionHandler(accelerator, timeout_s=config.train.timeout_s),
        guard=NonFiniteGuard(accelerator, train_state.module, train_state.optimizer),
    )


def _open(config: RunConfig, accelerator: Accelerator) -> _Start | None:
    """Check run directory, losses, checkpoint, data and schedule, in this order: the cheapest mistakes first."""
    directory = run_directory(config)
    finished = on_main_process(accelerator, directory.finished_summary)
    losses = build_losses(config)
    if finished is None:
        on_main_process(accelerator, lambda: refuse_missing_package(config.tracking))
    resumed_from = None if finished else on_main_process(accelerator, directory.checkpoint_to_resume)
    checkpoint = load_checkpoint(resumed_from) if resumed_from else None
    data = load_data(config.data)
    if finished is not None:
        _refuse_another_run(finished, config, data)
        return None
    if checkpoint is not None:
        refuse_other_data(checkpoint.state["data"], data.fingerprint_fields(), where=str(checkpoint.path))
    loader = build_train_loader(config, data, accelerator)
    schedule = build_schedule(config, steps_per_epoch=loader.steps_per_epoch)
    _refuse_a_pause_beyond_the_end(config, schedule.total_steps)
    return _Start(config, directory, losses, data, loader, schedule, checkpoint)


def _refuse_another_run(finished: Mapping[str, Any], config: RunConfig, data: DataModule) -> None:
    """Raise UserError for a finished run that was trained on other data, or by another teacher."""
    where = str(config.directory)
    refuse_other_data(finished.get("data", {}), data.fingerprint_fields(), where=where)
    fingerprint = load_teacher(config, data).fingerprint if config.teacher else None
    refuse_other_teacher(finished, fingerprint, where=where)


def _refuse_another_start(start: _Start, teacher: TeacherSetup | None) -> None:
    """Raise UserError for a checkpoint of another teacher or cache."""
    if start.checkpoint is not None:
        refuse_other_teacher(start.checkpoint.state, teacher.fingerprint if teacher else None, where=str(start.checkpoint.path))
        refuse_other_cache(start.checkpoint, teacher.cache if teacher else None)


def _refuse_a_pause_beyond_the_end(config: RunConfig, total_steps: int) -> None:
    stop = config.checkpoint.stop_after_steps
    if stop is not None and stop >= total_steps:
        raise UserError(
            f"checkpoint.stop_after_steps: {stop} has no effect, the training has {total_steps} steps; lower it, or leave it "
            "out"
        )


def _hold_directory(start: _Start, accelerator: Accelerator, stack: ExitStack) -> None:
    resumed_from = start.checkpoint.path if start.checkpoint else None
    held = on_main_process(accelerator, lambda: start.directory.claim(resumed_from=resumed_from))
    if accelerator.is_main_process:
        stack.callback(os.close, held)


def _start_tracker(config: RunConfig, accelerator: Accelerator, checkpoint: Checkpoint | None) -> WandbTracker:
    """Start W&B on the main process, through Accelerate's tracker; a resumed run continues the same W&B run."""
    tracker = WandbTracker(
        config.tracking,
        run_dir=config.directory,
        name=config.name,
        role=role(config),
        run_id=checkpoint.state["wandb_id"] if checkpoint else None,
    )

    def init(kwargs: dict[str, Any]) -> Any:
        accelerator.trackers.clear()  # of an attempt that failed: they would be started again
        accelerator.init_trackers(config.tracking.project, config=config.model_dump(mode="json"), init_kwargs={"wandb": kwargs})
        return accelerator.get_tracker("wandb", unwrap=True)

    if accelerator.is_main_process:
        tracker.start(init)
    return tracker


def _build_trainer(
    start: _Start, distiller: Distiller, teacher: TeacherSetup | None, tracker: WandbTracker, accelerator: Accelerator
) -> tuple[Trainer, list[str]]:
    """Build the trainer in the state of the checkpoint. Returns it and notices about what a resume cannot keep the same."""
    config, checkpoint = start.config, start.checkpoint
    train_state = build_train_state(config, distiller, accelerator)
    notices = [] if checkpoint is None else _restored(train_state, checkpoint, accelerator)
    keep_images_on_gpu(start.loader, start.data, accelerator.device)
    state, tensors = _checkpoint_extra(start, teacher, tracker)
    source = teacher.source if teacher else no_teacher
    trainer = build_trainer(
        config,
        train_state,
        start.loader,
        source,
        start.schedule,
        accelerator,
        tracker=tracker,
        extra_state=state,
        extra_tensors=tensors,
    )
    if len(start.data.splits.val):
        trainer.validation = _held_out(start, "val", teacher, accelerator)
    length_bytes = checkpoint.state["metrics_bytes"] if checkpoint else 0
    on_main_process(accelerator, lambda: trainer.metrics_log.start(length_bytes))
    return trainer, notices


def _restored(train_state: TrainState, checkpoint: Checkpoint, accelerator: Accelerator) -> list[str]:
    """Restore a checkpoint. Its settings and data fit the run, so any error is damage: raises UserError."""
    try:
        return restore(train_state, checkpoint, accelerator)
    except (KeyError, IndexError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = describe_error(error)
        raise UserError(
            f"{checkpoint.path}: does not fit the training that its own config describes ({reason}); remove it to resume from "
            "an earlier one, or start from scratch in another run_dir"
        ) from error


def _held_out(start: _Start, split: HeldOutSplit, teacher: TeacherSetup | None, accelerator: Accelerator) -> HeldOut:
    return build_held_out(start.config, start.data, split, teacher.held_out(split) if teacher else None, accelerator)


def build_held_out(
    config: RunConfig, data: DataModule, split: HeldOutSplit, source: TeacherSource | None, accelerator: Accelerator
) -> HeldOut:
    """Build a held-out split, with the source of the teacher's outputs on it."""
    loader = data.eval_loader(
        split,
        batch_size=config.train.eval_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    return HeldOut(loader, teacher=source)


def _checkpoint_extra(
    start: _Start, teacher: TeacherSetup | None, tracker: WandbTracker
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Return (plain state, tensors by file) that every checkpoint holds besides the state of the training."""
    tensors = teacher.saved_tensors() if teacher else {}
    state = {
        "config": dict(start.directory.settings),
        "data": start.data.fingerprint_fields(),
        "wandb_id": tracker.run_id,
        "teacher_fingerprint": teacher.fingerprint if teacher else None,
        "cache": teacher.cache if teacher else None,
        "explained": dict(teacher.explained) if teacher else {},
    }
    return state, {"targets": tensors} if tensors else {}


def trained_network(run: Run) -> nn.Module:
    """Return the network that is deployed: the moving average of the student where it is kept."""
    average = run.trainer.train_state.average
    return run.distiller.student if average is None else average.module
