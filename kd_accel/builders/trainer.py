"""Builders of a training from a `RunConfig`: ready to fit, in a new run directory or resumed from a checkpoint."""

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
    """Training that is ready to start, with all its parts.

    Attributes:
        config: Config of the run.
        directory: Directory of the run.
        data: Images and splits.
        distiller: The trained module, without the DDP wrapper.
        trainer: Trainer that fits the distiller.
        test: Test split.
        teacher: Teacher with its targets and the source of its outputs; None without a teacher.
        tracker: Tracker that sends metrics to W&B.
        notices: Lines to print before the training starts.
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
class _CheckedInputs:
    """Checked inputs of a run: losses, data, schedule, and the checkpoint to resume from, None for a new run."""

    config: RunConfig
    directory: RunDirectory
    losses: Losses
    data: DataModule
    loader: TrainLoader
    schedule: TrainingSchedule
    checkpoint: Checkpoint | None


def role(config: RunConfig) -> str:
    """Return the role of a run in tables and W&B: teacher, student or distilled."""
    return config.role if config.teacher is None else "distilled"


def run_directory(config: RunConfig) -> RunDirectory:
    """Return the directory of a run, with the settings that a resumed run is compared with."""
    settings, checkpoint = config.model_dump(mode="json"), config.checkpoint
    return RunDirectory(config.directory, settings, checkpoint.resume, checkpoint.stop_after_steps)


def build_run(config: RunConfig, accelerator: Accelerator, stack: ExitStack) -> Run | None:
    """Build the training of a config.

    Args:
        config: Config of the run.
        accelerator: Accelerator of the launch.
        stack: Stack to which callbacks are added that close files, hooks and the tracker.

    Returns:
        The training, or None if the run is already finished.

    Raises:
        UserError: If settings, data, teacher, cache, checkpoint and run directory do not fit together.
    """
    inputs = _check_inputs(config, accelerator)
    if inputs is None:
        return None
    network, notices = build_student(config, inputs.data)
    notices += inputs.data.notices
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
            config, inputs.data, network, inputs.losses, accelerator=accelerator, checkpoint=inputs.checkpoint
        )
        stack.callback(teacher.close)
        notices += teacher.notices
    _refuse_other_teacher_or_cache(inputs, teacher)
    shapes = teacher.target_shapes if teacher else {}
    distiller = build_distiller(config, inputs.data, network, inputs.losses, shapes, accelerator.device)
    distiller.start_recording()
    stack.callback(distiller.stop_recording)
    _claim_directory(inputs, accelerator, stack)
    tracker = _start_tracker(config, accelerator, inputs.checkpoint)
    stack.callback(tracker.finish)
    if accelerator.is_main_process:
        notices += missing_package_notices(config.tracking)
    trainer, resume_notices = _build_trainer(inputs, distiller, teacher, tracker, accelerator)
    for close in (trainer.progress.close, trainer.profiler.close, trainer.checkpoints.writer.close):
        stack.callback(close)
    test = _held_out(inputs, "test", teacher, accelerator)
    notices += resume_notices
    return Run(config, inputs.directory, inputs.data, distiller, trainer, test, teacher, tracker, notices)


def build_train_loader(config: RunConfig, data: DataModule, accelerator: Accelerator) -> TrainLoader:
    """Build the loader of this rank's training batches. Raises UserError if the samples do not fill a batch."""
    return data.train_loader(
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        grad_accum_steps=config.train.grad_accum_steps,
        seed=config.seed,
        pin_memory=accelerator.device.type == "cuda",
    )


def build_schedule(config: RunConfig, *, steps_per_epoch: int) -> TrainingSchedule:
    """Build the schedules of learning rate, temperature and weights, which end after all epochs or after `train.max_steps`."""
    steps = config.train.epochs * steps_per_epoch
    steps = steps if config.train.max_steps is None else min(steps, config.train.max_steps)
    distill = None if config.teacher is None else config.distill or DistillConfig()
    return TrainingSchedule(config.optim, steps_per_epoch, steps, distill)


def build_train_state(config: RunConfig, distiller: Distiller, accelerator: Accelerator) -> TrainState:
    """Move the distiller to the device, and wrap it with its optimizer for training."""
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
    """Build the trainer of a config, which writes to the run directory of the config.

    Args:
        config: Config of the run.
        train_state: Wrapped module, optimizer, meters and position.
        loader: Training batches.
        source: Source of the teacher's outputs.
        schedule: Schedules over the steps.
        accelerator: Accelerator of the launch.
        tracker: Tracker that receives the metrics; None = metrics.jsonl only.
        extra_state: Plain values that are added to each checkpoint.
        extra_tensors: Tensors, by file name, that are added to each checkpoint.
    """
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


def _check_inputs(config: RunConfig, accelerator: Accelerator) -> _CheckedInputs | None:
    """Check run directory, losses, checkpoint, data and schedule, the fastest checks first. Returns None if finished."""
    directory = run_directory(config)
    finished = on_main_process(accelerator, directory.finished_summary)
    losses = build_losses(config)
    if finished is None:
        on_main_process(accelerator, lambda: refuse_missing_package(config.tracking))
    resumed_from = None if finished else on_main_process(accelerator, directory.checkpoint_to_resume)
    checkpoint = load_checkpoint(resumed_from) if resumed_from else None
    data = load_data(config.data)
    if finished is not None:
        _refuse_other_finished_run(finished, config, data)
        return None
    if checkpoint is not None:
        refuse_other_data(checkpoint.state["data"], data.fingerprint_fields(), where=str(checkpoint.path))
    loader = build_train_loader(config, data, accelerator)
    schedule = build_schedule(config, steps_per_epoch=loader.steps_per_epoch)
    _refuse_pause_beyond_end(config, schedule.total_steps)
    return _CheckedInputs(config, directory, losses, data, loader, schedule, checkpoint)


