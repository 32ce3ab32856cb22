"""Results of a finished training: the model files for deployment, and summary.json."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
import torchvision

import kd_accel
from kd_accel.builders.run import Run, role, trained_network
from kd_accel.builders.student import model_card
from kd_accel.config.schema import RunConfig, Schedule
from kd_accel.distributed import on_main_process
from kd_accel.io.files import write_json
from kd_accel.models.weights import save_model

_TABLE_COLUMNS = ("name", "role", "arch", "accuracy", "parameters")


def save_trained_model(run: Run) -> None:
    """Write model.safetensors and model.json of a finished training, from the main process."""
    accelerator = run.trainer.accelerator
    on_main_process(
        accelerator, lambda: save_model(run.directory.path, trained_network(run), card=model_card(run.config, run.data))
    )


def save_summary(run: Run, test_metrics: dict[str, float]) -> None:
    """Write summary.json, the last file of a run, from the main process, and print the test accuracy or agreement.

    Args:
        run: The run, after its training.
        test_metrics: Metrics on the test split by name; accuracies are fractions of 1.
    """
    position, trainer = run.trainer.train_state.position, run.trainer
    trainer.metrics_log.write({"step": position.step, "epoch": position.epoch, "split": "test", **test_metrics})
    on_main_process(trainer.accelerator, lambda: _save(run, test_metrics))
    name = "accuracy" if "accuracy" in test_metrics else "agreement"
    text = f"test {name} {100 * test_metrics[name]:.2f} %" + ("" if name == "accuracy" else " with the teacher")
    trainer.progress.say(f"{run.config.name}: {text} ({run.directory.path})")


def _save(run: Run, test_metrics: dict[str, float]) -> None:
    summary = _summary(run, test_metrics)
    write_json(summary, run.directory.path / "summary.json")
    run.tracker.log_table("results", list(_TABLE_COLUMNS), [[summary[key] for key in _TABLE_COLUMNS]])


def _summary(run: Run, test_metrics: dict[str, float]) -> dict[str, Any]:
    config, position, accelerator = run.config, run.trainer.train_state.position, run.trainer.accelerator
    return {
        "name": config.name,
        "role": role(config),
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
