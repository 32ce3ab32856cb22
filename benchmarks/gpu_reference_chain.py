"""Sequence of the jobs of gpu_reference, and the choice of the number of epochs from the first rates."""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.budgeted_jobs import Job, Runner, Running
from benchmarks.gpu_reference_figures import (
    WARM_UP_LINES,
    bench_figures,
    build_figures,
    rates,
    resumed_figures,
    timed_figures,
    training_figures,
    verify_figures,
    warm_rate,
)
from benchmarks.gpu_reference_plan import (
    FirstRates,
    Flags,
    Part,
    Row,
    Stem,
    as_arguments,
    choose,
    epoch_s,
    pair,
    reference,
    scaled_down,
)

TIMED = ("cached", "live")
"""Sources of the teacher's outputs (`teacher.outputs`) in the two timed trainings."""
_TRIAL_SAMPLES = 40
_TRIAL_SOURCE = "import:benchmarks.synthetic:images"
_RATE_LINES = 3
"""Lines of metrics after the warm-up from which the first rates are measured."""


@dataclass(frozen=True)
class Options:
    """Arguments of the command line.

    Args:
        data: Directory of the Parquet files; None = generated images, in a trial.
        out: Directory of the results.
        part: Name of the part.
        budget_s: Time for everything, in seconds.
        stem: Stem of the networks of part `pair`.
        seeds: Largest number of seeds of part `pair`.
        epochs: Largest number of epochs of a training; None = the part's.
        limit_train: Number of training images; None = all.
        trial: Whether everything runs on a CPU with small settings.
        work: Directory in which runs, cache and logs are kept; None = a temporary directory.
    """

    data: Path | None
    out: Path
    part: str
    budget_s: float
    stem: Stem
    seeds: int
    epochs: int | None
    limit_train: int | None
    trial: bool
    work: Path | None


