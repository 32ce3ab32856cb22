"""A teacher that answers from its cache, with the same type of signals as the live one; the training step cannot tell.

Opening is where every doubt is settled: another identity, other rows, tensors or views that are not there. What is asked for
may be less than the cache holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from kd_accel.parse import flatten
from kd_accel.teacher.identity import settings_digest
from kd_accel.teacher.store.codec import INT8_LARGEST, RELATIVE_ERROR, decode
from kd_accel.teacher.store.layout import LOGITS, Plan, Split
from kd_accel.teacher.store.manifest import CachedRows, read_manifest, read_plan, read_rows
from kd_accel.teacher.store.reader import Reader, StoredRows
from kd_accel.teacher.store.shards import damage
from kd_accel.types import Batch, Signals, UserError

_BUILD = "`kd-accel cache build` with this config"
_LISTED = 5
_LAYOUT = "numeric.channels_last"


@dataclass(frozen=True)
class Wanted:
    """What a run asks of a cache.

    identity: of the teacher, its numerics, the data and the views, without the contents of the rows. rows: by split.
    taps: {student tap: teacher tap}. projected: channels by teacher tap where its features are to be projected by a frozen
    PCA; the others are to be raw. pca_images: on how many images such a PCA is fitted. dtype: None = whatever is stored.
    any_layout: the memory layout was left to the device, so a cache that another kind of device made will do.
    """

    identity: Mapping[str, Any]
    rows: Mapping[Split, CachedRows]
    views: int
    taps: Mapping[str, str]
    projected: Mapping[str, int]
    pca_images: int | None = None
    dtype: str | None = None
    any_layout: bool = False


@dataclass(frozen=True)
class OpenCache:
    """A cache that holds what is wanted. rows: what it covers."""

    directory: Path
    plan: Plan
    rows: dict[Split, CachedRows]
    taps: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of all that decides what is read: kept in each checkpoint."""
        tensors = {name: [spec.dtype, spec.projector] for name, spec in self.plan.tensors.items() if self._is_used(name)}
        return settings_digest({"cache": self.plan.digest, "tensors": tensors})

    def _is_used(self, name: str) -> bool:
        return name == LOGITS or name in self.taps.values()

    def source(self, split: Split) -> CachedTeacher:
        """Answers for the rows of a split: with features for the training rows."""
        taps = self.taps if split == "train" else {}
        tensors = (LOGITS, *dict.fromkeys(taps.values()))
        reader = Reader(self.directory, self.plan, split, self.rows[split].rows, tensors)
        return CachedTeacher(reader, taps, channels_last=self.plan.identity["numeric"]["channels_last"])


class CachedTeacher:
    """Answers for a batch by its rows and view; the pixels are not looked at."""

    def __init__(self, reader: Reader, taps: Mapping[str, str], *, channels_last: bool) -> None:
        """channels_last: the memory layout of the features, which is the live teacher's: sums depend on it bit for bit."""
        self._reader, self._taps = reader, dict(taps)
        self._map_layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, batch: Batch) -> Signals:
        """Signals on the device of the images, float32."""
        device = batch.images.device
        stored = self._reader.read(batch.view, batch.rows.numpy(), pin_memory=device.type == "cuda")
        values = {name: decoded_on(device, rows, self._map_layout) for name, rows in stored.items()}
        return Signals(values[LOGITS], {tap: values[name] for tap, name in self._taps.items()})

    def ranges(self, batch: Batch) -> dict[str, float]:
        """By student tap: the largest magnitude in the files of these rows, where it decides how coarse the values are."""
        stored = self._reader.read(batch.view, batch.rows.numpy())
        scales = {tap: stored[name].scale for tap, name in self._taps.items()}
        return {tap: INT8_LARGEST * scale.max().item() for tap, scale in scales.items() if scale is not None}


def decoded_on(device: torch.device, stored: StoredRows, map_layout: torch.memory_format) -> Tensor:
    """float32 [n, ...] on the device: moved as it is kept, decoded there."""
    values = stored.values.to(device, non_blocking=True)
    scale = None if stored.scale is None else stored.scale.to(device, non_blocking=True)
    layout = map_layout if values.ndim == 4 else torch.contiguous_format
    return decode(values.contiguous(memory_format=layout), scale)


