"""`kd-accel train`: the course of one training, from the config to the results.

Out: the run directory: config.yaml, metrics.jsonl, checkpoints/, model.safetensors, model.json and summary.json, which is
written last, so that its presence means that the run is finished.
"""

from __future__ import annotations

from contextlib import ExitStack

from kd_accel.commands.data import data_identity, held_out, load_data
from kd_accel.commands.job import Prepared, build_job, start_tracking
from kd_accel.commands.networks import build_network, wrap_student
from kd_accel.commands.results import save_results
from kd_accel.commands.run_directory import checkpoint_to_resume, is_finished, refuse_other_data, refuse_other_teacher
from kd_accel.commands.teaching import build_teaching, check_teacher_accuracy
from kd_accel.config import RunConfig
from kd_accel.engine.checkpoint import load_checkpoint
from kd_accel.engine.setup import Accelerator, leave_processes, on_main_process, set_kernel_choice, start_processes
from kd_accel.engine.train import measure, train
from kd_accel.parse import save_config


def run_training(config: RunConfig) -> None:
    """Train what the config says, or go on where it stopped. Raises UserError for what the user can mend."""
    set_kernel_choice(config.train)  # before CUDA starts: it reads CUBLAS_WORKSPACE_CONFIG then
    accelerator = start_processes(config.train.precision, seed=config.seed, track_with="wandb")
    _resume_or_start(config, accelerator)
    leave_processes(accelerator)


def _resume_or_start(config: RunConfig, accelerator: Accelerator) -> None:
    resumed_from = on_main_process(accelerator, lambda: checkpoint_to_resume(config))
    checkpoint = load_checkpoint(resumed_from) if resumed_from else None
    data = load_data(config.data)
    if checkpoint is not None:
        refuse_other_data(checkpoint, data_identity(data))
    network, notices = build_network(config, data)
    with ExitStack() as stack:
        teaching = None
        if config.teacher is not None:
            teaching = build_teaching(config, data, network, accelerator=accelerator, checkpoint=checkpoint)
            stack.callback(teaching.close)
            notices = [*notices, *teaching.notices]
        if checkpoint is not None:
            refuse_other_teacher(checkpoint, teaching.digest if teaching else None, cache=teaching.cache if teaching else None)
        if on_main_process(accelerator, lambda: is_finished(config)):
            accelerator.print(f"{config.name}: finished already ({config.directory}); nothing to do")
            return
        module = wrap_student(network, config, data, projectors=teaching.projectors if teaching else None)
        module.open_taps()
        stack.callback(module.close_taps)
        _train_and_save(Prepared(config, data, module, teaching, checkpoint, accelerator, notices), stack)


def _train_and_save(start: Prepared, stack: ExitStack) -> None:
    config, accelerator = start.config, start.accelerator
    if accelerator.is_main_process:
        config.directory.mkdir(parents=True, exist_ok=True)
        save_config(config, config.directory / "config.yaml")
    accelerator.wait_for_everyone()
    signals = start.teaching.held_out("test") if start.teaching else None
    test = held_out(start.data, config, accelerator, split="test", signals=signals)
    if start.teaching:
        accuracy = check_teacher_accuracy(config, start.data, test, digest=start.teaching.digest, accelerator=accelerator)
        accelerator.print(f"{config.name}: the teacher's accuracy on the test rows is {100 * accuracy:.2f} %")
    tracking = start_tracking(start)
    stack.callback(tracking.finish)
    job = build_job(start, tracking)
    stack.callback(job.progress.close)
    for notice in start.notices:
        job.progress.say(f"{config.name}: {notice}")
    train(job)
    if not job.is_done:
        job.progress.say(f"{config.name}: paused after step {job.trainee.position.step}; start it again to go on")
        return
    if start.teaching:
        start.teaching.check_unchanged()
    save_results(start, job, test_metrics=measure(job, test), tracking=tracking)