class Chain:
    """Jobs of a part, in sequence.

    Args:
        options: Arguments of the command line.
        work: Directory of runs and cache.
        runner: Runner of kd_accel.

    Attributes:
        planned: Part before the choice of epochs and seeds.
        part: Part with the chosen epochs and seeds.
        ledger: Record of the outcomes.
    """

    def __init__(self, options: Options, work: Path, runner: Runner) -> None:
        part = pair(options.stem, range(options.seeds)) if options.part == "pair" else reference()
        self.planned = scaled_down(part) if options.trial else part
        self.part = replace(self.planned, epochs=options.epochs or self.planned.epochs)
        self.ledger = runner.ledger
        self._options, self._work, self._runner = options, work, runner
        self._first_rates: FirstRates | None = None

    def run(self) -> None:
        """Run all jobs before bench and report."""
        self._runner.finish(*self._start_first_trainings())
        self._runner.run(self.cache("build", "teacher"), *map(self.training, self.part.students[1:]))
        self._runner.run(*map(self.training, self.part.distilled), self.cache("verify", "cache-build"))
        for outputs in TIMED:
            self._runner.run(self.timed(outputs))
        self._run_postponed_seeds()

    def report(self) -> None:
        """Run bench and report for the trainings that have finished."""
        finished = [str(self._work / name) for name in self.finished_rows()]
        if not finished:
            for name in ("bench", "report"):
                self.ledger.skip(name, "no training has finished")
            return
        figures = self._work / "bench.json"
        small = {"batch_sizes": [1], "min_iterations": 2, "min_time_s": 0.01, "threads": 1}
        quick = {"batch_sizes": [1, 128], "min_iterations": 100, "min_time_s": 0.3}
        flags = {"out": str(figures), "precision": self.part.precision, **(small if self._options.trial else quick)}
        arguments = ["bench", *finished, *as_arguments(flags)]
        self._runner.run(Job("bench", arguments, figures=lambda outcome: bench_figures(figures)))
        measured = ["--bench", str(figures)] if "bench" in self.ledger.done else []
        self._runner.run(Job("report", ["report", *finished, "--out", str(self._options.out / "report"), *measured]))

    def finished_rows(self) -> list[str]:
        """Return the names of the trainings that have finished, in the order of the table."""
        return [row.name for row in self.planned.rows if row.name in self.ledger.done]

    def _start_first_trainings(self) -> tuple[Running | None, Running | None]:
        """Start teacher and first student, stop the student, choose the epochs, and resume the student."""
        teacher, student, resumed = self._start_and_stop()
        if teacher and student and self._must_restart(teacher, student):
            self._runner.stop(teacher, student, number=signal.SIGKILL)
            for run in (teacher, student):
                shutil.rmtree(self._work / run.job.name)
            teacher, student, resumed = self._start_and_stop()
        return teacher, self._runner.start(resumed) if resumed else student

    def _start_and_stop(self) -> tuple[Running | None, Running | None, Job | None]:
        """Start teacher and first student, and stop the student.

        Returns:
            (teacher, student, job that resumes the student), each None if it could not be started.
        """
        teacher, student = (self._runner.start(self.training(row)) for row in (self.part.teacher, self.part.students[0]))
        return teacher, student, self._stop_and_prepare_resume(student) if student else None

    def _stop_and_prepare_resume(self, student: Running) -> Job | None:
        """Stop a student by SIGTERM after a third of its steps.

        Returns:
            The job that resumes the student; None if it did not exit with the code of SIGTERM and a checkpoint.
        """
        name = f"{student.job.name}-stop"
        if not self._runner.wait_until(lambda: _share_done(student) >= 1 / 3, student):
            self.ledger.skip(name, "the training or the budget ended before a third of the steps")
            return None
        self._runner.stop(student, grace_s=max(1.0, self._runner.left_s))
        outcome = student.outcome()
        checkpoints = (self._work / student.job.name / "checkpoints").glob("step-*")
        steps = sorted(int(path.name.removeprefix("step-")) for path in checkpoints)
        line = {"job": name, "signal": "SIGTERM", "code": outcome.code, "checkpoint_steps": steps}
        if outcome.code != 128 + signal.SIGTERM or not steps:
            self.ledger.fail(name, {**line, "stderr": outcome.stderr_lines})
            return None
        self.ledger.write(line)
        about = {**student.job.about, "stopped_with_code": outcome.code, "resumed_from_step": steps[-1]}
        return replace(student.job, about=about, figures=resumed_figures)

    def _must_restart(self, teacher: Running, student: Running) -> bool:
        """Choose epochs and seeds from the first rates; return whether the running trainings have too many epochs.

        Without rates the plan does not change.
        """
        lines = WARM_UP_LINES + _RATE_LINES
        has_rates = self._runner.wait_until(lambda: len(rates(teacher.job)) >= lines, teacher)
        if not has_rates or len(rates(student.job)) < lines:
            return False
        measured = _first_rates(self.part, teacher, student)
        left_s = self._runner.left_s
        choice = choose(self.part, measured, left_s=left_s)
        rounded = {name: round(value, 5) for name, value in asdict(measured).items()}
        chosen = {"epochs": choice.part.epochs, "epochs_planned": self.planned.epochs, "restarts": choice.restarts}
        names = [row.name for row in choice.part.rows]
        self.ledger.write({"job": "epochs", **rounded, "left_s": round(left_s, 1), **chosen, "rows": names})
        self.part, self._first_rates, self._runner.least_s = choice.part, measured, measured.startup_s
        return choice.restarts

    def _run_postponed_seeds(self) -> None:
        """Run the rows that did not fit by the first rates, if time is left."""
        plain, distilled = (
            [row for row in planned if row not in kept]
            for planned, kept in (
                (self.planned.students, self.part.students),
                (self.planned.distilled, self.part.distilled),
            )
        )
        if self._first_rates is None or not (plain or distilled):
            return
        epochs_s = self.part.epochs * epoch_s(self._first_rates, plain=len(plain), distilled=len(distilled))
        self._runner.least_s = self._first_rates.startup_s + epochs_s
        self._runner.run(*map(self.training, (*plain, *distilled)))

    def training(self, row: Row) -> Job:
        """Return the job of a row."""
        flags, run_dir = self._flags(row), self._work / row.name
        about = {"seed": row.seed, "epochs": self.part.epochs, "epochs_planned": self.planned.epochs}
        needs = ("teacher", "cache-build") if row in self.planned.distilled else ()
        return Job(
            row.name, ["train", *as_arguments({**flags, "run_dir": str(run_dir)})], run_dir, about, needs, training_figures
        )

    def timed(self, outputs: str) -> Job:
        """Return the job of a short training with the settings of the first distilled row."""
        name, steps = f"timed-{outputs}", self.part.timed_steps
        flags = {**self._flags(self.part.distilled[0]), "name": name, "run_dir": str(self._work / name)}
        flags |= {"teacher.outputs": outputs, "train.max_steps": steps}
        needs = ("teacher", "cache-build") if outputs == "cached" else ("teacher",)
        return Job(name, ["train", *as_arguments(flags)], self._work / name, {"steps": steps}, needs, timed_figures)

    def cache(self, action: str, needs: str) -> Job:
        """Return the job of `cache build` or `cache verify`, which needs another job."""
        as_json, figures = (["--json"], verify_figures) if action == "verify" else ([], build_figures)
        arguments = ["cache", action, *as_json, *as_arguments(self._flags(self.part.distilled[0]))]
        return Job(f"cache-{action}", arguments, needs=(needs,), figures=figures)

    def _flags(self, row: Row) -> dict[str, Any]:
        """Return the flags of a row without its run directory."""
        flags = {**row.flags, **self.part.shared, **_source(self._options), "name": row.name, "seed": row.seed}
        flags |= {"train.epochs": self.part.epochs, "train.eval_every_epochs": 10}
        flags |= {"tracking.wandb": "disabled", "checkpoint.every_epochs": None}
        if row.name != self.planned.teacher.name:
            # An epoch reads one view, so more views than epochs would be built in vain.
            flags["data.views"] = min(self.part.views, self.part.epochs)
        if row in self.planned.distilled:
            flags |= {"teacher.run": str(self._work / self.planned.teacher.name), "teacher.outputs": "cached"}
            flags["teacher.cache.dir"] = str(self._work / "cache")
        return flags


def _source(options: Options) -> Flags:
    few = _TRIAL_SAMPLES if options.trial else None
    limits = {"data.limit_train": options.limit_train or few, "data.limit_test": few}
    if options.data is None:
        return {"data.source": _TRIAL_SOURCE, "data.image_column": "image", **limits}
    return {"data.source": f"parquet:{options.data}", "data.image_column": "img", **limits}


def _share_done(run: Running) -> float:
    shown = run.steps_shown
    return shown[-1][0] / shown[-1][1] if shown else 0.0


def _first_rates(part: Part, teacher: Running, student: Running) -> FirstRates:
    teacher_s, student_s = (part.batch_size / warm_rate(run.job) for run in (teacher, student))
    step, steps = teacher.steps_shown[-1]
    elapsed_s = time.monotonic() - teacher.started_at
    trained_s = min(step * teacher_s, elapsed_s)
    return FirstRates(max(1.0, elapsed_s - trained_s), trained_s, steps // part.epochs, teacher_s, student_s)
