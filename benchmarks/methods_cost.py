"""Time of a training step of each method, next to that of plain `kl`, in one process.

Each method is built by kd_accel from the settings of its run, and reads the finished cache. The methods take turns, with a
block of steps each. The ratio is of times (lower is better), turn by turn.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_reference_plan import as_arguments
from benchmarks.harness import Result, finish, measure_in_turns
from benchmarks.jobs import epochs_of
from kd_accel.builders.run import build_run
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.distributed import start_processes
from kd_accel.models.inference import choose_kernels
from kd_accel.training.progress import Progress

_STEPS = 4
_RATE = 1e-6
"""Learning rate with which no method diverges; the time of a step does not depend on it."""
_FILE = "cost.json"


def measure_costs(flags: Mapping[str, Mapping[str, Any]], out: Path, *, repeats: int) -> None:
    """Measure the time of a step in milliseconds, print the closing line of JSON, and write it to OUT/cost.json.

    Args:
        flags: Settings of the training of each method, by name, with `kl` among them.
        out: Directory of the file.
        repeats: Measured blocks of each method.

    Raises:
        UserError: If the cache is not complete.
    """
    torch.set_num_threads(1)
    choose_kernels(deterministic=False, tf32=True)
    accelerator = start_processes("float32")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        cases = {}
        for name, settings in flags.items():
            own = {"name": name, "run_dir": f"{directory}/{name}", "checkpoint.every_epochs": None, "optim.lr": _RATE}
            config, _ = parse_config(RunConfig, as_arguments({**settings, **own, **_block(settings, repeats)}))
            run = build_run(config, accelerator, stack)
            assert run is not None, "the run directory is new"
            run.trainer.progress = Progress(name, total_steps=1, done_steps=0, is_main=False)
            batch_size = run.trainer.settings.batch_size
            cases[name] = epochs_of(run.trainer)
        rates = measure_in_turns(cases, repeats=repeats)
    times_ms = {name: [1000 * batch_size / rate for rate in values] for name, values in rates.items()}
    result = Result.of_repeats("methods-cost", times_ms, notes={"batch_size": batch_size, "steps": _STEPS}, unit="ms")
    for name in times_ms:
        if name != "kl":
            result.add_ratio(name, "kl")
    (out / _FILE).write_text(finish(result) + "\n", encoding="utf-8")


def _block(settings: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """Return the settings with which an epoch is a block of steps, and the training has as many epochs as blocks."""
    # The images are some of those in the cache, which serves any subset.
    return {"train.epochs": repeats + 1, "data.limit_train": _STEPS * settings.get("train.batch_size", 128)}


def read_costs(out: Path) -> dict[str, dict[str, float]]:
    """Return the ratios turn by turn from OUT/cost.json, {"METHOD/kl": {"median", "error"}}; empty without the file."""
    path = out / _FILE
    costs: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))["by_turn"] if path.is_file() else {}
    return costs
