"""The run directory: checks before a training starts or resumes in it, the lock, and config.yaml."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any, Literal

import yaml

from kd_accel.config.paths import absolute_paths
from kd_accel.errors import UserError
from kd_accel.io.files import lock, read_json, refuse_links, write_whole
from kd_accel.io.safe_yaml import load_yaml_file
from kd_accel.training.checkpoint import Checkpoint, find_checkpoint, has_checkpoints, load_checkpoint
from kd_accel.training.progress import print_line
from kd_accel.training.resume_settings import refused_changes, setting_changes
from kd_accel.training.state import Position

_LATER = {"best_val_agreement", "best_epoch", "stopped_early"}
"""Fields of a position that checkpoints of earlier versions lack."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_position(value: Any) -> bool:
    known = {each.name for each in fields(Position)}
    # Checkpoints of earlier versions lack the others.
    if not isinstance(value, dict) or not known - _LATER <= value.keys() <= known:
        return False
    numbers = (value["elapsed_s"], value["best_val_accuracy"] or 0.0, value.get("best_val_agreement") or 0.0)
    is_finite = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    counts = (*(value[name] for name in ("epoch", "step_in_epoch", "step")), value.get("best_epoch") or 0)
    return is_finite and all(map(_is_count, counts)) and isinstance(value.get("stopped_early", False), bool)


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
        path: The directory, which may not exist yet.
        settings: All settings of the run, as plain nested values; they are stored with absolute paths.
        resume: The mode `checkpoint.resume`: auto, never or must.
        stop_after_steps: The step of the next pause, as `checkpoint.stop_after_steps`; None = no pause.
    """

    path: Path
    settings: Mapping[str, Any]
    resume: Literal["auto", "never", "must"] = "auto"
    stop_after_steps: int | None = None
    _changes: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Convert the paths among the settings to their absolute form."""
        object.__setattr__(self, "settings", absolute_paths(self.settings))

    def finished_summary(self) -> dict[str, Any] | None:
        """Return the content of summary.json if the directory has all results of a run, else None.

        Raises:
            UserError: If the run has other settings, or a file is damaged.
        """
        if self.resume == "never" or not all((self.path / name).is_file() for name in _RESULTS):
            return None
        remedy = "remove the directory, or use another run_dir"
        summary = read_json(self.path / "summary.json", remedy=remedy)
        try:
            stored = load_yaml_file(self.path / "config.yaml")
        except (OSError, ValueError, yaml.YAMLError):
            stored = None
        if not isinstance(stored, dict):
            raise UserError(f"{self.path / 'config.yaml'}: is missing or damaged: {remedy}")
        self._compare(stored, where=self.path / "config.yaml", is_finished=True)
        if not isinstance(summary.get("data"), dict):
            raise UserError(f"{self.path / 'summary.json'}: is damaged (no data): {remedy}")
        return summary

    def checkpoint_to_resume(self) -> Path | None:
        """Return the checkpoint to resume from, or None to start from scratch.

        Raises:
            UserError: If the directory does not fit `checkpoint.resume` or is not writable, or a setting has changed that may
                not.
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
                f"checkpoint.resume: never, but {self.path} contains an earlier run; use another run_dir, or auto to resume it"
            )
        if found is None:
            self._refuse_damaged_run()
            return None
        checkpoint = load_checkpoint(found)
        wrong = [name for name, is_valid in _STATE.items() if not is_valid(checkpoint.state.get(name))]
        if wrong:
            raise UserError(
                f"{found}: is damaged ({', '.join(wrong)} wrong or missing); remove it to resume from an earlier one, or use "
                "another run_dir"
            )
        changes = self._compare(checkpoint.state["config"], where=found, is_finished=False)
        self._refuse_past_pause(checkpoint)
        self._changes[:] = changes
        return found

    def claim(self, *, resumed_from: Path | None) -> int:
        """Create the directory and lock it until the returned file descriptor is closed.

        Args:
            resumed_from: The result of `checkpoint_to_resume`.

        Returns:
            A file descriptor.

        Raises:
            UserError: If another training is running in the directory, or has run in it since `checkpoint_to_resume`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = lock(self.path / ".lock")
        except BlockingIOError:
            raise UserError(
                f"run_dir: another training is running in {self.path}; wait until it ends, or use another run_dir"
            ) from None
        try:
            if find_checkpoint(self.path / "checkpoints") != resumed_from or self.finished_summary() is not None:
                raise UserError(
                    f"run_dir: another training has run in {self.path} while this one started; run the command again"
                )
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def write_config(self) -> None:
        """Write config.yaml with the present settings, and print those that differ from the checkpoint's.

        Call it once everything that could be wrong with an earlier run in the directory has been checked.
        """
        text = yaml.safe_dump(dict(self.settings), sort_keys=False)
        write_whole(self.path / "config.yaml", lambda temporary: temporary.write_text(text, encoding="utf-8"))
        if self._changes:
            print_line(f"{self.settings['name']}: resumes with changed settings: {'; '.join(self._changes)}")

    def _refuse_damaged_run(self) -> None:
        if has_checkpoints(self.path / "checkpoints"):
            raise UserError(
                f"{self.path / 'checkpoints'}: holds no intact checkpoint (see the warnings above), so the training cannot be "
                "resumed; remove the directory to start from scratch, or use another run_dir"
            )
        if (self.path / "summary.json").exists():
            raise UserError(
                f"{self.path}: has a summary.json but neither all results nor an intact checkpoint, so the training cannot be "
                "resumed; remove the directory, or use another run_dir"
            )

    def _refuse_past_pause(self, checkpoint: Checkpoint) -> None:
        stop, step = self.stop_after_steps, checkpoint.state["position"]["step"]
        if stop is not None and stop <= step:
            raise UserError(
                f"checkpoint.stop_after_steps: {stop}, but {checkpoint.path} is already at step {step}; raise it, or leave it "
                "out to train to the end"
            )

    def _compare(self, stored: Mapping[str, Any], *, where: Path, is_finished: bool) -> list[str]:
        """Compare the settings of the run with the present ones, and describe the changes.

        Raises:
            UserError: If a setting has changed that may not. A path may change if the directory or file was moved: the data
                are compared by their contents, and initial weights are not used again.
        """
        before = absolute_paths(stored)
        refused = refused_changes(before, self.settings, is_finished=is_finished)
        if not refused:
            return list(setting_changes(before, self.settings).values())
        remedy = "Set them back, or start from scratch in another run_dir"
        # A network of another architecture cannot start from these weights.
        if not any(name.startswith(("model.arch", "model.stem")) for name in refused):
            remedy = self._remedy(is_finished=is_finished)
        raise UserError(f"{where} was written with other settings: {'; '.join(refused.values())}. {remedy}")

    def _remedy(self, *, is_finished: bool) -> str:
        """Describe how a run with other settings can start from the weights of this run."""
        flags = shlex.join([f"--run_dir={_unused(self.path)}", f"--model.weights={self.path}"])
        if is_finished:
            return f"Set them back, or train a new run from the weights of this run: add {flags} to the command"
        return (
            "Set them back to resume, or start from scratch in another run_dir. To train a new run from the weights of this "
            f"run, finish this run with its own settings first, then add {flags} to the command"
        )


