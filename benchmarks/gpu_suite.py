"""All that must be measured on a GPU, in one command and at most eight minutes: `python -m benchmarks.gpu_suite`.

    training   plain, live and cached, in float32, bf16 and fp16, with and without torch.compile (gpu_case.py), each in its own
               process: images per second, peak memory, CUDA events over the host's clock, shares of copies and kernels
    latency    ResNet-50 and ResNet-18 at batch 1 and 128, by CUDA events
    agreement  thirty steps of the digits student in float32 on the GPU and on the CPU: largest relative difference of a loss

One GPU, no network; the only data are the digits and random pixels. Without a GPU it says so and ends with 0. What does not fit
into the time, or fails, is left out and named in the notes; after a failure it ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Result, finish
from benchmarks.jobs import CLASSES, IMAGE_SIZE
from kd_accel.bench.latency import measure_latency
from kd_accel.models.zoo import build_model

LIMIT_S = 480
PRECISIONS = ("no", "bf16", "fp16")
AGREEMENT_STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", action="store_true", help="all of it in small, without fp16 and compile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.trial:
        print("there is no GPU here: nothing was measured")
        return
    ends_at, have_all_worked = time.monotonic() + LIMIT_S, True
    result = Result("gpu-suite")
    agreement = loss_difference()
    result.notes["largest relative difference of a loss, GPU and CPU"] = agreement
    latencies(result, is_trial=arguments.trial)
    for compiles in (False,) if arguments.trial else (False, True):
        for precision in PRECISIONS[:2] if arguments.trial else PRECISIONS:
            left_s = ends_at - time.monotonic()
            have_all_worked &= add_case(result, precision, compiles=compiles, left_s=left_s, is_trial=arguments.trial)
    finish(result)
    if not have_all_worked:
        raise SystemExit(1)


def add_case(result: Result, precision: str, *, compiles: bool, left_s: float, is_trial: bool) -> bool:
    """False where the case failed: what was measured before it is kept."""
    name = f"{precision}{'/compiled' if compiles else ''}"
    small = ["--batch_size", "4", "--steps", "1", "--repeats", "1"] if is_trial else []
    flags = ["--precision", precision, *(["--compile"] if compiles else []), *small]
    try:
        found = _last_json([sys.executable, "-m", "benchmarks.gpu_case", *flags], timeout_s=left_s)
    except subprocess.TimeoutExpired:
        result.notes[name] = "left out: the time was over"
        return True
    except RuntimeError as error:
        result.notes[name] = f"failed: {error}"
        print(f"{name} failed: {error}")
        return False
    result.add_repeats({f"{case}/{name}": rates for case, rates in found.pop("rates").items()})
    result.notes[name] = found
    for numerator, denominator in (("cached", "plain"), ("live", "plain")):
        result.add_ratio(f"{numerator}/{name}", f"{denominator}/{name}")
    return True


def latencies(result: Result, *, is_trial: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {arch: build_model(f"torchvision/{arch}", num_classes=CLASSES) for arch in ("resnet50", "resnet18")}
    for batch_size in (1,) if is_trial else (1, 128):
        images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE).to(device)
        found = measure_latency(
            {arch: model.eval().to(device).to(memory_format=torch.channels_last) for arch, model in models.items()},
            dict.fromkeys(models, images.contiguous(memory_format=torch.channels_last)),
            min_iterations=3 if is_trial else 200,
            min_time_s=0.01 if is_trial else 1.0,
        )
        result.notes[f"latency at batch {batch_size}, ms"] = found


def loss_difference() -> float:
    """Same weights, views and order on both; TF32 in convolutions as torch has it."""
    losses: list[list[float]] = []
    with tempfile.TemporaryDirectory() as directory:
        for name, changes in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
            run_dir = Path(directory) / name
            training = ["train", "--run_dir", str(run_dir), "--data.source", "digits", "--train.batch_size", "32"]
            training += ["--train.max_steps", str(AGREEMENT_STEPS), "--train.log_every_steps", "1", "--optim.lr", "0.01"]
            command = [sys.executable, "-m", "kd_accel", *training, "--tracking.wandb", "disabled"]
            subprocess.run(command, env={**os.environ, **changes}, check=True, stdout=subprocess.DEVNULL)
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            losses.append([line["loss"] for line in lines if line["split"] == "train"])
    assert len(losses[0]) == len(losses[1]) == AGREEMENT_STEPS
    return max(abs(one - other) / abs(other) for one, other in zip(*losses, strict=True))


def _last_json(command: list[str], *, timeout_s: float) -> dict[str, Any]:
    if timeout_s <= 0:
        raise subprocess.TimeoutExpired(command, timeout_s)
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
