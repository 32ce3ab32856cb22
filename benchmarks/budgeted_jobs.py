"""Commands under one time budget: side by side or alone, stopped at the end of the budget, recorded one by one.

A `Job` is a command. The `Runner` starts it as a process group of its own. The `Ledger` appends a line of JSON as soon as the
outcome is known, so that finished outcomes outlive the machine. A failed job does not affect the others. A job that is not run,
for lack of time or of a job that it needs, is named with the reason.
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
"""A training that is stopped writes a checkpoint first."""
_STDERR_LINES = 20


@dataclass(frozen=True)
class Job:
    """Command to run.

    Args:
        name: by which it is recorded and needed.
        arguments: of the runner's program.
        run_dir: of a training.
        about: recorded together with the outcome.
        needs: names of jobs that must be done before.
        figures: reads the recorded figures after exit code 0. If it raises because something is missing, the job has failed.
    """

    name: str
    arguments: Sequence[str]
    run_dir: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    figures: Callable[[Outcome], Mapping[str, Any]] = lambda outcome: {}


@dataclass(frozen=True)
class Outcome:
    """Command that has ended. code: its exit code; negative = killed by that signal."""

    job: Job
    code: int
    seconds: float
    stdout: str
    stderr: str

    @property
    def steps_shown(self) -> list[tuple[int, int]]:
        """Return (step, total steps) of each line of progress."""
        return _steps_shown(self.stdout)

    @property
    def stderr_lines(self) -> list[str]:
        """Return the last lines, to be recorded with a failure."""
        return self.stderr.splitlines()[-_STDERR_LINES:]


@dataclass(frozen=True)
class Running:
    """Command that was started. Its output goes to files, so that no pipe can fill up."""

    job: Job
    process: subprocess.Popen[bytes]
    started_at: float
    stdout: Path
    stderr: Path

    @property
    def has_ended(self) -> bool:
        """Whether the command has ended."""
        return self.process.poll() is not None

    @property
    def steps_shown(self) -> list[tuple[int, int]]:
        """Return (step, total steps) of each line of progress so far."""
        return _steps_shown(self.stdout.read_text(encoding="utf-8", errors="replace"))

    def outcome(self) -> Outcome:
        """Wait for the end of the command and return its outcome."""
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in (self.stdout, self.stderr))
        return Outcome(self.job, self.process.wait(), time.monotonic() - self.started_at, *texts)


class Ledger:
    """Outcomes of jobs, in memory and as lines of JSON in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []
        self.not_done: dict[str, str] = {}

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to the file, and print it."""
        text = json.dumps(line)
        self.append(text)
        print(text, flush=True)

    def append(self, text: str) -> None:
        """Append a line of text to the file."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def record(self, outcome: Outcome) -> None:
        """Write the outcome of a job that has ended by itself."""
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

    def leave_out(self, name: str, reason: str) -> None:
        """Note a job that was not run, with the reason."""
        self.not_done[name] = reason
        print(f"{name}: not done ({reason})", flush=True)


class Runner:
    """Runner of jobs until `ends_at` at most. On leaving its context it kills those that still run.

    Args:
        ledger: for outcomes.
        logs: directory for the output of the commands.
        ends_at: end of the budget, as of time.monotonic.
        least_s: time that must be left to start a job.
        program: the command line before a job's arguments.
        environment: of the commands.
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
        """Return the rest of the budget, in seconds."""
        return self.ends_at - time.monotonic()

    def start(self, job: Job) -> Running | None:
        """Start a job. Returns None for one that must not start, which is noted as left out."""
        if (reason := self._reason_against(job)) is not None:
            self.ledger.leave_out(job.name, reason)
            return None
        out, err = (self._logs / f"{len(self._started):02d}-{job.name}.{stream}" for stream in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [*self._program, *job.arguments], env=self._environment, stdout=stdout, stderr=stderr, start_new_session=True
            )
        run = Running(job, process, time.monotonic(), out, err)
        self._started.append(run)
        print(f"{job.name}: started, {self.left_s:.0f} s left", flush=True)
        return run

    def run(self, *jobs: Job) -> None:
        """Run these side by side to their ends."""
        self.finish(*(self.start(job) for job in jobs))

    def finish(self, *runs: Running | None) -> None:
        """Wait for these and record their outcomes. At the end of the budget stop those that still run, and note them."""
        open_runs = [run for run in runs if run is not None]
        while open_runs and self.left_s > 0:
            time.sleep(_POLL_S)
            for run in [run for run in open_runs if run.has_ended]:
                open_runs.remove(run)
                self.ledger.record(run.outcome())
        self.stop(*open_runs)
        for run in open_runs:
            if run.process.returncode == 0:
                self.ledger.record(run.outcome())
            else:
                self.ledger.leave_out(run.job.name, f"stopped when the budget ended{_progress_of(run)}")

    def wait_until(self, is_so: Callable[[], bool], *runs: Running) -> bool:
        """Wait while all of these run and time is left. Returns whether the condition was met."""
        while not is_so():
            if self.left_s <= 0 or any(run.has_ended for run in runs):
                return is_so()
            time.sleep(_POLL_S)
        return True

    def stop(self, *runs: Running, number: signal.Signals = signal.SIGTERM, grace_s: float = _GRACE_S) -> None:
        """Signal the process groups of those that run, and kill them after the grace period."""
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
        lacking = [name for name in job.needs if name not in self.ledger.done]
        if lacking:
            return f"needs {' and '.join(lacking)}, not done"
        if self.left_s < self.least_s:
            return f"takes {self.least_s:.0f} s or more, and {max(0.0, self.left_s):.0f} s of the budget are left"
        return None


def _steps_shown(stdout: str) -> list[tuple[int, int]]:
    return [(int(step), int(total)) for step, total in re.findall(r": step (\d+)/(\d+),", stdout)]


def _progress_of(run: Running) -> str:
    shown = run.steps_shown
    return f" after step {shown[-1][0]} of {shown[-1][1]}" if shown else ""


def _signal_group(run: Running, number: signal.Signals) -> None:
    """Signal the command and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process.pid, number)
