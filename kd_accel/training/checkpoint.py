"""Checkpoints: the state of a training on disk, written atomically and without pickle.

A checkpoint is a directory `checkpoints/step-00000123` with safetensors files for tensors and one state.json for the rest,
which also holds size and checksum of each file. It is written under a temporary name and renamed, so a kill at any instant
leaves earlier checkpoints untouched. A resume reads the newest intact checkpoint, with a warning for each damaged one.

state.json: {"version", "files": {name: {"bytes", "xxh3_128"}}, "state": {...}}; training/state.py defines "state".
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_accel.errors import UserError
from kd_accel.io.files import flush, load_json, write_whole
from kd_accel.io.tensors import read_tensors

VERSION = 2
"""Version of the format; a checkpoint of another version is refused."""

_PREFIX = "step-"
_STEP = re.compile(r"step-([0-9]{8,18})")
_REPLACED = re.compile(r"\.(step-[0-9]{8,18})\.tmp-replaced")
"""Name of a complete checkpoint in whose place a second one of the same step comes."""


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint directory.

    Attributes:
        path: The directory.
        state: Plain values.
        tensors: Tensors on the CPU, by file stem, then by name.
    """

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    directory: Path, *, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write `directory/step-N` atomically, then remove superseded checkpoints: older than the latest `keep`, or of later steps.

    Args:
        directory: Directory of the checkpoints.
        step: Optimizer steps done.
        tensors: Contiguous tensors on the CPU, by file stem, then by name.
        state: Plain values for state.json.
        keep: Number of checkpoints to keep.

    Returns:
        The path of the checkpoint.

    Raises:
        UserError: If the disk is full, read-only or broken; earlier checkpoints are untouched.
    """
    final = directory / f"{_PREFIX}{step:08d}"
    temporary = directory / f".{final.name}.tmp-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        temporary.mkdir()
        files = {
            f"{name}.safetensors": _write_tensors(temporary / f"{name}.safetensors", named) for name, named in tensors.items()
        }
        text = json.dumps({"version": VERSION, "files": files, "state": state})
        write_whole(temporary / "state.json", lambda path: path.write_text(text, encoding="utf-8"))
        flush(temporary)
        if final.is_symlink():
            final.unlink()
        elif final.exists():
            # A second checkpoint of this step: the first one is in place until the second one is complete.
            final.rename(directory / f".{final.name}.tmp-replaced")
        temporary.rename(final)
        _remove_leftovers(directory)
        flush(directory)
        for superseded in _superseded(directory, final, keep=keep):
            shutil.rmtree(superseded)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint: cannot write {final} ({error}); free some space or move the run directory, then run the same command "
            "again: the training resumes from the last intact checkpoint"
        ) from None
    return final


class CheckpointWriter:
    """Writer of checkpoints in a thread, one at a time, while the training continues.

    The error of a failed write is raised by the next call of `write` or `wait`; `has_failed` reports it before.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    @property
    def has_failed(self) -> bool:
        """True if the last write has ended with an error, read without waiting."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def write(self, directory: Path, **content: Any) -> None:
        """Wait for the previous write, then start `save_checkpoint` with these arguments.

        Args:
            directory: Directory of the checkpoints.
            **content: The other arguments of `save_checkpoint`; the caller must not change them afterwards.

        Raises:
            UserError: If the previous write has failed.
        """
        self.wait()
        self._writing = self._thread.submit(save_checkpoint, directory, **content)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises UserError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the thread after its last write. It raises nothing, because it may be called while another error is handled."""
        self._thread.shutdown(wait=True)


def find_checkpoint(directory: Path) -> Path | None:
    """Return the newest intact checkpoint, or None, with a warning for each newer checkpoint that is damaged.

    Raises:
        UserError: If a checkpoint has another version of the format.
    """
    for path in _step_directories(directory):
        damage = _damage(path)
        if damage is None:
            return path
        warnings.warn(f"checkpoint {path} is passed over: {damage}", stacklevel=2)
    return None


