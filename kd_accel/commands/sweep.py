"""`kd-accel sweep`: the trainings of a grid of settings in turn, each in its own process, from one cache.

All trials, and the settings of finished runs, are checked before the first start. The caches that they need are built first,
each once. Finished runs are skipped, and an interrupted one resumes. This process does not import torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kd_accel.builders.sweep_results import config_file, has_results, refuse_other_results, write_configs, write_results
from kd_accel.config.cache_content import configs_to_build
from kd_accel.config.sweep import Sweep
from kd_accel.errors import UserError
from kd_accel.io.child_process import run_child


def run_sweep(sweep: Sweep, *, launch: str | None) -> None:
    """Run what is left of a sweep, and print its table.

    Args:
        sweep: The sweep.
        launch: Config file of `accelerate launch` for each build and training; None = one process without a launcher.

    Raises:
        UserError: If a finished run has other settings, or a build or a training fails.
        Preempted: If a signal has stopped the sweep, in a training after a checkpoint.
    """
    if launch is not None and not Path(launch).is_file():
        raise UserError(f"--launch: file {launch!r} not found; use a file of launch/, relative to the working directory")
    for notice in sweep.notices:
        print(f"{sweep.directory.name}: {notice}", flush=True)
    runs = [run for _, run in sweep.runs()]
    for run in filter(has_results, runs):
        refuse_other_results(run)
    left = [run for run in runs if not has_results(run)]
    write_configs(sweep, left)
    for run in configs_to_build(left):
        _start("cache", "build", str(config_file(sweep, run)), launch=launch, what=f"cache of {run.name}")
    for number, run in enumerate(left, len(runs) - len(left) + 1):
        _start("train", str(config_file(sweep, run)), launch=launch, what=f"training of {run.name}, {number} of {len(runs)}")
        if not has_results(run):
            raise UserError(f"{run.name}: paused by checkpoint.stop_after_steps; run the sweep again without it to continue")
        write_results(sweep)
    print(f"\n{write_results(sweep)}")


def _start(*arguments: str, launch: str | None, what: str) -> None:
    """Run a command of this program in its own process, or in those of a launcher."""
    print(f"\n== {what}", flush=True)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", launch] if launch else []
    code = run_child([sys.executable, *launcher, "-m", "kd_accel", *arguments])
    if code:
        raise UserError(
            f"the {what} exited with code {code}; its messages are above. Fix the cause and run the same command again: "
            "finished runs are skipped, and an interrupted training resumes from its last checkpoint"
        )
