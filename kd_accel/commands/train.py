"""`kd-accel train`: the course of one training, from the config to the results.

Out: the run directory: config.yaml, metrics.jsonl, checkpoints/, model.safetensors, model.json and summary.json, which is
written last, so that its presence means that the run is finished.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from kd_accel.commands.job import TrainingSetup, build_job, plan_schedule, start_tracking
from kd_accel.commands.networks import build_network, wrap_student
from kd_accel.commands.results import save_results
from kd_accel.commands.teacher import load_teacher
from kd_accel.commands.teacher_setup import build_teacher_setup
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import Data, data_fingerprint, load_data, notices_of_small_batches
from kd_accel.distributed import (
    Accelerator,
    leave_processes,
    on_main_process,
    peers_needed,
    start_processes,
)
from kd_accel.errors import Preempted
from kd_accel.models.kernels import choose_kernels
from kd_accel.training.checkpoint import load_checkpoint
from kd_accel.training.evaluation import held_out, teacher_accuracy
from kd_accel.training.run_dir import (
    checkpoint_to_resume,
    claim,
    finished_summary,
    keep_config,
    refuse_other_cache,
    refuse_other_data,
    refuse_other_teacher,
)
from kd_accel.training.trainer import measure, train
from kd_accel.training.wandb_tracker import refuse_missing_package, tracker_name


def run_training(config: RunConfig) -> None:
    """Train what the config says, or go on where it stopped. Raises UserError for what the user can mend."""
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(
        config.train.precision, seed=config.seed, track_with=tracker_name(config.tracking), timeout_s=config.train.timeout_s
    )
    try:
        with peers_needed(accelerator, lambda: "outside of the steps"):
            _resume_or_start(config, accelerator)
    except Preempted:
        leave_processes(accelerator)
        raise
    leave_processes(accelerator)


def _resume_or_start(config: RunConfig, accelerator: Accelerator) -> None:
    finished = on_main_process(accelerator, lambda: finished_summary(config))
    if finished is None:
        on_main_process(accelerator, lambda: refuse_missing_package(config.tracking))
    resumed_from = None if finished else on_main_process(accelerator, lambda: checkpoint_to_resume(config))
    checkpoint = load_checkpoint(resumed_from) if resumed_from else None
    data = load_data(config.data)
    if finished is not None:
        _refuse_another_run(finished, config, data)
        accelerator.print(f"{config.name}: finished already ({config.directory}); nothing to do")
        return
    if checkpoint is not None:
        refuse_other_data(checkpoint.state["data"], data_fingerprint(data), where=str(checkpoint.path))
    loader, schedule = plan_schedule(
        config, data, accelerator
    )  # first: what it refuses needs no teacher and leaves nothing behind
    network, notices = build_network(config, data)
    notices += notices_of_small_batches(config, accelerator.device, processes=accelerator.num_processes)
    with ExitStack() as stack:
        teacher_setup = None
        if config.teacher is not None:
            teacher_setup = build_teacher_setup(config, data, network, accelerator=accelerator, checkpoint=checkpoint)
            stack.callback(teacher_setup.close)
            notices = [*notices, *teacher_setup.notices]
        if checkpoint is not None:
            refuse_other_teacher(checkpoint.state, teacher_setup.digest if teacher_setup else None, where=str(checkpoint.path))
            refuse_other_cache(checkpoint, teacher_setup.cache if teacher_setup else None)
        module = wrap_student(
            network, config, data, accelerator.device, projectors=teacher_setup.projectors if teacher_setup else None
        )
        module.start_recording()
        stack.callback(module.stop_recording)
        _train_and_save(
            TrainingSetup(config, data, loader, schedule, module, teacher_setup, checkpoint, accelerator, notices), stack
        )


def _refuse_another_run(finished: dict[str, Any], config: RunConfig, data: Data) -> None:
    """What was trained on other data, or by another teacher, is not what this config asks for."""
    where = str(config.directory)
    refuse_other_data(finished.get("data", {}), data_fingerprint(data), where=where)
    digest = load_teacher(config.teacher, data).digest if config.teacher else None
    refuse_other_teacher(finished, digest, where=where)


def _train_and_save(start: TrainingSetup, stack: ExitStack) -> None:
    config, accelerator = start.config, start.accelerator
    resumed_from = start.checkpoint.path if start.checkpoint else None
    held = on_main_process(accelerator, lambda: claim(config, resumed_from=resumed_from))
    if accelerator.is_main_process:
        stack.callback(os.close, held)
    teacher = start.teacher_setup.held_out("test") if start.teacher_setup else None
    test = held_out(start.data, config, accelerator, split="test", teacher=teacher)
    of_teacher = {}
    if start.teacher_setup:
        of_teacher["teacher_accuracy"] = accuracy = teacher_accuracy(test, accelerator=accelerator)
        accelerator.print(f"{config.name}: the teacher's accuracy on the test samples is {100 * accuracy:.2f} %")
    tracking = start_tracking(start)
    stack.callback(tracking.finish)
    job = build_job(start, tracking)
    stack.callback(job.progress.close)
    stack.callback(job.profiler.close)
    stack.callback(job.writer.close)
    on_main_process(accelerator, lambda: keep_config(config))
    for notice in start.notices:
        job.progress.say(f"{config.name}: {notice}")
    with job.preemption.listening(), peers_needed(accelerator, lambda: f"after step {job.train_state.position.step}"):
        train(job)
    if not job.is_done:
        job.progress.say(f"{config.name}: paused after step {job.train_state.position.step}; start it again to go on")
        return
    if start.teacher_setup:
        start.teacher_setup.check_unchanged()
    save_results(start, job, test_metrics={**measure(job, test), **of_teacher}, tracking=tracking)
