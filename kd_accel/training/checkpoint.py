"""The state of a training on disk: whole or not there, without pickle, and enough of it to go on exactly.

A checkpoint is a directory `checkpoints/step-00000123` with safetensors for what is large and one state.json for the rest,
which also holds size and checksum of each file. It is written under a temporary name and renamed, so a kill at any instant
leaves the checkpoints before it untouched. Reading takes the newest that is whole and names each that is not.

state.json: {"version", "files": {name: {"bytes", "xxh3_128"}}, "state": {...}}; what "state" holds is TrainState's business.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
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

VERSION = 1
_PREFIX = "step-"
_STEP = re.compile(r"step-[0-9]{8,18}")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory holds. tensors: by file stem, then by name, on the CPU."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    directory: Path, *, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write `directory/step-N` atomically, then remove all but `keep` up to it, and damaged ones of later steps.

    Raises UserError when the disk refuses (full, read-only); what was there is untouched.
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
            shutil.rmtree(final)
        temporary.rename(final)
        flush(directory)
        for superseded in _superseded(directory, final, keep=keep):
            shutil.rmtree(superseded)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint: cannot write {final} ({error}); free some space or name another place with run_dir, then start "
            "again: the training goes on from the last whole checkpoint"
        ) from None
    return final


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time: who asks for one waits for the one before it, not for the disk."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def write(self, directory: Path, **content: Any) -> None:
        """`save_checkpoint` with these arguments, which nobody changes any more. Raises what the one before it raised."""
        self.wait()
        self._writing = self._thread.submit(save_checkpoint, directory, **content)

    def wait(self) -> None:
        """Until the last one is on the disk. Raises UserError when the disk has refused it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Without raising anything, for a training that ends with an error of its own."""
        self._thread.shutdown(wait=True)


def find_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint, or None. One that is damaged is named in a warning and passed over."""
    for path in _step_directories(directory):
        damage = _damage(path)
        if damage is None:
            return path
        warnings.warn(f"checkpoint {path} is passed over: {damage}", stacklevel=2)
    return None


def has_checkpoints(directory: Path) -> bool:
    """Whether any stands there, whole or not."""
    return bool(_step_directories(directory))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that `find_checkpoint` found whole. Raises UserError where its files hold no tensors all the same."""
    content = load_json(path / "state.json")
    try:
        tensors = {Path(name).stem: read_tensors(path / name) for name in content["files"]}
    except ValueError as error:
        raise UserError(f"{path}: a file of it is no safetensors file ({error}); remove this checkpoint") from None
    return Checkpoint(path, content["state"], tensors)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as it is now, copied to the host, contiguous, as safetensors wants it."""
    return {name: _copied(tensor) for name, tensor in module.state_dict().items()}


def restore_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy values into the tensors that exist, so that device and memory layout stay as they are."""
    own = module.state_dict()
    assert own.keys() == tensors.keys(), own.keys() ^ tensors.keys()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state per parameter as ("index.name" -> tensor, "index.name" -> plain number)."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = _copied(value)
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """The inverse of `optimizer_tensors`; each tensor takes the layout of its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**numbers, **tensors}.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _step_directories(directory: Path) -> list[Path]:
    """Newest first. A link is none: what it points to is not ours to read or to remove."""
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if _STEP.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), reverse=True)


def _superseded(directory: Path, newest: Path, *, keep: int) -> list[Path]:
    """All but `keep` up to the newest, and those of later steps: a resume has passed them over, so they are damaged."""
    later = [path for path in _step_directories(directory) if path > newest]
    return later + [path for path in _step_directories(directory) if path <= newest][keep:]


def _damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        content = load_json(path / "state.json")
        if content["version"] != VERSION:
            return f"state.json has version {str(content['version'])[:20]}, this program reads {VERSION}"
        if not isinstance(content["state"], dict):
            return "state.json is damaged"
        return next(_damaged_files(path, content["files"]), None)
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "state.json is damaged"


def _damaged_files(path: Path, files: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, expected in files.items():
        if Path(name).name != name:
            yield f"state.json names a file outside the directory ({name!r})"
        elif (path / name).exists() and (not (path / name).is_file() or (path / name).is_symlink()):
            yield f"{name} is no file, or a link"
        elif (path / name).stat().st_size != expected["bytes"]:
            yield f"{name} has {(path / name).stat().st_size} bytes instead of {expected['bytes']}"
        elif _checksum(path / name) != expected["xxh3_128"]:
            yield f"{name} does not match its checksum"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
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
    """Temporary directories of writers that were killed; the one writer of a run is the caller."""
    for path in directory.glob(f".{_PREFIX}*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
