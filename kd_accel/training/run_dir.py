"""What stands in a run directory before a training starts, and whether that training may go on there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from kd_accel.config.parsing import save_config
from kd_accel.config.reading import flatten
from kd_accel.config.schema import RunConfig
from kd_accel.errors import UserError
from kd_accel.io.files import lock, read_json, refuse_links, write_whole
from kd_accel.io.safe_yaml import load_yaml_file
from kd_accel.training.checkpoint import Checkpoint, find_checkpoint, has_checkpoints, load_checkpoint
from kd_accel.training.state import Position

_MAY_CHANGE = (
    "name",
    "run_dir",
    "profile",
    "checkpoint.",
    "tracking.",
    "data.num_workers",
    "train.timeout_s",
    "data.memory_limit_mib",
    "teacher.cache_dir",
    "teacher.shard_mib",
    "teacher.cache_batch_size",
)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_position(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(Position)}:
        return False
    numbers = (value["elapsed_s"], value["best_val_accuracy"] or 0.0)
    is_finite = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    return is_finite and all(_is_count(value[name]) for name in ("epoch", "step_in_epoch", "step"))


_STATE: dict[str, Callable[[Any], bool]] = {
    "position": _is_position,
    "metrics_bytes": _is_count,
    "config": lambda value: isinstance(value, dict),
    "data": lambda value: isinstance(value, dict),
    "optimizer": lambda value: isinstance(value, dict),
    "pca_explained": lambda value: isinstance(value, dict),
    "ranks": lambda value: isinstance(value, list) and bool(value) and all(isinstance(rank, dict) for rank in value),
    "meter_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "wandb_id": _is_name,
    "teacher_digest": _is_name,
    "cache": _is_name,
}
"""Of the plain state in a checkpoint, what is read before the training stands."""

_RESULTS = ("summary.json", "model.safetensors", "model.json")


def finished_summary(config: RunConfig) -> dict[str, Any] | None:
    """summary.json of a run that has left all its results, None of one that has not.

    Raises UserError where it was another training than this config's.
    """
    directory = config.directory
    if config.checkpoint.resume == "never" or not all((directory / name).is_file() for name in _RESULTS):
        return None
    remedy = "remove the directory, or name another run_dir"
    summary = read_json(directory / "summary.json", remedy=remedy)
    try:
        stored = load_yaml_file(directory / "config.yaml")
    except (OSError, ValueError, yaml.YAMLError):
        stored = None
    if not isinstance(stored, dict):
        raise UserError(f"{directory / 'config.yaml'}: is missing or damaged: {remedy}")
    _refuse_other_settings(stored, config, where=str(directory / "config.yaml"))
    if not isinstance(summary.get("data"), dict):
        raise UserError(f"{directory / 'summary.json'}: is damaged (no data): {remedy}")
    return summary


def checkpoint_to_resume(config: RunConfig) -> Path | None:
    """The checkpoint from which this config may go on, None to start anew.

    Raises UserError when the directory and `checkpoint.resume` do not fit, a setting differs that may not, or the directory
    cannot be written.
    """
    directory, resume = config.directory, config.checkpoint.resume
    _refuse_unwritable(directory)
    refuse_links(directory, field="run_dir")
    found = find_checkpoint(directory / "checkpoints")
    if resume == "must" and found is None:
        raise UserError(f"checkpoint.resume: must, but {directory} holds no whole checkpoint; use auto to start anew")
    if resume == "never" and (found is not None or (directory / "metrics.jsonl").exists()):
        raise UserError(f"checkpoint.resume: never, but {directory} holds an earlier run; name another run_dir, or use auto")
    if found is None:
        _refuse_a_damaged_run(directory)
        return None
    checkpoint = load_checkpoint(found)
    wrong = [name for name, is_valid in _STATE.items() if not is_valid(checkpoint.state.get(name))]
    if wrong:
        raise UserError(
            f"{found}: is damaged ({', '.join(wrong)} wrong or missing); remove it to go on from an earlier one, or name "
            "another run_dir"
        )
    _refuse_other_settings(checkpoint.state["config"], config, where=str(found))
    _refuse_a_pause_that_is_past(checkpoint, config)
    return found


def claim(config: RunConfig, *, resumed_from: Path | None) -> int:
    """Make the directory, and hold it until the returned descriptor is closed.

    resumed_from: the newest checkpoint when it was looked at. Raises UserError where a training has worked there since.
    """
    directory = config.directory
    directory.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = lock(directory / ".lock")
    except BlockingIOError:
        raise UserError(f"run_dir: another training is at work in {directory}; wait for it, or name another run_dir") from None
    try:
        if find_checkpoint(directory / "checkpoints") != resumed_from or finished_summary(config) is not None:
            raise UserError(f"run_dir: another training has worked in {directory} while this one started; start it again")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def keep_config(config: RunConfig) -> None:
    """config.yaml, once all that could be wrong with an earlier training there has been looked at."""
    write_whole(config.directory / "config.yaml", lambda temporary: save_config(config, temporary))


def refuse_other_teacher(stored: Mapping[str, Any], digest: str | None, *, where: str) -> None:
    """A run goes on with the teacher it began with, whatever stands under that teacher's path today."""
    if stored.get("teacher_digest") != digest:
        raise UserError(
            f"teacher: {where} was trained with the teacher {stored.get('teacher_digest')}, the one here is {digest}; bring "
            "the first one back, or start anew in another run_dir"
        )


