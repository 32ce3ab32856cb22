"""Readers of the figures of a finished job of gpu_reference, from its run directory, its output or the file that it wrote."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.budgeted_jobs import Job, Outcome
from benchmarks.harness import training_rates

WARM_UP_LINES = 2
"""Lines of metrics in which kernels are chosen and memory is first allocated."""
_OMITTED = ("data", "versions", "name")


def rates(job: Job) -> list[float]:
    """Return images/s of each training line of metrics so far."""
    assert job.run_dir is not None
    return training_rates(job.run_dir)


def warm_rate(job: Job) -> float:
    """Return the median images/s without the lines of the warm-up."""
    return statistics.median(rates(job)[WARM_UP_LINES:])


def training_figures(outcome: Outcome) -> Mapping[str, Any]:
    """Return the contents of summary.json, without the description of the data."""
    assert outcome.job.run_dir is not None
    summary = json.loads((outcome.job.run_dir / "summary.json").read_text(encoding="utf-8"))
    return {name: value for name, value in summary.items() if name not in _OMITTED}


def resumed_figures(outcome: Outcome) -> Mapping[str, Any]:
    """Return the figures of a resumed training.

    Raises:
        ValueError: If the training started from scratch instead.
    """
    first, start = outcome.steps_shown[0][0], outcome.job.about["resumed_from_step"]
    if first <= start:
        raise ValueError(f"the first step after the checkpoint of step {start} was {first}")
    return {**training_figures(outcome), "first_step_shown": first}


def timed_figures(outcome: Outcome) -> Mapping[str, Any]:
    """Return images/s of each line of a short training after the warm-up, and their median."""
    warm = [round(rate, 1) for rate in rates(outcome.job)[WARM_UP_LINES:]]
    return {"images_per_second": statistics.median(warm), "rates": warm}


def build_figures(outcome: Outcome) -> Mapping[str, Any]:
    """Return the rate of `cache build`; each view of a sample counts as a sample."""
    return {"samples_per_second": float(re.findall(r"\((\d+) samples/s\)", outcome.stdout)[-1])}


def verify_figures(outcome: Outcome) -> Mapping[str, Any]:
    """Return the result of `cache verify --json`."""
    report = json.loads(next(line for line in outcome.stdout.splitlines() if line.startswith("{")))
    return {name: report[name] for name in ("is_intact", "files", "bytes", "largest_difference")}


def bench_figures(path: Path) -> Mapping[str, Any]:
    """Return the median latency in milliseconds, by model and batch size."""
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    medians = {
        Path(model["name"]).name: {str(latency["batch_size"]): latency["median_ms"] for latency in model["latency"]}
        for model in models
    }
    return {"latency_ms": medians}