def open_cache(directory: Path, wanted: Wanted) -> OpenCache:
    """Raises UserError that names each field in which the cache differs, or what it lacks, and the remedy."""
    plan = read_plan(directory)
    refuse_other_identity(directory, plan, wanted)
    rows = read_rows(directory, plan)
    for split, own in wanted.rows.items():
        refuse_other_rows(directory, split, rows[split], own)
    files = read_manifest(directory, plan)
    if not files:
        raise UserError(f"teacher.cache_dir: the build of {directory} has not ended; run {_BUILD}, which goes on with it")
    refuse_lacking(directory, plan, wanted)
    _refuse_missing(directory, plan, files, wanted)
    return OpenCache(directory, plan, rows, wanted.taps)


def refuse_other_identity(directory: Path, plan: Plan, wanted: Wanted) -> None:
    """What can never be mended by adding to the cache: another teacher, other numerics, data, views, projectors or types."""
    stored = {key: value for key, value in flatten(plan.identity).items() if not key.startswith("data.contents.")}
    own = flatten(dict(wanted.identity))
    different = [
        f"{key}: {_short(stored.get(key))} stored, {_short(own.get(key))} wanted"
        for key in {**stored, **own}
        if stored.get(key) != own.get(key) and not (key == _LAYOUT and wanted.any_layout)
    ]
    different += _other_tensors(plan, wanted)
    if different:
        raise UserError(
            f"teacher.cache_dir: {directory} is a cache of something else: {'; '.join(different)}. Name another cache_dir and "
            f"run {_BUILD}, or remove that directory first; or set these fields back"
        )


def wanted_tensors(wanted: Wanted) -> Sequence[str]:
    return (LOGITS, *dict.fromkeys(wanted.taps.values()))


def differing_rows(stored: CachedRows, wanted: CachedRows) -> tuple[np.ndarray, np.ndarray]:
    """(wanted rows that are not covered, covered ones with another content)."""
    at = np.searchsorted(stored.rows, wanted.rows)
    inside = np.minimum(at, max(0, len(stored.rows) - 1))
    is_there = stored.rows[inside] == wanted.rows if len(stored.rows) else np.zeros(len(wanted.rows), bool)
    missing = wanted.rows[~is_there]
    is_other = is_there.copy()
    is_other[is_there] = stored.contents[inside[is_there]] != wanted.contents[is_there]
    return missing, wanted.rows[is_other]


def largest_difference(cached: Signals, live: Signals, ranges: Mapping[str, float]) -> tuple[str, float]:
    """(tensor, largest difference relative to the largest magnitude of the live tensor), of the tensor where that is worst.

    ranges: larger magnitudes to take instead, by tap. The difference from what is not a number is infinite.
    """
    assert cached.logits is not None and live.logits is not None
    pairs = {LOGITS: (cached.logits, live.logits)}
    pairs |= {tap: (feature, live.features[tap]) for tap, feature in cached.features.items()}
    differences = {name: _relative(stored, fresh.float(), ranges.get(name, 0.0)) for name, (stored, fresh) in pairs.items()}
    worst = max(differences, key=lambda name: differences[name])
    return worst, differences[worst]


def tolerance(dtype: str, precision: str) -> float:
    """What `largest_difference` may be when the teacher answers again, in another batch shape, perhaps on another device."""
    return 2 * RELATIVE_ERROR[dtype] + {"no": 5e-3, "fp16": 2e-2, "bf16": 6e-2}[precision]


def _relative(stored: Tensor, fresh: Tensor, largest: float) -> float:
    if stored.shape != fresh.shape:
        return math.inf
    relative = (stored - fresh).abs().max() / fresh.abs().max().clamp(min=max(largest, 1e-12))
    return relative.nan_to_num(nan=math.inf).item()


