"""Item a: ten steps of every kind of training, none of which may synchronize the device.

`torch.cuda.set_sync_debug_mode("error")` is active during these steps, but not before them, where the training is built and
kernels are chosen, nor after them, where the line of metrics reads values. On a CPU the steps run without it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.jobs import Size, open_bench
from benchmarks.training_case import CaseBuilder
from kd_accel.config.schema import Precision
from kd_accel.models.inference import choose_kernels
from kd_accel.profiling import StepProfiler

VARIANTS = {
    "plain": "plain",
    "live_hybrid": "live_hybrid",
    "cached_hybrid": "cached_hybrid",
    "cached_hybrid_int8": "cached_hybrid_int8",
    "clipped": "plain_clipped",
    "averaged": "plain_averaged",
    "host_loader": "plain_on_host",
    "deterministic": "plain",
    "deterministic_live_hybrid": "live_hybrid",
}
"""{case: name in training_case.TRAININGS}."""


def build(setting: Setting, precision: Precision) -> Cases:
    """Return the cases of one precision."""
    steps, warm_up = setting.size(10, 2), setting.size(3, 1)
    # The last step of an epoch writes a line of metrics, so it comes after the checked steps.
    bench = open_bench(Size(setting.size(128, 2), warm_up + steps + 1), precision=precision)
    directory = setting.scratch / f"steps-{precision}"
    builder = CaseBuilder(bench, directory, views=1)
    return {name: partial(check_steps, builder, name, directory / name, warm_up=warm_up, steps=steps) for name in VARIANTS}


def check_steps(builder: CaseBuilder, name: str, directory: Path, *, warm_up: int, steps: int) -> Figures:
    """Run an epoch of a variant.

    Args:
        builder: Builder of the trainings.
        name: Name of the variant.
        directory: Run directory.
        warm_up: Steps before the checked steps.
        steps: Checked steps.

    Raises:
        RuntimeError: If a checked step synchronizes the device.
    """
    with _kernels(deterministic=name.startswith("deterministic")):
        trainer = builder.training(VARIANTS[name], directory, blocks=1)
        trainer.profiler = guard = SyncGuard(directory, first=warm_up, steps=steps)
        try:
            trainer.fit_epoch()
        finally:
            guard.close()
    (line,) = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {"checked_steps": guard.checked, "loss": line["loss"]}


class SyncGuard(StepProfiler):
    """Replacement of the step profiler that forbids synchronizations during some steps.

    Args:
        directory: Unused directory of the profiler.
        first: Steps before the checked steps.
        steps: Checked steps.

    Attributes:
        checked: Number of checked steps that are done.
    """

    def __init__(self, directory: Path, *, first: int, steps: int) -> None:
        super().__init__(directory, steps=None, rank=0, say=print)
        self._first, self._steps, self._done, self.checked = first, steps, 0, 0

    def step(self) -> None:
        self._done += 1
        self.checked = min(max(0, self._done - self._first), self._steps)
        if self._done == self._first:
            _set_sync_debug_mode("error")
        if self.checked == self._steps:
            _set_sync_debug_mode("default")

    def close(self) -> None:
        _set_sync_debug_mode("default")


def _set_sync_debug_mode(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def _kernels(*, deterministic: bool) -> Iterator[None]:
    """Choose kernels inside the `with` block, and restore the default choice after it."""
    choose_kernels(deterministic=deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        choose_kernels()
