"""A chain of runs with one command: caches and trainings, each in a launch of its own, then bench and report. What is done is
skipped.

The configs of all trainings are parsed and checked before the first launch, so that a mistake in the last one does not show
after hours. Imports no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kd_accel.bench.provenance import is_measured
from kd_accel.config.parsing import build_parser, parse_config
from kd_accel.config.reading import read_written, read_yaml
from kd_accel.config.schema import BenchConfig, ReproduceConfig, RunConfig
from kd_accel.errors import UserError


def run_chain(config: ReproduceConfig, *, overrides: list[str]) -> None:
    """Raises UserError before anything starts when a config is wrong, and when a step of the chain fails."""
    runs = _checked_runs(config, overrides)
    report_dir = Path(config.report_dir)
    for file, run in zip(config.runs, runs, strict=True):
        flags = [f"--config={file}", *overrides]
        if _needs_its_cache(run):
            _launch(["cache", "build", *flags], launch=config.launch, what=f"cache of {run.name}")
        _launch(["train", *flags], launch=config.launch, what=f"training of {run.name}")
        if not (run.directory / "summary.json").is_file():
            raise UserError(f"{run.name}: paused (checkpoint.stop_after_steps); start the chain again without it to go on")
    directories = [str(run.directory) for run in runs]
    bench_file = report_dir / "bench.json"
    if not is_measured(bench_file, [run.directory for run in runs], config.bench):
        _call(["bench", *directories, "--out", str(bench_file), *_bench_flags(config.bench)], what="bench")
    _call(["report", *directories, "--out", str(report_dir), "--bench", str(bench_file)], what="report")


def _checked_runs(config: ReproduceConfig, overrides: list[str]) -> list[RunConfig]:
    if not Path(config.launch).is_file():
        raise UserError(
            f"launch: no file {config.launch!r}; launch/ holds those that ship (paths are from the working directory)"
        )
    parser = build_parser(RunConfig, prog="kd-accel train", description="")
    mistakes = [f"after --: {mistake}" for mistake in read_written(RunConfig, overrides, parser=parser).mistakes]
    read_yaml(config.launch, mistakes, field="launch")
    if mistakes:
        raise UserError("\n".join(mistakes))
    runs = []
    for file in config.runs:
        try:
            runs.append(parse_config(RunConfig, [f"--config={file}", *overrides], parser=parser)[0])
        except UserError as error:
            mistakes.append(f"{file}: {error}")
    directories = [run.directory for run in runs]
    if not config.runs or len(set(directories)) < len(directories):
        mistakes.append("runs: must list at least one config, each with a name (run directory) of its own")
    if mistakes:
        raise UserError("\n".join(mistakes))
    return runs


def _needs_its_cache(run: RunConfig) -> bool:
    """Whether a training that is not finished reads a cache: a build writes what that cache lacks, and checks the rest."""
    is_finished = (run.directory / "summary.json").is_file()
    return run.teacher is not None and run.teacher.outputs != "live" and not is_finished


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
            f"the {what} ended with code {status}; what it said stands above. Start the same command again once that is "
            "mended: what is done is skipped, and an interrupted training goes on from its last checkpoint"
        )


def _bench_flags(bench: BenchConfig) -> list[str]:
    default = BenchConfig()
    changed = {name: value for name, value in vars(bench).items() if value != getattr(default, name)}
    return [f"--{name}={value}" for name, value in changed.items()]
