"""How long a forward takes: warmed up, synchronised, the models in turns, with median, tail and spread.

On a GPU each forward lies between two CUDA events, read after one synchronisation at the end, so that nothing waits inside the
loop; beside it stands the host's clock with a synchronisation per forward, which is what a caller who needs the answer sees.
On a CPU it is `perf_counter`. Inputs are fixed and resident; caches are warm. After the protocols of timm's and triton's
benchmarks and MLPerf's single stream.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_accel.config import Precision

_WARM_UP_ITERATIONS = 20
_LONGEST_WARM_UP_S = 5.0
"""Forwards that take long are warm after fewer of them."""
_P99_ITERATIONS = 1000
_ROUNDS = 10
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def measure_latency(
    models: Mapping[str, nn.Module],
    images: Mapping[str, Tensor],
    *,
    min_iterations: int,
    min_time_s: float,
    precision: Precision = "no",
) -> dict[str, dict[str, Any]]:
    """Per model: median_ms, p90_ms, p99_ms (null below 1,000 iterations), mean_ms, std_ms, spread_ms, iterations.

    images: each model's input [B, 3, H, W] on its device. Models take turns in ten rounds, so that a drift of the machine's
    speed falls on all of them. spread_ms is the distance between the quartiles. On a GPU, host_median_ms is added.
    """
    with torch.inference_mode(), _autocast(images, precision):
        iterations = {name: _needed(model, images[name], min_iterations, min_time_s) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(_ROUNDS):
            for name, model in models.items():
                times[name] += _timed(model, images[name], -(-iterations[name] // _ROUNDS))
        results = {name: _summary(times[name]) for name in models}
        for name, model in models.items():
            if images[name].is_cuda:
                results[name]["host_median_ms"] = statistics.median(_host_times(model, images[name], min_iterations))
    return results


def compile_for_latency(models: Iterable[nn.Module], *, batch_sizes: int) -> None:
    """`compile()` each of them, for so many batch sizes.

    torch takes models of one class for one function, and after eight compilations of it runs the rest eagerly.
    """
    from torch._dynamo import config  # heavy, and not needed otherwise

    models = list(models)
    config.recompile_limit = max(config.recompile_limit, len(models) * batch_sizes)
    for model in models:
        model.compile()


def _autocast(images: Mapping[str, Tensor], precision: Precision) -> AbstractContextManager:
    if precision == "no":
        return nullcontext()
    device = next(iter(images.values())).device
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def _needed(model: nn.Module, images: Tensor, min_iterations: int, min_time_s: float) -> int:
    """Warm up for the least time too, and find how many forwards fill both minima."""
    model(images)  # compiles what is to be compiled
    times_ms: list[float] = []
    while sum(times_ms) < 1000 * _LONGEST_WARM_UP_S:
        if len(times_ms) >= _WARM_UP_ITERATIONS and sum(times_ms) >= 1000 * min_time_s:
            break
        times_ms += _host_times(model, images, 1)
    return max(min_iterations, int(1000 * min_time_s / statistics.median(times_ms)))


def _timed(model: nn.Module, images: Tensor, iterations: int) -> list[float]:
    return _event_times(model, images, iterations) if images.is_cuda else _host_times(model, images, iterations)


def _host_times(model: nn.Module, images: Tensor, iterations: int) -> list[float]:
    """Milliseconds of each forward by the host's clock, its result waited for."""
    times_ms = []
    for _ in range(iterations):
        started_at = time.perf_counter()
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        times_ms.append(1000 * (time.perf_counter() - started_at))
    return times_ms


def _event_times(model: nn.Module, images: Tensor, iterations: int) -> list[float]:
    """Milliseconds of each forward on the GPU itself."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(iterations)]
    for begin, end in pairs:
        begin.record()
        model(images)
        end.record()
    torch.cuda.synchronize(images.device)
    return [begin.elapsed_time(end) for begin, end in pairs]


def _summary(times_ms: list[float]) -> dict[str, Any]:
    lower, median, upper, p90, p99 = np.percentile(times_ms, [25, 50, 75, 90, 99]).tolist()
    return {
        "median_ms": median,
        "p90_ms": p90,
        "p99_ms": p99 if len(times_ms) >= _P99_ITERATIONS else None,
        "mean_ms": statistics.fmean(times_ms),
        "std_ms": statistics.pstdev(times_ms),
        "spread_ms": upper - lower,
        "iterations": len(times_ms),
    }
