"""Item d: two ranks on one GPU, over gloo because NCCL does not support two ranks on a device.

    cache     the files of a cache built by one rank and by two ranks must be equal byte for byte
    losses    20 steps of a float64 network without BatchNorm, with a teacher: the losses of two ranks must equal those of one
    sigterm   one rank receives SIGTERM in step 10: both must exit with 143, and after a resume the model must equal that of an
              uninterrupted run byte for byte
    2-to-1    the same checkpoint, resumed by one rank, must give the losses of an uninterrupted run

All runs are `deterministic`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import torch

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import (
    IMAGES,
    SYNTHETIC,
    UNTRACKED,
    features_flag,
    losses,
    metrics,
    model_bytes,
    relative_difference,
    teacher_flags,
)
from benchmarks.acceptance.starting import Started, Starter, launch_environment, run_command

SIGTERM_CODE = 128 + 15
_TOLERANCE = 1e-6
"""Largest relative difference of a loss, because two ranks sum in a different order than one."""
_LIMIT_S = 120.0
_SHARED = (*UNTRACKED, *IMAGES, "--train.deterministic=true", "--train.tf32=false")


def build(setting: Setting, starter: Starter) -> Cases:
    """Start all commands that do not need a checkpoint, and return the cases."""
    directory = setting.scratch / "ranks"
    training = [
        *("train", *_SHARED, "--data.limit_train=320", f"--model.arch={SYNTHETIC}:faulty_student_float64", "--optim.lr=0.05"),
        *teacher_flags(setting, starter, f"{SYNTHETIC}:teacher_float64"),
        *("--train.batch_size=32", "--train.max_steps=20", "--train.epochs=2", "--train.log_every_steps=1"),
    ]
    stopped = [*training, f"--run_dir={directory / 'stopped'}"]
    started = {"stopped": _start(starter, "d-stopped", stopped, 2, {"KD_FAULT_SIGTERM_AT": "10"})}
    for ranks in (1, 2):
        uninterrupted = [*training, f"--run_dir={directory / str(ranks)}"]
        started[f"train-{ranks}"] = _start(starter, f"d-train-{ranks}", uninterrupted, ranks)
        cache = _cache_flags(setting, starter, directory, ranks)
        started[f"cache-{ranks}"] = _start(starter, f"d-cache-{ranks}", cache, ranks)
    return {
        "cache": partial(compare_caches, started, directory),
        "losses": partial(compare_losses, started, directory),
        "sigterm": partial(resume, started, starter, directory, stopped),
        "2-to-1": partial(resume_on_one_rank, started, starter, directory, training),
    }


def compare_caches(started: dict[str, list[Started]], directory: Path) -> Figures:
    """Compare the files of the caches of one rank and of two ranks."""
    _finish(started["cache-1"] + started["cache-2"])
    one, two = (_digests(directory / f"cache-{ranks}") for ranks in (1, 2))
    differing = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    return {"ok": bool(one) and not differing, "files": len(one), "differing_files": differing}


def compare_losses(started: dict[str, list[Started]], directory: Path) -> Figures:
    """Compare the losses of two ranks with those of one rank."""
    _finish(started["train-1"] + started["train-2"])
    return _compare(directory / "2", directory / "1")


def resume(started: dict[str, list[Started]], starter: Starter, directory: Path, flags: list[str]) -> Figures:
    """Resume the stopped training on two ranks, and compare it with the uninterrupted training."""
    _finish(started["stopped"], code=SIGTERM_CODE)
    run_dir, expected = directory / "stopped", directory / "2"
    steps_done = len(losses(run_dir))
    # Case 2-to-1 resumes a copy of the run directory.
    shutil.copytree(run_dir, directory / "moved")
    _finish(_start(starter, "d-resumed", [*flags, "--checkpoint.resume=must"], 2) + started["train-2"])
    is_same = model_bytes(run_dir) == model_bytes(expected) and metrics(run_dir) == metrics(expected)
    return {"ok": is_same and steps_done < 20, "exit_code": SIGTERM_CODE, "steps_before": steps_done, "same_bytes": is_same}


def resume_on_one_rank(started: dict[str, list[Started]], starter: Starter, directory: Path, flags: list[str]) -> Figures:
    """Resume the stopped training on one rank, and compare its losses with those of the uninterrupted training."""
    if not (directory / "moved").exists():
        raise RuntimeError("the checkpoint of two ranks was not found, because the case sigterm has failed")
    moved = [*flags, f"--run_dir={directory / 'moved'}", "--checkpoint.resume=must"]
    _finish(_start(starter, "d-moved", moved, 1) + started["train-1"])
    return _compare(directory / "moved", directory / "1")


def join_over_gloo(argv: list[str]) -> None:
    """Run a command as a rank of a process group over gloo."""
    # Accelerate would choose NCCL, but keeps a process group that is initialized.
    torch.distributed.init_process_group("gloo")
    run_command(argv)


def _start(starter: Starter, name: str, argv: list[str], ranks: int, env: dict[str, str] | None = None) -> list[Started]:
    if ranks == 1:
        return [starter.command(name, *argv, env=env)]
    environments = launch_environment(ranks)
    return [
        starter.start(f"{name}-{rank}", join_over_gloo, argv, env={**environment, **(env or {})})
        for rank, environment in enumerate(environments)
    ]


def _finish(started: list[Started], *, code: int = 0) -> None:
    for process in started:
        process.finish(_LIMIT_S, code=code)


def _cache_flags(setting: Setting, starter: Starter, directory: Path, ranks: int) -> list[str]:
    """Return the flags of a `cache build` with small shards, so that each rank writes several files."""
    return [
        *("cache", "build", *_SHARED, f"--data.limit_train={setting.size(2048, 96)}", "--data.views=2"),
        *("--model.arch=torchvision/resnet18", *teacher_flags(setting, starter, "torchvision/resnet50")),
        *("--teacher.outputs=cached", "--teacher.cache.shard_mib=1", f"--teacher.cache.dir={directory / f'cache-{ranks}'}"),
        *(f"--train.batch_size={setting.size(128, 16)}", features_flag(2, pca_images=setting.size(1024, 64))),
    ]


def _digests(directory: Path) -> dict[str, str]:
    """Return {file of a cache: digest}. That of spec.json omits the fields that record how the cache was built."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")]
    contents = {str(path.relative_to(directory)): path.read_bytes() for path in files}
    cache_spec = {
        name: value for name, value in json.loads(contents["spec.json"]).items() if name not in ("recorded", "checksum")
    }
    contents["spec.json"] = json.dumps(cache_spec).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _compare(run_dir: Path, expected: Path) -> Figures:
    difference = relative_difference(losses(run_dir), losses(expected))
    return {"ok": difference <= _TOLERANCE, "largest_relative_difference": difference, "steps": len(losses(run_dir))}
