"""Builders of a training from a `RunConfig`: ready to fit, in a new run directory or resumed from a checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kd_accel.builders.ensemble import build_ensemble_setup, fingerprint_of_teachers
from kd_accel.builders.labels import check_labels, unlabeled_class_names
from kd_accel.builders.layers import with_layers
from kd_accel.builders.student import Losses, build_distiller, build_losses, build_student, data_settings
from kd_accel.builders.teacher import TeacherSetup, build_teacher_setup
from kd_accel.builders.tracking import Trackers, refuse_missing_trackers
from kd_accel.builders.trainer import build_held_out, build_schedule, build_train_loader, build_train_state, build_trainer
from kd_accel.config.rules import BEST_WEIGHTS
from kd_accel.config.schema import RunConfig
from kd_accel.config.training_rules import earliest_stop
from kd_accel.data.datamodule import DataModule, keep_images_on_gpu, load_data, notices_of_small_batches
from kd_accel.data.loader import TrainLoader
from kd_accel.data.splits import HeldOutSplit
from kd_accel.distributed import Accelerator, on_main_process
from kd_accel.errors import UserError, describe_error
from kd_accel.losses.distiller import Distiller
from kd_accel.training.checkpoint import Checkpoint, load_checkpoint
from kd_accel.training.evaluation import HeldOut
from kd_accel.training.run_dir import (
    RunDirectory,
    refuse_other_cache,
    refuse_other_data,
    refuse_other_teacher,
    replaceable_samples,
)
from kd_accel.training.schedules import TrainingSchedule
from kd_accel.training.state import TrainState, restore
from kd_accel.training.trainer import Trainer
from kd_accel.training.wandb_tracker import missing_package_notices
from kd_accel.types import no_teacher


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
        trackers: Experiment trackers, W&B and TensorBoard.
        notices: Lines to print before the training starts.
    """

    config: RunConfig
    directory: RunDirectory
    data: DataModule
    distiller: Distiller
    trainer: Trainer
    test: HeldOut
    teacher: TeacherSetup | None
    trackers: Trackers
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
    config = with_layers(config)
    inputs = _check_inputs(config, accelerator)
    if inputs is None:
        return None
    stack.callback(inputs.data.batch_loader.close)
    network, notices = build_student(config, inputs.data)
    notices += inputs.data.notices + _notices_of_epochs(config, inputs.schedule)
    notices += notices_of_small_batches(
        accelerator.device,
        batch_size=config.train.batch_size,
        image_size=config.data.image_size,
        processes=accelerator.num_processes,
        grad_accum_steps=config.train.grad_accum_steps,
    )
    teacher = _teacher(inputs, network, accelerator)
    if teacher is not None:
        stack.callback(teacher.close)
        notices += teacher.notices
    _refuse_other_teacher_or_cache(inputs, teacher)
    shapes = teacher.target_shapes if teacher else {}
    distiller = build_distiller(config, inputs.data, network, inputs.losses, shapes, accelerator.device)
    distiller.start_recording()
    stack.callback(distiller.stop_recording)
    _claim_directory(inputs, accelerator, stack)
    trackers = Trackers(config, checkpoint=inputs.checkpoint)
    stack.callback(trackers.finish)
    trackers.start(accelerator)
    if accelerator.is_main_process:
        notices += missing_package_notices(config.tracking)
    trainer, resume_notices = _build_trainer(inputs, distiller, teacher, trackers, accelerator)
    for close in (trainer.progress.close, trainer.profiler.close, trainer.checkpoints.writer.close):
        stack.callback(close)
    test = _held_out(inputs, "test", teacher, accelerator)
    notices += resume_notices
    return Run(config, inputs.directory, inputs.data, distiller, trainer, test, teacher, trackers, notices)


def _teacher(inputs: _CheckedInputs, network: nn.Module, accelerator: Accelerator) -> TeacherSetup | None:
    """Set up the teacher, or the teachers, of a run; None without one."""
    config, data, checkpoint = inputs.config, inputs.data, inputs.checkpoint
    if config.teachers:
        return build_ensemble_setup(config, data, network, accelerator=accelerator, checkpoint=checkpoint)
    if config.teacher is None:
        return None
    return build_teacher_setup(config, data, network, inputs.losses, accelerator=accelerator, checkpoint=checkpoint)


def _check_inputs(config: RunConfig, accelerator: Accelerator) -> _CheckedInputs | None:
    """Check run directory, losses, checkpoint, data and schedule, the fastest checks first. Returns None if finished."""
    directory = run_directory(config)
    finished = on_main_process(accelerator, directory.finished_summary)
    losses = build_losses(config)
    if finished is None:
        on_main_process(accelerator, lambda: refuse_missing_trackers(config.tracking))
    resumed_from = None if finished else on_main_process(accelerator, directory.checkpoint_to_resume)
    checkpoint = load_checkpoint(resumed_from) if resumed_from else None
    data = load_data(data_settings(config), accelerator, class_names=unlabeled_class_names(config))
    if finished is not None:
        _refuse_other_finished_run(finished, config, data)
        return None
    if checkpoint is not None:
        fields = data.fingerprint_fields(replaceable=replaceable_samples(checkpoint))
        refuse_other_data(checkpoint.state["data"], fields, where=str(checkpoint.path))
    check_labels(config, data)
    _refuse_absent_test_samples(config, data)
    _refuse_selection_without_samples(config, data)
    loader = build_train_loader(config, data, accelerator)
    schedule = build_schedule(config, steps_per_epoch=loader.steps_per_epoch)
    _refuse_pause_beyond_end(config, schedule.total_steps)
    _refuse_steps_without_teacher(schedule)
    return _CheckedInputs(config, directory, losses, data, loader, schedule, checkpoint)