def _refuse_other_finished_run(finished: Mapping[str, Any], config: RunConfig, data: DataModule) -> None:
    """Raise UserError if the finished run in the directory was trained on other data, or with another teacher."""
    where = str(config.directory)
    refuse_other_data(finished.get("data", {}), data.fingerprint_fields(), where=where)
    fingerprint = load_teacher(config, data).fingerprint if config.teacher else None
    refuse_other_teacher(finished, fingerprint, where=where)


def _refuse_other_teacher_or_cache(inputs: _CheckedInputs, teacher: TeacherSetup | None) -> None:
    """Raise UserError if the checkpoint was trained with another teacher or cache."""
    if (checkpoint := inputs.checkpoint) is not None:
        refuse_other_teacher(checkpoint.state, teacher.fingerprint if teacher else None, where=str(checkpoint.path))
        refuse_other_cache(checkpoint, teacher.cache if teacher else None)


def _refuse_pause_beyond_end(config: RunConfig, total_steps: int) -> None:
    stop = config.checkpoint.stop_after_steps
    if stop is not None and stop >= total_steps:
        raise UserError(
            f"checkpoint.stop_after_steps: {stop} has no effect, because the training has {total_steps} steps; lower it, or "
            "leave it out"
        )


def _claim_directory(inputs: _CheckedInputs, accelerator: Accelerator, stack: ExitStack) -> None:
    """Lock the run directory from the main process, until `stack` is closed."""
    resumed_from = inputs.checkpoint.path if inputs.checkpoint else None
    lock = on_main_process(accelerator, lambda: inputs.directory.claim(resumed_from=resumed_from))
    if accelerator.is_main_process:
        stack.callback(os.close, lock)


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
        # Trackers of a failed attempt are still registered, and would be started again.
        accelerator.trackers.clear()
        accelerator.init_trackers(config.tracking.project, config=config.model_dump(mode="json"), init_kwargs={"wandb": kwargs})
        return accelerator.get_tracker("wandb", unwrap=True)

    if accelerator.is_main_process:
        tracker.start(init)
    return tracker


def _build_trainer(
    inputs: _CheckedInputs,
    distiller: Distiller,
    teacher: TeacherSetup | None,
    tracker: WandbTracker,
    accelerator: Accelerator,
) -> tuple[Trainer, list[str]]:
    """Build the trainer, in the state of the checkpoint if there is one.

    Returns:
        The trainer, and a notice for each thing that differs from an uninterrupted training.
    """
    config, checkpoint = inputs.config, inputs.checkpoint
    train_state = build_train_state(config, distiller, accelerator)
    notices = [] if checkpoint is None else _restore_checkpoint(train_state, checkpoint, accelerator)
    keep_images_on_gpu(inputs.loader, inputs.data, accelerator.device)
    state, tensors = _checkpoint_extra(inputs, teacher, tracker)
    source = teacher.source if teacher else no_teacher
    trainer = build_trainer(
        config,
        train_state,
        inputs.loader,
        source,
        inputs.schedule,
        accelerator,
        tracker=tracker,
        extra_state=state,
        extra_tensors=tensors,
    )
    if len(inputs.data.splits.val):
        trainer.validation = _held_out(inputs, "val", teacher, accelerator)
    length_bytes = checkpoint.state["metrics_bytes"] if checkpoint else 0
    on_main_process(accelerator, lambda: trainer.metrics_log.start(length_bytes))
    return trainer, notices


def _restore_checkpoint(train_state: TrainState, checkpoint: Checkpoint, accelerator: Accelerator) -> list[str]:
    """Restore a checkpoint, and return notices. Raises UserError if it is damaged.

    Settings and data were compared with the run before, so any error is a sign of damage.
    """
    try:
        return restore(train_state, checkpoint, accelerator)
    except (KeyError, IndexError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = describe_error(error)
        raise UserError(
            f"{checkpoint.path}: checkpoint is damaged or does not fit the training that its config describes ({reason}); "
            "remove it to resume from an earlier checkpoint, or set another run_dir to start from scratch"
        ) from error


def _held_out(inputs: _CheckedInputs, split: HeldOutSplit, teacher: TeacherSetup | None, accelerator: Accelerator) -> HeldOut:
    return build_held_out(inputs.config, inputs.data, split, teacher.held_out(split) if teacher else None, accelerator)


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
    return HeldOut(loader, teacher=source)


def _checkpoint_extra(
    inputs: _CheckedInputs, teacher: TeacherSetup | None, tracker: WandbTracker
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Return the plain values, and the tensors by file name, that each checkpoint holds in addition to the `TrainState`."""
    tensors = teacher.saved_tensors() if teacher else {}
    state = {
        "config": dict(inputs.directory.settings),
        "data": inputs.data.fingerprint_fields(),
        "wandb_id": tracker.run_id,
        "teacher_fingerprint": teacher.fingerprint if teacher else None,
        "cache": teacher.cache if teacher else None,
        "explained": dict(teacher.explained) if teacher else {},
    }
    return state, {"targets": tensors} if tensors else {}


def trained_network(run: Run) -> nn.Module:
    """Return the network to deploy: the moving average of the student if `train.ema_decay` is set, otherwise the student."""
    average = run.trainer.train_state.average
    return run.distiller.student if average is None else average.module
