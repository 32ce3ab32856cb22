"""`kd-accel reproduce`: the caches and trainings of a chain, each in its own launch, then bench and report.

Completed steps are skipped. The configs of all trainings are checked before the first launch, so that no mistake is found after
hours of training. This process does not import torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_accel.bench.provenance import is_measured
from kd_accel.config.cache_content import configs_to_build
from kd_accel.config.command_line import CommandParser
from kd_accel.config.parsing import flag_mistakes, parse_config
from kd_accel.config.schema import BenchConfig, ReproduceConfig, RunConfig
from kd_accel.config.seeds import with_seed
from kd_accel.config.settings import read_yaml
from kd_accel.errors import UserError
from kd_accel.io.child_process import run_child
from kd_accel.losses.registry import names


def run_chain(config: ReproduceConfig, *, overrides: list[str]) -> None:
    """Run a chain.

    Args:
        config: The chain.
        overrides: Flags that are added to every training.

    Raises:
        UserError: If a config is wrong, before the first launch, or if a step of the chain fails.
        Preempted: If a signal has stopped the chain, in a training after a checkpoint.
    """
    trainings = _checked_trainings(config, overrides)
    report_dir = Path(config.report_dir)
    bench_file = report_dir / "bench.json"
    runs = [run.directory for training in trainings for run in training.runs]
    names = [str(directory) for directory in runs]
    steps = _steps(trainings, config.launch, overrides)
    measured = [str(directory) for directory in _one_of_each_architecture(trainings)]
    steps.append(_Step("bench", ["bench", *measured, "--out", str(bench_file), *_bench_flags(config.bench)]))
    steps.append(_Step("report", ["report", *names, "--out", str(report_dir), "--bench", str(bench_file)]))
    for number, step in enumerate(steps, 1):
        print(f"\n== {number} of {len(steps)}: {step.what}", flush=True)
        if step.what == "bench" and is_measured(bench_file, [Path(name) for name in measured], config.bench):
            print("measured already; nothing to do", flush=True)
            continue
        _run(step)
        paused = [run.name for run in step.runs if not (run.directory / "summary.json").is_file()]
        if paused:
            raise UserError(f"{paused[0]}: paused by checkpoint.stop_after_steps; run the chain again without it to continue")


@dataclass(frozen=True)
class _Training:
    """Config file of the chain, with its runs: one, or one for each seed."""

    file: str
    config: RunConfig
    seeds: Sequence[int]

    @property
    def runs(self) -> list[RunConfig]:
        """Configs of the runs."""
        return [with_seed(self.config, seed) for seed in self.seeds] or [self.config]


@dataclass(frozen=True)
class _Step:
    """Command of the chain, in a launcher if `launch` is its config file, and the runs that it must finish."""

    what: str
    arguments: list[str]
    launch: str | None = None
    runs: Sequence[RunConfig] = ()


def _steps(trainings: Sequence[_Training], launch: str, overrides: Sequence[str]) -> list[_Step]:
    """Return each training, after the build of its cache if it needs one that no build before has completed."""
    steps: list[_Step] = []
    built: list[RunConfig] = []
    for training in trainings:
        name, flags = training.config.name, [f"--config={training.file}", *overrides]
        is_built = any(configs_to_build([earlier, training.config]) == [earlier] for earlier in built)
        if not is_built and any(map(_needs_its_cache, training.runs)):
            steps.append(_Step(f"cache of {name}", ["cache", "build", *flags], launch))
            built.append(training.config)
        seeds = ",".join(map(str, training.seeds))
        what = f"training of {name}" + (f", seeds {seeds}" if seeds else "")
        steps.append(_Step(what, ["train", *flags, *([f"--seeds={seeds},"] if seeds else [])], launch, training.runs))
    return steps


def _one_of_each_architecture(trainings: Sequence[_Training]) -> list[Path]:
    """Return the directory of the first run of each architecture: the others have the same cost."""
    first: dict[str, Path] = {}
    for training in trainings:
        model, data = training.config.model, training.config.data
        # The source stands for the classes, which only the data defines.
        key = json.dumps([model.arch, model.stem, model.arch_args, data.image_size, data.source, data.labels])
        first.setdefault(key, training.runs[0].directory)
    return list(first.values())


def _checked_trainings(config: ReproduceConfig, overrides: list[str]) -> list[_Training]:
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
    used = {directory for run in runs for directory in _used_directories(run)}
    return [
        _Training(file, run, () if run.directory.absolute() in used else range(config.num_seeds or 0))
        for file, run in zip(config.runs, runs, strict=True)
    ]


def _used_directories(run: RunConfig) -> Iterator[Path]:
    """Yield the directories of the runs from which a training loads its initial weights or its teachers."""
    if run.model.weights:
        path = Path(run.model.weights).absolute()
        yield from (path, path.parent)
    for own in run.by_teacher().values():
        if own.teacher is not None and own.teacher.run:
            yield Path(own.teacher.run).absolute()
        if own.teacher is not None and own.teacher.weights:
            yield Path(own.teacher.weights).absolute().parent


def _needs_its_cache(run: RunConfig) -> bool:
    """Return whether a run is unfinished and reads a cache that its teacher can complete, which a build does and checks."""
    is_finished = (run.directory / "summary.json").is_file()
    teachers = [own.teacher for own in run.by_teacher().values() if own.teacher is not None]
    return not is_finished and any(teacher.uses_cache and not teacher.is_stored for teacher in teachers)


def _run(step: _Step) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", step.launch] if step.launch else []
    code = run_child([sys.executable, *launcher, "-m", "kd_accel", *step.arguments])
    if code:
        raise UserError(
            f"the {step.what} exited with code {code}; its messages are above. Fix the cause and run the same command again: "
            "completed steps are skipped, and an interrupted training resumes from its last checkpoint"
        )


def _bench_flags(bench: BenchConfig) -> list[str]:
    default = BenchConfig()
    changed = {name: value for name, value in bench.model_dump().items() if value != getattr(default, name)}
    return [f"--{name}={value}" for name, value in changed.items()]