def _refuse_other_finished_run(finished: Mapping[str, Any], config: RunConfig, data: DataModule) -> None:
    """Raise UserError if the finished run in the directory was trained on other data, or with another teacher."""
    where = str(config.directory)
    refuse_other_data(finished.get("data", {}), {**data.fingerprint_fields(), "test": data.fields_of_test_split()}, where=where)
    fingerprint = fingerprint_of_teachers(config, data)
    # A finished run needs no cache, so that without a teacher there may be nothing to compare.
    if not config.has_teacher or fingerprint is not None:
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


def _refuse_absent_test_samples(config: RunConfig, data: DataModule) -> None:
    """Raise UserError if no test sample is left, so that the training could not be finished."""
    if not len(data.splits.test):
        setting = "data.test_split" if config.data.test_fraction is None else "data.test_fraction"
        value = config.data.test_split if config.data.test_fraction is None else config.data.test_fraction
        remedy = "use a split with readable samples" if config.data.test_fraction is None else "raise it"
        raise UserError(f"{setting}: {value} leaves no test sample, on which the trained model is evaluated; {remedy}")


def _notices_of_epochs(config: RunConfig, schedule: TrainingSchedule) -> list[str]:
    """Return a notice for each setting that takes effect in epochs beyond `train.max_steps` alone."""
    epochs, steps = math.ceil(schedule.total_steps / schedule.steps_per_epoch), config.optim.step_epochs
    reason = f"has no effect, because the training ends in epoch {epochs} (train.max_steps: {config.train.max_steps})"
    found = []
    if config.optim.schedule == "step" and min(steps, default=0) >= epochs:
        found.append(f"optim.step_epochs: {steps} {reason}")
    earliest = earliest_stop(config.train)
    if earliest is not None and earliest >= epochs:
        found.append(f"train.early_stopping_epochs: {config.train.early_stopping_epochs} {reason}")
    return found


def _refuse_steps_without_teacher(schedule: TrainingSchedule) -> None:
    """Raise UserError if the scheduled weights of all teachers are 0 at the same step: they are divided by their sum."""
    if (step := schedule.step_without_teacher()) is not None:
        raise UserError(
            f"teachers: the weights of all of them are 0 at step {step + 1} of {schedule.total_steps}; change the "
            "schedules, so that one of them is above 0 at every step"
        )


def _refuse_selection_without_samples(config: RunConfig, data: DataModule) -> None:
    """Raise UserError for settings that select an epoch, which has no effect without validation samples."""
    settings = {
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "train.early_stopping_epochs": config.train.early_stopping_epochs is not None,
    }
    used = [name for name, is_set in settings.items() if is_set]
    if used and not len(data.splits.val):
        raise UserError(
            f"{' and '.join(used)}: has no effect, because no sample is held out for validation; raise data.val_fraction, or "
            "leave it out"
        )


def _claim_directory(inputs: _CheckedInputs, accelerator: Accelerator, stack: ExitStack) -> None:
    """Lock the run directory from the main process, until `stack` is closed."""
    resumed_from = inputs.checkpoint.path if inputs.checkpoint else None
    lock = on_main_process(accelerator, lambda: inputs.directory.claim(resumed_from=resumed_from))
    if accelerator.is_main_process:
        stack.callback(os.close, lock)


def _build_trainer(
    inputs: _CheckedInputs,
    distiller: Distiller,
    teacher: TeacherSetup | None,
    trackers: Trackers,
    accelerator: Accelerator,
) -> tuple[Trainer, list[str]]:
    """Build the trainer, in the state of the checkpoint if there is one.

    Returns:
        The trainer, and a notice for each thing that differs from an uninterrupted training.
    """
    config, checkpoint = inputs.config, inputs.checkpoint
    train_state = build_train_state(config, distiller, accelerator, has_unlabeled=inputs.data.has_unlabeled)
    notices = [] if checkpoint is None else _restore_checkpoint(train_state, checkpoint, accelerator)
    keep_images_on_gpu(inputs.loader, inputs.data, accelerator.device)
    state, tensors = _checkpoint_extra(inputs, teacher, trackers)
    source = teacher.source if teacher else no_teacher
    trainer = build_trainer(
        config,
        train_state,
        inputs.loader,
        source,
        inputs.schedule,
        accelerator,
        trackers=trackers.all,
        extra_state=state,
        extra_tensors=tensors,
    )
    trainer.note_unreadable = lambda sample: state.update(
        data=inputs.data.fingerprint_fields(replaceable=replaceable_samples(checkpoint, sample))
    )
    if len(inputs.data.splits.val):
        trainer.validation = _held_out(inputs, "val", teacher, accelerator)
    if config.checkpoint.keep_best:
        trainer.best_file = config.directory / BEST_WEIGHTS
        # A training that was killed may have written those of an epoch after the checkpoint.
        trainer.save_best()
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


def _checkpoint_extra(
    inputs: _CheckedInputs, teacher: TeacherSetup | None, trackers: Trackers
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Return the plain values, and the tensors by file name, that each checkpoint holds in addition to the `TrainState`."""
    tensors = teacher.saved_tensors() if teacher else {}
    state = {
        "config": dict(inputs.directory.settings),
        "data": inputs.data.fingerprint_fields(replaceable=replaceable_samples(inputs.checkpoint)),
        "wandb_id": trackers.wandb.run_id,
        "teacher_fingerprint": teacher.fingerprint if teacher else None,
        "cache": teacher.cache if teacher else None,
        "explained": dict(teacher.explained) if teacher else {},
    }
    return state, {"targets": tensors} if tensors else {}
