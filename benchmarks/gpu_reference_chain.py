"""Jobs of gpu_reference in their order, side by side or alone, and the choice of epochs from the first rates."""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.budgeted_jobs import Job, Runner, Running
from benchmarks.gpu_reference_figures import (
    WARM_LINES,
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
    in_small,
    pair,
    reference,
)

TIMED = ("cached", "live")
_TRIAL_SAMPLES = 40
_TRIAL_SOURCE = "import:benchmarks.gpu_reference_trial:images"
_RATE_LINES = 3


@dataclass(frozen=True)
class Options:
    """Arguments of the command line. data: None = the generated images of the trial; epochs: None = those of the part."""

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
    """Jobs of a part in their order."""

    def __init__(self, options: Options, work: Path, runner: Runner) -> None:
        part = pair(options.stem, range(options.seeds)) if options.part == "pair" else reference()
        self.planned = in_small(part) if options.trial else part
        self.part = replace(self.planned, epochs=options.epochs or self.planned.epochs)
        self.ledger = runner.ledger
        self._options, self._work, self._runner = options, work, runner
        self._first_rates: FirstRates | None = None

    def run(self) -> None:
        """Run everything before bench and report."""
        self._runner.finish(*self._begin())
        self._runner.run(self.cache("build", "teacher"), *map(self.training, self.part.students[1:]))
        self._runner.run(*map(self.training, self.part.distilled), self.cache("verify", "cache-build"))
        for outputs in TIMED:
            self._runner.run(self.timed(outputs))
        self._run_other_seeds()

    def report(self) -> None:
        """Run the last two commands, for the rows that are finished."""
        finished = [str(self._work / name) for name in self.finished_rows()]
        if not finished:
            for name in ("bench", "report"):
                self.ledger.leave_out(name, "no training was finished")
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
        """Names of the trainings that are done, in the order of the table."""
        return [row.name for row in self.planned.rows if row.name in self.ledger.done]

    def _begin(self) -> tuple[Running | None, Running | None]:
        """Start teacher and student, stop the student, decide the epochs, and resume the student."""
        teacher, student, resumed = self._start_and_stop()
        if teacher and student and self._must_start_again(teacher, student):
            self._runner.stop(teacher, student, number=signal.SIGKILL)
            for run in (teacher, student):
                shutil.rmtree(self._work / run.job.name)
            teacher, student, resumed = self._start_and_stop()
        return teacher, self._runner.start(resumed) if resumed else student

    def _start_and_stop(self) -> tuple[Running | None, Running | None, Job | None]:
        """Return teacher, student, and the job that resumes the student; None for those that did not start or did not stop."""
        teacher, student = (self._runner.start(self.training(row)) for row in (self.part.teacher, self.part.students[0]))
        return teacher, student, self._stopped(student) if student else None

    def _stopped(self, student: Running) -> Job | None:
        """Stop a student by SIGTERM after a third of its steps.

        Returns the job that resumes it; None if it did not end by that signal, with a checkpoint.
        """
        name = f"{student.job.name}-stop"
        if not self._runner.wait_until(lambda: _share_done(student) >= 1 / 3, student):
            self.ledger.leave_out(name, "the training or the budget ended before a third of the steps")
            return None
        self._runner.stop(student, grace_s=max(1.0, self._runner.left_s))
        found = student.outcome()
        checkpoints = (self._work / student.job.name / "checkpoints").glob("step-*")
        steps = sorted(int(path.name.removeprefix("step-")) for path in checkpoints)
        line = {"job": name, "signal": "SIGTERM", "code": found.code, "checkpoint_steps": steps}
        if found.code != 128 + signal.SIGTERM or not steps:
            self.ledger.fail(name, {**line, "stderr": found.stderr_lines})
            return None
        self.ledger.write(line)
        about = {**student.job.about, "stopped_with_code": found.code, "resumed_from_step": steps[-1]}
        return replace(student.job, about=about, figures=resumed_figures)

    def _must_start_again(self, teacher: Running, student: Running) -> bool:
        """Decide epochs and seeds from the first rates of the teacher; without them the plan does not change."""
        lines = WARM_LINES + _RATE_LINES
        has_rates = self._runner.wait_until(lambda: len(rates(teacher.job)) >= lines, teacher)
        if not has_rates or len(rates(student.job)) < lines:
            return False
        measured = _first_rates(self.part, teacher, student)
        left_s = self._runner.left_s
        choice = choose(self.part, measured, left_s=left_s)
        rounded = {name: round(value, 5) for name, value in asdict(measured).items()}
        decided = {"epochs": choice.part.epochs, "epochs_planned": self.planned.epochs, "starts_again": choice.starts_again}
        names = [row.name for row in choice.part.rows]
        self.ledger.write({"job": "epochs", **rounded, "left_s": round(left_s, 1), **decided, "rows": names})
        self.part, self._first_rates, self._runner.least_s = choice.part, measured, measured.startup_s
        return choice.starts_again

    def _run_other_seeds(self) -> None:
        """Run the rows that the choice has left out, if time is left for them."""
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
        """Return the training of a row."""
        flags, run_dir = self._flags(row), self._work / row.name
        about = {"seed": row.seed, "epochs": self.part.epochs, "epochs_planned": self.planned.epochs}
        needs = ("teacher", "cache-build") if row in self.planned.distilled else ()
        return Job(
            row.name, ["train", *as_arguments({**flags, "run_dir": str(run_dir)})], run_dir, about, needs, training_figures
        )

    def timed(self, outputs: str) -> Job:
        """Return a short training with the settings of the first distilled row."""
        name, steps = f"timed-{outputs}", self.part.timed_steps
        flags = {**self._flags(self.part.distilled[0]), "name": name, "run_dir": str(self._work / name)}
        flags |= {"teacher.outputs": outputs, "train.max_steps": steps}
        needs = ("teacher", "cache-build") if outputs == "cached" else ("teacher",)
        return Job(name, ["train", *as_arguments(flags)], self._work / name, {"steps": steps}, needs, timed_figures)

    def cache(self, action: str, needs: str) -> Job:
        """Return `cache build` or `cache verify`."""
        as_json, read = (["--json"], verify_figures) if action == "verify" else ([], build_figures)
        arguments = ["cache", action, *as_json, *as_arguments(self._flags(self.part.distilled[0]))]
        return Job(f"cache-{action}", arguments, needs=(needs,), figures=read)

    def _flags(self, row: Row) -> dict[str, Any]:
        """Return the flags of a row besides its run directory, with no more views than epochs."""
        flags = {**row.flags, **self.part.shared, **_source(self._options), "name": row.name, "seed": row.seed}
        flags |= {"train.epochs": self.part.epochs, "train.eval_every_epochs": 10}
        flags |= {"tracking.wandb": "disabled", "checkpoint.every_epochs": None}
        if row.name != self.planned.teacher.name:
            flags["data.views"] = min(self.part.views, self.part.epochs)
        if row in self.planned.distilled:
            flags |= {"teacher.run": str(self._work / self.planned.teacher.name), "teacher.outputs": "cached"}
            flags["teacher.cache.dir"] = str(self._work / "cache")
        return flags


def _source(options: Options) -> Flags:
    if options.data is None:
        return {"data.source": _TRIAL_SOURCE, "data.image_column": "image"}
    few = _TRIAL_SAMPLES if options.trial else None
    limits = {"data.limit_train": options.limit_train or few, "data.limit_test": few}
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
