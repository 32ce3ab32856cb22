"""Shared parts of the suites: interleaved repeats, medians with their spread, the closing line of JSON, the dated file.

Timings of one case drift with everything else that a machine does. So the cases take turns within one run, and the ratio of
their medians is reported; absolute times stand next to it for reference only. A drift that is slower than a turn does not
change the ratio within each turn: the median of those is reported with its standard error, the resolution of the run.
"""

from __future__ import annotations

import argparse
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
    """Ratio turn by turn.

    Args:
        median: of the ratios.
        error: standard error of the median, from the quartiles as for a normal distribution; None of a single turn.
    """

    median: float
    error: float | None


@dataclass
class Result:
    """Figures of one suite.

    Args:
        benchmark: name of the suite.
        medians: by case, in `unit`.
        spread: interquartile range over the median, by case.
        ratios: between medians, by "numerator/denominator".
        by_turn: the same ratios turn by turn.
        notes: further figures and settings.
        unit: of the medians.
        repeats: single figures by case.
    """

    benchmark: str
    medians: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    by_turn: dict[str, TurnRatio] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    unit: str = "/s"
    repeats: dict[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def of_repeats(
        cls, benchmark: str, repeats: Mapping[str, Sequence[float]], *, notes: dict[str, Any], unit: str = "/s"
    ) -> Result:
        """Create a result from throughputs (or times) by case, one figure per repeat."""
        result = cls(benchmark, notes=notes, unit=unit)
        result.add_repeats(repeats)
        return result

    def add_repeats(self, repeats: Mapping[str, Sequence[float]]) -> None:
        """Add the medians and spreads of further cases."""
        for name, values in repeats.items():
            self.repeats[name] = values
            self.medians[name], self.spread[name] = statistics.median(values), _relative_spread(values)

    def add_ratio(self, numerator: str, denominator: str) -> None:
        """Add the ratio of two cases."""
        name = f"{numerator}/{denominator}"
        self.ratios[name] = self.medians[numerator] / self.medians[denominator]
        self.by_turn[name] = turn_ratio(self.repeats[numerator], self.repeats[denominator])


def turn_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> TurnRatio:
    """Compute the ratio of figures whose n-th items come from the same turn."""
    ratios = [one / other for one, other in zip(numerators, denominators, strict=True)]
    median = statistics.median(ratios)
    error = 0.93 * _relative_spread(ratios) * median / math.sqrt(len(ratios)) if len(ratios) > 1 else None
    return {"median": median, "error": error}


def suite_parser(
    description: str | None,
    *,
    repeats: int | None = None,
    steps: int | None = 8,
    batch_size: int = 128,
    threads: int | None = 1,
) -> argparse.ArgumentParser:
    """Create the parser of a suite. repeats, steps, threads: defaults; None for an option that the suite does not have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="blocks (or launches) of each case")
    if threads is not None:
        parser.add_argument(
            "--threads", type=int, default=threads, help="CPU threads; several of them synchronize with each other"
        )
    parser.add_argument(
        "--batch_size", type=int, default=batch_size, help="samples in a forward; fewer for a trial of the suite"
    )
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="such batches in a block, epoch or launch")
    return parser


def measure_in_turns(cases: Mapping[str, Callable[[], float]], *, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Call each case `warm_up + repeats` times in turns.

    Args:
        cases: each does some work and returns the number of units.
        repeats: measured calls.
        warm_up: calls before them.

    Returns:
        Units per second by case, one figure per repeat.
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
    """Return the command before `-m MODULE` that starts this many processes on this machine, each with a GPU if it has any."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*launcher, "--multi_gpu"] if processes > 1 else launcher


def most_processes() -> int | None:
    """Return the largest number of processes of a launch on this machine: one for each GPU, any number (None) on CPUs."""
    return torch.cuda.device_count() if torch.cuda.is_available() else None


def has_compiler() -> bool:
    """Return whether torch.compile can compile for CPUs on this machine."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def cpu_threads(threads: int) -> dict[str, str]:
    """Return the environment in which each process has this many threads; with GPUs all have all CPUs."""
    return {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() if torch.cuda.is_available() else threads)}


def finish(result: Result, *, threads: int | None = None, out_dir: Path = Path("runs/benchmarks")) -> str:
    """Print a table and the closing line of JSON; write the line to a dated file (by default in a directory that git ignores).

    Args:
        result: of the suite.
        threads: of the measured processes, where they are other processes than this one.
        out_dir: directory of the dated file.

    Returns:
        The line.
    """
    for name, median in result.medians.items():
        shown = f"{median:.1f}" if median >= 100 else f"{median:.4g}"
        print(f"{name:42} {shown:>12} {result.unit}   spread {100 * result.spread[name]:.1f} %")
    for name, ratio in result.ratios.items():
        print(f"{name:68} {ratio:.3f}{_shown(result.by_turn.get(name))}")
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
    """Return commit, hardware and versions, which are part of every result."""
    return {
        "commit": _commit(),
        "hardware": _hardware(threads or torch.get_num_threads()),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
    }


def _shown(turns: TurnRatio | None) -> str:
    if turns is None or turns["error"] is None:
        return ""
    return f"   turn by turn {turns['median']:.3f} +- {turns['error']:.3f}"


def _relative_spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4)
    return (upper - lower) / statistics.median(values)


def _hardware(threads: int) -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpus": os.cpu_count(), "machine": platform.machine(), "threads": threads, "gpus": gpus}


def _version(library: str) -> str | None:
    """Return the installed version; None where the library is absent."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the working directory; None outside of a checkout and where git is absent."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
