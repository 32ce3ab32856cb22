"""`kd-accel train`: one training, from the config to the results.

Output: the run directory with config.yaml, metrics.jsonl, checkpoints/, model.safetensors, model.json and summary.json.
summary.json is written last: a run directory with it is a finished run.
"""

from __future__ import annotations

from contextlib import ExitStack

from kd_accel.builders.ensemble import errors_of_teacher
from kd_accel.builders.header import described_teachers, header_text, start_notices, training_header
from kd_accel.builders.results import evaluate_best, evaluate_test, save_results, save_trained_model
from kd_accel.builders.run import Run, build_run
from kd_accel.config.ensemble_rules import of_teacher
from kd_accel.config.schema import RunConfig
from kd_accel.distributed import Accelerator, leave_processes, on_main_process, peers_needed, start_processes
from kd_accel.errors import Preempted, UnreadableImage
from kd_accel.models.inference import choose_kernels
from kd_accel.teacher.accuracy import check_accuracy
from kd_accel.training.evaluation import member_accuracies, teacher_accuracy
from kd_accel.training.wandb_tracker import tracker_name


def run_training(config: RunConfig) -> None:
    """Train as configured, or resume from the latest checkpoint.

    Raises:
        UserError: If a setting, the data or a file is not valid.
        Preempted: If a signal has stopped the training, after a checkpoint.
    """
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    tracker, timeout_s = tracker_name(config.tracking), config.train.timeout_s
    accelerator = start_processes(config.train.precision, seed=config.seed, track_with=tracker, timeout_s=timeout_s)
    try:
        with peers_needed(accelerator, lambda: "outside of the steps"), ExitStack() as stack:
            run = build_run(config, accelerator, stack)
            if run is None:
                accelerator.print(f"{config.name}: finished already ({config.directory}); nothing to do")
                return
            known = _announce(run, accelerator)
            trainer = run.trainer
            with trainer.preemption.installed(), peers_needed(accelerator, lambda: _place(run)):
                trainer.fit()
            _finish(run, known)
    except Preempted:
        leave_processes(accelerator)
        raise
    leave_processes(accelerator)


def _place(run: Run) -> str:
    return f"after step {run.trainer.train_state.position.step}"


def _announce(run: Run, accelerator: Accelerator) -> dict[str, float]:
    """Print header and notices, and write config.yaml. Returns the teacher's accuracy; empty without a teacher."""
    config, known = run.config, {}
    run.trainer.progress.say(header_text(training_header(run)))
    accuracy = teacher_accuracy(run.test, accelerator=accelerator) if run.teacher else None
    accuracies: dict[str, float] = {}
    if accuracy is not None:
        known["teacher_accuracy"] = accuracy
        labels = run.data.test.labels[run.data.splits.test]
        accuracies = member_accuracies(run.test, labeled=int((labels >= 0).sum()), accelerator=accelerator)
        for name, own in config.by_teacher().items():
            assert own.teacher is not None, "each of these configs has a teacher"
            with errors_of_teacher(name):
                notices = check_accuracy(accuracies.get(name, accuracy), labels, own.teacher.min_accuracy)
            run.notices.extend(of_teacher(notice, name) for notice in notices)
    # Only now, because a live teacher may take minutes on the test samples, and the other lines are useful before.
    run.trainer.progress.say(header_text({"teacher": described_teachers(config, accuracies, accuracy)}))
    on_main_process(accelerator, run.directory.write_config)
    for notice in [*start_notices(config, accelerator), *run.notices]:
        run.trainer.progress.say(f"{config.name}: {notice}")
    return known


def _finish(run: Run, known: dict[str, float]) -> None:
    """Save the model, evaluate on the test split, and save the results, unless the training is only paused."""
    trainer = run.trainer
    if not trainer.is_done:
        trainer.progress.say(f"{run.config.name}: paused {_place(run)}; run the same command again to resume")
        return
    position = trainer.train_state.position
    if position.stopped_early:
        trainer.progress.say(
            f"{run.config.name}: stopped early after epoch {position.epoch} of {run.config.train.epochs}: the best validation "
            f"result is that of epoch {position.best_epoch}"
        )
    if run.teacher:
        run.teacher.check_unchanged()
    # Before the evaluation, so that a bad test image does not lose the training.
    save_trained_model(run)
    try:
        test_metrics, predictions = evaluate_test(run)
        best_metrics = evaluate_best(run, test_metrics)
    except UnreadableImage as error:
        raise error.with_remedy(
            f"the training is complete, and its model is in {run.directory.path}. Restore or remove the image, or set "
            "data.on_error to skip, then run the same command again, which only evaluates on the test samples"
        ) from None
    save_results(run, {**test_metrics, **known}, predictions, best_metrics)
