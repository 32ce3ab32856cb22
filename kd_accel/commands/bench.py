"""`kd-accel bench`: parameters, MACs and latency of runs and architectures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_accel.bench.runner import Benchmark
from kd_accel.config.schema import BenchConfig
from kd_accel.errors import UserError
from kd_accel.io.files import write_json


def run_bench(models: Sequence[str], config: BenchConfig, *, out: Path | None) -> None:
    """Measure models, print a line per model and then one per batch size as they are measured, and write the figures as JSON.

    A measurement that is interrupted keeps the figures that were measured until then.

    Args:
        models: Run directories and architectures.
        config: Settings of the measurement.
        out: JSON file for the figures; None = they are only printed.

    Raises:
        UserError: If a model is not found, does not fit the settings, or `out` is a directory.
    """
    if out is not None and out.is_dir():
        raise UserError(f"--out: {out} is a directory; give the path of a JSON file")
    benchmark = Benchmark(models, config, on_model=_print_model, on_latency=_print_latency)
    try:
        benchmark.run()
    finally:
        is_worth_keeping = benchmark.has_latency or (benchmark.entries and benchmark.stopped_by != "error")
        if is_worth_keeping:
            # Counts alone do not replace the latencies of an earlier file.
            _close(benchmark.figures(), out if benchmark.has_latency or not (out and out.exists()) else None)


def _print_model(entry: dict[str, Any]) -> None:
    size = f"{entry['parameters'] / 1e6:.2f} M parameters, {entry['macs'] / 1e6:.1f} M multiply-adds"
    print(f"{entry['name']}: {size} per image of {entry['image_size']}x{entry['image_size']}", flush=True)


def _print_latency(entry: dict[str, Any], latency: dict[str, Any]) -> None:
    times = f"median {latency['median_ms']:.2f} ms, p90 {latency['p90_ms']:.2f} ms"
    spread = f"interquartile range {latency['spread_ms']:.2f} ms"
    early = "" if latency["complete"] else f", stopped after {latency['iterations']} forwards"
    more = f"{_graph(latency)}{_onnx(latency)}{early}"
    print(f"{entry['name']}, batch {latency['batch_size']:4}: {times}, {spread}{more}", flush=True)


def _graph(latency: dict[str, Any]) -> str:
    if "graph_error" in latency:
        return f", CUDA graph not captured ({latency['graph_error']})"
    median_ms = latency["graph_median_ms"]
    return "" if median_ms is None else f", CUDA graph {median_ms:.2f} ms"


def _onnx(latency: dict[str, Any]) -> str:
    if "onnxruntime_error" in latency:
        return f", ONNX Runtime not measured ({latency['onnxruntime_error']})"
    median_ms = latency.get("onnxruntime_median_ms")
    return "" if median_ms is None else f", ONNX Runtime {median_ms:.2f} ms"


def _close(figures: dict[str, Any], out: Path | None) -> None:
    """Print where the figures were measured and what is missing, and write the file."""
    gpu, cpu = figures["hardware"]["gpu"], figures["hardware"]["cpu"]
    where = f"on {gpu}, with CPU {cpu}" if gpu else f"on CPU {cpu}"
    threads = f"{figures['threads']} thread{'s' if figures['threads'] > 1 else ''}"
    print(f"{where}, {threads}, precision {figures['precision']}, {figures['memory_format']}")
    if not figures["complete"]:
        missing = [f"{each['name']} at batch {', '.join(map(str, each['batch_sizes']))}" for each in figures["not_measured"]]
        print(f"incomplete, stopped by {figures['stopped_by']}; not measured: {'; '.join(missing) or 'the last forwards'}")
    if out is not None:
        write_json(figures, out)
        print(f"Written to {out}")
