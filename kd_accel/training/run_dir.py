"""The run directory: checks before a training starts or resumes in it, the lock, and its config."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from kd_accel.config.fields import flatten
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
    "teacher.cache.dir",
    "teacher.cache.shard_mib",
    "teacher.cache.batch_size",
)
"""Settings, or prefixes of settings, that may differ when a run is resumed."""


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
    "explained": lambda value: isinstance(value, dict),
    "ranks": lambda value: isinstance(value, list) and bool(value) and all(isinstance(rank, dict) for rank in value),
    "meter_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "wandb_id": _is_name,
    "teacher_fingerprint": _is_name,
    "cache": _is_name,
}
"""Check of each plain value of a checkpoint that is read before the training is built."""

_RESULTS = ("summary.json", "model.safetensors", "model.json")


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run.

    Args:
        path: of the directory, which may not exist yet.
        settings: the complete settings of the run, as plain nested values.
        resume: auto, never or must, as `checkpoint.resume`.
        stop_after_steps: as `checkpoint.stop_after_steps`.
    """

    path: Path
    settings: Mapping[str, Any]
    resume: Literal["auto", "never", "must"] = "auto"
    stop_after_steps: int | None = None

    def finished_summary(self) -> dict[str, Any] | None:
        """Return summary.json of a run that has left all its results, None of another.

        Raises:
            UserError: the run has other settings.
        """
        if self.resume == "never" or not all((self.path / name).is_file() for name in _RESULTS):
            return None
        remedy = "remove the directory, or name another run_dir"
        summary = read_json(self.path / "summary.json", remedy=remedy)
        try:
            stored = load_yaml_file(self.path / "config.yaml")
        except (OSError, ValueError, yaml.YAMLError):
            stored = None
        if not isinstance(stored, dict):
            raise UserError(f"{self.path / 'config.yaml'}: is missing or damaged: {remedy}")
        self._refuse_other_settings(stored, where=str(self.path / "config.yaml"))
        if not isinstance(summary.get("data"), dict):
            raise UserError(f"{self.path / 'summary.json'}: is damaged (no data): {remedy}")
        return summary

    def checkpoint_to_resume(self) -> Path | None:
        """Return the checkpoint from which the run continues, None to start from scratch.

        Raises:
            UserError: the directory and `checkpoint.resume` do not fit, a setting differs that may not, or the directory
                cannot be written.
        """
        _refuse_unwritable(self.path)
        refuse_links(self.path, field="run_dir")
        found = find_checkpoint(self.path / "checkpoints")
        if self.resume == "must" and found is None:
            raise UserError(
                f"checkpoint.resume: must, but {self.path} holds no intact checkpoint; use auto to start from scratch"
            )
        if self.resume == "never" and (found is not None or (self.path / "metrics.jsonl").exists()):
            raise UserError(
                f"checkpoint.resume: never, but {self.path} holds an earlier run; name another run_dir, or use auto"
            )
        if found is None:
            self._refuse_a_damaged_run()
            return None
        checkpoint = load_checkpoint(found)
        wrong = [name for name, is_valid in _STATE.items() if not is_valid(checkpoint.state.get(name))]
        if wrong:
            raise UserError(
                f"{found}: is damaged ({', '.join(wrong)} wrong or missing); remove it to resume from an earlier one, or name "
                "another run_dir"
            )
        self._refuse_other_settings(checkpoint.state["config"], where=str(found))
        self._refuse_a_pause_that_is_past(checkpoint)
        return found

    def claim(self, *, resumed_from: Path | None) -> int:
        """Create the directory and hold it until the returned descriptor is closed.

        Args:
            resumed_from: the newest checkpoint when the directory was checked.

        Raises:
            UserError: another training is running in the directory, or has run in it since it was checked.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = lock(self.path / ".lock")
        except BlockingIOError:
            raise UserError(
                f"run_dir: another training is running in {self.path}; wait for its end, or name another run_dir"
            ) from None
        try:
            if find_checkpoint(self.path / "checkpoints") != resumed_from or self.finished_summary() is not None:
                raise UserError(f"run_dir: another training has run in {self.path} while this one started; start again")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def write_config(self) -> None:
        """Write config.yaml, once everything that could be wrong with an earlier run in the directory has been checked."""
        text = yaml.safe_dump(dict(self.settings), sort_keys=False)
        write_whole(self.path / "config.yaml", lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _refuse_a_damaged_run(self) -> None:
        if has_checkpoints(self.path / "checkpoints"):
            raise UserError(
                f"{self.path / 'checkpoints'}: holds no intact checkpoint (the damage of each is named above), so the training "
                "cannot be resumed; remove the directory to start from scratch, or name another run_dir"
            )
        if (self.path / "summary.json").exists():
            raise UserError(
                f"{self.path}: holds a summary.json but neither all results nor an intact checkpoint, so the training cannot "
                "be resumed; remove the directory, or name another run_dir"
            )

    def _refuse_a_pause_that_is_past(self, checkpoint: Checkpoint) -> None:
        stop, step = self.stop_after_steps, checkpoint.state["position"]["step"]
        if stop is not None and stop <= step:
            raise UserError(
                f"checkpoint.stop_after_steps: {stop}, but {checkpoint.path} is at step {step} already; raise it, or leave it "
                "out to train to the end"
            )

    def _refuse_other_settings(self, stored: Mapping[str, Any], *, where: str) -> None:
        before, now = flatten(stored), flatten(self.settings)
        keys = [key for key in {**before, **now} if not key.startswith(_MAY_CHANGE)]
        changed = [
            f"{key}: {before.get(key)!r} in the run, {now.get(key)!r} now" for key in keys if before.get(key) != now.get(key)
        ]
        if changed:
            raise UserError(
                f"{where} was written with other settings: {'; '.join(changed)}. Set them back, or start from scratch in "
                "another run_dir"
            )


def refuse_other_teacher(stored: Mapping[str, Any], fingerprint: str | None, *, where: str) -> None:
    """Raise UserError for another teacher than the one that the run began with, regardless of its path."""
    if stored.get("teacher_fingerprint") != fingerprint:
        raise UserError(
            f"teacher: {where} was trained with the teacher {stored.get('teacher_fingerprint')}, the present one is "
            f"{fingerprint}; "
            "bring the first one back, or start from scratch in another run_dir"
        )


def refuse_other_cache(checkpoint: Checkpoint, cache: str | None) -> None:
    """Raise UserError for another cache than the one that the run began with, regardless of its path."""
    if checkpoint.state["cache"] != cache:
        raise UserError(
            f"teacher.cache.dir: {checkpoint.path} was trained from the cache {checkpoint.state['cache']}, the present one is "
            f"{cache}; bring the first one back, or start from scratch in another run_dir"
        )


def refuse_other_data(stored: Mapping[str, Any], fields_now: Mapping[str, Any], *, where: str) -> None:
    """Raise UserError for other data than the run began with: classes, samples, labels and images (some of them)."""
    changed = [
        f"{name}: {stored.get(name)} in the run, {value} now" for name, value in fields_now.items() if stored.get(name) != value
    ]
    if changed:
        raise UserError(
            f"data: {where} was trained on other data ({'; '.join(changed)}); bring it back, or start from scratch in another "
            "run_dir"
        )


def _refuse_unwritable(directory: Path) -> None:
    """Raise UserError before anything that takes time; a full disk shows only later."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"run_dir: {existing} is a file; name a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: {existing} is not writable; name another run_dir")
