"""Item b: speed of trainings by kd_accel and of their limits (benchmarks/bare.py), measured in turns.

`plain`, `live_hybrid` and `cached_hybrid` are trained with the program's defaults, so on a GPU their steps are replayed as a
CUDA graph; `..._eager` has `train.cuda_graph: never`. A block is an epoch of a few steps, of more steps if they are replayed.
The speed of a host drifts, so there are many turns of short blocks. Cases of the acceptance test, for each precision:

    128, 1024   speed at this batch size
        images_per_s, ms_per_step   medians over the blocks, by the clock of the host
        start_s                     time of the first block, in which kernels are chosen and trainings record their graphs
        peak_mib                    peak memory of a block above the memory allocated before it; null for graphs, whose memory
                                    is allocated when they are recorded
    kernels     what the device did in one block of each of these, by torch.profiler
        operators_per_step          kernels per step
        copies_per_step             copies and fills per step
        kernels_ms                  sum of the times of the kernels of a step
        ms_per_step/kernels_ms      time of a step, measured without the profiler, over `kernels_ms`
        busy_share                  the reciprocal
        graphs_per_step             graphs replayed per step
    compiled    torch.compile of the student of `bare`, at batch size 128 in bf16; its first block has the compilation

The figures of the device are null without a GPU. They come last because launches take longer for the rest of a process once it
has been profiled. Images, live teacher, cache and chosen kernels are shared by all cases of a precision. Weights, momentum and
images of all cases are on the device at the same time, so `peak_mib` measures activations and gradients alone. A failed case
does not affect the cases after it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.acceptance.guard import Cases, described
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.starting import BUDGET, NotRun, Starter
from benchmarks.bare import LIMITS, fused_teacher, graph_case, limit_case
from benchmarks.caches import write_cache
from benchmarks.harness import Result, has_compiler, measure_in_turns
from benchmarks.jobs import (
    PLAIN,
    Bench,
    Size,
    build_live_teacher,
    build_training,
    epochs_of,
    hybrid,
    open_bench,
    with_settings,
)
from benchmarks.training_case import cached
from kd_accel.builders.teacher import TeacherSetup
from kd_accel.config.schema import Precision, RunConfig

RATIOS = (
    ("plain", "bare"),
    ("plain", "bare_graph"),
    ("plain", "bare_compiled"),
    ("bare_compiled", "bare"),
    ("cached_hybrid", "limit_cached_hybrid"),
    ("live_hybrid", "limit"),
    ("cached_hybrid", "plain"),
    ("live_hybrid", "plain"),
)
"""Pairs of cases whose images/s are compared."""
DEFAULTS = {"plain": PLAIN, "live_hybrid": hybrid(), "cached_hybrid": cached(hybrid())}
EAGER = {f"{name}_eager": with_settings(config, train={"cuda_graph": "never"}) for name, config in DEFAULTS.items()}
GRAPHS = (*DEFAULTS, "bare_graph")
"""Cases that replay a CUDA graph on a GPU."""
NAMES = (*GRAPHS, *EAGER, "bare", "limit_cached_hybrid", "limit")
COMPILED_NAMES = ("bare_compiled", "bare", "bare_graph", "plain")


@dataclass(frozen=True)
class _Steps:
    """Steps in a block of a case: `replayed` from a graph, or `eager`."""

    eager: int
    replayed: int

    def of(self, name: str) -> int:
        return self.replayed if name in GRAPHS else self.eager


BATCH_SIZES = {"128": _Steps(eager=5, replayed=72), "1024": _Steps(eager=3, replayed=24)}
"""{samples in a batch: steps in a block}."""
_WARM_UP, _REPEATS = 2, 9
_LIMIT_S, _LEAST_S = 120.0, 30.0
"""Time limit of the case `compiled`, and time that must be left to start it."""
_ON_CPU = "without a GPU no graph is recorded"
Block = Callable[[], float]


@dataclass
class _Measured:
    """Blocks of one batch size, and their median images/s."""

    blocks: Mapping[str, Block]
    medians: Mapping[str, float]


class Speed:
    """Measurement of one precision.

    Args:
        setting: Settings of the acceptance test.
        precision: Precision of all trainings and limits.
    """

    def __init__(self, setting: Setting, precision: Precision) -> None:
        self._setting, self._directory = setting, setting.scratch / f"speed-{precision}"
        self._bench = open_bench(Size(*_largest(setting)), precision=precision)
        self._shared: _Teachers | None = None
        self._measured: dict[str, _Measured] = {}

    def measure(self, batch_size: str, names: Iterable[str] = NAMES) -> Figures:
        """Measure trainings and limits with one batch size."""
        repeats = self._setting.size(_REPEATS, 1)
        blocks, notes, failed = self._build_blocks(batch_size, names, epochs=_WARM_UP + repeats + 1)
        result = Result.of_repeats("speed", measure_in_turns(blocks, repeats=repeats, warm_up=0), notes={})
        self._measured[batch_size] = _Measured(blocks, result.medians)
        samples = self._size(batch_size, "plain").batch_size
        cases: dict[str, Any] = {
            name: {
                "images_per_s": round(median, 1),
                "spread": round(result.spread[name], 4),
                "ms_per_step": round(1000 * samples / median, 3),
                **notes[name],
            }
            for name, median in result.medians.items()
        }
        for numerator, denominator in RATIOS:
            if numerator in blocks and denominator in blocks:
                result.add_ratio(numerator, denominator)
        about = {} if torch.cuda.is_available() else {"note": _ON_CPU}
        return {"ok": not failed, "cases": cases | failed, "ratios": result.by_turn, "batch_size": samples, **about}

    def profile(self) -> Figures:
        """Return the figures of the device for a block of each measured case."""
        if not self._measured:
            raise RuntimeError("no batch size was measured in this process")
        cases = {}
        for batch_size, measured in self._measured.items():
            for name, block in measured.blocks.items():
                size = self._size(batch_size, name)
                block_s = size.samples / measured.medians[name]
                cases[f"{batch_size}/{name}"] = device_figures(_profile(block), steps=size.steps, block_s=block_s)
        return {"cases": cases}

    def _build_blocks(
        self, batch_size: str, names: Iterable[str], *, epochs: int
    ) -> tuple[dict[str, Block], dict[str, Figures], Figures]:
        """Build and warm up cases.

        Returns:
            (blocks by case, figures of their warm-up by case, figures of the cases that failed).
        """
        blocks: dict[str, Block] = {}
        notes: dict[str, Figures] = {}
        failed: Figures = {}
        for name in names:
            try:
                block = self._case(batch_size, name, epochs=epochs)
                notes[name] = _warm_up(block, allocates=name not in GRAPHS)
                blocks[name] = block
            except Exception as error:
                failed[name] = described(error)
        return blocks, notes, failed

    def _case(self, batch_size: str, name: str, *, epochs: int) -> Block:
        """Build a case. epochs: largest number of calls of a training."""
        bench = replace(self._bench, size=self._size(batch_size, name))
        if name == "bare_graph":
            return graph_case(bench)
        if name == "bare_compiled":
            return limit_case(LIMITS["bare"], bench, is_compiled=True)
        if name in LIMITS:
            return limit_case(LIMITS[name], bench, teacher_network=self._teachers.network if name != "bare" else None)
        config = with_settings((DEFAULTS | EAGER)[name], train={"epochs": epochs})
        teacher = None
        if config.teacher is not None:
            config = with_settings(config, data={"views": 1})
            teacher = self._teachers.setup(config)
        return epochs_of(build_training(bench, config, self._directory / batch_size / name, teacher=teacher))

    def _size(self, batch_size: str, name: str) -> Size:
        return _size(self._setting, batch_size, name)

    @property
    def _teachers(self) -> _Teachers:
        """Return the teachers, which are built at the first use, so that a failure is one of the case that needs them."""
        if self._shared is None:
            self._shared = _Teachers.build(self._bench, self._directory / "cache")
        return self._shared


@dataclass(frozen=True)
class _Teachers:
    """The teacher live, from a cache, and as the network of the limits."""

    live: TeacherSetup
    cached: TeacherSetup
    network: torch.nn.Module

    @classmethod
    def build(cls, bench: Bench, directory: Path) -> _Teachers:
        """Build the teacher, and a cache of its outputs for all images of the bench."""
        live = build_live_teacher(bench, hybrid())
        assert live.live is not None
        cache = write_cache(bench, directory, live.live, views=1)
        from_cache = replace(
            live, source=cache.source("train", keeps_views=True), held_out=cache.source, cache=cache.digest, live=None
        )
        return cls(live, from_cache, fused_teacher(bench))

    def setup(self, config: RunConfig) -> TeacherSetup:
        assert config.teacher is not None
        return self.cached if config.teacher.outputs == "cached" else self.live


def build(setting: Setting, precision: Precision) -> Cases:
    """Return the cases of one precision: one per batch size, then the figures of the device."""
    speed = Speed(setting, precision)
    return {**{name: partial(speed.measure, name) for name in BATCH_SIZES}, "kernels": speed.profile}


def build_compiled(setting: Setting, starter: Starter) -> Cases:
    """Return the case `compiled`."""
    return {"compiled": partial(_run_compiled, setting, starter)}


def device_figures(events: Iterable[Any], *, steps: int, block_s: float) -> Figures:
    """Return the figures of the device.

    Args:
        events: Events of a block under torch.profiler.
        steps: Steps in the block.
        block_s: Time of the block without the profiler.
    """
    events = list(events)
    on_device = [event for event in events if event.device_type == torch._C._autograd.DeviceType.CUDA]
    if not on_device:
        return dict.fromkeys(
            (
                *("operators_per_step", "copies_per_step", "kernels_ms", "ms_per_step/kernels_ms"),
                *("busy_share", "graphs_per_step"),
            )
        )
    # An annotation spans kernels, which have events of their own.
    launched = [event for event in on_device if not event.is_user_annotation]
    kernels = [event for event in launched if not event.name.startswith(("Memcpy", "Memset"))]
    kernels_s = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    return {
        "operators_per_step": round(len(kernels) / steps, 1),
        "copies_per_step": round((len(launched) - len(kernels)) / steps, 1),
        "kernels_ms": round(1000 * kernels_s / steps, 3),
        "ms_per_step/kernels_ms": round(block_s / kernels_s, 2),
        "busy_share": round(kernels_s / block_s, 4),
        "graphs_per_step": round(sum(event.name == "cudaGraphLaunch" for event in events) / steps, 2),
    }


def _size(setting: Setting, batch_size: str, name: str) -> Size:
    """Return the size of a block of a case."""
    samples = setting.size(int(batch_size), 2 if batch_size == "128" else 4)
    return Size(samples, setting.size(BATCH_SIZES[batch_size].of(name), 1))


def _largest(setting: Setting) -> tuple[int, int]:
    """Return batch size and steps of the case with the most samples, whose images contain those of all other cases."""
    sizes = [_size(setting, batch_size, name) for batch_size in BATCH_SIZES for name in GRAPHS]
    largest = max(sizes, key=lambda size: size.samples)
    return largest.batch_size, largest.steps


def _run_compiled(setting: Setting, starter: Starter) -> Figures:
    """Measure a compiled loop in a process of its own, if there is a compiler and time; a trial would take minutes."""
    if setting.is_trial or not has_compiler():
        raise NotRun("trial" if setting.is_trial else "no compiler")
    if starter.left_s < _LEAST_S:
        raise NotRun(BUDGET)
    path = setting.scratch / "compiled.json"
    starter.start("b-compiled", measure_compiled, setting, path).finish(_LIMIT_S)
    figures: Figures = json.loads(path.read_text())
    return figures


def measure_compiled(setting: Setting, path: Path) -> None:
    """Measure the compiled loop next to loops that are not, in turns, and write the figures to a file."""
    path.write_text(json.dumps(Speed(setting, "bf16").measure("128", COMPILED_NAMES)))


def _warm_up(block: Block, *, allocates: bool) -> Figures:
    """Run a block and return its time, and with a GPU a second one for its peak memory in MiB.

    Args:
        block: The case.
        allocates: Whether the second block allocates its memory, so that there is a peak.
    """
    started_at = time.perf_counter()
    block()
    if not torch.cuda.is_available():
        return {"start_s": round(time.perf_counter() - started_at, 2), "peak_mib": None}
    torch.cuda.synchronize()
    start_s = time.perf_counter() - started_at
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    block()
    torch.cuda.synchronize()
    peak_mib = round((torch.cuda.max_memory_allocated() - before_bytes) / 2**20, 1)
    return {"start_s": round(start_s, 2), "peak_mib": peak_mib if allocates else None}


def _profile(block: Block) -> Iterable[Any]:
    """Run a block under torch.profiler and return the events of the device."""
    # Reading the events of the CPU as well would take seconds.
    with profile(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]) as profiler:
        block()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler.events() or ()
