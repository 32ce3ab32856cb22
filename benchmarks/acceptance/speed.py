"""Item b: speed of trainings by kd_accel and of their limits (benchmarks/bare.py), measured in turns.

A block is an epoch of a few steps.

    images_per_s, ms_per_step   medians over the blocks, by the clock of the host
    operators_per_step          kernels that the device ran per step, by torch.profiler
    copies_per_step             copies and fills that the device ran per step, by torch.profiler
    busy_share                  time in which the device ran kernels over the time of the same steps without the profiler
    peak_mib                    peak memory of a block above the memory allocated before it

The last four are null without a GPU. Weights, momentum and images of all cases are on the device at the same time, so
`peak_mib` measures activations and gradients alone. A failed case does not affect the cases after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.acceptance.guard import Cases, described
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.harness import Result, measure_in_turns
from benchmarks.jobs import Bench, Size, open_bench
from benchmarks.training_case import CaseBuilder
from kd_accel.config.schema import Precision

RATIOS = (
    ("plain", "bare"),
    ("cached_hybrid", "limit_cached_hybrid"),
    ("live_hybrid", "limit"),
    ("cached_hybrid", "plain"),
    ("live_hybrid", "plain"),
)
"""Pairs of cases whose images/s are compared."""
NAMES = tuple(dict.fromkeys(name for ratio in RATIOS for name in ratio))
BATCH_SIZES = {"128": 20, "1024": 8}
"""{samples in a batch: steps in a block}."""
_WARM_UP, _REPEATS = 2, 5
Block = Callable[[], float]


def build(setting: Setting, precision: Precision) -> Cases:
    """Return the cases of one precision, one per batch size."""
    return {name: partial(measure, setting, precision, int(name)) for name in BATCH_SIZES}


def measure(setting: Setting, precision: Precision, batch_size: int) -> Figures:
    """Measure trainings and limits with one batch size."""
    repeats = setting.size(_REPEATS, 1)
    size = Size(setting.size(batch_size, 2 if batch_size == 128 else 4), setting.size(BATCH_SIZES[str(batch_size)], 1))
    bench = open_bench(size, precision=precision)
    blocks, peaks_mib, failed = _build_blocks(setting, bench, epochs=_WARM_UP + repeats + 1)
    result = Result.of_repeats("speed", measure_in_turns(blocks, repeats=repeats, warm_up=0), notes={})
    cases: dict[str, Any] = {
        name: {
            "images_per_s": round(result.medians[name], 1),
            "spread": round(result.spread[name], 4),
            "ms_per_step": round(1000 * size.batch_size / result.medians[name], 3),
            "peak_mib": peaks_mib[name],
            **device_figures(_profile(block), steps=size.steps, block_s=size.samples / result.medians[name]),
        }
        for name, block in blocks.items()
    }
    for numerator, denominator in RATIOS:
        if numerator in blocks and denominator in blocks:
            result.add_ratio(numerator, denominator)
    return {"ok": not failed, "cases": cases | failed, "ratios": result.by_turn, "batch_size": size.batch_size}


def device_figures(events: Iterable[Any], *, steps: int, block_s: float) -> Figures:
    """Return the figures of the device.

    Args:
        events: Events of a block under torch.profiler.
        steps: Steps in the block.
        block_s: Time of the block without the profiler.
    """
    on_device = [event for event in events if event.device_type == torch._C._autograd.DeviceType.CUDA]
    if not on_device:
        return dict.fromkeys(("operators_per_step", "copies_per_step", "busy_share"))
    # An annotation spans kernels, which have events of their own.
    launched = [event for event in on_device if not event.is_user_annotation]
    kernels = [event for event in launched if not event.name.startswith(("Memcpy", "Memset"))]
    busy_us = sum(event.time_range.elapsed_us() for event in kernels)
    return {
        "operators_per_step": round(len(kernels) / steps, 1),
        "copies_per_step": round((len(launched) - len(kernels)) / steps, 1),
        "busy_share": round(busy_us / 1e6 / block_s, 4),
    }


def _build_blocks(setting: Setting, bench: Bench, *, epochs: int) -> tuple[dict[str, Block], dict[str, float | None], Figures]:
    """Build and warm up all cases.

    Returns:
        (blocks by case, peak memory in MiB by case, figures of the cases that failed).
    """
    directory = setting.scratch / f"speed-{bench.precision}-{bench.size.batch_size}"
    builder = CaseBuilder(bench, directory, views=2)
    blocks: dict[str, Block] = {}
    peaks_mib: dict[str, float | None] = {}
    failed: Figures = {}
    for name in NAMES:
        try:
            block = builder.case(name, directory / name, blocks=epochs)
            peaks_mib[name] = _warm_up(block)
            blocks[name] = block
        except Exception as error:
            failed[name] = described(error)
    return blocks, peaks_mib, failed


def _warm_up(block: Block) -> float | None:
    """Run two blocks; return the peak memory of the second one in MiB, None without a GPU."""
    # Kernels are chosen in the first block.
    block()
    if not torch.cuda.is_available():
        block()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    block()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before_bytes) / 2**20, 1)


def _profile(block: Block) -> Iterable[Any]:
    """Run a block under torch.profiler and return the events of the device."""
    # Reading the events of the CPU as well would take seconds.
    with profile(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]) as profiler:
        block()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler.events() or ()
