"""`kd-accel reproduce`: the caches and trainings of a chain, each in its own launch, then bench and report.

Completed steps are skipped. The configs of all trainings are checked before the first launch, so that no mistake is found after
hours of training. This process does not import torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kd_accel.bench.provenance import is_measured
from kd_accel.config.command_line import CommandParser
from kd_accel.config.parsing import flag_mistakes, parse_config
from kd_accel.config.schema import BenchConfig, ReproduceConfig, RunConfig
from kd_accel.config.settings import read_yaml
from kd_accel.errors import UserError
from kd_accel.losses.registry import names


def run_chain(config: ReproduceConfig, *, overrides: list[str]) -> None:
    """Run a chain.

    Args:
        config: The chain.
        overrides: Flags that are added to every training.

    Raises:
        UserError: If a config is wrong, before the first launch, or if a step of the chain fails.
    """
    runs = _checked_runs(config, overrides)
    report_dir = Path(config.report_dir)
    for file, run in zip(config.runs, runs, strict=True):
        flags = [f"--config={file}", *overrides]
        if _needs_its_cache(run):
            _launch(["cache", "build", *flags], launch=config.launch, what=f"cache of {run.name}")
        _launch(["train", *flags], launch=config.launch, what=f"training of {run.name}")
        if not (run.directory / "summary.json").is_file():
            raise UserError(f"{run.name}: paused by checkpoint.stop_after_steps; run the chain again without it to continue")
    directories = [str(run.directory) for run in runs]
    bench_file = report_dir / "bench.json"
    if not is_measured(bench_file, [run.directory for run in runs], config.bench):
        _call(["bench", *directories, "--out", str(bench_file), *_bench_flags(config.bench)], what="bench")
    _call(["report", *directories, "--out", str(report_dir), "--bench", str(bench_file)], what="report")


def _checked_runs(config: ReproduceConfig, overrides: list[str]) -> list[RunConfig]:
    if not Path(config.launch).is_file():
        raise UserError(
            f"launch: file {config.launch!r} not found; use a file of launch/ (paths are relative to the working directory)"
        )
    mistakes = [f"after --: {mistake}" for mistake in flag_mistakes(RunConfig, overrides)]
    read_yaml(config.launch, mistakes, field="launch")
    if mistakes:
        raise UserError("\n".join(mistakes))
    losses = {"logits": names("logits"), "features": names("features")}
    parser = CommandParser("train", "", "", config_class=RunConfig, losses=losses)
    runs = []
    for file in config.runs:
        try:
            runs.append(parse_config(RunConfig, [f"--config={file}", *overrides], parser=parser)[0])
        except UserError as error:
            mistakes.append(f"{file}: {error}")
    directories = [run.directory for run in runs]
    if not config.runs or len(set(directories)) < len(directories):
        mistakes.append("runs: must list at least one config, and no two with the same run directory")
    if mistakes:
        raise UserError("\n".join(mistakes))
    return runs


def _needs_its_cache(run: RunConfig) -> bool:
    """Return whether a run is unfinished and reads a cache that its teacher can complete, which a build does and checks."""
    is_finished = (run.directory / "summary.json").is_file()
    teachers = [own.teacher for own in run.by_teacher().values() if own.teacher is not None]
    return not is_finished and any(teacher.uses_cache and not teacher.is_stored for teacher in teachers)


def _launch(arguments: list[str], *, launch: str, what: str) -> None:
    print(f"\n== {what}", flush=True)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch]
    _run([*launcher, "-m", "kd_accel", *arguments], what=what)


def _call(arguments: list[str], *, what: str) -> None:
    print(f"\n== {what}", flush=True)
    _run([sys.executable, "-m", "kd_accel", *arguments], what=what)


def _run(command: list[str], *, what: str) -> None:
    status = subprocess.run(command, env=os.environ, check=False).returncode
    if status:
        raise UserError(
            f"the {what} exited with code {status}; its messages are above. Fix the cause and run the same command again: "
            "completed steps are skipped, and an interrupted training resumes from its last checkpoint"
        )


def _bench_flags(bench: BenchConfig) -> list[str]:
    default = BenchConfig()
    changed = {name: value for name, value in bench.model_dump().items() if value != getattr(default, name)}
    return [f"--{name}={value}" for name, value in changed.items()]
