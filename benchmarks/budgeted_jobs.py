"""Commands within one time budget: run concurrently or alone, stopped at the end of the budget, recorded as each ends.

A `Job` is a command. The `Runner` starts each job as a process group. The `Ledger` appends a line of JSON as soon as a job has
ended, so that the results survive a loss of the machine. A failed job does not affect jobs that do not need it. A job that was
not run, for lack of time or because a job that it needs has not finished, is recorded with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

_POLL_S = 0.05
_GRACE_S = 6.0
"""Time between SIGTERM and SIGKILL, in which a training writes its checkpoint."""
_STDERR_LINES = 20


@dataclass(frozen=True)
class Job:
    """Command to run.

    Args:
        name: Name in the ledger, and in the `needs` of other jobs.
        arguments: Arguments of the runner's program.
        run_dir: Run directory of a training.
        about: Settings that are recorded together with the outcome.
        needs: Names of the jobs that must have finished before.
        figures: Function that reads the figures to record, called after exit code 0. The job counts as failed if the function
            raises OSError, ValueError or LookupError.
    """

    name: str
    arguments: Sequence[str]
    run_dir: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    figures: Callable[[Outcome], Mapping[str, Any]] = lambda outcome: {}


@dataclass(frozen=True)
class Outcome:
    """Command that has ended.

    Args:
        job: The command.
        code: Exit code; -N if it was killed by signal N.
        seconds: Time since its start.
        stdout: Standard output.
        stderr: Standard error.
    """

    job: Job
    code: int
    seconds: float
    stdout: str
    stderr: str

    @property
    def steps_shown(self) -> list[tuple[int, int]]:
        """Return (step, total steps) of each progress line."""
        return _steps_shown(self.stdout)

    @property
    def stderr_lines(self) -> list[str]:
        """Return the last lines of standard error, which are recorded with a failure."""
        return self.stderr.splitlines()[-_STDERR_LINES:]


@dataclass(frozen=True)
class Running:
    """Command that was started. Its output is redirected to files, because a full pipe would block it.

    Args:
        job: The command.
        process: Leader of a process group.
        started_at: Start, as of time.monotonic.
        stdout: File of the standard output.
        stderr: File of the standard error.
    """

    job: Job
    process: subprocess.Popen[bytes]
    started_at: float
    stdout: Path
    stderr: Path

    @property
    def has_ended(self) -> bool:
        """Return whether the command has ended."""
        return self.process.poll() is not None

    @property
    def steps_shown(self) -> list[tuple[int, int]]:
        """Return (step, total steps) of each progress line so far."""
        return _steps_shown(self.stdout.read_text(encoding="utf-8", errors="replace"))

    def outcome(self) -> Outcome:
        """Wait for the end of the command and return its outcome."""
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in (self.stdout, self.stderr))
        return Outcome(self.job, self.process.wait(), time.monotonic() - self.started_at, *texts)


class Ledger:
    """Record of the outcomes of jobs, in memory and as lines of JSON in a file.

    Attributes:
        done: Recorded figures of the jobs that have finished, by name.
        failed: Names of the failed jobs.
        not_done: Reasons of the jobs that were not run, by name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []
        self.not_done: dict[str, str] = {}

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line of JSON to the file, and print it."""
        text = json.dumps(line)
        self.append(text)
        print(text, flush=True)

    def append(self, text: str) -> None:
        """Append a line of text to the file, after a line that a kill has cut."""
        is_cut = self._path.is_file() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size > 0
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if is_cut else "") + text + "\n")

    def record(self, outcome: Outcome) -> None:
        """Write the outcome of a job that was not stopped."""
        job = outcome.job
        line = {"job": job.name, "code": outcome.code, "wall_s": round(outcome.seconds, 1), **job.about}
        try:
            figures = dict(job.figures(outcome)) if outcome.code == 0 else None
        except (OSError, ValueError, LookupError) as error:
            figures, line["error"] = None, f"{type(error).__name__}: {error}"
        if figures is None:
            self.fail(job.name, {**line, "stderr": outcome.stderr_lines})
            return
        self.done[job.name] = figures
        self.write({**line, **figures})

    def fail(self, name: str, line: Mapping[str, Any]) -> None:
        """Write the line of a failed job."""
        self.failed.append(name)
        self.write({**line, "failed": True})

    def skip(self, name: str, reason: str) -> None:
        """Note a job that was not run to its end, with the reason."""
        self.not_done[name] = reason
        print(f"{name}: skipped ({reason})", flush=True)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ledger, without one that a kill has cut; empty without the file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class Runner:
    """Runner of jobs within a time budget; a context manager that kills the running jobs on exit.

    Args:
        ledger: Record of the outcomes.
        logs: Directory for the output of the commands; must not exist yet.
        ends_at: End of the budget, as of time.monotonic.
        least_s: Time in seconds that must be left to start a job.
        program: Command line before a job's arguments.
        environment: Environment of the commands.
    """

    def __init__(
        self,
        ledger: Ledger,
        logs: Path,
        *,
        ends_at: float,
        least_s: float,
        program: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self.ledger, self.ends_at, self.least_s = ledger, ends_at, least_s
        self._logs, self._program, self._environment = logs, tuple(program), dict(environment)
        logs.mkdir()
        self._started: list[Running] = []

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for run in self._started:
            if not run.has_ended:
                _signal_group(run, signal.SIGKILL)

    @property
    def left_s(self) -> float:
        """Return the rest of the budget in seconds."""
        return self.ends_at - time.monotonic()

    def start(self, job: Job) -> Running | None:
        """Start a job; return None if it was skipped, for lack of time or of a job that it needs."""
        if (reason := self._reason_against(job)) is not None:
            self.ledger.skip(job.name, reason)
            return None
        out, err = (self._logs / f"{len(self._started):02d}-{job.name}.{stream}" for stream in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [*self._program, *job.arguments], env=self._environment, stdout=stdout, stderr=stderr, start_new_session=True
            )
        run = Running(job, process, time.monotonic(), out, err)
        self._started.append(run)
        print(f"{job.name}: started, {self.left_s:.0f} s of the budget left", flush=True)
        return run

    def run(self, *jobs: Job) -> None:
        """Run jobs concurrently, until all have ended."""
        self.finish(*(self.start(job) for job in jobs))

    def finish(self, *runs: Running | None) -> None:
        """Wait for running jobs and record their outcomes. Jobs that still run at the end of the budget are stopped."""
        open_runs = [run for run in runs if run is not None]
        while open_runs and self.left_s > 0:
            time.sleep(_POLL_S)
            for run in [run for run in open_runs if run.has_ended]:
                open_runs.remove(run)
                self.ledger.record(run.outcome())
        ended = [run for run in open_runs if run.has_ended]
        self.stop(*open_runs)
        for run in open_runs:
            # A job can finish between the last poll and the signal.
            if run in ended or run.process.returncode == 0:
                self.ledger.record(run.outcome())
            else:
                self.ledger.skip(run.job.name, f"stopped when the budget ended{_progress_of(run)}")

    def wait_until(self, condition: Callable[[], bool], *runs: Running) -> bool:
        """Wait for a condition while all of these jobs run and time is left; return whether the condition was met."""
        while not condition():
            if self.left_s <= 0 or any(run.has_ended for run in runs):
                return condition()
            time.sleep(_POLL_S)
        return True

    def stop(self, *runs: Running, number: signal.Signals = signal.SIGTERM, grace_s: float = _GRACE_S) -> None:
        """Signal the process groups of running jobs, and kill the groups after the grace period."""
        open_runs = [run for run in runs if not run.has_ended]
        for run in open_runs:
            _signal_group(run, number)
        kills_at = time.monotonic() + grace_s
        while time.monotonic() < kills_at and not all(run.has_ended for run in open_runs):
            time.sleep(_POLL_S)
        for run in open_runs:
            _signal_group(run, signal.SIGKILL)
            run.process.wait()

    def _reason_against(self, job: Job) -> str | None:
        missing = [name for name in job.needs if name not in self.ledger.done]
        if missing:
            return f"needs {' and '.join(missing)}, which did not finish"
        if self.left_s < self.least_s:
            return f"takes {self.least_s:.0f} s or more, and {max(0.0, self.left_s):.0f} s of the budget are left"
        return None


def _steps_shown(stdout: str) -> list[tuple[int, int]]:
    return [(int(step), int(total)) for step, total in re.findall(r": step (\d+)/(\d+),", stdout)]


def _progress_of(run: Running) -> str:
    shown = run.steps_shown
    return f" after step {shown[-1][0]} of {shown[-1][1]}" if shown else ""


def _signal_group(run: Running, number: signal.Signals) -> None:
    """Signal the command and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process.pid, number)
