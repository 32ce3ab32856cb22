"""Figures of a finished job of gpu_reference, read from its run directory, its output or the file that it wrote."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.budgeted_jobs import Job, Outcome

WARM_LINES = 2
"""Lines of metrics in which kernels are chosen and memory is first allocated."""
_BULKY = ("data", "versions", "name")


def rates(job: Job) -> list[float]:
    """Return images/s of each training line of metrics.jsonl; of complete lines, since the training may be writing."""
    path = job.run_dir / "metrics.jsonl" if job.run_dir else None
    text = path.read_text(encoding="utf-8") if path and path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line["images_per_second"] for line in lines if line["split"] == "train" and "images_per_second" in line]


def warm_rate(job: Job) -> float:
    """Return the median of the rates without the first lines."""
    return statistics.median(rates(job)[WARM_LINES:])


def training_figures(outcome: Outcome) -> Mapping[str, Any]:
    """Return what summary.json holds, besides the description of the data."""
    assert outcome.job.run_dir is not None
    summary = json.loads((outcome.job.run_dir / "summary.json").read_text(encoding="utf-8"))
    return {name: value for name, value in summary.items() if name not in _BULKY}


def resumed_figures(outcome: Outcome) -> Mapping[str, Any]:
    """Return the figures of a resumed training. Raises ValueError if it started from scratch instead."""
    first, start = outcome.steps_shown[0][0], outcome.job.about["resumed_from_step"]
    if first <= start:
        raise ValueError(f"the first step after the checkpoint of step {start} was {first}")
    return {**training_figures(outcome), "first_step_shown": first}


def timed_figures(outcome: Outcome) -> Mapping[str, Any]:
    """Return the rate of a short training, and the rates that it is the median of."""
    warm = [round(rate, 1) for rate in rates(outcome.job)[WARM_LINES:]]
    return {"images_per_second": statistics.median(warm), "rates": warm}


def build_figures(outcome: Outcome) -> Mapping[str, Any]:
    """Return the rate of `cache build`; a sample counts once for each of its views."""
    return {"samples_per_second": float(re.findall(r"\((\d+) samples/s\)", outcome.stdout)[-1])}


def verify_figures(outcome: Outcome) -> Mapping[str, Any]:
    """Return the result of `cache verify --json`."""
    report = json.loads(next(line for line in outcome.stdout.splitlines() if line.startswith("{")))
    return {name: report[name] for name in ("is_intact", "files", "bytes", "largest_difference")}


def bench_figures(path: Path) -> Mapping[str, Any]:
    """Return median milliseconds by model and batch size."""
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    latency = {model["name"]: {str(one["batch_size"]): one["median_ms"] for one in model["latency"]} for model in models}
    return {"latency_ms": {Path(name).name: medians for name, medians in latency.items()}}
