"""Files that describe a cache: spec.json, samples.safetensors, targets.safetensors, manifest.json, and the lock of a build.

A build writes spec.json before any shard and manifest.json after all shards; both are renamed into place. File names in a
manifest are only compared with the names that follow from the spec and never opened, so they cannot lead out of the directory.
Samples and targets are checked against the digests in the spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kd_accel.cache.spec import LOGITS, VERSION, CacheSpec, TensorSpec, spec_from_json, spec_to_json
from kd_accel.data.splits import Split
from kd_accel.errors import UserError
from kd_accel.io.files import flush, lock, read_json, unlock, write_json, write_whole
from kd_accel.io.hashing import arrays_digest, tensors_digest
from kd_accel.io.tensors import read_tensors
from kd_accel.losses.targets import TargetFunction, build_target

_REPAIR = "run `kd-accel cache build` with the same config, which repairs the file"
_SPEC_ERRORS = (KeyError, TypeError, ValueError, AttributeError, RecursionError)
_OLD_SPEC = "plan.json"


@dataclass(frozen=True)
class CachedSamples:
    """Samples of a split that a cache covers.

    Attributes:
        indices: Positions in the source split, int64 [N], ascending.
        digests: Digest of each sample's image and label, uint64 [N].
    """

    indices: np.ndarray
    digests: np.ndarray

    @property
    def digest(self) -> str:
        """Digest of all indices and digests."""
        return arrays_digest(self.indices, self.digests)


class _UntouchableError(UserError):
    """Refusal of a cache that a build must not change either."""


def read_spec(directory: Path) -> CacheSpec:
    """Read spec.json.

    Raises:
        UserError: If the file does not exist, is damaged, or has another version.
    """
    path = directory / "spec.json"
    if not path.is_file():
        _check_not_version_1(directory)
        raise UserError(
            f"teacher.cache.dir: no cache found in {directory} (spec.json is missing); run `kd-accel cache build` with the "
            "same config, or correct the path"
        )
    content = read_json(path, remedy=_REPAIR)
    _check_version(content, path)
    try:
        return spec_from_json(content)
    except _SPEC_ERRORS:
        raise UserError(f"{path}: is damaged: {_REPAIR}") from None


def find_spec(directory: Path) -> CacheSpec | None:
    """Read spec.json for a build, which replaces a damaged one.

    Returns:
        The spec; None if the file does not exist or is damaged.

    Raises:
        UserError: If the cache has another version.
    """
    path = directory / "spec.json"
    if not path.exists():
        _check_not_version_1(directory)
        return None
    try:
        return read_spec(directory)
    except _UntouchableError:
        raise
    except UserError:
        return None


def check_owner(directory: Path, cache_spec: CacheSpec) -> None:
    """Check that a directory without an intact spec.json does not hold the cache of another config.

    Raises:
        UserError: If manifest.json has another fingerprint.
    """
    try:
        owner = read_json(directory / "manifest.json", remedy="").get("fingerprint")
    except UserError:
        return
    if owner != cache_spec.fingerprint:
        raise UserError(
            f"teacher.cache.dir: spec.json in {directory} is missing or damaged, and manifest.json next to it belongs to the "
            f"cache of another config (fingerprint {owner} in the cache, {cache_spec.fingerprint} now); build with the config "
            "of the first build, set another teacher.cache.dir, or remove this directory"
        )


def write_spec(directory: Path, cache_spec: CacheSpec) -> None:
    """Write spec.json. Raises UserError if the file cannot be written."""
    write_json(spec_to_json(cache_spec), directory / "spec.json")


def read_manifest(directory: Path, cache_spec: CacheSpec) -> dict[str, str]:
    """Read manifest.json.

    Returns:
        {file name: checksum of its data} of the shards that were complete when the manifest was written; empty without a
        manifest.

    Raises:
        UserError: If the file is damaged, belongs to another cache or version, or lists a path outside the cache.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        return {}
    content = read_json(path, remedy=_REPAIR)
    _check_version(content, path)
    files = content.get("files")
    if not isinstance(files, dict) or not all(isinstance(checksum, str) for checksum in files.values()):
        raise UserError(f"{path}: is damaged: {_REPAIR}")
    _check_names(files, path)
    if content.get("fingerprint") != cache_spec.fingerprint:
        raise UserError(f"{path}: belongs to another cache than spec.json in the same directory: {_REPAIR}")
    return files


