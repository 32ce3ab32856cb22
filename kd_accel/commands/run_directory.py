"""What stands in a run directory before a training starts, and whether that training may go on there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd_accel.config import RunConfig
from kd_accel.engine.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from kd_accel.parse import flatten
from kd_accel.types import UserError

_MAY_CHANGE = (
    "name",
    "run_dir",
    "checkpoint.",
    "tracking.",
    "data.num_workers",
    "data.memory_limit_mib",
    "teacher.cache_dir",
    "teacher.shard_mib",
    "teacher.cache_batch_size",
)


def checkpoint_to_resume(config: RunConfig) -> Path | None:
    """The checkpoint from which this config may go on, None to start anew.

    Raises UserError when the directory and `checkpoint.resume` do not fit, or a setting differs that may not.
    """
    directory, resume = config.directory, config.checkpoint.resume
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run_dir: {directory} is a file; name a directory")
    found = find_checkpoint(directory / "checkpoints")
    if resume == "must" and found is None:
        raise UserError(f"checkpoint.resume: must, but {directory} holds no whole checkpoint; use auto to start anew")
    if resume == "never" and (found is not None or (directory / "metrics.jsonl").exists()):
        raise UserError(f"checkpoint.resume: never, but {directory} holds an earlier run; name another run_dir, or use auto")
    if found is None:
        _refuse_a_damaged_run(directory)
        return None
    _refuse_other_settings(load_checkpoint(found), config)
    return found


def is_finished(config: RunConfig) -> bool:
    """Whether the run has left all its results."""
    return all((config.directory / name).is_file() for name in ("summary.json", "model.safetensors", "model.json"))


def refuse_other_teacher(checkpoint: Checkpoint, digest: str | None, *, cache: str | None) -> None:
    """A run goes on with the teacher and the cache it began with, whatever stands under their paths today."""
    stored = checkpoint.state["teacher_digest"]
    if stored != digest:
        raise UserError(
            f"teacher: {checkpoint.path} was trained with the teacher {stored}, the one here is {digest}; bring the first one "
            "back, or start anew in another run_dir"
        )
    if checkpoint.state["cache"] != cache:
        raise UserError(
            f"teacher.cache_dir: {checkpoint.path} was trained from the cache {checkpoint.state['cache']}, the one here is "
            f"{cache}; bring the first one back, or start anew in another run_dir"
        )


def refuse_other_data(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """A run goes on with the data it began with: same classes, rows, labels and pixels (a sample of them)."""
    stored = checkpoint.state["data"]
    changed = [f"{name}: {stored[name]} there, {value} here" for name, value in identity.items() if stored[name] != value]
    if changed:
        raise UserError(
            f"data: {checkpoint.path} was trained on other data ({'; '.join(changed)}); bring it back, or start anew in "
            "another run_dir"
        )


def _refuse_a_damaged_run(directory: Path) -> None:
    if (directory / "summary.json").exists():
        raise UserError(
            f"{directory}: holds a summary.json but no whole checkpoint, so the training cannot go on; "
            "remove the directory, or name another run_dir"
        )


def _refuse_other_settings(checkpoint: Checkpoint, config: RunConfig) -> None:
    stored = flatten(checkpoint.state["config"])
    wanted = flatten(json.loads(json.dumps(asdict(config))))
    keys = [key for key in {**stored, **wanted} if not key.startswith(_MAY_CHANGE)]
    changed = [
        f"{key}: {stored.get(key)!r} there, {wanted.get(key)!r} here" for key in keys if stored.get(key) != wanted.get(key)
    ]
    if changed:
        raise UserError(
            f"{checkpoint.path} was written with other settings: {'; '.join(changed)}. "
            "Set them back, or start anew in another run_dir"
        )
