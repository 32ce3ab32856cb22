"""`kd-accel train`: data, models, teacher and loss of one config, put together and run to the end.

Out: the run directory: config.yaml, metrics.jsonl, checkpoints/, model.safetensors, model.json and summary.json, which is
written last, so that its presence means that the run is finished.
"""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kd_accel
from kd_accel.commands.course import build_course
from kd_accel.commands.data import Data, held_out, load_data, training_loader
from kd_accel.commands.networks import build_network, wrap_student
from kd_accel.commands.run_directory import checkpoint_to_resume, is_finished, refuse_other_teacher
from kd_accel.commands.teaching import Teaching, build_teaching, check_teacher_accuracy
from kd_accel.config import RunConfig
from kd_accel.engine.checkpoint import Checkpoint, load_checkpoint
from kd_accel.engine.journal import Journal
from kd_accel.engine.meters import Meters
from kd_accel.engine.optim import build_optimizer
from kd_accel.engine.progress import Progress
from kd_accel.engine.setup import on_main_process, set_kernel_choice, start_processes
from kd_accel.engine.state import Trainee, restore
from kd_accel.engine.train import Job, measure, train
from kd_accel.models.files import ModelCard, save_model
from kd_accel.parse import save_config
from kd_accel.report.tracking import WandbTracking
from kd_accel.types import no_signals


def run_training(config: RunConfig) -> None:
    """Train what the config says, or go on where it stopped. Raises UserError for what the user can mend."""
    accelerator = start_processes(config.train.precision, seed=config.seed, track_with="wandb")
    set_kernel_choice(config.train)
    resumed_from = on_main_process(accelerator, lambda: checkpoint_to_resume(config))
    checkpoint = load_checkpoint(resumed_from) if resumed_from else None
    data = load_data(config.data)
    network, notices = build_network(config, data)
    with ExitStack() as stack:
        teaching = None
        if config.teacher is not None:
            teaching = build_teaching(config, data, network, accelerator=accelerator, checkpoint=checkpoint)
            stack.callback(teaching.signals.close)
            notices = [*notices, *teaching.notices]
        if checkpoint is not None:
            refuse_other_teacher(checkpoint, teaching.digest if teaching else None)
        if on_main_process(accelerator, lambda: is_finished(config)):
            accelerator.print(f"{config.name}: finished already ({config.directory}); nothing to do")
            return
        module = wrap_student(network, config, data, projectors=teaching.projectors if teaching else None)
        module.open_taps()
        stack.callback(module.close_taps)
        _train_and_save(_Start(config, data, module, teaching, checkpoint, accelerator, notices), stack)
    accelerator.end_training()


@dataclass(frozen=True)
class _Start:
    """What is there before the first step."""

    config: RunConfig
    data: Data
    module: StudentModule
    teaching: Teaching | None
    checkpoint: Checkpoint | None
    accelerator: Accelerator
    notices: list[str]

    @property
    def signals(self) -> SignalSource:
        return self.teaching.signals if self.teaching else no_signals


def _train_and_save(start: _Start, stack: ExitStack) -> None:
    config, accelerator = start.config, start.accelerator
    if accelerator.is_main_process:
        config.directory.mkdir(parents=True, exist_ok=True)
        save_config(config, config.directory / "config.yaml")
    accelerator.wait_for_everyone()
    signals = start.signals if start.teaching else None
    test = held_out(start.data, config, accelerator, split="test", signals=signals)
    if start.teaching:
        accuracy = check_teacher_accuracy(
            config, start.data, test, digest=start.teaching.digest, accelerator=accelerator
        )
        accelerator.print(f"{config.name}: the teacher's accuracy on the test rows is {100 * accuracy:.2f} %")
    tracking = _start_tracking(start)
    stack.callback(tracking.finish)
    job = _build_job(start, tracking)
    stack.callback(job.progress.close)
    for notice in start.notices:
        job.progress.say(f"{config.name}: {notice}")
    train(job)
    if not job.is_done:
        job.progress.say(f"{config.name}: paused after step {job.trainee.position.step}; start it again to go on")
        return
    if start.teaching:
        start.teaching.signals.check_unchanged()
    _save_results(start, job, measure(job, test), tracking)


def _start_tracking(start: _Start) -> WandbTracking:
    """W&B on the main process, through Accelerate's tracker; a resumed run goes on in the same W&B run."""
    config, accelerator = start.config, start.accelerator
    tracking = WandbTracking(
        config.tracking,
        run_dir=config.directory,
        name=config.name,
        settings=asdict(config),
        run_id=start.checkpoint.state["wandb_id"] if start.checkpoint else None,
    )
    if accelerator.is_main_process:
        tracking.start(lambda kwargs: _wandb_run(accelerator, config, kwargs))
    return tracking


def _wandb_run(accelerator: Accelerator, config: RunConfig, kwargs: dict[str, Any]) -> Any:
    accelerator.init_trackers(config.tracking.project, config=asdict(config), init_kwargs={"wandb": kwargs})
    return accelerator.get_tracker("wandb", unwrap=True)


def _build_job(start: _Start, tracking: WandbTracking) -> Job:
    config, accelerator = start.config, start.accelerator
    loader = training_loader(start.data, config, accelerator)
    course = build_course(config, steps_per_epoch=loader.steps_per_epoch)
    trainee, notices = _build_trainee(start)
    start.notices.extend(notices)
    journal = Journal(config.directory / "metrics.jsonl", is_main=accelerator.is_main_process, tracker=tracking)
    journal.start(start.checkpoint.state["metrics_bytes"] if start.checkpoint else 0)
    feature = config.distill.feature if config.distill else None
    return Job(
        accelerator=accelerator,
        train=config.train,
        checkpoint=config.checkpoint,
        trainee=trainee,
        loader=loader,
        signals=start.signals,
        course=course,
        journal=journal,
        progress=Progress(
            config.name,
            total_steps=course.total_steps,
            done_steps=trainee.position.step,
            is_main=accelerator.is_main_process,
        ),
        checkpoint_dir=config.directory / "checkpoints",
        checkpoint_extra=_checkpoint_extra(start, tracking),
        validation=_validation(start),
        logs_target_variance=feature is not None and feature.teacher_projector == "learned",
    )
