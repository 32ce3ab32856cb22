"""Item d: two ranks, which share the one GPU over gloo (NCCL refuses that).

    cache     the files of a cache are the same bytes, built by one rank and by two
    losses    20 steps of a float64 network without BatchNorm and its teacher: the losses of two ranks are those of one
    sigterm   one rank is signaled in step 10: both leave with 143, and resumed they end with the bytes of the undisturbed
    2-to-1    the same checkpoint, resumed by one rank

All runs are `deterministic`. Those of two ranks join over gloo before the program would join them over NCCL.
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
    OWN,
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
_LARGEST = 1e-6
_LIMIT_S = 120.0
_SHARED = (*UNTRACKED, *IMAGES, "--train.deterministic=true", "--train.tf32=false")


def build(setting: Setting, starter: Starter) -> Cases:
    """Start at once everything that needs no checkpoint."""
    directory = setting.scratch / "ranks"
    training = [
        *("train", *_SHARED, "--data.limit_train=320", f"--model.arch={OWN}:disturbed_float64", "--optim.lr=0.05"),
        *teacher_flags(setting, starter, f"{OWN}:teacher_float64"),
        *("--train.batch_size=32", "--train.max_steps=20", "--train.epochs=2", "--train.log_every_steps=1"),
    ]
    stopped = [*training, f"--run_dir={directory / 'stopped'}"]
    started = {"stopped": _start(starter, "d-stopped", stopped, 2, {"KD_ACCEPTANCE_SIGTERM_AT": "10"})}
    for ranks in (1, 2):
        straight, cache = [*training, f"--run_dir={directory / str(ranks)}"], _cache_flags(setting, starter, directory, ranks)
        started[f"straight-{ranks}"] = _start(starter, f"d-straight-{ranks}", straight, ranks)
        started[f"cache-{ranks}"] = _start(starter, f"d-cache-{ranks}", cache, ranks)
    return {
        "cache": partial(same_cache, started, directory),
        "losses": partial(same_losses, started, directory),
        "sigterm": partial(resumed, started, starter, directory, stopped),
        "2-to-1": partial(resumed_by_one, started, starter, directory, training),
    }


def same_cache(started: dict[str, list[Started]], directory: Path) -> Figures:
    """Compare the files of the caches of one and of two ranks."""
    _finish(started["cache-1"] + started["cache-2"])
    one, two = (_digests(directory / f"cache-{ranks}") for ranks in (1, 2))
    differing = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    return {"ok": bool(one) and not differing, "files": len(one), "differing_files": differing}


def same_losses(started: dict[str, list[Started]], directory: Path) -> Figures:
    """Compare the losses of two ranks with those of one."""
    _finish(started["straight-1"] + started["straight-2"])
    return _compared(directory / "2", directory / "1")


def resumed(started: dict[str, list[Started]], starter: Starter, directory: Path, flags: list[str]) -> Figures:
    """Resume the signaled training on two ranks, and compare it with the undisturbed one."""
    _finish(started["stopped"], code=SIGTERM_CODE)
    steps_done = len(losses(directory / "stopped"))
    shutil.copytree(directory / "stopped", directory / "moved")
    _finish(_start(starter, "d-resumed", [*flags, "--checkpoint.resume=must"], 2) + started["straight-2"])
    own, expected = directory / "stopped", directory / "2"
    is_same = model_bytes(own) == model_bytes(expected) and metrics(own) == metrics(expected)
    return {"ok": is_same and steps_done < 20, "exit_code": SIGTERM_CODE, "steps_before": steps_done, "same_bytes": is_same}


def resumed_by_one(started: dict[str, list[Started]], starter: Starter, directory: Path, flags: list[str]) -> Figures:
    """Resume the signaled training on one rank, and compare its losses."""
    if not (directory / "moved").exists():
        raise RuntimeError("the checkpoint of two ranks was not found: the case sigterm has failed")
    moved = [*flags, f"--run_dir={directory / 'moved'}", "--checkpoint.resume=must"]
    _finish(_start(starter, "d-moved", moved, 1) + started["straight-1"])
    return _compared(directory / "moved", directory / "1")


def join_over_gloo(argv: list[str]) -> None:
    """Run a command as a rank of a launch. Accelerate keeps a process group that it finds initialized."""
    torch.distributed.init_process_group("gloo")
    run_command(argv)


def _start(starter: Starter, name: str, argv: list[str], ranks: int, env: dict[str, str] | None = None) -> list[Started]:
    if ranks == 1:
        return [starter.command(name, *argv, env=env)]
    environments = launch_environment(ranks)
    return [
        starter.start(f"{name}-{rank}", join_over_gloo, argv, env={**own, **(env or {})})
        for rank, own in enumerate(environments)
    ]


def _finish(started: list[Started], *, code: int = 0) -> None:
    for process in started:
        process.finish(_LIMIT_S, code=code)


def _cache_flags(setting: Setting, starter: Starter, directory: Path, ranks: int) -> list[str]:
    """Return the flags of a build with a few files for each rank."""
    return [
        *("cache", "build", *_SHARED, f"--data.limit_train={setting.size(2048, 96)}", "--data.views=2"),
        *("--model.arch=torchvision/resnet18", *teacher_flags(setting, starter, "torchvision/resnet50")),
        *("--teacher.outputs=cached", "--teacher.cache.shard_mib=1", f"--teacher.cache.dir={directory / f'cache-{ranks}'}"),
        *(f"--train.batch_size={setting.size(128, 16)}", features_flag(2, pca_images=setting.size(1024, 64))),
    ]


def _digests(directory: Path) -> dict[str, str]:
    """Return a digest of each file of a cache; of spec.json without the circumstances of the build."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")]
    contents = {str(path.relative_to(directory)): path.read_bytes() for path in files}
    cache_spec = {
        name: value for name, value in json.loads(contents["spec.json"]).items() if name not in ("recorded", "checksum")
    }
    contents["spec.json"] = json.dumps(cache_spec).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _compared(run_dir: Path, expected: Path) -> Figures:
    difference = relative_difference(losses(run_dir), losses(expected))
    return {"ok": difference <= _LARGEST, "largest_relative_difference": difference, "steps": len(losses(run_dir))}
