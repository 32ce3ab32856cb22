"""Isolation of the cases of the acceptance test: every case is run and recorded, regardless of how other cases end.

Cases that share a network or a cache share a process. After an exception in a case the next case runs in the same process.
After a CUDA error, a crash or a hang the remaining cases run in a new process, because a CUDA error makes all later CUDA calls
of its process fail.
"""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import kd_accel
from benchmarks.acceptance.record import Figures, Record, Setting
from benchmarks.acceptance.starting import NotRun, Started, Starter

Cases = Mapping[str, Callable[[], Figures]]
_STICKY_ERRORS = ("CUDA error", "cuDNN error")
_UNUSABLE = 3
"""Exit code of a process after a CUDA error."""
_ERROR_LINES = 4


@dataclass(frozen=True)
class Part:
    """Cases of an item that run one after another.

    Args:
        item: Letter of the item.
        name: Name of the part; empty if the item has no other part like it.
        cases: Names of the cases.
        build: Builder of the cases as `module:function`. With `in_child` it is called with (setting, name of the part);
            otherwise with (setting, starter), and its cases start commands.
        in_child: Whether the cases run in a child process.
        is_timed: Whether nothing else may run at the same time.
        limit_s: Time limit of a case in a child process, in seconds.
        env: Additional environment variables of the child process.
    """

    item: str
    name: str
    cases: Sequence[str]
    build: str
    in_child: bool = False
    is_timed: bool = False
    limit_s: float = 60.0
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def builder(self) -> Callable[..., Cases]:
        """Return the function that builds the cases."""
        # Imported where it is called, because the imports of the cases in a child process take seconds.
        module, _, function = self.build.partition(":")
        return getattr(importlib.import_module(module), function)

    def label(self, case: str) -> str:
        """Return the recorded name of a case, which is unique within the item."""
        return f"{self.name}/{case}" if self.name else case


def run_part(part: Part, setting: Setting, starter: Starter) -> dict[str, str]:
    """Run all cases of a part.

    Returns:
        {"item/case" that was not run: reason}.
    """
    if part.in_child:
        return _supervise(part, setting, starter)
    try:
        built = part.builder(setting, starter)
        cases = {name: built[name] for name in part.cases}
    except NotRun as reason:
        return _not_run(part, part.cases, reason)
    except (Exception, SystemExit) as error:
        _fail(part, part.cases, described(error), setting.record)
        return {}
    return run_cases(part, cases, setting.record)


def run_cases(part: Part, cases: Cases, record: Record, *, progress: Path | None = None) -> dict[str, str]:
    """Run cases in this process.

    Args:
        part: Part of the cases.
        cases: Cases to run.
        record: Record of the figures.
        progress: File for the begin and end of each case, which the parent of a child process reads; None in the parent.

    Returns:
        {"item/case" that was not run: reason}.
    """
    not_run: dict[str, str] = {}
    for name, case in cases.items():
        _note(progress, "begin", name)
        started_at, is_sticky = time.monotonic(), False
        try:
            figures = case()
        except NotRun as reason:
            not_run |= _not_run(part, [name], reason)
            continue
        except (Exception, SystemExit) as error:
            figures, is_sticky = described(error), any(words in str(error) for words in _STICKY_ERRORS)
        record.add(part.item, part.label(name), figures, seconds=time.monotonic() - started_at)
        _note(progress, "end", name)
        if is_sticky and progress is not None:
            sys.exit(_UNUSABLE)
    return not_run


def described(error: BaseException) -> Figures:
    """Return the figures of a failed case: first lines of the error, and innermost line of kd_accel in its traceback."""
    first_lines = (f"{type(error).__name__}: {error}").strip().splitlines()[:_ERROR_LINES]
    return {"ok": False, "error": "\n".join(first_lines), "where": _where(error)}


def _where(error: BaseException) -> str | None:
    root = Path(kd_accel.__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(root)]
    return f"{Path(frames[-1].filename).relative_to(root.parent)}:{frames[-1].lineno}" if frames else None


def _supervise(part: Part, setting: Setting, starter: Starter) -> dict[str, str]:
    """Run the cases of a part in child processes, a new one after each that ended early."""
    remaining, attempt = list(part.cases), 0
    while remaining:
        attempt += 1
        name = "-".join(filter(None, (part.item, part.name, str(attempt))))
        progress = setting.scratch / f"{name}.progress"
        progress.touch()
        child = starter.start(name, _run_child, part, remaining, setting, progress, env=part.env)
        try:
            failure = _wait(child, part, progress)
        except NotRun as reason:
            return _not_run(part, [case for case in remaining if case not in _noted(progress, "end")], reason)
        ended, begun = _noted(progress, "end"), _noted(progress, "begin")
        unfinished = [case for case in begun if case not in ended]
        remaining = [case for case in remaining if case not in ended]
        # If no case has begun, their common builder has failed, and with it all of them.
        culprits = unfinished or ([] if ended else remaining)
        _fail(part, culprits, {"ok": False, **failure}, setting.record)
        remaining = [case for case in remaining if case not in culprits]
    return {}


def _wait(child: Started, part: Part, progress: Path) -> Figures:
    """Wait for a child process, and return the error of the case that it did not end, if there is one."""
    try:
        code = child.wait(part.limit_s, progress=lambda: progress.stat().st_size)
    except TimeoutError as error:
        return {"error": str(error)}
    return {"error": f"the process ended with exit code {code}\n{child.tail}"}


def _run_child(part: Part, names: Sequence[str], setting: Setting, progress: Path) -> None:
    cases = part.builder(setting, part.name)
    run_cases(part, {name: cases[name] for name in names}, setting.record, progress=progress)


def _fail(part: Part, cases: Sequence[str], figures: Figures, record: Record) -> None:
    for case in cases:
        record.add(part.item, part.label(case), figures, seconds=0.0)


def _not_run(part: Part, cases: Sequence[str], reason: NotRun) -> dict[str, str]:
    return {f"{part.item}/{part.label(case)}": str(reason) for case in cases}


def _note(progress: Path | None, event: str, case: str) -> None:
    if progress is not None:
        with progress.open("a") as file:
            file.write(f"{event} {case}\n")


def _noted(progress: Path, event: str) -> list[str]:
    """Return the cases with this event."""
    lines = (line.split(" ", 1) for line in progress.read_text().splitlines())
    return [case for noted, case in lines if noted == event]
