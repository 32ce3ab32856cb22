"""Measurement and reporting of the benchmarks: interleaved repeats, medians, ratios, the result as JSON.

The speed of a machine drifts with its other load. Cases therefore take turns within one run, and the ratio of their medians is
the result; absolute values are for reference only. A drift that is slower than one turn does not change the ratio within a
turn, so the median of the ratios by turn is also reported, with its standard error: the resolution of the run.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch

_LIBRARIES = ("torch", "torchvision", "accelerate", "safetensors", "datasets", "numpy")


class TurnRatio(TypedDict):
    """Ratio of two cases, computed turn by turn.

    Args:
        median: Median of the ratios.
        error: Standard error of the median, estimated from the quartiles as for a normal distribution; None for one turn.
    """

    median: float
    error: float | None


@dataclass
class Result:
    """Result of one benchmark.

    Args:
        benchmark: Name of the benchmark.
        medians: Median of each case, in `unit`.
        spread: Interquartile range over the median, of each case.
        ratios: Ratio of two medians, by "numerator/denominator".
        by_turn: The same ratios, computed turn by turn.
        notes: Settings, and further figures.
        unit: Unit of the medians.
        repeats: Measured values of each case, in `unit`.
    """

    benchmark: str
    medians: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    by_turn: dict[str, TurnRatio] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    unit: str = "images/s"
    repeats: dict[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def of_repeats(
        cls, benchmark: str, repeats: Mapping[str, Sequence[float]], *, notes: dict[str, Any], unit: str = "images/s"
    ) -> Result:
        """Create a result from the values of each case, one per repeat."""
        result = cls(benchmark, notes=notes, unit=unit)
        result.add_repeats(repeats)
        return result

    def add_repeats(self, repeats: Mapping[str, Sequence[float]]) -> None:
        """Add cases, each with one value per repeat."""
        for name, values in repeats.items():
            self.repeats[name] = values
            self.medians[name], self.spread[name] = statistics.median(values), _relative_spread(values)

    def add_ratio(self, numerator: str, denominator: str) -> None:
        """Add the ratio of two cases that were measured in the same turns."""
        name = f"{numerator}/{denominator}"
        self.ratios[name] = self.medians[numerator] / self.medians[denominator]
        self.by_turn[name] = turn_ratio(self.repeats[numerator], self.repeats[denominator])


def turn_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> TurnRatio:
    """Compute the ratio of two cases turn by turn; the n-th values of both must come from the same turn."""
    ratios = [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]
    median = statistics.median(ratios)
    # Standard error of a median: 1.2533 standard deviations / sqrt(n); a standard deviation is 0.7413 interquartile ranges.
    error = 0.93 * _relative_spread(ratios) * median / math.sqrt(len(ratios)) if len(ratios) > 1 else None
    return {"median": median, "error": error}


def benchmark_parser(
    description: str | None,
    *,
    repeats: int | None = None,
    steps: int | None = 8,
    batch_size: int = 128,
    threads: int | None = 1,
) -> argparse.ArgumentParser:
    """Create the command line of a benchmark.

    Args:
        description: The module's docstring.
        repeats: Default of `--repeats`; None = the benchmark has no such option.
        steps: Default of `--steps`; None = no such option.
        batch_size: Default of `--batch_size`.
        threads: Default of `--threads`; None = no such option.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(parser.add_argument, type=int)
    if repeats is not None:
        add("--repeats", default=repeats, help="measured blocks, or launches, of each case (default: %(default)s)")
    if threads is not None:
        add("--threads", default=threads, help="CPU threads of each process (default: %(default)s)")
    add("--batch_size", default=batch_size, help="samples in a batch over all processes (default: %(default)s)")
    if steps is not None:
        add("--steps", default=steps, help="batches in a block, epoch or launch (default: %(default)s)")
    return parser


def measure_in_turns(cases: Mapping[str, Callable[[], float]], *, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Call the cases in turns, each of them `warm_up + repeats` times.

    Args:
        cases: Functions that do some work and return the number of processed units, such as images.
        repeats: Measured calls of each case.
        warm_up: Calls of each case before the measured ones.

    Returns:
        Units per second of each case, one value per repeat.
    """
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm_up + repeats):
        for name, case in cases.items():
            started_at = time.perf_counter()
            units = case()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            elapsed_s = time.perf_counter() - started_at
            if turn >= warm_up:
                rates[name].append(units / elapsed_s)
    return rates


def accelerate_launch(processes: int) -> list[str]:
    """Return the part of a command before `-m MODULE` that starts processes on this machine, on a GPU each if it has GPUs."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*launcher, "--multi_gpu"] if processes > 1 else launcher


def most_processes() -> int | None:
    """Return the largest number of processes of a launch on this machine: one for each GPU; None = no limit, on CPUs."""
    return torch.cuda.device_count() if torch.cuda.is_available() else None


def has_compiler() -> bool:
    """Return whether this machine has a C++ compiler, which torch.compile needs on CPUs."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def cpu_threads(threads: int) -> dict[str, str]:
    """Return the environment of processes with this number of CPU threads each; with GPUs, of all CPUs."""
    return {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() if torch.cuda.is_available() else threads)}


def training_rates(run_dir: Path) -> list[float]:
    """Return images/s of each training line in metrics.jsonl; the run may still be writing, or not have started."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line["images_per_second"] for line in lines if line["split"] == "train" and "images_per_second" in line]


def finish(result: Result, *, threads: int | None = None, out_dir: Path = Path("runs/benchmarks")) -> str:
    """Print medians, ratios and a closing line of JSON, and write the JSON to `out_dir/DATE-BENCHMARK.json`.

    Args:
        result: Result of the benchmark.
        threads: CPU threads of the measured processes, if they are not this process.
        out_dir: Directory of the file; git ignores the default.

    Returns:
        The closing line.
    """
    for name, median in result.medians.items():
        shown = f"{median:.1f}" if median >= 100 else f"{median:.4g}"
        print(f"{name:42} median {shown:>10} {result.unit}, interquartile range {100 * result.spread[name]:.1f} %")
    for name, ratio in result.ratios.items():
        print(f"{name:68} ratio {ratio:.3f}{_shown(result.by_turn.get(name))}")
    line = json.dumps(
        {
            "benchmark": result.benchmark,
            **provenance(threads=threads),
            "unit": result.unit,
            "medians": result.medians,
            "spread": result.spread,
            "ratios": result.ratios,
            "by_turn": result.by_turn,
            "notes": result.notes,
        }
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / f"{date.today()}-{result.benchmark}.json").write_text(line + "\n")
    print(line)
    return line


def provenance(*, threads: int | None = None) -> dict[str, Any]:
    """Return the commit, the hardware and the versions of the libraries, which are part of every result."""
    return {
        "commit": _commit(),
        "hardware": _hardware(threads or torch.get_num_threads()),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
    }


def _shown(turns: TurnRatio | None) -> str:
    if turns is None or turns["error"] is None:
        return ""
    return f", by turn {turns['median']:.3f} +/- {turns['error']:.3f}"


def _relative_spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4)
    return (upper - lower) / statistics.median(values)


def _hardware(threads: int) -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpus": os.cpu_count(), "machine": platform.machine(), "threads": threads, "gpus": gpus}


def _version(library: str) -> str | None:
    """Return the version of a library; None if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the working directory; None outside of a checkout and without git."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