def find_manifest(directory: Path, cache_spec: CacheSpec) -> dict[str, str]:
    """Read manifest.json for a build, which replaces a damaged one.

    Returns:
        The checksums as `read_manifest` returns them; empty if the file is damaged.

    Raises:
        UserError: If the file has another version, or lists a path outside the cache.
    """
    try:
        return read_manifest(directory, cache_spec)
    except _UntouchableError:
        raise
    except UserError:
        return {}


def write_manifest(
    directory: Path, cache_spec: CacheSpec, files: Mapping[str, str], *, teacher_accuracy: float | None = None
) -> None:
    """Write manifest.json, which makes a cache complete.

    Args:
        directory: Directory of the cache.
        cache_spec: Spec of the cache.
        files: {file name: checksum of its data}.
        teacher_accuracy: Accuracy of the teacher on the cached test samples, in 0..1; None without test samples.
    """
    content = {"version": VERSION, "fingerprint": cache_spec.fingerprint, "teacher_accuracy": teacher_accuracy}
    write_json({**content, "files": dict(sorted(files.items()))}, directory / "manifest.json")


def read_teacher_accuracy(directory: Path) -> float | None:
    """Return the teacher's accuracy in manifest.json, in 0..1; None if the file does not exist or has no valid accuracy."""
    path = directory / "manifest.json"
    accuracy = read_json(path, remedy=_REPAIR).get("teacher_accuracy") if path.is_file() else None
    return accuracy if isinstance(accuracy, float) and 0 <= accuracy <= 1 else None


def write_samples(directory: Path, samples: Mapping[Split, CachedSamples]) -> None:
    """Write samples.safetensors: `SPLIT.indices` and `SPLIT.digests`, int64 (digests are the bits of uint64 values)."""
    tensors = {
        f"{split}.{name}": torch.from_numpy(array.view(np.int64).copy())
        for split, cached in samples.items()
        for name, array in (("indices", cached.indices), ("digests", cached.digests))
    }
    _write_tensors(directory / "samples.safetensors", tensors)


def read_samples(directory: Path, cache_spec: CacheSpec) -> dict[Split, CachedSamples]:
    """Read samples.safetensors.

    Raises:
        UserError: If the file is missing or damaged, or does not match the digests in the spec.
    """
    tensors = _read_tensors(directory / "samples.safetensors")
    try:
        samples: dict[Split, CachedSamples] = {
            split: CachedSamples(tensors[f"{split}.indices"].numpy(), tensors[f"{split}.digests"].numpy().view(np.uint64))
            for split in cache_spec.samples
        }
        is_intact = all(_are_intact(cache_spec, split, cached) for split, cached in samples.items())
    except (KeyError, ValueError, TypeError, AttributeError):
        is_intact = False
    if not is_intact:
        raise UserError(f"{directory / 'samples.safetensors'}: does not match spec.json: {_REPAIR}")
    return samples


def _are_intact(cache_spec: CacheSpec, split: Split, cached: CachedSamples) -> bool:
    """Return whether samples match their digest in the spec, and their indices ascend and lie inside the split.

    A reader allocates an entry for each index up to the largest, so the size of the split bounds its memory.
    """
    data, indices, count = cache_spec.fingerprint_fields["data"], cached.indices, cache_spec.samples[split]
    size = data.get(f"{split}_size", data.get("train_size", 2**31))
    is_typed = indices.dtype == np.int64 and cached.digests.dtype == np.uint64
    if not is_typed or not indices.shape == cached.digests.shape == (count,):
        return False
    if not (np.diff(indices) > 0).all() or (count and not 0 <= int(indices[0]) <= int(indices[-1]) < size):
        return False
    return bool(cached.digest == data["contents"][split])


def write_targets(directory: Path, targets: Mapping[str, TargetFunction]) -> None:
    """Write the fitted tensors of target functions to targets.safetensors, as `LAYER|NAME`; no file without such tensors.

    Args:
        directory: Directory of the cache.
        targets: Target functions by the teacher's layer.
    """
    tensors = {
        f"{layer}|{name}": tensor.detach().cpu()
        for layer, target in targets.items()
        for name, tensor in target.tensors().items()
    }
    if tensors:
        _write_tensors(directory / "targets.safetensors", tensors)


def read_targets(directory: Path, cache_spec: CacheSpec) -> dict[str, TargetFunction]:
    """Build the target functions of a cache and load their fitted tensors.

    Returns:
        Target functions on the CPU by the teacher's layer.

    Raises:
        UserError: If targets.safetensors is missing or damaged, or does not match the digests in the spec.
    """
    path, specs = directory / "targets.safetensors", _feature_specs(cache_spec)
    tensors = _by_layer(_read_tensors(path)) if cache_spec.has_fitted_targets else {}
    return {layer: _restored(layer, spec, tensors.get(layer, {}), path) for layer, spec in specs.items()}


