"""Latency of a forward after warm-up, with median, tail and spread; models are measured in turns.

On a GPU each forward is between two CUDA events, read after one synchronization at the end, so that the timed loop never
synchronizes. Two more figures go with it: the host's clock with a synchronization per forward, which is the latency of a caller
that needs the result; and optionally the replay of the forward as a CUDA graph, since at batch size 1 an eager forward measures
the launches of its kernels. On a CPU the clock is `perf_counter`. Inputs are fixed and on the device; caches are warm.

References:
    The protocols of timm's and Triton's benchmarks and of MLPerf's single-stream scenario.
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

from kd_accel.bench.graphs import capture
from kd_accel.config.schema import Precision

Forward = Callable[[], Tensor]
_WARM_UP_ITERATIONS = 20
_LONGEST_WARM_UP_S = 5.0
"""Limit of the warm-up; slow forwards have fewer warm-up iterations."""
_P99_ITERATIONS = 1000
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

    Models take turns in ten rounds, so that a drift of the machine's speed affects all of them.

    Args:
        models: Models by name, on the device of their images.
        images: Input of each model, [B, 3, H, W], all on one device.
        min_iterations: Minimal number of timed forwards per model.
        min_time_s: Minimal measured time per model, in seconds.
        precision: Autocast around each forward; float32 = none.
        cuda_graph: Whether a CUDA graph of the forward is timed as well, on a GPU.

    Returns:
        Per model: median_ms, p90_ms, p99_ms (None below 1,000 iterations), mean_ms, std_ms, spread_ms (distance between the
        quartiles), iterations, graph_median_ms (None if not measured). On a GPU also host_median_ms, and graph_error if the
        capture failed.
    """
    device = next(iter(images.values())).device
    with torch.inference_mode(), _current(device):
        forwards = {name: _forward(model, images[name], precision) for name, model in models.items()}
        iterations = {name: _needed(forward, device, min_iterations, min_time_s) for name, forward in forwards.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(_ROUNDS):
            for name, forward in forwards.items():
                times[name] += _timed(forward, device, -(-iterations[name] // _ROUNDS))
        results: dict[str, dict[str, Any]] = {name: {**_summary(times[name]), "graph_median_ms": None} for name in models}
        for name, forward in forwards.items() if device.type == "cuda" else ():
            results[name]["host_median_ms"] = statistics.median(_host_times(forward, device, min_iterations))
            results[name].update(_graph_figures(forward, device, min_iterations) if cuda_graph else {})
    return results


def compile_for_latency(models: Iterable[nn.Module], *, batch_sizes: int) -> None:
    """Compile each model in place, with room for `batch_sizes` compilations of each.

    torch.compile counts models of one class as one function, and after eight compilations of a function runs it eagerly.
    """
    from torch._dynamo import config  # slow to import, and not needed otherwise

    models = list(models)
    config.recompile_limit = max(config.recompile_limit, len(models) * batch_sizes)
    for model in models:
        model.compile()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current device: events are recorded on the current device's stream, not on that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _forward(model: nn.Module, images: Tensor, precision: Precision) -> Forward:
    if precision == "float32":
        return lambda: model(images)

    def forward() -> Tensor:
        # Entered per forward, as a caller does. Autocast caches the casts of weights until its exit (in older versions of
        # PyTorch in inference mode too): with one context around all forwards only the first would pay for the casts.
        with torch.autocast(images.device.type, dtype=_AUTOCAST_DTYPES[precision]):
            return model(images)

    return forward


def _needed(forward: Forward, device: torch.device, min_iterations: int, min_time_s: float) -> int:
    """Warm up, and return the number of forwards that reaches both minima."""
    forward()  # a compiled model is compiled here
    times_ms: list[float] = []
    while sum(times_ms) < 1000 * _LONGEST_WARM_UP_S:
        if len(times_ms) >= _WARM_UP_ITERATIONS and sum(times_ms) >= 1000 * min_time_s:
            break
        times_ms += _host_times(forward, device, 1)
    return max(min_iterations, int(1000 * min_time_s / statistics.median(times_ms)))


def _timed(forward: Forward, device: torch.device, iterations: int) -> list[float]:
    return _event_times(forward, device, iterations) if device.type == "cuda" else _host_times(forward, device, iterations)


def _host_times(forward: Forward, device: torch.device, iterations: int) -> list[float]:
    """Time each forward with its synchronization by the host's clock, in milliseconds."""
    times_ms = []
    for _ in range(iterations):
        started_at = time.perf_counter()
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_ms.append(1000 * (time.perf_counter() - started_at))
    return times_ms


def _event_times(forward: Forward, device: torch.device, iterations: int) -> list[float]:
    """Time each forward by CUDA events, in milliseconds."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(iterations)]
    for begin, end in pairs:
        begin.record()
        forward()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in pairs]


def _graph_figures(forward: Forward, device: torch.device, iterations: int) -> dict[str, Any]:
    """Measure the median of the replayed forward, or return the reason why it cannot be captured."""
    try:
        replay = capture(forward, device)
    except RuntimeError as error:
        first = error.__context__ or error  # the end of a failed capture raises a second error
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
