"""`kd-accel bench`: parameters, MACs and latency of runs and architectures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_accel.bench.runner import bench_models
from kd_accel.config.schema import BenchConfig
from kd_accel.errors import UserError
from kd_accel.io.files import write_json


def run_bench(models: Sequence[str], config: BenchConfig, *, out: Path | None) -> None:
    """Measure models, print a line per model and batch size, and write the figures as JSON.

    Args:
        models: Run directories and architectures.
        config: Settings of the measurement.
        out: JSON file for the figures; None = they are only printed.

    Raises:
        UserError: If a model is not found, does not fit the settings, or `out` is a directory.
    """
    if out is not None and out.is_dir():
        raise UserError(f"--out: {out} is a directory; give the path of a JSON file")
    figures = bench_models(models, config)
    for entry in figures["models"]:
        for latency in entry["latency"]:
            print(_line(entry, latency))
    print(f"on {figures['device']}, {figures['threads']} threads, precision {figures['precision']}, {figures['memory_format']}")
    if out is not None:
        write_json(figures, out)
        print(f"Written to {out}")


def _line(entry: dict[str, Any], latency: dict[str, Any]) -> str:
    size = f"{entry['parameters'] / 1e6:.2f} M parameters, {entry['macs'] / 1e6:.1f} M multiply-adds"
    time = f"batch {latency['batch_size']:4}: median {latency['median_ms']:.2f} ms, p90 {latency['p90_ms']:.2f} ms"
    return f"{entry['name']}: {size}, {time}, interquartile range {latency['spread_ms']:.2f} ms{_graph(latency)}"


def _graph(latency: dict[str, Any]) -> str:
    if "graph_error" in latency:
        return f", CUDA graph not captured ({latency['graph_error']})"
    median_ms = latency["graph_median_ms"]
    return "" if median_ms is None else f", CUDA graph {median_ms:.2f} ms"
