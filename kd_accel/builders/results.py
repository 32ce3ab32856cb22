"""Results of a finished training: the model files for deployment, the predictions for the test samples, and summary.json."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
import torchvision

import kd_accel
from kd_accel.builders.run import Run
from kd_accel.builders.student import model_card
from kd_accel.config.schema import RunConfig, Schedule
from kd_accel.distributed import on_main_process
from kd_accel.io.files import write_json
from kd_accel.models.weights import save_model
from kd_accel.training.checkpoint import restore_module
from kd_accel.training.prediction_file import save_predictions, with_errors
from kd_accel.training.predictions import PredictionRecorder, Predictions


def save_trained_model(run: Run) -> None:
    """Write model.safetensors and model.json of a finished training, from the main process."""
    accelerator = run.trainer.accelerator
    on_main_process(
        accelerator, lambda: save_model(run.directory.path, run.trainer.network, card=model_card(run.config, run.data))
    )


def evaluate_test(run: Run) -> tuple[dict[str, float], Predictions]:
    """Evaluate the last weights on the test split. Every rank must call it.

    Returns:
        Metrics by name, and the predictions.
    """
    recorder = PredictionRecorder(keeps_probabilities=False)
    metrics = run.trainer.evaluate(run.test, record=recorder)
    return metrics, recorder.gather()


def evaluate_best(run: Run, last: dict[str, float]) -> dict[str, float] | None:
    """Evaluate the weights of the best epoch on the test split, once at the end. Every rank must call it.

    The network has these weights afterwards.

    Args:
        run: The run, after its training.
        last: Metrics of the last weights on the test split.

    Returns:
        Metrics by name; None without `checkpoint.keep_best`.
    """
    train_state, trainer = run.trainer.train_state, run.trainer
    if train_state.best is None:
        return None
    if train_state.position.best_epoch == train_state.position.epoch:
        return last
    restore_module(trainer.network, train_state.best)
    return trainer.evaluate(run.test)


def save_results(
    run: Run,
    test_metrics: dict[str, float],
    predictions: Predictions,
    best_metrics: dict[str, float] | None = None,
) -> None:
    """Write predictions and summary.json, the last file of a run, from the main process, and print the test accuracy.

    Without labels, the agreement with the teacher is printed instead.

    Args:
        run: The run, after its training.
        test_metrics: Metrics on the test split by name; accuracies are fractions of 1.
        predictions: Predictions for the test split.
        best_metrics: Those of the weights of the best epoch; None if they are not kept.
    """
    position, trainer = run.trainer.train_state.position, run.trainer
    trainer.metrics_log.write({"step": position.step, "epoch": position.epoch, "split": "test", **test_metrics})
    summary = {**_summary(run, test_metrics), **_selection(run, best_metrics)}
    on_main_process(trainer.accelerator, lambda: _save(run, summary, predictions))
    if trainer.accelerator.is_main_process:
        # After the collective: no other process waits for a tracker.
        run.trackers.note_results(summary, test_metrics, run.data.label_names)
    name = "accuracy" if "accuracy" in test_metrics else "agreement"
    text = f"test {name} {100 * test_metrics[name]:.2f} %" + ("" if name == "accuracy" else " with the teacher")
    if best_metrics is not None:
        text += f", {100 * best_metrics[name]:.2f} % with the weights of the best epoch, {position.best_epoch}"
    trainer.progress.say(f"{run.config.name}: {text} ({run.directory.path})")


def _selection(run: Run, best_metrics: dict[str, float] | None) -> dict[str, Any]:
    """Return what summary.json holds about the best epoch; nothing for a run that does not select one."""
    position, selection = run.trainer.train_state.position, dict[str, Any]()
    if best_metrics is not None:
        selection |= {"accuracy_best": best_metrics.get("accuracy"), "agreement_best": best_metrics.get("agreement")}
    if run.config.train.early_stopping_epochs is not None:
        selection["stopped_early_after_epoch"] = position.epoch if position.stopped_early else None
    return {"best_epoch": position.best_epoch, **selection} if selection else {}


def _save(run: Run, summary: dict[str, Any], predictions: Predictions) -> None:
    save_predictions(run.directory.path, with_errors(predictions, run.data.test.pixels))
    write_json(summary, run.directory.path / "summary.json")


def _summary(run: Run, test_metrics: dict[str, float]) -> dict[str, Any]:
    config, position, accelerator = run.config, run.trainer.train_state.position, run.trainer.accelerator
    return {
        "name": config.name,
        "role": config.shown_role,
        "arch": config.model.arch,
        "stem": config.model.stem,
        "accuracy": test_metrics.get("accuracy"),
        "accuracy_best_val": position.best_val_accuracy,
        "agreement": test_metrics.get("agreement"),
        "teacher_accuracy": test_metrics.get("teacher_accuracy"),
        "parameters": sum(parameter.numel() for parameter in run.distiller.student.parameters()),
        "steps": position.step,
        "seconds": position.elapsed_s,
        "images_per_second": position.step * config.train.batch_size / max(position.elapsed_s, 1e-9),
        "world_size": accelerator.num_processes,
        "precision": config.train.precision,
        "tf32": config.train.tf32 if accelerator.device.type == "cuda" else None,
        "cpu_kernels": config.train.cpu_kernels,
        "device": _device_name(accelerator.device),
        "is_scheduled": _is_scheduled(config),
        "source": run.directory.settings["data"]["source"],
        "data": {**run.data.fingerprint_fields(), "test": run.data.fields_of_test_split()},
        "teacher_fingerprint": run.teacher.fingerprint if run.teacher else None,
        "explained": dict(run.teacher.explained) if run.teacher else {},
        "versions": {
            "kd_accel": kd_accel.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "commit": _commit(),
    }


def _is_scheduled(config: RunConfig) -> bool:
    """Return whether the temperature or alpha follows a schedule."""
    distill = config.distill
    return distill is not None and any(isinstance(value, Schedule) for value in (distill.temperature, distill.alpha))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _commit() -> str | None:
    """Return the git commit of the checkout that contains the package; None if it is not in a checkout or git is missing."""
    command = ["git", "-C", str(Path(kd_accel.__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
