"""Latency of a forward: warmed up, synchronized, the models in turns, with median, tail and spread.

On a GPU each forward lies between two CUDA events, read after one synchronization at the end, so that nothing waits inside the
loop. Next to it are the host's clock with a synchronization per forward, which is what a caller who needs the result sees, and,
where asked for, the replay of the forward as a CUDA graph: at batch 1 an eager forward measures the launches of its kernels.
On a CPU it is `perf_counter`. Inputs are fixed and resident; caches are warm. After the protocols of timm's and triton's
benchmarks and MLPerf's single stream.
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
    cuda_graph: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure how long a forward of each model takes.

    Models take turns in ten rounds, so that a drift of the machine's speed falls on all of them.

    Args:
        images: each model's input [B, 3, H, W], all on one device.
        min_iterations: least number of timed forwards per model.
        min_time_s: least time per model, in seconds.
        precision: autocast around each forward.
        cuda_graph: on a GPU, time a CUDA graph of the forward as well.

    Returns:
        Per model: median_ms, p90_ms, p99_ms (null below 1,000 iterations), mean_ms, std_ms, spread_ms (the distance between
        the quartiles), iterations, graph_median_ms (null where not measured). On a GPU also host_median_ms, and graph_error
        where no graph could be captured.
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
    """`compile()` each of them, for so many batch sizes.

    torch takes models of one class for one function, and after eight compilations of it runs the rest eagerly.
    """
    from torch._dynamo import config  # heavy, and not needed otherwise

    models = list(models)
    config.recompile_limit = max(config.recompile_limit, len(models) * batch_sizes)
    for model in models:
        model.compile()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current device: events and launches go to the stream of the current device, not to that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _forward(model: nn.Module, images: Tensor, precision: Precision) -> Forward:
    if precision == "no":
        return lambda: model(images)

    def forward() -> Tensor:
        # Entered per forward, as a caller does. Autocast keeps the casts of weights until it is left (in older versions of
        # PyTorch in inference mode too): in one context around all forwards only the first of them would pay for the casts.
        with torch.autocast(images.device.type, dtype=_DTYPES[precision]):
            return model(images)

    return forward


def _needed(forward: Forward, device: torch.device, min_iterations: int, min_time_s: float) -> int:
    """Warm up for the least time too, and find how many forwards fill both minima."""
    forward()  # compiles what is to be compiled
    times_ms: list[float] = []
    while sum(times_ms) < 1000 * _LONGEST_WARM_UP_S:
        if len(times_ms) >= _WARM_UP_ITERATIONS and sum(times_ms) >= 1000 * min_time_s:
            break
        times_ms += _host_times(forward, device, 1)
    return max(min_iterations, int(1000 * min_time_s / statistics.median(times_ms)))


def _timed(forward: Forward, device: torch.device, iterations: int) -> list[float]:
    return _event_times(forward, device, iterations) if device.type == "cuda" else _host_times(forward, device, iterations)


def _host_times(forward: Forward, device: torch.device, iterations: int) -> list[float]:
    """Measure milliseconds of each forward by the host's clock, its result waited for."""
    times_ms = []
    for _ in range(iterations):
        started_at = time.perf_counter()
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_ms.append(1000 * (time.perf_counter() - started_at))
    return times_ms


def _event_times(forward: Forward, device: torch.device, iterations: int) -> list[float]:
    """Measure milliseconds of each forward on the GPU itself."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(iterations)]
    for begin, end in pairs:
        begin.record()
        forward()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in pairs]


def _graph_figures(forward: Forward, device: torch.device, iterations: int) -> dict[str, Any]:
    """Measure the median of the replayed forward, or give the reason why it cannot be captured."""
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
