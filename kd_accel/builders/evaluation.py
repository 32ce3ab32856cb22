"""Evaluation of a finished run: its model, data and teacher, from its directory and a config, on a held-out split."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kd_accel.builders.agreement import agreement_source
from kd_accel.builders.header import evaluation_header, header_text
from kd_accel.builders.trainer import build_held_out
from kd_accel.config.data_schema import DataConfig
from kd_accel.config.fields import flatten
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import DataModule
from kd_accel.data.held_out import load_held_out
from kd_accel.data.splits import HeldOutSplit
from kd_accel.distributed import Accelerator, launch_notices, leave_processes, peers_needed, start_processes
from kd_accel.errors import IneffectiveSetting
from kd_accel.io.safe_yaml import load_yaml_file
from kd_accel.models.inference import choose_kernels, image_memory_format, use_cpu_kernels
from kd_accel.models.preprocess import Normalize
from kd_accel.models.weights import load_run_model
from kd_accel.training.classification import classification_metrics
from kd_accel.training.evaluation import evaluate
from kd_accel.training.predictions import PredictionRecorder, Predictions


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a finished run.

    Attributes:
        metrics: Metrics by name; see `kd_accel.evaluate`.
        predictions: Predictions for the samples of the split, with all probabilities only if these were asked for.
        label_names: Class names, by label.
        paths: Path of each sample's image file; None if the source has no files.
        accelerator: Accelerator of the launch.
    """

    metrics: dict[str, Any]
    predictions: Predictions
    label_names: tuple[str, ...]
    paths: list[str] | None
    accelerator: Accelerator

    def table(self, run: str) -> dict[str, Any]:
        """Return the columns of the predictions, with `run` in each row, for `write_predictions`."""
        predictions, nothing = self.predictions, [None] * len(self.predictions.index)
        teacher = predictions.teacher_predicted
        return {
            "run": [run] * len(predictions.index),
            "index": predictions.index,
            "path": nothing if self.paths is None else self.paths,
            "label": self._named(predictions.labels),
            "prediction": self._named(predictions.predicted),
            "score": predictions.scores,
            "probabilities": predictions.probabilities,
            "teacher_prediction": nothing if teacher is None else self._named(teacher),
        }

    def _named(self, classes: np.ndarray) -> list[str | None]:
        """Return the names of classes, int64 [N]; None for a sample without a label."""
        return [self.label_names[label] if label >= 0 else None for label in classes.tolist()]


def evaluate_run(
    directory: Path,
    config: RunConfig,
    *,
    split: HeldOutSplit,
    has_header: bool = False,
    keeps_probabilities: bool = False,
) -> Evaluation:
    """Evaluate a finished run on a held-out split. Every rank must call it.

    Args:
        directory: Run directory.
        config: Config of the run, or one with other data or another teacher.
        split: Held-out split.
        has_header: Whether a header is printed on stderr.
        keeps_probabilities: Whether the predictions have the probabilities of all classes.

    Raises:
        UserError: If the directory has no finished run, its data or teacher is not found, or the data has other classes.
    """
    network, card = load_run_model(directory, field="evaluate")
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(config.train.precision)
    settings = {"mean": card.mean, "std": card.std, "image_size": card.image_size}
    config = config.model_copy(update={"data": config.data.model_copy(update=settings)})
    with peers_needed(accelerator, lambda: "while the data were read"):
        config, data = _load_data(directory, config, split, card.label_names, accelerator)
    use_cpu_kernels(network, accelerator.device, config.train.cpu_kernels)
    network.to(accelerator.device)
    memory_format = image_memory_format(config.train.channels_last, accelerator.device)
    normalize = Normalize(card.mean, card.std, memory_format=memory_format).to(accelerator.device)
    recorder = PredictionRecorder(keeps_probabilities=keeps_probabilities)

    def forward(images: Tensor) -> Tensor:
        return network(normalize(images))

    with peers_needed(accelerator, lambda: "during the evaluation"), ExitStack() as stack:
        stack.callback(data.batch_loader.close)
        source, notices = agreement_source(config, data, split, accelerator, stack)
        if has_header:
            header = evaluation_header(directory, config, data, split, network, accelerator)
            _print_notices([header_text(header), *launch_notices(accelerator)], accelerator)
        _print_notices([*data.notices_of(split), *notices], accelerator)
        held_out = build_held_out(config, data, split, source, accelerator)
        metrics = evaluate(forward, held_out, accelerator=accelerator, record=recorder)
        found = recorder.gather()
    leave_processes(accelerator)
    more = classification_metrics(found.labels, found.predicted, found.scores, found.label_ranks, card.label_names)
    paths = _paths(data.parts()[split].images.paths, found.index)
    return Evaluation({**metrics, **more}, found, tuple(card.label_names), paths, accelerator)


def _load_data(
    directory: Path, config: RunConfig, split: HeldOutSplit, label_names: Sequence[str], accelerator: Accelerator
) -> tuple[RunConfig, DataModule]:
    """Load the data of an evaluation.

    Returns:
        The config without the settings of the run's own data that have no effect on the other data, and the data.
    """
    stored = flatten(load_yaml_file(directory / "config.yaml"))
    while True:
        try:
            return config, load_held_out(config.data, split, label_names, accelerator)
        except IneffectiveSetting as error:
            name = error.setting.removeprefix("data.")
            value, default = getattr(config.data, name), DataConfig.model_fields[name].default
            if value in (default, None) or stored.get(error.setting) != value:
                raise
            config = config.model_copy(update={"data": config.data.model_copy(update={name: default})})


def _paths(all_paths: Sequence[str] | None, index: np.ndarray) -> list[str] | None:
    return None if all_paths is None else [all_paths[sample] for sample in index.tolist()]


def _print_notices(notices: Iterable[str], accelerator: Accelerator) -> None:
    """Print notices on stderr, because stdout has the result alone."""
    if accelerator.is_main_process:
        for notice in notices:
            print(notice, file=sys.stderr, flush=True)