def has_checkpoints(directory: Path) -> bool:
    """Return whether a directory contains any checkpoint, intact or damaged."""
    return bool(_step_directories(directory))


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint that `find_checkpoint` has returned. Raises UserError if a file is not a safetensors file."""
    content = load_json(path / "state.json")
    try:
        tensors = {Path(name).stem: read_tensors(path / name) for name in content["files"]}
    except ValueError as error:
        raise UserError(f"{path}: a file in it is not a valid safetensors file ({error}); remove this checkpoint") from None
    return Checkpoint(path, content["state"], tensors)


class HostCopies:
    """Contiguous copies of tensors on the CPU, as `save_checkpoint` takes them.

    Each call of `copy` overwrites the copies of the previous one: memory that was not written to before makes a copy several
    times slower. So the caller must have waited for the write of the previous checkpoint.
    """

    def __init__(self) -> None:
        self._copies: dict[str, dict[str, Tensor]] = {}

    def copy(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copy tensors, by file stem, then by name."""
        before = self._copies
        self._copies = {
            stem: {name: _copied(tensor, before.get(stem, {}).get(name)) for name, tensor in named.items()}
            for stem, named in tensors.items()
        }
        return self._copies


def restore_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy values into a module's tensors, which keep their device and memory format."""
    own = module.state_dict()
    assert own.keys() == tensors.keys(), own.keys() ^ tensors.keys()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors and plain numbers, both by "INDEX.NAME", where INDEX is that of the parameter."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Load the state that `optimizer_tensors` returned; each tensor takes the memory format of its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**numbers, **tensors}.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _copied(tensor: Tensor, copy: Tensor | None) -> Tensor:
    """Copy a tensor into the memory of an earlier copy of it, or into new memory if there is none."""
    if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor)


def _step_directories(directory: Path) -> list[Path]:
    """List the checkpoint directories, newest first, without symbolic links, whose targets may belong to another run.

    Among them is one that a killed process has moved away, but not replaced yet.
    """
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if _STEP.fullmatch(path.name) or _is_only_copy(path))
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=_step_of, reverse=True)


def _is_only_copy(path: Path) -> bool:
    """Return whether this is a replaced checkpoint without the one that replaces it."""
    replaced = _REPLACED.fullmatch(path.name)
    return replaced is not None and not (path.parent / replaced[1]).exists()


def _step_of(path: Path) -> int:
    """Return the step of a checkpoint directory."""
    step = _STEP.search(path.name)
    assert step is not None, path
    return int(step[1])


def _superseded(directory: Path, newest: Path, *, keep: int) -> list[Path]:
    """List the checkpoints to remove after `newest` was written.

    Checkpoints of later steps are damaged: otherwise the training would have resumed from one of them.
    """
    own = _step_of(newest)
    later = [path for path in _step_directories(directory) if _step_of(path) > own]
    return later + [path for path in _step_directories(directory) if _step_of(path) <= own][keep:]


def _damage(path: Path) -> str | None:
    """Describe the damage of a checkpoint; None if it is intact. Raises UserError for another version of the format."""
    try:
        content = load_json(path / "state.json")
        _refuse_other_version(path, content["version"])
        if not isinstance(content["state"], dict):
            return "state.json is damaged"
        return next(_damaged_files(path, content["files"]), None)
    except UserError:
        raise
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "state.json is damaged"


def _refuse_other_version(path: Path, version: Any) -> None:
    """Raise UserError for a checkpoint of another version, TypeError for a version that is not a number."""
    if not isinstance(version, int):
        raise TypeError(version)
    if version != VERSION:
        raise UserError(
            f"{path}: is of version {version} of the checkpoint format, but this program reads and writes version {VERSION}; "
            "start from scratch in another run_dir, or resume with the version of kd_accel that wrote it"
        )


def _damaged_files(path: Path, files: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a description of each damaged file."""
    for name, expected in files.items():
        if Path(name).name != name:
            yield f"state.json names a file outside the directory ({name!r})"
        elif (path / name).exists() and (not (path / name).is_file() or (path / name).is_symlink()):
            yield f"{name} is not a regular file"
        elif (path / name).stat().st_size != expected["bytes"]:
            yield f"{name} has {(path / name).stat().st_size} bytes instead of {expected['bytes']}"
        elif _checksum(path / name) != expected["xxh3_128"]:
            yield f"{name} does not match its checksum"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, flush it to the disk, and return its entry in state.json."""
    save_file(tensors, path)
    path.chmod(0o644)
    flush(path)
    return {"bytes": path.stat().st_size, "xxh3_128": _checksum(path)}


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _remove_leftovers(directory: Path) -> None:
    """Remove the temporary directories of killed processes. The caller must be the only writer in the directory."""
    for path in directory.glob(f".{_PREFIX}*.tmp-*"):
        if not _is_only_copy(path):
            shutil.rmtree(path, ignore_errors=True)
