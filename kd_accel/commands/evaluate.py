"""`kd-accel evaluate RUN`: accuracy, loss and agreement of a finished run, from its files, on any number of processes."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from kd_accel.commands.teacher import load_teacher, ready_teacher
from kd_accel.config.parsing import load_config_file
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import load_data
from kd_accel.distributed import leave_processes, start_processes
from kd_accel.errors import UserError
from kd_accel.models.cpu_kernels import use_cpu_kernels
from kd_accel.models.kernels import choose_kernels
from kd_accel.models.memory_format import image_memory_format
from kd_accel.models.preprocess import Normalize
from kd_accel.models.weights import load_run_model
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.training.evaluation import HeldOutSplit, evaluate, held_out


def run_evaluation(directory: Path, *, split: HeldOutSplit) -> None:
    """Print one line of JSON: run, split, samples, loss, accuracy and, for a distilled run, agreement."""
    network, card = load_run_model(directory, field="evaluate")
    config_file = directory / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{directory}: no config.yaml, so the data it was trained on is not known; train the run again")
    config = load_config_file(RunConfig, config_file)
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(config.train.precision)
    data = load_data(config.data)
    use_cpu_kernels(network, accelerator.device)
    network.to(accelerator.device)
    memory_format = image_memory_format(config.train.channels_last, accelerator.device)
    normalize = Normalize(card.mean, card.std, memory_format=memory_format).to(accelerator.device)

    def forward(images: Tensor) -> Tensor:
        return network(normalize(images))

    with ExitStack() as stack:
        source = None
        if config.teacher is not None:
            teacher = load_teacher(config.teacher, data)
            model, teacher_input = ready_teacher(config, teacher, accelerator, layers={})
            source = LiveTeacher(model, teacher_input, autocast=accelerator.autocast)
            stack.callback(source.close)
        samples = held_out(data, config, accelerator, split=split, teacher=source)
        result = evaluate(forward, samples, accelerator=accelerator)
    accelerator.print(json.dumps({"run": str(directory), "split": split, **result}))
    leave_processes(accelerator)