def find_targets(directory: Path, cache_spec: CacheSpec) -> dict[str, TargetFunction]:
    """Read the target functions of a cache for a build, which fits the missing functions again.

    Returns:
        The functions that `read_targets` returns, without those whose tensors are missing or damaged.
    """
    path, targets = directory / "targets.safetensors", {}
    try:
        tensors = _by_layer(_read_tensors(path))
    except UserError:
        tensors = {}
    for layer, spec in _feature_specs(cache_spec).items():
        with suppress(UserError):
            targets[layer] = _restored(layer, spec, tensors.get(layer, {}), path)
    return targets


def _feature_specs(cache_spec: CacheSpec) -> dict[str, TensorSpec]:
    return {layer: spec for layer, spec in cache_spec.tensors.items() if layer != LOGITS}


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition("|")
        by_layer.setdefault(layer, {})[name] = tensor
    return by_layer


def _restored(layer: str, spec: TensorSpec, tensors: Mapping[str, Tensor], path: Path) -> TargetFunction:
    if spec.target_digest is None:
        tensors = {}
    elif tensors_digest(tensors) != spec.target_digest:
        raise UserError(f"{path}: the tensors of {layer} do not match spec.json (digest {spec.target_digest}): {_REPAIR}")
    try:
        if any(0 in tensor.shape for tensor in tensors.values()):
            raise ValueError("a tensor is empty")
        target = build_target(spec.target or {})
        target.load(tensors)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: the target function of {layer} cannot be restored ({error}): {_REPAIR}") from None
    target.explained = spec.explained
    return target


def lock_for_building(directory: Path, rank: int) -> int:
    """Lock a cache against other builds: each process of a build holds one byte of the lock file until the process ends.

    Rank 0 must call first. It checks that no byte is held, so it detects any process of another build.

    Args:
        directory: Directory of the cache; created if it does not exist.
        rank: Rank of this process.

    Returns:
        File descriptor to close at the end of the build.

    Raises:
        UserError: If another build is running, or the directory cannot be created or modified.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = lock(directory / ".lock", first=rank, count=0 if rank == 0 else 1)
    except BlockingIOError:
        raise UserError(
            f"teacher.cache.dir: another build is writing to {directory}; wait until it has finished, or stop it, then run "
            "this command again"
        ) from None
    except OSError as error:
        raise UserError(
            f"teacher.cache.dir: cannot write to {directory} ({error.strerror}); check that the path is a directory with write "
            "permission, or set another teacher.cache.dir"
        ) from None
    if rank == 0:
        unlock(descriptor, first=1)
    return descriptor


def flush_shards(directory: Path, names: list[str]) -> None:
    """Flush files and their directories to the disk, as is required before a manifest lists them."""
    for name in names:
        flush(directory / name)
    for folder in {(directory / name).parent for name in names}:
        flush(folder)


def _check_version(content: Mapping[str, Any], path: Path) -> None:
    version = content.get("version")
    if version == 1 and not isinstance(version, bool):
        _refuse_version_1(path)
    if isinstance(version, int) and version > VERSION:
        raise _UntouchableError(
            f"{path}: has version {version}, but this version of kd_accel reads version {VERSION}; install a later kd_accel, "
            "or set another teacher.cache.dir"
        )
    if version != VERSION:
        raise UserError(f"{path}: is damaged (version {str(version)[:20]}): {_REPAIR}")


def _check_not_version_1(directory: Path) -> None:
    if (directory / _OLD_SPEC).is_file():
        _refuse_version_1(directory / _OLD_SPEC)


def _refuse_version_1(path: Path) -> None:
    raise _UntouchableError(
        f"{path}: belongs to a cache of version 1, but this version of kd_accel reads version {VERSION}; run `kd-accel cache "
        "build` with the same config and another teacher.cache.dir, or remove this directory first"
    )


def _check_names(files: Mapping[str, str], path: Path) -> None:
    for name in files:
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise _UntouchableError(
                f"{path}: lists {name!r}, a path outside the cache; nothing was read or changed. Remove {path.name}"
            )


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: save_file(tensors, temporary))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path} ({error}); check free disk space and permissions") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing: {_REPAIR}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error}): {_REPAIR}") from None
