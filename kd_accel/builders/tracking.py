"""Experiment trackers of a run: W&B and TensorBoard, started with its config, and sent the results of the finished training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_accel.bench.runner import bench_models
from kd_accel.config.schema import BenchConfig, RunConfig, TrackingConfig
from kd_accel.distributed import Accelerator
from kd_accel.errors import describe_error
from kd_accel.io.hashing import settings_digest
from kd_accel.training.checkpoint import Checkpoint
from kd_accel.training.metrics import Tracker
from kd_accel.training.prediction_file import StoredPredictions, load_predictions
from kd_accel.training.tensorboard_tracker import TensorBoardTracker, refuse_missing_tensorboard
from kd_accel.training.wandb_tracker import WandbTracker, project_name, refuse_missing_package

_MOST_CLASSES = 50
"""Number of classes up to which a confusion matrix can be read."""
_LATENCY = BenchConfig(batch_sizes=[1], min_iterations=50, min_time_s=0.5, time_limit_s=10.0)


class Trackers:
    """Trackers of a run. Create them on every rank, for the id in checkpoints; only the main process tracks.

    Args:
        config: Config of the run.
        checkpoint: Checkpoint that the run resumes from; None for a new run. A resumed run continues the same W&B run.
    """

    def __init__(self, config: RunConfig, *, checkpoint: Checkpoint | None) -> None:
        self.wandb = WandbTracker(
            config.tracking,
            run_dir=config.directory,
            name=config.name,
            role=config.shown_role,
            run_id=checkpoint.state["wandb_id"] if checkpoint else None,
        )
        self.tensorboard = TensorBoardTracker(
            Path(config.tracking.dir or config.directory) / "tensorboard", name=_tensorboard_name(config)
        )
        self._config, self._checkpoint = config, checkpoint

    @property
    def all(self) -> tuple[Tracker, ...]:
        """All trackers; those that are disabled ignore what they are sent."""
        return (self.wandb, self.tensorboard)

    def start(self, accelerator: Accelerator) -> None:
        """Start the trackers that the config enables, through Accelerate, on the main process."""
        if not accelerator.is_main_process:
            return
        config = {**self._config.model_dump(mode="json"), "role": self._config.shown_role}

        def init(kwargs: dict[str, Any]) -> Any:
            # Trackers of a failed attempt are still registered, and would be started again.
            accelerator.trackers.clear()
            accelerator.init_trackers(project_name(self._config.tracking), config=config, init_kwargs={"wandb": kwargs})
            return accelerator.get_tracker("wandb", unwrap=True)

        self.wandb.start(init)
        if self._config.tracking.tensorboard:
            self.tensorboard.start(config, step=self._checkpoint.state["position"]["step"] if self._checkpoint else 0)

    def note_results(self, summary: Mapping[str, Any], test_metrics: Mapping[str, float], label_names: Sequence[str]) -> None:
        """Send the results of the finished run to W&B, and its model if that is configured.

        Args:
            summary: Contents of summary.json, which is written, as are the predictions.
            test_metrics: Metrics on the test split. Those in the history are lost if only the test was left to a resumed run:
                W&B drops a line for a step that it has.
            label_names: Class names, by label.
        """
        if not self.wandb.is_enabled:
            return
        directory = self._config.directory
        tested = {f"test/{name}": value for name, value in test_metrics.items() if name != "samples"}
        self.wandb.summarize({**tested, **_summary(summary), **_cost(directory)})
        if (stored := load_predictions(directory)) is not None:
            self._log_errors(stored, label_names)
        if self._config.tracking.log_model:
            self.wandb.log_files([directory / "model.safetensors", directory / "model.json"])

    def _log_errors(self, stored: StoredPredictions, label_names: Sequence[str]) -> None:
        """Log the most confident errors with their images, and the confusion matrix of the labeled samples."""
        predictions, names = stored.predictions, dict(enumerate(label_names))
        teacher = predictions.teacher_predicted
        columns = ["image", "label", "prediction", "score", *(["teacher's prediction"] if teacher is not None else [])]
        rows = [
            [
                image.transpose(1, 2, 0),
                names[predictions.labels[row]],
                names[predictions.predicted[row]],
                float(predictions.scores[row]),
                *([names[teacher[row]]] if teacher is not None else []),
            ]
            for row, image in zip(stored.error_rows.tolist(), stored.error_images, strict=True)
        ]
        self.wandb.log_table("test/errors", columns, rows)
        if len(names) <= _MOST_CLASSES:
            counts = _confusion(predictions.labels, predictions.predicted, len(names))
            matrix = [[name, *row] for name, row in zip(label_names, counts.tolist(), strict=True)]
            self.wandb.log_table("test/confusion_matrix", ["label / prediction", *label_names], matrix)

    def finish(self) -> None:
        """End the tracking."""
        self.wandb.finish()
        self.tensorboard.finish()


def refuse_missing_trackers(config: TrackingConfig) -> None:
    """Raise UserError if a tracker is requested whose package is not installed."""
    refuse_missing_package(config)
    refuse_missing_tensorboard(config)


def _tensorboard_name(config: RunConfig) -> str:
    """Return the name of the run's directory, with a digest of its path where runs of equal names may share `tracking.dir`."""
    name, path = config.directory.name, str(config.directory.absolute())
    return f"{name}-{settings_digest({'run_dir': path})[:8]}" if config.tracking.dir else name


def _summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the row of a run in W&B's table has in addition to the metrics."""
    accuracy, teacher_accuracy = summary["accuracy"], summary["teacher_accuracy"]
    values = {
        "best_val_accuracy": summary["accuracy_best_val"],
        "teacher_accuracy": teacher_accuracy,
        "gap_to_teacher": None if None in (accuracy, teacher_accuracy) else teacher_accuracy - accuracy,
        "parameters": summary["parameters"],
        "data_fingerprint": settings_digest(summary["data"]),
    }
    return {name: value for name, value in values.items() if value is not None}


def _confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the labeled samples by label and prediction, int64 [num_classes, num_classes]."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    labeled = labels >= 0
    np.add.at(counts, (labels[labeled], predicted[labeled]), 1)
    return counts


def _cost(directory: Path) -> dict[str, Any]:
    """Measure the trained model: multiply-adds, and the latency of one image on the device that a deployment would choose."""
    try:
        figures = bench_models([str(directory)], _LATENCY)
    except Exception as error:  # a model that only runs in larger batches, for example; the results are complete
        warnings.warn(f"W&B: the summary lacks the latency ({describe_error(error)})", stacklevel=2)
        return {}
    (model,) = figures["models"]
    if not model["latency"]:  # no forward within the time limit
        return {"macs": model["macs"]}
    return {"macs": model["macs"], "latency_ms": model["latency"][0]["median_ms"], "latency_device": figures["device"]}