def _unused(directory: Path) -> Path:
    """Return the first of DIRECTORY-2, DIRECTORY-3, ... that does not exist."""
    return next(path for number in count(2) if not (path := Path(f"{directory}-{number}")).exists())


def refuse_other_teacher(stored: Mapping[str, Any], fingerprint: str | None, *, where: str) -> None:
    """Raise UserError for another teacher than that of the run, which is identified by its fingerprint and not by its path."""
    if stored.get("teacher_fingerprint") != fingerprint:
        raise UserError(
            f"teacher: {where} was trained with the teacher {stored.get('teacher_fingerprint')}, the present one is "
            f"{fingerprint}; use the same teacher with the same mean, std, class_map and image_size (for a run of an earlier "
            "version, set teacher.image_size to data.image_size), or start from scratch in another run_dir"
        )


def refuse_other_cache(checkpoint: Checkpoint, cache: str | None) -> None:
    """Raise UserError for another cache than that of the run, which is identified by its contents and not by its path."""
    stored = checkpoint.state["cache"]
    # Checkpoints of earlier versions lack the batch size of the build.
    if stored != cache and not (stored and cache and "-" not in stored and stored == cache.partition("-")[0]):
        raise UserError(
            f"teacher.cache.dir: {checkpoint.path} was trained from the cache {checkpoint.state['cache']}, the present one is "
            f"{cache}; use the same cache, or start from scratch in another run_dir"
        )


def replaceable_samples(checkpoint: Checkpoint | None, *unreadable: int) -> list[int]:
    """Return the training samples that could not be read in the run, so that their images may be replaced.

    Args:
        checkpoint: Checkpoint that the run was resumed from, with such samples of the time before; None for a new run.
        *unreadable: Samples that cannot be read now.
    """
    earlier = [] if checkpoint is None else checkpoint.state["data"].get("replaceable", [])
    is_valid = isinstance(earlier, list) and all(map(_is_count, earlier))
    return sorted({*(earlier if is_valid else []), *unreadable})


def refuse_other_data(stored: Mapping[str, Any], fields_now: Mapping[str, Any], *, where: str) -> None:
    """Raise UserError for other data than that of the run: classes, samples, labels and (a part of the) images."""
    changed = [
        f"{name}: {stored.get(name)} in the run, {value} now" for name, value in fields_now.items() if stored.get(name) != value
    ]
    if changed:
        raise UserError(
            f"data: {where} was trained on other data ({'; '.join(changed)}); use the same data, or start from scratch in "
            "another run_dir"
        )


def _refuse_unwritable(directory: Path) -> None:
    """Raise UserError for a directory that cannot be created or written, before anything that takes time."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"run_dir: {existing} is a file; name a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: {existing} is not writable; use another run_dir")
