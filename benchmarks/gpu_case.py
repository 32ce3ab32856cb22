"""One precision of the GPU suite, in a process of its own: `python -m benchmarks.gpu_case --precision bf16 [--compile]`.

Trainings of ResNet-18, plain, live and cached (hybrid, taught by ResNet-50; jobs.py says the rest), on images that lie on the
device. Prints a line of JSON: images per second by case and block, peak memory of a block by case, the time of a block by CUDA
events over that by the host's clock, and what the device does in a block of live distillation (shares of the host's time).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import measure_in_turns, suite_parser
from benchmarks.jobs import Bench, Size, open_bench
from benchmarks.training_case import Programs

VIEWS = 2
CASES = {"plain": "plain", "cached": "cached_hybrid", "live": "live_hybrid"}


def main() -> None:
    parser = suite_parser(__doc__, repeats=3, steps=20, batch_size=256, threads=None)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], required=True)
    parser.add_argument("--compile", action="store_true", help="torch.compile for student and teacher")
    arguments = parser.parse_args()
    bench = open_bench(Size(arguments.batch_size, arguments.steps), precision=arguments.precision)
    with tempfile.TemporaryDirectory() as directory:
        programs = Programs(bench, Path(directory), views=VIEWS, compiles=arguments.compile)
        cases = {
            name: programs.case(program, Path(directory) / name, blocks=arguments.repeats + 4)
            for name, program in CASES.items()
        }
        memory = {name: _peak_mib(case, bench) for name, case in cases.items()}
        found: dict[str, Any] = {"rates": measure_in_turns(cases, repeats=arguments.repeats), "peak_mib": memory}
        if bench.device.type == "cuda":
            found |= {"events/host": _events_over_host(cases["live"]), "shares": _shares(cases["live"])}
    print(json.dumps(found))


def _peak_mib(case: Callable[[], float], bench: Bench) -> float | None:
    """Of the device during the first block, beyond what lay there before it: activations, gradients, momentum.

    Compilation and the choice of kernels are in it; weights and images are not, since all cases lie there at once.
    """
    if bench.device.type != "cuda":
        case()
        return None
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    case()
    return (torch.cuda.max_memory_allocated() - before_bytes) / 2**20


def _events_over_host(case: Callable[[], float]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    started_at = time.perf_counter()
    begin.record()
    case()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / (1000 * (time.perf_counter() - started_at))


def _shares(case: Callable[[], float]) -> dict[str, float]:
    """Copies between host and device, all other kernels, and the rest, in which the device waits."""
    torch.cuda.synchronize()
    started_at = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        case()
        torch.cuda.synchronize()
    elapsed_us = 1e6 * (time.perf_counter() - started_at)
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_device if not event.is_user_annotation]  # a mark spans kernels that are listed too
    copy_us = sum(event.time_range.elapsed_us() for event in kernels if "Memcpy" in event.name)
    compute_us = sum(event.time_range.elapsed_us() for event in kernels if "Memcpy" not in event.name)
    return {
        "copy": copy_us / elapsed_us,
        "compute": compute_us / elapsed_us,
        "idle": max(0.0, 1 - (copy_us + compute_us) / elapsed_us),
    }


if __name__ == "__main__":
    main()
