"""Whole trainings from Python: what the commands `train` and `evaluate` do, as functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_accel.commands.evaluate import evaluate_run
from kd_accel.commands.train import run_training
from kd_accel.config.fields import flatten
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.data.splits import HeldOutSplit
from kd_accel.errors import UserError
from kd_accel.io.files import read_json
from kd_accel.models.predictor import Model, load_model


@dataclass(frozen=True)
class RunResult:
    """A finished training.

    Args:
        directory: of the run.
        summary: content of summary.json: accuracies, parameters, steps, versions.
    """

    directory: Path
    summary: dict[str, Any]

    def load_model(self) -> Model:
        """Load the trained model."""
        return load_model(self.directory)


def train(config: RunConfig | str | Path | Mapping[str, Any], **settings: Any) -> RunResult:
    """Train, or resume a training that was stopped.

    Args:
        config: a config, the path of a YAML file, or nested settings.
        settings: single settings by dotted name that override the config, as `**{"optim.lr": 0.05}`.

    Returns:
        The finished run.

    Raises:
        ValueError: a setting, the data or a file is not valid (`UserError`).
    """
    built, _ = parse_config(RunConfig, [*_flags(config), *_flags(settings)])
    run_training(built)
    if not (built.directory / "summary.json").is_file():
        raise UserError("checkpoint.stop_after_steps: the training is paused, so it has no result; train without it to finish")
    return RunResult(built.directory, read_json(built.directory / "summary.json", remedy="train the run again"))


def evaluate(run: str | Path, *, split: HeldOutSplit = "test") -> dict[str, Any]:
    """Evaluate a finished run on a held-out split: samples, loss, accuracy and, for a distilled run, agreement."""
    return evaluate_run(Path(run), split=split)


def _flags(config: RunConfig | str | Path | Mapping[str, Any]) -> list[str]:
    """Return the command-line flags that stand for a config, so that both entrances parse and check alike."""
    if isinstance(config, str | Path):
        return [f"--config={config}"]
    settings = config.model_dump(mode="json") if isinstance(config, RunConfig) else config
    if not isinstance(settings, Mapping):
        raise TypeError(f"config: must be a RunConfig, a path or a mapping, not {type(config).__name__}")
    values = flatten(settings).items()
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values]
