"""What a finished training leaves: the model to deploy, and the summary."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
import torchvision

import kd_accel
from kd_accel.commands.job import TrainingSetup
from kd_accel.commands.networks import card_of
from kd_accel.config.schema import RunConfig, Schedule
from kd_accel.data.datamodule import data_fingerprint
from kd_accel.distributed import on_main_process
from kd_accel.io.files import write_json
from kd_accel.models.weights import save_model
from kd_accel.training.job import Job
from kd_accel.training.wandb_tracker import WandbTracking


def save_results(start: TrainingSetup, job: Job, *, test_metrics: dict[str, float], tracking: WandbTracking) -> None:
    """Write model.safetensors, model.json and, last, summary.json; print the result. The main process writes."""
    position = job.train_state.position
    job.metrics_log.write({"step": position.step, "epoch": position.epoch, "split": "test", **test_metrics})
    on_main_process(start.accelerator, lambda: _save(start, job, test_metrics, tracking))
    job.progress.say(f"{start.config.name}: test accuracy {100 * test_metrics['accuracy']:.2f} % ({start.config.directory})")


def _save(start: TrainingSetup, job: Job, test_metrics: dict[str, float], tracking: WandbTracking) -> None:
    average = job.train_state.average
    network = start.module.student if average is None else average.module
    save_model(start.config.directory, network, card=card_of(start.config, start.data))
    summary = _summary(start, job, test_metrics)
    write_json(summary, start.config.directory / "summary.json")
    tracking.log_table("results", list(_TABLE), [[summary[key] for key in _TABLE]])


_TABLE = ("name", "role", "arch", "accuracy", "parameters")


def _summary(start: TrainingSetup, job: Job, test_metrics: dict[str, float]) -> dict[str, Any]:
    config, position = start.config, job.train_state.position
    student = start.module.student
    return {
        "name": config.name,
        "role": "distilled" if start.teacher_setup else config.role,
        "arch": config.model.arch,
        "stem": config.model.stem,
        "accuracy": test_metrics["accuracy"],
        "accuracy_best_val": position.best_val_accuracy,
        "agreement": test_metrics.get("agreement"),
        "teacher_accuracy": test_metrics.get("teacher_accuracy"),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "steps": position.step,
        "seconds": position.elapsed_s,
        "images_per_second": position.step * config.train.batch_size / max(position.elapsed_s, 1e-9),
        "world_size": start.accelerator.num_processes,
        "precision": config.train.precision,
        "tf32": config.train.tf32 if start.accelerator.device.type == "cuda" else None,
        "device": _device_name(start.accelerator.device),
        "is_scheduled": _is_scheduled(config),
        "source": config.data.source,
        "data": data_fingerprint(start.data),
        "teacher_digest": start.teacher_setup.digest if start.teacher_setup else None,
        "pca_explained": start.teacher_setup.explained if start.teacher_setup else {},
        "versions": {
            "kd_accel": kd_accel.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "commit": _commit(),
    }


def _is_scheduled(config: RunConfig) -> bool:
    """Whether T or alpha changes during the training."""
    distill = config.distill
    return distill is not None and any(isinstance(value, Schedule) for value in (distill.temperature, distill.alpha))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _commit() -> str | None:
    """Of the program's own checkout, where it runs from one."""
    command = ["git", "-C", str(Path(kd_accel.__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
