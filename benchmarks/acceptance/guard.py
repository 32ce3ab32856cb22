"""Guard around the cases of an acceptance: each is run regardless of how the others end, and all are in the record.

Cases that share a network or a cache share a process. A case that raises is recorded and the next one follows, unless CUDA has
failed, which poisons the process: the other cases then get a new one, as after a crash or a hang.
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
_POISON, _POISONED = ("CUDA error", "cuDNN error"), 3
_LINES = 4


@dataclass(frozen=True)
class Part:
    """Cases of an item that are run one after the other.

    Args:
        item: letter of the item.
        name: of the part; empty for the only one of its kind.
        cases: their names.
        build: `module:function`. in_child: (setting, name of the part) -> cases, called in a process of its own; otherwise
            (setting, starter) -> cases that start commands, called in this process.
        is_timed: nothing else may run meanwhile.
        limit_s: for one case.
        env: of the child.
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
        """Import the builder, in the process that calls it: the imports of a child take seconds."""
        module, _, function = self.build.partition(":")
        return getattr(importlib.import_module(module), function)

    def label(self, case: str) -> str:
        """Return the name of a case by which it is recorded, after that of the item."""
        return f"{self.name}/{case}" if self.name else case


def run_part(part: Part, setting: Setting, starter: Starter) -> dict[str, str]:
    """Run all cases of a part. Returns {item/case that was left out: reason}."""
    if part.in_child:
        return _supervise(part, setting, starter)
    try:
        built = part.builder(setting, starter)
        cases = {name: built[name] for name in part.cases}
    except NotRun as reason:
        return _left_out(part, part.cases, reason)
    except (Exception, SystemExit) as error:
        _fail(part, part.cases, described(error), setting.record)
        return {}
    return run_cases(part, cases, setting.record)


def run_cases(part: Part, cases: Cases, record: Record, *, progress: Path | None = None) -> dict[str, str]:
    """Run cases in this process. progress: a file for the names of those that were begun and ended. Returns as `run_part`."""
    left_out: dict[str, str] = {}
    for name, case in cases.items():
        _note(progress, "begin", name)
        started_at, is_poisoned = time.monotonic(), False
        try:
            figures = case()
        except NotRun as reason:
            left_out |= _left_out(part, [name], reason)
            continue
        except (Exception, SystemExit) as error:
            figures, is_poisoned = described(error), any(words in str(error) for words in _POISON)
        record.add(part.item, part.label(name), figures, seconds=time.monotonic() - started_at)
        _note(progress, "end", name)
        if is_poisoned and progress is not None:
            sys.exit(_POISONED)
    return left_out


def described(error: BaseException) -> Figures:
    """Return the first lines of an error, and the innermost line of this program that it came through."""
    first_lines = (f"{type(error).__name__}: {error}").strip().splitlines()[:_LINES]
    return {"ok": False, "error": "\n".join(first_lines), "where": _where(error)}


def _where(error: BaseException) -> str | None:
    root = Path(kd_accel.__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(root)]
    return f"{Path(frames[-1].filename).relative_to(root.parent)}:{frames[-1].lineno}" if frames else None


def _supervise(part: Part, setting: Setting, starter: Starter) -> dict[str, str]:
    remaining, attempt = list(part.cases), 0
    while remaining:
        attempt += 1
        name = "-".join(filter(None, (part.item, part.name, str(attempt))))
        progress = setting.scratch / f"{name}.progress"
        progress.touch()
        child = starter.start(name, _run_child, part, remaining, setting, progress, env=part.env)
        try:
            ending = _ending(child, part, progress)
        except NotRun as reason:
            return _left_out(part, [case for case in remaining if case not in _named(progress, "end")], reason)
        ended, begun = _named(progress, "end"), _named(progress, "begin")
        unfinished = [case for case in begun if case not in ended]
        remaining = [case for case in remaining if case not in ended]
        culprits = unfinished or ([] if ended else remaining)  # none was begun: what all of them share has failed
        _fail(part, culprits, {"ok": False, **ending}, setting.record)
        remaining = [case for case in remaining if case not in culprits]
    return {}


def _ending(child: Started, part: Part, progress: Path) -> Figures:
    """Wait for a child. Returns the figures of a case that it has not ended."""
    try:
        code = child.wait(part.limit_s, progress=lambda: progress.stat().st_size)
    except TimeoutError as error:
        return {"error": str(error)}
    return {"error": f"its process ended with {code}\n{child.tail}"}


def _run_child(part: Part, names: Sequence[str], setting: Setting, progress: Path) -> None:
    cases = part.builder(setting, part.name)
    run_cases(part, {name: cases[name] for name in names}, setting.record, progress=progress)


def _fail(part: Part, cases: Sequence[str], figures: Figures, record: Record) -> None:
    for case in cases:
        record.add(part.item, part.label(case), figures, seconds=0.0)


def _left_out(part: Part, cases: Sequence[str], reason: NotRun) -> dict[str, str]:
    return {f"{part.item}/{part.label(case)}": str(reason) for case in cases}


def _note(progress: Path | None, what: str, case: str) -> None:
    if progress is not None:
        with progress.open("a") as file:
            file.write(f"{what} {case}\n")


def _named(progress: Path, what: str) -> list[str]:
    lines = (line.split(" ", 1) for line in progress.read_text().splitlines())
    return [case for kind, case in lines if kind == what]
