"""`kd-accel evaluate`: accuracy, loss and agreement of a finished run, in any number of processes."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from kd_accel.builders.teacher import load_teacher, teacher_on_device
from kd_accel.builders.trainer import build_held_out
from kd_accel.config.parsing import load_config_file
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.splits import HeldOutSplit
from kd_accel.distributed import leave_processes, start_processes
from kd_accel.errors import UserError
from kd_accel.models.inference import choose_kernels, image_memory_format, use_cpu_kernels
from kd_accel.models.preprocess import Normalize
from kd_accel.models.weights import load_run_model
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.training.evaluation import evaluate


def run_evaluation(directory: Path, *, split: HeldOutSplit) -> None:
    """Evaluate a finished run, and print the result with `run` and `split` as one line of JSON."""
    result = evaluate_run(directory, split=split)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"run": str(directory), "split": split, **result}))


def evaluate_run(directory: Path, *, split: HeldOutSplit) -> dict[str, float]:
    """Evaluate a finished run on a held-out split.

    Args:
        directory: Run directory.
        split: Held-out split.

    Returns:
        `samples`, `loss`, `accuracy` and, for a distilled run, `agreement` with the teacher; fractions in 0..1.

    Raises:
        UserError: If the directory has no finished run, or its data or teacher is not found.
    """
    network, card = load_run_model(directory, field="evaluate")
    config_file = directory / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{directory}: no config.yaml, so the data of the run is not known; train the run again")
    config = load_config_file(RunConfig, config_file)
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(config.train.precision)
    data = load_data(config.data)
    use_cpu_kernels(network, accelerator.device, config.train.cpu_kernels)
    network.to(accelerator.device)
    memory_format = image_memory_format(config.train.channels_last, accelerator.device)
    normalize = Normalize(card.mean, card.std, memory_format=memory_format).to(accelerator.device)

    def forward(images: Tensor) -> Tensor:
        return network(normalize(images))

    with ExitStack() as stack:
        source = None
        if config.teacher is not None:
            model, teacher_input = teacher_on_device(config, load_teacher(config, data), accelerator, [])
            source = LiveTeacher(model, teacher_input, autocast=accelerator.autocast)
            stack.callback(source.close)
        held_out = build_held_out(config, data, split, source, accelerator)
        result = evaluate(forward, held_out, accelerator=accelerator)
    leave_processes(accelerator)
    return result
