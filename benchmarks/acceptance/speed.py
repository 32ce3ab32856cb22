"""Item b: speed of the program next to its limits (benchmarks/bare.py), in turns.

A block is an epoch of a few steps, a unit an image.

    ms_per_step, images_per_s   medians over the blocks, by the host's clock
    operators_per_step          kernels that the device ran in a step; copies_per_step: copies and fills, by torch.profiler
    busy_share                  the device's time with kernels over the time of the same steps without the profiler
    peak_mib                    largest use during a block beyond what lay on the device before it

The last three are null without a GPU. `peak_mib` is activations and gradients: weights, momentum and images of all cases lie on
the device at once. A failed case does not affect the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.acceptance.guard import Cases, described
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.bare import LIMITS, limit_case
from benchmarks.harness import Result, measure_in_turns
from benchmarks.jobs import Bench, Size, open_bench
from benchmarks.training_case import Programs
from kd_accel.config.schema import Precision

RATIOS = (
    ("plain", "bare"),
    ("cached_hybrid", "limit_cached_hybrid"),
    ("live_hybrid", "limit"),
    ("cached_hybrid", "plain"),
    ("live_hybrid", "plain"),
)
"""Of images per second."""
NAMES = tuple(dict.fromkeys(name for ratio in RATIOS for name in ratio))
BATCH_SIZES = {"128": 20, "1024": 8}
"""{samples in a batch: steps in a block}."""
_WARM_UP, _REPEATS = 2, 5
Block = Callable[[], float]


def build(setting: Setting, precision: Precision) -> Cases:
    """Build the cases of one precision."""
    return {name: partial(measure, setting, precision, int(name)) for name in BATCH_SIZES}


def measure(setting: Setting, precision: Precision, batch_size: int) -> Figures:
    """Measure programs and limits with one batch size."""
    repeats = setting.size(_REPEATS, 1)
    size = Size(setting.size(batch_size, 2 if batch_size == 128 else 4), setting.size(BATCH_SIZES[str(batch_size)], 1))
    bench = open_bench(size, precision=precision)
    blocks, peaks, failed = _built(setting, bench, epochs=_WARM_UP + repeats + 1)
    result = Result.of_repeats("speed", measure_in_turns(blocks, repeats=repeats, warm_up=0), notes={})
    found: dict[str, Any] = {
        name: {
            "images_per_s": round(result.medians[name], 1),
            "spread": round(result.spread[name], 4),
            "ms_per_step": round(1000 * size.batch_size / result.medians[name], 3),
            "peak_mib": peaks[name],
            **device_figures(_events(block), steps=size.steps, block_s=size.samples / result.medians[name]),
        }
        for name, block in blocks.items()
    }
    for numerator, denominator in RATIOS:
        if numerator in blocks and denominator in blocks:
            result.add_ratio(numerator, denominator)
    return {"ok": not failed, "cases": found | failed, "ratios": result.by_turn, "batch_size": size.batch_size}


def device_figures(events: Iterable[Any], *, steps: int, block_s: float) -> Figures:
    """Return figures from the events of a profiled block and the time that the block takes without the profiler."""
    on_device = [event for event in events if event.device_type == torch._C._autograd.DeviceType.CUDA]
    if not on_device:
        return dict.fromkeys(("operators_per_step", "copies_per_step", "busy_share"))
    own = [event for event in on_device if not event.is_user_annotation]  # a mark spans kernels that are listed too
    kernels = [event for event in own if not event.name.startswith(("Memcpy", "Memset"))]
    busy_us = sum(event.time_range.elapsed_us() for event in kernels)
    return {
        "operators_per_step": round(len(kernels) / steps, 1),
        "copies_per_step": round((len(own) - len(kernels)) / steps, 1),
        "busy_share": round(busy_us / 1e6 / block_s, 4),
    }


def _built(setting: Setting, bench: Bench, *, epochs: int) -> tuple[dict[str, Block], dict[str, float | None], Figures]:
    """Return (cases that are warm, their peaks, the errors of the other cases)."""
    directory = setting.scratch / f"speed-{bench.precision}-{bench.size.batch_size}"
    programs = Programs(bench, directory, views=2)
    built: dict[str, Block] = {}
    peaks: dict[str, float | None] = {}
    failed: Figures = {}
    for name in NAMES:
        try:
            is_limit = name in LIMITS
            block = limit_case(LIMITS[name], bench) if is_limit else programs.case(name, directory / name, blocks=epochs)
            peaks[name] = _warm(block)
            built[name] = block
        except Exception as error:
            failed[name] = described(error)
    return built, peaks, failed


def _warm(block: Block) -> float | None:
    """Choose kernels in the first block; return the peak of the second one in MiB."""
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


def _events(block: Block) -> Iterable[Any]:
    """Return the events of the device, of a CPU where there is none: all of both would take seconds to read."""
    with profile(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]) as profiler:
        block()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler.events() or ()
