"""Profiler ranges for the parts of a training step, traces for Perfetto (ui.perfetto.dev), and each range's share of the time.

While no profiler is recording, a range is a null context.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch._C._autograd import DeviceType, _profiler_enabled
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from kd_accel.io.files import refused_by_disk

Item = TypeVar("Item")
RangeName = Literal[
    "loader",
    "teacher",
    "student",
    "projector",
    "loss",
    "backward",
    "optimizer",
    "average",
    "logging",
    "graph",
    "evaluation",
    "checkpoint",
]
Observer = Callable[[RangeName], AbstractContextManager[object]]
"""Function that returns the context to enter in place of the profiler range of a name."""

PREFIX = "kd_accel."
"""Prefix of the names of the ranges in a trace."""

WARM_UP_STEPS = 5
"""Number of steps before the first recorded step; the last of them is the warm-up step of the profiler."""

# At its default level Kineto logs a machine without a GPU as an error.
_KINETO_LOG_LEVEL = "99"

_observers: list[Observer] = []


def profiler_range(name: RangeName) -> AbstractContextManager[object]:
    """Return a context that records the code inside it as a range of the profiler.

    `projector` is nested in `loss`; all other ranges are disjoint. `graph` is the replay of a step as a CUDA graph, which does
    not tell the ranges from `teacher` to `logging` apart.
    """
    # Code under torch.compile cannot query the state of the profiler.
    if torch.compiler.is_compiling():
        return nullcontext()
    if _observers:
        return _observers[-1](name)
    return record_function(PREFIX + name) if _profiler_enabled() else nullcontext()


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Replace each profiler range inside the `with` block by the context that `observer` returns for its name."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


def profiled(name: RangeName, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items of an iterable, and record the time until each as a range."""
    iterator = iter(items)
    while True:
        with profiler_range(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


class StepProfiler:
    """Profiler of a few optimizer steps: writes the trace `directory/rank-R.json` and prints each range's share of the time.

    Call `step` at the end of each optimizer step, and `close` at the end of the training.
    """

    def __init__(self, directory: Path, *, steps: int | None, rank: int, say: Callable[[str], None]) -> None:
        """Start the profiler.

        Args:
            directory: Directory of the traces.
            steps: Number of steps to record after the first `WARM_UP_STEPS`; None = no profiler.
            rank: Rank of this process.
            say: Function that prints a line.
        """
        self._directory, self._rank, self._say = directory, rank, say
        self._profiler: Any = None
        self._is_saved = False
        if steps is not None:
            os.environ.setdefault("KINETO_LOG_LEVEL", _KINETO_LOG_LEVEL)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            recorded_steps = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=steps, repeat=1)
            self._profiler = profile(activities=activities, schedule=recorded_steps, on_trace_ready=self._write)
            self._profiler.start()

    def step(self) -> None:
        """Mark the end of an optimizer step."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """Stop the profiler, and write the trace if the training ended within the recorded steps."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            if not self._is_saved:
                self._say(f"profile: nothing was recorded, because the training ended within its first {WARM_UP_STEPS} steps")

    def _write(self, profiler: profile) -> None:
        self._is_saved = True
        path = self._directory / f"rank-{self._rank}.json"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except OSError as error:
            self._say(f"profile: {refused_by_disk(error)}")
        step_ms, shares = range_shares(profiler.events())
        listed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
        self._say(f"profile: {step_ms:.1f} ms per step: {listed} ({path})")


def range_shares(
    events: Iterable[Any] | None, *, total_prefix: str = "ProfilerStep", steps: int | None = None
) -> tuple[float, dict[str, float]]:
    """Compute each range's share of the time from the events of a profile.

    On a GPU the times are those of the device, and `rest` includes the backward pass: autograd launches its kernels in a thread
    of its own, outside of any range.

    Args:
        events: Events of `torch.profiler.profile`.
        total_prefix: Prefix of the names of the ranges whose sum is the total time; by default that of the profiler's steps.
        steps: Optimizer steps in these ranges; None = one in each.

    Returns:
        (milliseconds per step, share of the time by range); `rest` is the share of the time outside of all ranges.
    """
    events = list(events or ())
    on_device = any(event.device_type == DeviceType.CUDA for event in events)
    totals_us = [event.time_range.elapsed_us() for event in events if event.name.startswith(total_prefix) and _is_host(event)]
    total_us = sum(totals_us)
    spent_us: Counter[str] = Counter()
    for event in events:
        if event.name.startswith(PREFIX) and _is_host(event) != on_device:
            spent_us[event.name.removeprefix(PREFIX)] += event.time_range.elapsed_us()
    spent_us["loss"] -= spent_us["projector"]
    shares = {name: spent_us[name] / total_us for name in get_args(RangeName) if name in spent_us}
    return total_us / (steps or len(totals_us)) / 1000, {**shares, "rest": 1 - sum(shares.values())}


def _is_host(event: Any) -> bool:
    return event.device_type == DeviceType.CPU
