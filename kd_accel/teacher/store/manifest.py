"""What a cache directory says of itself, and who may write in it.

plan.json is written before any shard, manifest.json after all of them; both by rename. A name in a manifest is only ever
compared with the names that follow from the plan, never opened: it cannot lead out of the directory. Rows and projectors are
checked against the digests in the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kd_accel.disk import flush, lock, read_json, unlock, write_json, write_whole
from kd_accel.models.tensor_files import read_tensors
from kd_accel.teacher.identity import arrays_digest, tensors_digest
from kd_accel.teacher.store.layout import SPLITS, VERSION, Plan, Shard, Split, plan_from_json, plan_to_json
from kd_accel.types import UserError

_REBUILD = "run `kd-accel cache build` with the same config, which mends it"


@dataclass(frozen=True)
class CachedRows:
    """Which rows of a split a cache covers, ascending, and what each of them was. rows: int64 [N]; contents: uint64 [N]."""

    rows: np.ndarray
    contents: np.ndarray

    @property
    def digest(self) -> str:
        return arrays_digest(self.rows, self.contents)


def read_plan(directory: Path) -> Plan:
    """Raises UserError where there is none, or none that this program can trust."""
    path = directory / "plan.json"
    if not path.is_file():
        raise UserError(
            f"teacher.cache_dir: {directory} holds no cache (no plan.json); run `kd-accel cache build` with the same config"
        )
    content = read_json(path, remedy=_REBUILD)
    _refuse_later_version(content, path)
    try:
        return plan_from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: is damaged: {_REBUILD}") from None


def find_plan(directory: Path) -> Plan | None:
    """The plan of a cache that a build may go on with; None where there is none, or a damaged one."""
    path = directory / "plan.json"
    if not path.exists():
        return None
    try:
        content = read_json(path, remedy="")
    except UserError:
        return None
    _refuse_later_version(content, path)
    try:
        return plan_from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def refuse_other_owner(directory: Path, plan: Plan) -> None:
    """Where plan.json is gone, a build must not write a plan of its own over the cache of another config."""
    try:
        owner = read_json(directory / "manifest.json", remedy="").get("cache")
    except UserError:
        return
    if owner != plan.digest:
        raise UserError(
            f"teacher.cache_dir: plan.json of {directory} is missing or damaged, and manifest.json beside it belongs to a "
            f"cache of something else ({owner} stored, {plan.digest} wanted); build with the config of the first build, name "
            "another cache_dir, or remove that directory first"
        )


def write_plan(directory: Path, plan: Plan) -> None:
    write_json(plan_to_json(plan), directory / "plan.json")


def read_manifest(directory: Path, plan: Plan) -> dict[str, str]:
    """{file name: checksum of its data} of the shards that were complete when it was written; empty where there is none.

    Raises UserError for a damaged one, one of another cache or version, and one with a name that no plan gives.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        return {}
    content = read_json(path, remedy=_REBUILD)
    _refuse_later_version(content, path)
    files = content.get("files")
    if not isinstance(files, dict) or not all(isinstance(checksum, str) for checksum in files.values()):
        raise UserError(f"{path}: is damaged: {_REBUILD}")
    _refuse_foreign_names(files, path)
    if content.get("cache") != plan.digest:
        raise UserError(f"{path}: belongs to another cache than plan.json beside it: {_REBUILD}")
    return files


def find_manifest(directory: Path, plan: Plan) -> dict[str, str]:
    """As `read_manifest`, for a build, to which a damaged one is none. One that was tampered with is refused all the same."""
    try:
        return read_manifest(directory, plan)
    except _TamperedError:
        raise
    except UserError:
        return {}


def write_manifest(directory: Path, plan: Plan, files: Mapping[str, str], *, teacher_accuracy: float | None = None) -> None:
    """Write manifest.json, which makes a cache complete.

    Args:
        directory: of the cache.
        plan: of the cache.
        files: {file name: checksum of its data}.
        teacher_accuracy: on the cached test rows, a fraction of 1, for whoever reads the file.
    """
    content = {"version": VERSION, "cache": plan.digest, "teacher_accuracy": teacher_accuracy}
    write_json({**content, "files": dict(sorted(files.items()))}, directory / "manifest.json")


def read_teacher_accuracy(directory: Path) -> float | None:
    """Return the accuracy that `write_manifest` was given, None where manifest.json does not have it or does not exist."""
    path = directory / "manifest.json"
    accuracy = read_json(path, remedy=_REBUILD).get("teacher_accuracy") if path.is_file() else None
    return accuracy if isinstance(accuracy, float) and 0 <= accuracy <= 1 else None


def missing_shards(plan: Plan, files: Mapping[str, str]) -> Iterator[Shard]:
    return (shard for shard in plan.all_shards() if shard.name not in files)