def refuse_other_cache(checkpoint: Checkpoint, cache: str | None) -> None:
    """The same for a cache, whatever its path."""
    if checkpoint.state["cache"] != cache:
        raise UserError(
            f"teacher.cache_dir: {checkpoint.path} was trained from the cache {checkpoint.state['cache']}, the one here is "
            f"{cache}; bring the first one back, or start anew in another run_dir"
        )


def refuse_other_data(stored: Mapping[str, Any], fingerprint_fields: Mapping[str, Any], *, where: str) -> None:
    """A run goes on with the data it began with: same classes, samples, labels and images (a sample of them)."""
    changed = [
        f"{name}: {stored.get(name)} there, {value} here"
        for name, value in fingerprint_fields.items()
        if stored.get(name) != value
    ]
    if changed:
        raise UserError(
            f"data: {where} was trained on other data ({'; '.join(changed)}); bring it back, or start anew in another run_dir"
        )


def _refuse_unwritable(directory: Path) -> None:
    """Before anything that takes time; a full disk shows only later."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"run_dir: {existing} is a file; name a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: {existing} may not be written; name another run_dir")


def _refuse_a_damaged_run(directory: Path) -> None:
    if has_checkpoints(directory / "checkpoints"):
        raise UserError(
            f"{directory / 'checkpoints'}: holds no whole checkpoint (what is wrong with each stands above), so the training "
            "cannot go on; remove the directory to start anew, or name another run_dir"
        )
    if (directory / "summary.json").exists():
        raise UserError(
            f"{directory}: holds a summary.json but neither all results nor a whole checkpoint, so the training cannot go on; "
            "remove the directory, or name another run_dir"
        )


def _refuse_a_pause_that_is_past(checkpoint: Checkpoint, config: RunConfig) -> None:
    stop, step = config.checkpoint.stop_after_steps, checkpoint.state["position"]["step"]
    if stop is not None and stop <= step:
        raise UserError(
            f"checkpoint.stop_after_steps: {stop}, but {checkpoint.path} is at step {step} already; raise it, or leave it out "
            "to train to the end"
        )


def _refuse_other_settings(stored: Mapping[str, Any], config: RunConfig, *, where: str) -> None:
    before = flatten(stored)
    request = flatten(json.loads(json.dumps(asdict(config))))
    keys = [key for key in {**before, **request} if not key.startswith(_MAY_CHANGE)]
    changed = [
        f"{key}: {before.get(key)!r} there, {request.get(key)!r} here" for key in keys if before.get(key) != request.get(key)
    ]
    if changed:
        raise UserError(
            f"{where} was written with other settings: {'; '.join(changed)}. Set them back, or start anew in another run_dir"
        )
