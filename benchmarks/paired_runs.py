"""Comparisons of many trainings that read one cache, two at a time with one thread each, continued from their ledger.

The base of benchmarks.methods and benchmarks.worth: their command line, the settings of the teacher, and the jobs. A finished
training is a line with its accuracies in the ledger; no further call runs it again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.budgeted_jobs import Job, Ledger, Outcome, Runner, Running, read_ledger
from benchmarks.gpu_reference_plan import ROOT, as_arguments
from kd_accel.models.factory import build_model

CONFIGS = ROOT / "configs" / "cifar10_short"
_BUILD = "cache-build"
_PROCESSES = 2
_LEAST_S = 20.0
"""Time that must be left to start a job; a job that the end of the budget stops is resumed by the next call."""
_TEACHER = {
    "teacher.arch": "torchvision/resnet18",
    "teacher.stem": "no_pool",
    "teacher.mean": [0.4914, 0.4822, 0.4465],
    "teacher.std": [0.2470, 0.2435, 0.2616],
    "teacher.outputs": "cached",
}


@dataclass(frozen=True)
class PairedOptions:
    """Arguments of the command line that the comparisons share.

    Args:
        data: Directory of the Parquet files; None = generated images, in a trial.
        teacher: File of the teacher's weights; None = random weights, in a trial.
        out: Directory of cache, runs and results.
        budget_s: Time for everything, in seconds.
        trial: Whether few steps are run on generated images.
    """

    data: Path | None
    teacher: Path | None
    out: Path
    budget_s: float
    trial: bool

    @property
    def runs(self) -> Path:
        """Return the directory of the runs."""
        return self.out / "runs"

    @property
    def teacher_file(self) -> Path:
        """Return the file of the teacher's weights, also that of a trial."""
        return self.teacher or self.out / "teacher.safetensors"

    @property
    def teacher_flags(self) -> dict[str, Any]:
        """Return the settings of the teacher and its cache."""
        weakest = {"teacher.min_accuracy": None} if self.trial else {}
        paths = {"teacher.weights": str(self.teacher_file), "teacher.cache.dir": str(self.out / "cache")}
        return {**_TEACHER, **weakest, **paths}


def create_parser(description: str | None, *, out: str) -> argparse.ArgumentParser:
    """Create the command line of a comparison.

    Args:
        description: The module's docstring.
        out: Default of `--out`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of train-*.parquet and test-*.parquet, with columns img and label")
    parser.add_argument("--teacher", type=Path, help="weights of the teacher, a .safetensors file of torchvision's names")
    parser.add_argument("--out", type=Path, default=Path(out), help="directory of all files (default: %(default)s)")
    parser.add_argument("--budget_s", type=float, default=7200.0, help="time for everything, in seconds (default: 7200)")
    parser.add_argument("--trial", action="store_true", help="a few steps on generated images, with a random teacher")
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with absolute paths; data and teacher are required without `--trial`."""
    arguments = parser.parse_args()
    if not arguments.trial and not (arguments.data and arguments.teacher):
        parser.error("--data and --teacher are required without --trial")
    for name in ("data", "teacher", "out"):
        path = getattr(arguments, name)
        setattr(arguments, name, path and path.resolve())
    return arguments


def start_comparison(options: PairedOptions) -> None:
    """Create the directory of the runs, and the teacher of a trial; a SIGTERM then ends the program and its jobs."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.runs.mkdir(parents=True, exist_ok=True)
    if options.trial:
        _save_random_teacher(options.teacher_file)


def _save_random_teacher(path: Path) -> None:
    """Write random weights of the teacher, the same in each call, unless the file exists."""
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(build_model("torchvision/resnet18", num_classes=10, stem="no_pool").state_dict(), path)


def cache_job(flags: Mapping[str, Any]) -> Job:
    """Return the job that builds the cache, which completes at once if the cache is complete. flags: Settings of the build."""
    return Job(_BUILD, ["cache", "build", *as_arguments({**flags, "name": "cache"})])


def training_job(
    options: PairedOptions, name: str, flags: Mapping[str, Any], about: Mapping[str, Any], *, needs_cache: bool
) -> Job:
    """Return the job of a training.

    Args:
        options: Arguments of the command line.
        name: Name of the run and of its directory.
        flags: Settings of the run, without name and directory.
        about: Settings that are recorded together with the accuracies.
        needs_cache: Whether the run reads the cache.
    """
    run_dir = options.runs / name
    arguments = as_arguments({**flags, "name": name, "run_dir": str(run_dir)})
    return Job(name, ["train", *arguments], run_dir, about, (_BUILD,) if needs_cache else (), _figures)


def _figures(outcome: Outcome) -> dict[str, Any]:
    """Return the accuracies of a finished run, and remove its checkpoints, which take most space."""
    assert outcome.job.run_dir is not None
    summary = json.loads((outcome.job.run_dir / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(outcome.job.run_dir / "checkpoints", ignore_errors=True)
    return {name: summary[name] for name in ("accuracy_best_val", "accuracy", "seconds", "commit")}


def read_results(ledger: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of the finished trainings in a ledger, by name of the run; empty without the file."""
    return {line["job"]: line for line in read_ledger(ledger) if "accuracy" in line}


def run_phases(options: PairedOptions, ledger: Path, phases: Iterable[Callable[[], Iterable[Job]]]) -> list[str]:
    """Run jobs within the budget, each phase after the end of the one before.

    Args:
        options: Arguments of the command line.
        ledger: File with a line for each job that has ended.
        phases: Functions that return the jobs of a phase, which may depend on the results of earlier phases.

    Returns:
        Names of the failed jobs.
    """
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=options.out))
    record = Ledger(ledger)
    search_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path}
    with Runner(
        record,
        logs / "jobs",
        ends_at=time.monotonic() + options.budget_s,
        least_s=_LEAST_S,
        program=(sys.executable, "-m", "kd_accel"),
        environment=variables,
    ) as runner:
        for jobs in phases:
            run_in_pairs(runner, jobs(), finished=read_results(ledger))
    return record.failed


def run_in_pairs(runner: Runner, jobs: Iterable[Job], *, finished: Iterable[str]) -> None:
    """Run jobs two at a time, in their order; a job that needs a running one lets the next one go first.

    Args:
        runner: Runner of the jobs.
        jobs: The jobs.
        finished: Names of the jobs that have finished in an earlier call, which are left out.
    """
    left = [job for job in jobs if job.name not in set(finished)]
    running: list[Running] = []
    while left:
        while runner.left_s > 0 and (len(running) == _PROCESSES or _first_free(left, running) is None):
            runner.wait_until(lambda: False, *running)
            # Checked once: a job that ends while the outcome of another one is recorded is still open.
            ended = [run for run in running if run.has_ended]
            runner.finish(*ended)
            running = [run for run in running if run not in ended]
        job = _first_free(left, running) or left[0]
        left.remove(job)
        started = runner.start(job)
        running += [started] if started else []
    runner.finish(*running)


def _first_free(jobs: Iterable[Job], running: Iterable[Running]) -> Job | None:
    """Return the first job that needs none of the running ones."""
    names = {run.job.name for run in running}
    return next((job for job in jobs if not names & set(job.needs)), None)
