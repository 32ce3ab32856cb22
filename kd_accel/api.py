"""Python API of the commands `train` and `evaluate`."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from kd_accel.builders.evaluation import evaluate_run
from kd_accel.commands.train import run_training
from kd_accel.config.evaluation import build_evaluation
from kd_accel.config.parsing import build_config
from kd_accel.config.schema import RunConfig
from kd_accel.config.wandb_sweep import as_trial_of_agent
from kd_accel.data.splits import HeldOutSplit
from kd_accel.distributed import accelerate_state_restored
from kd_accel.errors import UserError
from kd_accel.io.files import read_json
from kd_accel.losses.registry import names
from kd_accel.models.predictor import Model, load_model


@dataclass(frozen=True)
class RunResult:
    """A finished training.

    Attributes:
        directory: Run directory.
        summary: Content of summary.json, such as accuracies, number of parameters, steps and versions.
    """

    directory: Path
    summary: dict[str, Any]

    def load_model(self) -> Model:
        """Load the trained model."""
        return load_model(self.directory)


def train(config: RunConfig | str | Path | Mapping[str, Any], **settings: Any) -> RunResult:
    """Train, or resume a training that was stopped. A finished run is returned without further training.

    The run directory is identical to that of `kd-accel train` with the same settings. In a launch of several processes every
    process must call this function.

    Args:
        config: A config, the path of a YAML file, or nested settings.
        settings: Settings by dotted name that override those of the config, such as `**{"optim.lr": 0.05}`.

    Returns:
        The finished run.

    Raises:
        TypeError: If `config` has another type.
        ValueError: If a setting, the data or a file is not valid (`UserError`).
        Preempted: If a signal has stopped the training after a checkpoint; the same call resumes it.
    """
    if not isinstance(config, RunConfig | str | Path | Mapping):
        raise TypeError(f"config: must be a RunConfig, a path or a mapping, not {type(config).__name__}")
    source = _with_text_paths(config) if isinstance(config, Mapping) else config
    built = as_trial_of_agent(build_config(RunConfig, source, _with_text_paths(settings), losses=_losses()))
    with _random_state_restored(), _kernel_choices_restored(), accelerate_state_restored():
        run_training(built)
    if not (built.directory / "summary.json").is_file():
        raise UserError("checkpoint.stop_after_steps: the training is paused, so it has no result; train without this setting")
    return RunResult(built.directory, read_json(built.directory / "summary.json", remedy="train the run again"))


def evaluate(run: str | Path, *, split: HeldOutSplit = "test", **settings: Any) -> dict[str, Any]:
    """Evaluate a finished run on a held-out split, in all processes of the launch.

    Args:
        run: Run directory.
        split: Held-out split, `test` or `val`.
        settings: Settings by dotted name that override those of the run: `data`, `teacher` (None = without the agreement),
            `train.eval_batch_size` and `train.precision`, such as `**{"data.source": "imagefolder:photos"}`.

    Returns:
        - `samples`, the number of samples; `loss`, the mean cross-entropy; `accuracy`.
        - With a teacher `agreement`, the fraction of samples with the same top-1 class as the teacher.
        - With more than five classes `top5_accuracy`.
        - `balanced_accuracy`, the mean of the accuracies of the classes; `calibration_error`, the expected one in 15 bins.
        - `per_class`, for each class by name its `samples` and `accuracy`, None without samples.

        Accuracies, agreement and calibration error are fractions in 0..1.

    Raises:
        ValueError: If `split` is not a held-out split, the directory has no finished run, or a setting or the data is not valid
            (`UserError`).
    """
    if split not in get_args(HeldOutSplit):
        raise ValueError(f"split: {split!r} is not a held-out split; use one of {', '.join(get_args(HeldOutSplit))}")
    config = build_evaluation(Path(run), _with_text_paths(settings), losses=_losses())
    with _random_state_restored(), _kernel_choices_restored(), accelerate_state_restored():
        return evaluate_run(Path(run), config, split=split).metrics


def _losses() -> dict[str, list[str]]:
    return {"logits": names("logits"), "features": names("features")}


def _with_text_paths(value: Any) -> Any:
    """Return nested settings with each path as text, as in YAML."""
    if isinstance(value, Mapping):
        return {name: _with_text_paths(inner) for name, inner in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@contextmanager
def _random_state_restored() -> Iterator[None]:
    """Restore the global random generators that a training seeds: else the caller would draw the same numbers again."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


@contextmanager
def _kernel_choices_restored() -> Iterator[None]:
    """Restore the process-wide switches of PyTorch that a training sets, because the caller's code depends on them."""
    cudnn = torch.backends.cudnn
    before, restore_tf32 = cudnn.benchmark, _tf32_restorer()
    is_deterministic, is_warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        yield
    finally:
        cudnn.benchmark = before
        restore_tf32()
        torch.use_deterministic_algorithms(is_deterministic, warn_only=is_warning)


def _tf32_restorer() -> Callable[[], None]:
    """Return a function that sets PyTorch's switches of TF32 to their present values."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        of_convolutions, of_products = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # from PyTorch 2.9 on, if the program has used the newer names of the switches
        holders: list[Any] = [matmul, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
        values = [holder.fp32_precision for holder in holders]

        def restore_newer() -> None:
            for holder, value in zip(holders, values, strict=True):
                holder.fp32_precision = value

        return restore_newer

    def restore() -> None:
        cudnn.allow_tf32 = of_convolutions
        torch.set_float32_matmul_precision(of_products)

    return restore