def write_rows(directory: Path, rows: Mapping[Split, CachedRows]) -> None:
    """rows.safetensors. Values are little-endian int64."""
    tensors = {
        f"{split}.{name}": torch.from_numpy(array.view(np.int64).copy())
        for split, cached in rows.items()
        for name, array in (("rows", cached.rows), ("contents", cached.contents))
    }
    _write_tensors(directory / "rows.safetensors", tensors)


def read_rows(directory: Path, plan: Plan) -> dict[Split, CachedRows]:
    """Raises UserError when they are not the ones that the identity was taken of."""
    tensors = _read_tensors(directory / "rows.safetensors")
    try:
        rows: dict[Split, CachedRows] = {
            split: CachedRows(tensors[f"{split}.rows"].numpy(), tensors[f"{split}.contents"].numpy().view(np.uint64))
            for split in SPLITS
        }
        data = plan.identity["data"]
        is_whole = all(
            cached.digest == data["contents"][split]
            and _are_rows(cached, plan.rows[split], size=data.get("test_size" if split == "test" else "train_size", 2**31))
            for split, cached in rows.items()
        )
    except (KeyError, ValueError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{directory / 'rows.safetensors'}: does not match plan.json: {_REBUILD}")
    return rows


def _are_rows(cached: CachedRows, count: int, *, size: int) -> bool:
    """So many different rows of a split of `size`, ascending: a reader makes room for each number up to the largest."""
    rows, is_typed = cached.rows, cached.rows.dtype == np.int64 and cached.contents.dtype == np.uint64
    if not is_typed or not rows.shape == cached.contents.shape == (count,):
        return False
    return bool((np.diff(rows) > 0).all()) and (not count or 0 <= int(rows[0]) <= int(rows[-1]) < size)


def write_projectors(directory: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """projectors.safetensors: {teacher tap: {name: tensor}}."""
    flat = {f"{tap}|{name}": tensor for tap, named in tensors.items() for name, tensor in named.items()}
    _write_tensors(directory / "projectors.safetensors", flat)


def read_projectors(directory: Path, plan: Plan) -> dict[str, dict[str, Tensor]]:
    """The inverse, for the taps whose plan names a projector. Raises UserError for one with another digest."""
    wanted = {tap: spec.projector for tap, spec in plan.tensors.items() if spec.projector is not None}
    if not wanted:
        return {}
    path = directory / "projectors.safetensors"
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(path).items():
        tap, _, name = key.rpartition("|")
        found.setdefault(tap, {})[name] = tensor
    for tap, digest in wanted.items():
        if tap not in found or tensors_digest(found[tap]) != digest or not _is_projector(found[tap]):
            raise UserError(f"{path}: holds another projector for {tap} than plan.json says ({digest}): {_REBUILD}")
    return {tap: found[tap] for tap in wanted}


def _is_projector(named: Mapping[str, Tensor]) -> bool:
    """A 1x1 convolution with a bias."""
    if named.keys() != {"conv.weight", "conv.bias"}:
        return False
    weight, bias = named["conv.weight"], named["conv.bias"]
    return weight.ndim == 4 and weight.shape[2:] == (1, 1) and bias.shape == weight.shape[:1] and 0 not in weight.shape


def lock_for_building(directory: Path, rank: int) -> int:
    """A descriptor to close at the end: each process of a build holds its own byte of one file, until it closes it or dies.

    Rank 0 must come first: it makes sure that no byte is held, so any process of another build is noticed. Raises UserError
    for a second build, and where the directory cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = lock(directory / ".lock", first=rank, count=0 if rank == 0 else 1)
    except BlockingIOError:
        raise UserError(
            f"teacher.cache_dir: {directory} is being written by another build; wait until it ends, or stop it"
        ) from None
    except OSError as error:
        raise UserError(
            f"teacher.cache_dir: cannot write to {directory} ({error.strerror}); see that it is a directory that may be "
            "written, or name another"
        ) from None
    if rank == 0:
        unlock(descriptor, first=1)
    return descriptor


def _refuse_later_version(content: Mapping[str, Any], path: Path) -> None:
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise _TamperedError(
            f"{path}: has version {version}, this program reads {VERSION}; use a later kd_accel, or name another cache_dir"
        )


def _refuse_foreign_names(files: Mapping[str, str], path: Path) -> None:
    for name in files:
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise _TamperedError(
                f"{path}: names {name!r}, which leads out of the cache; nothing was read or written. Remove it"
            )


class _TamperedError(UserError):
    """What not even a build may touch."""


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: save_file(tensors, temporary))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path} ({error}); see that there is space and that it may be written") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing: {_REBUILD}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error}): {_REBUILD}") from None


def flush_shards(directory: Path, names: list[str]) -> None:
    """To the disk itself, before a manifest may say that they are there."""
    for name in names:
        flush(directory / name)
    for folder in {directory / name for name in names}:
        flush(folder.parent)
