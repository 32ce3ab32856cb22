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
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_accel.bench.timing import Forward, TimeLimit, Timer
from kd_accel.config.schema import Precision
from kd_accel.models.cuda_graphs import capture

_WARM_UP_ITERATIONS = 20
_MAX_WARM_UP_S = 5.0
"""Time limit of the warm-up, for slow forwards."""
_P99_ITERATIONS = 1000
"""Least number of forwards for which a 99th percentile is reported."""
_ROUNDS = 10
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LatencyMeasurement:
    """Measurement of the latency of a forward of each model, with figures also if it is interrupted.

    The forwards are timed in ten rounds over all models, so that a drift of the machine's speed affects each model. After an
    interruption, the figures are those of the complete rounds.

    Args:
        models: Models by name, on the device of their images.
        images: Input of each model by name, float32 [B, 3, H, W], all on one device.
        min_iterations: Minimum number of timed forwards per model.
        min_time_s: Minimum measured time per model, in seconds.
        precision: Autocast type of each forward; float32 = no autocast.
        cuda_graph: Whether to measure the forward as a CUDA graph too, on a GPU.
        limit: Time limit; None = no limit.

    Attributes:
        is_complete: Whether all forwards were timed.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        images: Mapping[str, Tensor],
        *,
        min_iterations: int,
        min_time_s: float,
        precision: Precision = "float32",
        cuda_graph: bool = False,
        limit: TimeLimit | None = None,
    ) -> None:
        self._device = next(iter(images.values())).device
        self._timer = Timer(self._device, limit or TimeLimit(None))
        self._forwards = {name: _forward(model, images[name], precision) for name, model in models.items()}
        self._min_iterations, self._min_time_s, self._cuda_graph = min_iterations, min_time_s, cuda_graph
        self._rounds: list[dict[str, list[float]]] = []
        self._gpu_figures: dict[str, dict[str, Any]] = {name: {} for name in models}
        self.is_complete = False

    def run(self) -> None:
        """Warm up, and time all forwards.

        Raises:
            TimeLimitSpent: If the limit is reached.
        """
        with torch.inference_mode(), _current_device(self._device):
            iterations = {name: self._warm_up(forward) for name, forward in self._forwards.items()}
            for _ in range(_ROUNDS):
                self._rounds.append(
                    {
                        name: self._timer.times_ms(forward, -(-iterations[name] // _ROUNDS))
                        for name, forward in self._forwards.items()
                    }
                )
            if self._device.type == "cuda":
                self._add_gpu_figures()
        self.is_complete = True

    def figures(self) -> dict[str, dict[str, Any]]:
        """Return the figures of the complete rounds.

        Returns:
            Figures by name of the model: median_ms, p90_ms, p99_ms (None below 1,000 iterations), mean_ms, std_ms, spread_ms
            (interquartile range), iterations, and graph_median_ms (None if not measured). On a GPU also host_median_ms, and
            graph_error if the capture failed. Empty before the end of the first round.
        """
        if not self._rounds:
            return {}
        return {
            name: {**_summary([ms for times in self._rounds for ms in times[name]]), "graph_median_ms": None, **further}
            for name, further in self._gpu_figures.items()
        }

    def _warm_up(self, forward: Forward) -> int:
        """Warm up, and return the number of forwards that reaches both minima."""
        self._timer.limit.check()
        # The first forward of a compiled model compiles it, and is not part of the warm-up time.
        forward()
        times_ms: list[float] = []
        while sum(times_ms) < 1000 * _MAX_WARM_UP_S:
            if len(times_ms) >= _WARM_UP_ITERATIONS and sum(times_ms) >= 1000 * self._min_time_s:
                break
            times_ms += self._timer.host_times_ms(forward, 1)
        return max(self._min_iterations, int(1000 * self._min_time_s / statistics.median(times_ms)))

    def _add_gpu_figures(self) -> None:
        for name, forward in self._forwards.items():
            host_ms = statistics.median(self._timer.host_times_ms(forward, self._min_iterations))
            self._gpu_figures[name] = {"host_median_ms": host_ms}
            if self._cuda_graph:
                self._gpu_figures[name] |= self._graph_figures(forward)

    def _graph_figures(self, forward: Forward) -> dict[str, Any]:
        """Measure the median time of the replayed forward, or return the reason why it cannot be captured."""
        try:
            replay = capture(forward, self._device)
        except RuntimeError as error:
            # The end of a failed capture raises a second error, which hides the cause.
            first = error.__context__ or error
            return {"graph_median_ms": None, "graph_error": str(first).strip().partition("\n")[0]}
        self._timer.event_times_ms(replay, _WARM_UP_ITERATIONS)
        return {"graph_median_ms": statistics.median(self._timer.event_times_ms(replay, self._min_iterations))}


def measure_latency(
    models: Mapping[str, nn.Module],
    images: Mapping[str, Tensor],
    *,
    min_iterations: int,
    min_time_s: float,
    precision: Precision = "float32",
    cuda_graph: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure the latency of a forward of each model; see `LatencyMeasurement` for arguments and figures."""
    measurement = LatencyMeasurement(
        models, images, min_iterations=min_iterations, min_time_s=min_time_s, precision=precision, cuda_graph=cuda_graph
    )
    measurement.run()
    return measurement.figures()


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
