"""Where the time of a step goes: a trace of some steps for Perfetto (ui.perfetto.dev), and the share of each stage."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from kd_accel.io.files import refused_by_disk
from kd_accel.profiling import PREFIX, RangeName

WARM_UP_STEPS = 5
"""Steps before those that are recorded; the profiler itself is warm in the last of them."""

_SILENT = "99"
"""Kineto reports a machine without a GPU as an error."""


class StepProfiler:
    """Records `steps` steps after the first few, writes `directory/rank-R.json`, and says what their stages took.

    It must be told of the end of each step, and closed. steps: None = records nothing.
    """

    def __init__(self, directory: Path, *, steps: int | None, rank: int, say: Callable[[str], None]) -> None:
        self._directory, self._rank, self._say = directory, rank, say
        self._profiler: Any = None
        self._is_written = False
        if steps is not None:
            os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            plan_of_steps = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=steps, repeat=1)
            self._profiler = profile(activities=activities, schedule=plan_of_steps, on_trace_ready=self._write)
            self._profiler.start()

    def step(self) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            if not self._is_written:
                self._say(f"profile: nothing was recorded, the training ended within its first {WARM_UP_STEPS} steps")

    def _write(self, profiler: profile) -> None:
        self._is_written = True
        path = self._directory / f"rank-{self._rank}.json"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except OSError as error:  # no reason to end a training
            self._say(f"profile: {refused_by_disk(error)}")
        step_ms, shares = range_shares(profiler.events())
        told = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
        self._say(f"profile: {step_ms:.1f} ms a step: {told} ({path})")


def range_shares(events: Iterable[Any] | None, *, whole: str = "ProfilerStep") -> tuple[float, dict[str, float]]:
    """(milliseconds a step, share of the time by stage) from the events of a profile.

    whole: what the names of the ranges begin with that make up the time; as they are where a profiler is told of each step.

    On a GPU these are times of the device, and `rest` holds the backward too: its kernels are started by a thread of
    autograd's own, outside of any mark.
    """
    events = list(events or ())
    on_device = any(event.device_type == DeviceType.CUDA for event in events)
    in_all_us = sum(event.time_range.elapsed_us() for event in events if event.name.startswith(whole) and _is_host(event))
    steps = sum(event.name == PREFIX + "optimizer" and _is_host(event) for event in events)
    spent_us: Counter[str] = Counter()
    for event in events:
        if event.name.startswith(PREFIX) and _is_host(event) != on_device:
            spent_us[event.name.removeprefix(PREFIX)] += event.time_range.elapsed_us()
    spent_us["student"] -= spent_us["projector"]
    shares = {name: spent_us[name] / in_all_us for name in get_args(RangeName) if name in spent_us}
    return in_all_us / steps / 1000, {**shares, "rest": 1 - sum(shares.values())}


def _is_host(event: Any) -> bool:
    return event.device_type == DeviceType.CPU
