"""What a cache directory says of itself, and who may write in it.

spec.json is written before any shard, manifest.json after all of them; both by rename. A name in a manifest is only ever
compared with the names that follow from the plan, never opened: it cannot lead out of the directory. Samples and projectors are
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

from kd_accel.cache.spec import SPLITS, VERSION, CacheSpec, Shard, Split, spec_from_json, spec_to_json
from kd_accel.errors import UserError
from kd_accel.io.files import flush, lock, read_json, unlock, write_json, write_whole
from kd_accel.io.hashing import arrays_digest, tensors_digest
from kd_accel.io.tensors import read_tensors

_REBUILD = "run `kd-accel cache build` with the same config, which mends it"


@dataclass(frozen=True)
class CachedSamples:
    """Which samples of a split a cache covers, ascending, and what each of them was. samples: int64 [N]; contents: uint64 [N]."""

    samples: np.ndarray
    contents: np.ndarray

    @property
    def digest(self) -> str:
        return arrays_digest(self.samples, self.contents)


def read_spec(directory: Path) -> CacheSpec:
    """Raises UserError where there is none, or none that this program can trust."""
    path = directory / "spec.json"
    if not path.is_file():
        raise UserError(
            f"teacher.cache_dir: {directory} holds no cache (no spec.json); run `kd-accel cache build` with the same config"
        )
    content = read_json(path, remedy=_REBUILD)
    _refuse_later_version(content, path)
    try:
        return spec_from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: is damaged: {_REBUILD}") from None


def find_spec(directory: Path) -> CacheSpec | None:
    """The plan of a cache that a build may go on with; None where there is none, or a damaged one."""
    path = directory / "spec.json"
    if not path.exists():
        return None
    try:
        content = read_json(path, remedy="")
    except UserError:
        return None
    _refuse_later_version(content, path)
    try:
        return spec_from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def refuse_other_owner(directory: Path, cache_spec: CacheSpec) -> None:
    """Where spec.json is gone, a build must not write a plan of its own over the cache of another config."""
    try:
        owner = read_json(directory / "manifest.json", remedy="").get("cache")
    except UserError:
        return
    if owner != cache_spec.digest:
        raise UserError(
            f"teacher.cache_dir: spec.json of {directory} is missing or damaged, and manifest.json beside it belongs to a "
            f"cache of something else ({owner} stored, {cache_spec.digest} wanted); build with the config of the first build, name "
            "another cache_dir, or remove that directory first"
        )


def write_spec(directory: Path, cache_spec: CacheSpec) -> None:
    write_json(spec_to_json(cache_spec), directory / "spec.json")


def read_manifest(directory: Path, cache_spec: CacheSpec) -> dict[str, str]:
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
    if content.get("cache") != cache_spec.digest:
        raise UserError(f"{path}: belongs to another cache than spec.json beside it: {_REBUILD}")
    return files


def find_manifest(directory: Path, cache_spec: CacheSpec) -> dict[str, str]:
    """As `read_manifest`, for a build, to which a damaged one is none. One that was tampered with is refused all the same."""
    try:
        return read_manifest(directory, cache_spec)
    except _TamperedError:
        raise
    except UserError:
        return {}


def write_manifest(
    directory: Path, cache_spec: CacheSpec, files: Mapping[str, str], *, teacher_accuracy: float | None = None
) -> None:
    """Write manifest.json, which makes a cache complete.

    Args:
        directory: of the cache.
        plan: of the cache.
        files: {file name: checksum of its data}.
        teacher_accuracy: on the cached test samples, a fraction of 1, for whoever reads the file.
    """
    content = {"version": VERSION, "cache": cache_spec.digest, "teacher_accuracy": teacher_accuracy}
    write_json({**content, "files": dict(sorted(files.items()))}, directory / "manifest.json")


def read_teacher_accuracy(directory: Path) -> float | None:
    """Return the accuracy that `write_manifest` was given, None where manifest.json does not have it or does not exist."""
    path = directory / "manifest.json"
    accuracy = read_json(path, remedy=_REBUILD).get("teacher_accuracy") if path.is_file() else None
    return accuracy if isinstance(accuracy, float) and 0 <= accuracy <= 1 else None


def missing_shards(cache_spec: CacheSpec, files: Mapping[str, str]) -> Iterator[Shard]:
    return (shard for shard in cache_spec.all_shards() if shard.name not in files)


def write_samples(directory: Path, samples: Mapping[Split, CachedSamples]) -> None:
    """samples.safetensors. Values are little-endian int64."""
    tensors = {
        f"{split}.{name}": torch.from_numpy(array.view(np.int64).copy())
        for split, cached in samples.items()
        for name, array in (("samples", cached.samples), ("contents", cached.contents))
    }
    _write_tensors(directory / "samples.safetensors", tensors)


def read_samples(directory: Path, cache_spec: CacheSpec) -> dict[Split, CachedSamples]:
    """Raises UserError when they are not the ones that the identity was taken of."""
    tensors = _read_tensors(directory / "samples.safetensors")
    try:
        samples: dict[Split, CachedSamples] = {
            split: CachedSamples(tensors[f"{split}.samples"].numpy(), tensors[f"{split}.contents"].numpy().view(np.uint64))
            for split in SPLITS
        }
        data = cache_spec.fingerprint_fields["data"]
        is_whole = all(
            cached.digest == data["contents"][split]
            and _are_samples(
                cached, cache_spec.samples[split], size=data.get("test_size" if split == "test" else "train_size", 2**31)
            )
            for split, cached in samples.items()
        )
    except (KeyError, ValueError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{directory / 'samples.safetensors'}: does not match spec.json: {_REBUILD}")
    return samples


def _are_samples(cached: CachedSamples, count: int, *, size: int) -> bool:
    """So many different samples of a split of `size`, ascending: a reader makes room for each number up to the largest."""
    samples, is_typed = cached.samples, cached.samples.dtype == np.int64 and cached.contents.dtype == np.uint64
    if not is_typed or not samples.shape == cached.contents.shape == (count,):
        return False
    return bool((np.diff(samples) > 0).all()) and (not count or 0 <= int(samples[0]) <= int(samples[-1]) < size)


def write_projectors(directory: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """targets.safetensors: {teacher layer: {name: tensor}}."""
    flat = {f"{layer}|{name}": tensor for layer, named in tensors.items() for name, tensor in named.items()}
    _write_tensors(directory / "targets.safetensors", flat)


def read_projectors(directory: Path, cache_spec: CacheSpec) -> dict[str, dict[str, Tensor]]:
    """The inverse, for the layers whose plan names a projector. Raises UserError for one with another digest."""
    request = {layer: spec.projector for layer, spec in cache_spec.tensors.items() if spec.projector is not None}
    if not request:
        return {}
    path = directory / "targets.safetensors"
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(path).items():
        layer, _, name = key.rpartition("|")
        found.setdefault(layer, {})[name] = tensor
    for layer, digest in request.items():
        if layer not in found or tensors_digest(found[layer]) != digest or not _is_projector(found[layer]):
            raise UserError(f"{path}: holds another projector for {layer} than spec.json says ({digest}): {_REBUILD}")
    return {layer: found[layer] for layer in request}


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
