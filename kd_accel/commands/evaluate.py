"""`kd-accel evaluate`: accuracy, loss and agreement of a finished run, in any number of processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from kd_accel.builders.agreement import agreement_source
from kd_accel.builders.header import evaluation_header, header_text
from kd_accel.builders.trainer import build_held_out
from kd_accel.config.schema import RunConfig
from kd_accel.data.held_out import load_held_out
from kd_accel.data.splits import HeldOutSplit
from kd_accel.distributed import Accelerator, launch_notices, leave_processes, start_processes
from kd_accel.models.inference import choose_kernels, image_memory_format, use_cpu_kernels
from kd_accel.models.preprocess import Normalize
from kd_accel.models.weights import load_run_model
from kd_accel.training.evaluation import evaluate


def run_evaluation(directory: Path, config: RunConfig, *, split: HeldOutSplit) -> None:
    """Evaluate a finished run, and print the result with `run` and `split` as one line of JSON."""
    result = evaluate_run(directory, config, split=split, has_header=True)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"run": str(directory), "split": split, **result}))


def evaluate_run(directory: Path, config: RunConfig, *, split: HeldOutSplit, has_header: bool = False) -> dict[str, float]:
    """Evaluate a finished run on a held-out split.

    Args:
        directory: Run directory.
        config: Config of the run, or one with other data or another teacher.
        split: Held-out split.
        has_header: Whether a header is printed on stderr.

    Returns:
        `samples`, `loss`, `accuracy` and, with a teacher, `agreement`; fractions in 0..1.

    Raises:
        UserError: If the directory has no finished run, its data or teacher is not found, or the data has other classes.
    """
    network, card = load_run_model(directory, field="evaluate")
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(config.train.precision)
    settings = {"mean": card.mean, "std": card.std, "image_size": card.image_size}
    config = config.model_copy(update={"data": config.data.model_copy(update=settings)})
    data = load_held_out(config.data, split, card.label_names, accelerator)
    use_cpu_kernels(network, accelerator.device, config.train.cpu_kernels)
    network.to(accelerator.device)
    memory_format = image_memory_format(config.train.channels_last, accelerator.device)
    normalize = Normalize(card.mean, card.std, memory_format=memory_format).to(accelerator.device)

    def forward(images: Tensor) -> Tensor:
        return network(normalize(images))

    with ExitStack() as stack:
        stack.callback(data.batch_loader.close)
        source, notices = agreement_source(config, data, split, accelerator, stack)
        if has_header:
            header = evaluation_header(directory, config, data, split, network, accelerator)
            _print_notices([header_text(header), *launch_notices(accelerator)], accelerator)
        _print_notices([*data.notices_of(split), *notices], accelerator)
        held_out = build_held_out(config, data, split, source, accelerator)
        result = evaluate(forward, held_out, accelerator=accelerator)
    leave_processes(accelerator)
    return result


def _print_notices(notices: Iterable[str], accelerator: Accelerator) -> None:
    """Print notices on stderr, because stdout has the result alone."""
    if accelerator.is_main_process:
        for notice in notices:
            print(notice, file=sys.stderr, flush=True)
