"""Latency of a forward after warm-up: median, tail and spread. The measurements of several models are interleaved.

On a GPU, each forward is timed by two CUDA events, which are read after one synchronization at the end. Two further figures are
reported: the time on the host's clock with a synchronization per forward, which is the latency for a caller that needs the
result; and, optionally, the time of the forward replayed as a CUDA graph, because an eager forward at batch size 1 mainly
measures kernel launches. On a CPU, the clock is `perf_counter`. Inputs are constant and on the device.

References:
    Protocols of timm's benchmark.py, of `triton.testing.do_bench`, and of the single-stream scenario of MLPerf Inference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_accel.config.schema import Precision
from kd_accel.models.cuda_graphs import capture

Forward = Callable[[], Tensor]
_WARM_UP_ITERATIONS = 20
_MAX_WARM_UP_S = 5.0
"""Time limit of the warm-up, for slow forwards."""
_P99_ITERATIONS = 1000
"""Least number of forwards for which a 99th percentile is reported."""
_ROUNDS = 10
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def measure_latency(
    models: Mapping[str, nn.Module],
    images: Mapping[str, Tensor],
    *,
    min_iterations: int,
    min_time_s: float,
    precision: Precision = "float32",
    cuda_graph: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure the latency of a forward of each model.

    The forwards are timed in ten rounds over all models, so that a drift of the machine's speed affects each model.

    Args:
        models: Models by name, on the device of their images.
        images: Input of each model by name, float32 [B, 3, H, W], all on one device.
        min_iterations: Minimum number of timed forwards per model.
        min_time_s: Minimum measured time per model, in seconds.
        precision: Autocast type of each forward; float32 = no autocast.
        cuda_graph: Whether to measure the forward as a CUDA graph too, on a GPU.

    Returns:
        Figures by name of the model: median_ms, p90_ms, p99_ms (None below 1,000 iterations), mean_ms, std_ms, spread_ms
        (interquartile range), iterations, and graph_median_ms (None if not measured). On a GPU also host_median_ms, and
        graph_error if the capture failed.
    """
    device = next(iter(images.values())).device
    with torch.inference_mode(), _current_device(device):
        forwards = {name: _forward(model, images[name], precision) for name, model in models.items()}
        iterations = {name: _warm_up(forward, device, min_iterations, min_time_s) for name, forward in forwards.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(_ROUNDS):
            for name, forward in forwards.items():
                times[name] += _times(forward, device, -(-iterations[name] // _ROUNDS))
        results: dict[str, dict[str, Any]] = {name: {**_summary(times[name]), "graph_median_ms": None} for name in models}
        for name, forward in forwards.items() if device.type == "cuda" else ():
            results[name]["host_median_ms"] = statistics.median(_host_times(forward, device, min_iterations))
            results[name].update(_graph_figures(forward, device, min_iterations) if cuda_graph else {})
    return results


def compile_for_latency(models: Iterable[nn.Module], *, batch_sizes: int) -> None:
    """Compile each model in place, and raise torch's limit so that each can be compiled for every batch size.

    torch.compile counts all models of a class as one function. After eight compilations of a function, it runs eagerly.

    Args:
        models: Models to compile.
        batch_sizes: Number of batch sizes with which each model is called.
    """
    from torch._dynamo import config  # slow to import

    models = list(models)
    config.recompile_limit = max(config.recompile_limit, len(models) * batch_sizes)
    for model in models:
        model.compile()


def _current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current device, because events are recorded on the current device, not on that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _forward(model: nn.Module, images: Tensor, precision: Precision) -> Forward:
    if precision == "float32":
        return lambda: model(images)

    def forward() -> Tensor:
        # Autocast is entered for each forward, as in an application. Its cache of cast weights lasts until the exit (in older
        # versions of PyTorch also in inference mode): within one context, only the first forward would pay for the casts.
        with torch.autocast(images.device.type, dtype=_AUTOCAST_DTYPES[precision]):
            return model(images)

    return forward


def _warm_up(forward: Forward, device: torch.device, min_iterations: int, min_time_s: float) -> int:
    """Warm up, and return the number of forwards that reaches both minima."""
    # The first forward of a compiled model compiles it, and is not part of the warm-up time.
    forward()
    times_ms: list[float] = []
    while sum(times_ms) < 1000 * _MAX_WARM_UP_S:
        if len(times_ms) >= _WARM_UP_ITERATIONS and sum(times_ms) >= 1000 * min_time_s:
            break
        times_ms += _host_times(forward, device, 1)
    return max(min_iterations, int(1000 * min_time_s / statistics.median(times_ms)))


def _times(forward: Forward, device: torch.device, iterations: int) -> list[float]:
    return _event_times(forward, device, iterations) if device.type == "cuda" else _host_times(forward, device, iterations)


def _host_times(forward: Forward, device: torch.device, iterations: int) -> list[float]:
    """Time each forward on the host's clock, with a synchronization, in milliseconds."""
    times_ms = []
    for _ in range(iterations):
        started_at = time.perf_counter()
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_ms.append(1000 * (time.perf_counter() - started_at))
    return times_ms


def _event_times(forward: Forward, device: torch.device, iterations: int) -> list[float]:
    """Time each forward with CUDA events, in milliseconds."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(iterations)]
    for begin, end in pairs:
        begin.record()
        forward()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in pairs]


def _graph_figures(forward: Forward, device: torch.device, iterations: int) -> dict[str, Any]:
    """Measure the median time of the replayed forward, or return the reason why it cannot be captured."""
    try:
        replay = capture(forward, device)
    except RuntimeError as error:
        # The end of a failed capture raises a second error, which hides the cause.
        first = error.__context__ or error
        return {"graph_median_ms": None, "graph_error": str(first).strip().partition("\n")[0]}
    _event_times(replay, device, _WARM_UP_ITERATIONS)
    return {"graph_median_ms": statistics.median(_event_times(replay, device, iterations))}


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