def _other_tensors(plan: Plan, wanted: Wanted) -> list[str]:
    different = []
    for tap in dict.fromkeys(wanted.taps.values()):
        spec = plan.tensors.get(tap)
        if spec is None:
            continue
        channels = wanted.projected.get(tap)
        stored_channels = spec.shape[0] if spec.projector else None
        if channels != stored_channels:
            different.append(f"projectors.{tap}: {_kind(stored_channels)} stored, {_kind(channels)} wanted")
        elif channels is not None and spec.pca_images != wanted.pca_images:
            different.append(f"distill.feature.pca_images: {spec.pca_images} stored, {wanted.pca_images} wanted")
    names = [name for name in wanted_tensors(wanted) if name in plan.tensors]
    for name in names if wanted.dtype is not None else []:
        own = stored_type(wanted.dtype, is_logits=name == LOGITS)
        if plan.tensors[name].dtype != own:
            different.append(f"teacher.dtype: {name} is {plan.tensors[name].dtype} stored, {own} wanted")
    return list(dict.fromkeys(different))


def stored_type(dtype: Any, *, is_logits: bool) -> Any:
    """Of a tensor in a cache of that type: logits are never int8."""
    return "float16" if is_logits and dtype == "int8" else dtype


def _kind(channels: int | None) -> str:
    return "raw features" if channels is None else f"a PCA to {channels} channels"


def refuse_other_rows(directory: Path, split: Split, stored: CachedRows, wanted: CachedRows) -> None:
    missing, other = differing_rows(stored, wanted)
    if len(other):
        raise UserError(
            f"teacher.cache_dir: {directory} was built from other data: data.contents.{split}: {len(other)} of "
            f"{len(wanted.rows)} wanted rows have another image or label than the stored ones (rows {_listed(other)}). "
            f"Bring the data back, or name another cache_dir and run {_BUILD}"
        )
    if len(missing):
        raise UserError(
            f"teacher.cache_dir: {directory} lacks {len(missing)} of {len(wanted.rows)} wanted {split} rows (rows "
            f"{_listed(missing)}); it was built with other data.limit_train, data.limit_test or data.val_fraction. Name "
            f"another cache_dir and run {_BUILD}"
        )


def refuse_lacking(directory: Path, plan: Plan, wanted: Wanted) -> None:
    """Tensors and views that the plan does not have."""
    lacking = [f"tensor {name}" for name in wanted_tensors(wanted) if name not in plan.tensors]
    if plan.views < wanted.views:
        lacking.append(f"views {plan.views} to {wanted.views - 1} (data.views: {plan.views} stored, {wanted.views} wanted)")
    if lacking:
        _refuse(directory, "lacks", lacking)


def _refuse_missing(directory: Path, plan: Plan, files: Mapping[str, str], wanted: Wanted) -> None:
    """Files of the plan that are not there, not finished, or by their header not the ones that were built."""
    shards = [
        shard
        for split in wanted.rows
        for view in range(wanted.views if split == "train" else 1)
        for name in (wanted_tensors(wanted) if split == "train" else (LOGITS,))
        for shard in plan.shards(split, view, name)
    ]
    unlisted = [shard.name for shard in shards if shard.name not in files]
    if unlisted:
        _refuse(directory, "lacks", [f"{len(unlisted)} files that no build has finished, such as {unlisted[0]}"])
    found = {shard.name: damage(directory, plan, shard, checksum=files[shard.name], reads_data=False) for shard in shards}
    wrong = [f"{name} {reason}" for name, reason in found.items() if reason is not None]
    if wrong:
        _refuse(directory, f"has {len(wrong)} wrong files:", wrong[:_LISTED])


def _refuse(directory: Path, verb: str, lacking: Sequence[str]) -> NoReturn:
    raise UserError(
        f"teacher.cache_dir: {directory} {verb} {'; '.join(lacking)}. Run {_BUILD}: it writes just what is missing or wrong"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(rows: np.ndarray) -> str:
    shown = ", ".join(str(row) for row in rows[:_LISTED].tolist())
    return f"{shown}, ..." if len(rows) > _LISTED else shown
