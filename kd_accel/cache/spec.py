"""Spec of a cache: its identity, its contents, and the names of its files.

File names follow from the spec alone; a name found on the disk is never opened.

    DIR/
      spec.json                                            fingerprint, samples, views, tensors; before any shard
      samples.safetensors                                  indices of the samples, and a digest of each
      targets.safetensors                                  tensors of fitted target functions, if any are fitted
      train/view-0000/logits-00000-of-00049.safetensors    [n, C]
      train/view-0000/layer1-00000-of-00049.safetensors    [n, D, H, W], named after the teacher's layer
      val/view-0000/logits-...   test/view-0000/logits-... held-out samples: logits, for the agreement with the student
      unlabeled/view-0000/...                              samples of `data.unlabeled`, if any: as those of train
      manifest.json                                        checksums of all shards, and the teacher's accuracy; last

All tensors of a split are divided into shards at the same samples, so one forward of the teacher fills one shard of each
tensor. docs/cache_format.md describes every file for other programs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, get_args
from urllib.parse import quote

from kd_accel.config.schema import StorageType
from kd_accel.data.splits import Split
from kd_accel.io.hashing import settings_digest

VERSION = 2
LOGITS = "logits"
SPLITS: tuple[Split, ...] = get_args(Split)
VIEWED_SPLITS: frozenset[Split] = frozenset({"train", "unlabeled"})
"""Splits that are stored with all views and tensors; the others have view 0 and the logits."""
OPTIONAL_SPLITS: frozenset[Split] = frozenset({"unlabeled"})
"""Splits that a cache need not have."""
BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
MAX_FILES = 400_000
"""Number of files that a manifest can list within `MAX_JSON_BYTES`."""
_MAX_COUNT = 2**40


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is stored for each sample and view.

    Attributes:
        shape: Shape for one sample, [C] or [D, H, W].
        dtype: Storage type.
        target: Description of the target function applied to the teacher's feature map; None for logits.
        target_digest: Digest of the function's fitted tensors; None if it has none.
        raw_channels: Channels of the teacher's feature map; None for logits.
        explained: Share of the map's variance that the function keeps; None if the share was not measured.
    """

    shape: tuple[int, ...]
    dtype: StorageType
    target: dict[str, Any] | None = None
    target_digest: str | None = None
    raw_channels: int | None = None
    explained: float | None = None

    @property
    def sample_bytes(self) -> int:
        """Size of one sample in bytes, without scales."""
        return math.prod(self.shape) * BYTES_PER_VALUE[self.dtype]

    @property
    def raw_sample_bytes(self) -> int:
        """Size of one sample in bytes if the teacher's map were stored with all its channels."""
        return self.sample_bytes * self.raw_channels // self.shape[0] if self.raw_channels else self.sample_bytes

    @property
    def is_scaled(self) -> bool:
        """True if a shard has one scale per channel next to the values."""
        return self.dtype == "int8"


@dataclass(frozen=True)
class Shard:
    """One file of a cache: consecutive samples of a split in one view and one tensor.

    Attributes:
        split: Split of the samples.
        view: Number of the view.
        tensor: Name of the tensor.
        number: Number of the file among the files of this split, view and tensor.
        count: Number of files of this split, view and tensor.
        first: Position of the first sample among the samples of the split that the cache covers.
        samples: Number of samples.
    """

    split: Split
    view: int
    tensor: str
    number: int
    count: int
    first: int
    samples: int

    @property
    def name(self) -> str:
        """Path relative to the cache's directory."""
        file = f"{quote(self.tensor, safe='')}-{self.number:05d}-of-{self.count:05d}.safetensors"
        return f"{self.split}/view-{self.view:04d}/{file}"


@dataclass(frozen=True)
class CacheSpec:
    """Identity and contents of a cache.

    Attributes:
        fingerprint_fields: Settings and digests that decide the stored values: teacher, numerics, data, views.
        samples: Number of samples of each split, in the order of `SPLITS`.
        views: Number of views of the training samples; held-out splits have one, without augmentation.
        tensors: The logits and the teacher's layers, by name.
        samples_per_shard: Number of samples in a file; the last file of a split may have fewer.
        batch_samples: Number of samples in one forward of the teacher during the build.
        recorded: Circumstances of the build, for people to read.
    """

    fingerprint_fields: dict[str, Any]
    samples: dict[Split, int]
    views: int
    tensors: dict[str, TensorSpec]
    samples_per_shard: int
    batch_samples: int
    recorded: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of `fingerprint_fields`, stored in every shard and in manifest.json."""
        return settings_digest(self.fingerprint_fields)

    @property
    def has_fitted_targets(self) -> bool:
        """True if a target function has fitted tensors, which targets.safetensors holds."""
        return any(spec.target_digest is not None for spec in self.tensors.values())

    def shards(self, split: Split, view: int, tensor: str) -> list[Shard]:
        """Return the files of one tensor in one view of a split, in the order of the samples."""
        samples, step = self.samples[split], self.samples_per_shard
        count = -(-samples // step)
        return [Shard(split, view, tensor, n, count, n * step, min(step, samples - n * step)) for n in range(count)]

    def all_shards(self) -> Iterator[Shard]:
        """Yield every file of the cache."""
        for split in self.samples:
            is_viewed = split in VIEWED_SPLITS
            for view in range(self.views if is_viewed else 1):
                for tensor in self.tensors if is_viewed else (LOGITS,):
                    yield from self.shards(split, view, tensor)

    def num_files(self) -> int:
        """Count all shards without creating them."""
        per_part = {split: self.views * len(self.tensors) if split in VIEWED_SPLITS else 1 for split in self.samples}
        return sum(-(-samples // self.samples_per_shard) * per_part[split] for split, samples in self.samples.items())

    def sample_bytes(self) -> int:
        """Return the size of one training sample in one view, in bytes: all tensors, without scales."""
        return sum(spec.sample_bytes for spec in self.tensors.values())

    def viewed_samples(self) -> int:
        """Return the number of samples that are stored in all views."""
        return sum(count for split, count in self.samples.items() if split in VIEWED_SPLITS)

    def total_bytes(self) -> int:
        """Return the size of all values in bytes, without headers and scales."""
        viewed = self.viewed_samples()
        held_out = sum(self.samples.values()) - viewed
        return viewed * self.views * self.sample_bytes() + held_out * self.tensors[LOGITS].sample_bytes

    def extended(self, *, views: int, tensors: Mapping[str, TensorSpec]) -> CacheSpec:
        """Return a spec with at least `views` views, and with `tensors` added; tensors of this spec keep their entries."""
        return replace(self, views=max(self.views, views), tensors={**tensors, **self.tensors})


def samples_in_a_shard(tensors: Mapping[str, TensorSpec], *, shard_mib: float, batch_samples: int) -> int:
    """Return the number of samples per file: a multiple of the teacher's batch size, at least one batch.

    Args:
        tensors: All tensors of the cache.
        shard_mib: Largest size of a file of the largest tensor, in MiB. A single batch may exceed the size.
        batch_samples: Number of samples in one forward of the teacher.
    """
    largest = max(spec.sample_bytes for spec in tensors.values())
    return max(1, int(shard_mib * 2**20 / largest) // batch_samples) * batch_samples


def spec_to_json(cache_spec: CacheSpec) -> dict[str, Any]:
    """Convert a spec to the content of spec.json."""
    content = asdict(cache_spec)
    return {"version": VERSION, "fingerprint": cache_spec.fingerprint, "checksum": settings_digest(content), **content}


def spec_from_json(content: Mapping[str, Any]) -> CacheSpec:
    """Convert the content of spec.json to a spec.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, RecursionError: If the content is not a valid spec, or does not match
            its digests.
    """
    # Raises ValueError for unpaired surrogates, which cannot be printed.
    json.dumps(content, ensure_ascii=False).encode()
    cache_spec = CacheSpec(
        fingerprint_fields=dict(content["fingerprint_fields"]),
        samples={
            split: _count(content["samples"][split], least=0)
            for split in SPLITS
            if split not in OPTIONAL_SPLITS or split in content["samples"]
        },
        views=_count(content["views"]),
        tensors={name: _tensor_from_json(name, spec) for name, spec in content["tensors"].items()},
        samples_per_shard=_count(content["samples_per_shard"]),
        batch_samples=_count(content["batch_samples"]),
        recorded=dict(content["recorded"]),
    )
    # Of a split without samples each view would have no file, for any number of views.
    if LOGITS not in cache_spec.tensors or max(cache_spec.num_files(), cache_spec.views * len(cache_spec.tensors)) > MAX_FILES:
        raise ValueError("the spec has no logits or too many files")
    if cache_spec.fingerprint != content["fingerprint"] or settings_digest(asdict(cache_spec)) != content["checksum"]:
        raise ValueError("the digests do not match the content")
    return cache_spec


def _tensor_from_json(name: str, content: Mapping[str, Any]) -> TensorSpec:
    spec = TensorSpec(**{**content, "shape": tuple(_count(length) for length in content["shape"])})
    if spec.dtype not in BYTES_PER_VALUE or not spec.shape or spec.sample_bytes > _MAX_COUNT:
        raise ValueError("not a valid spec of a tensor")
    if spec.target_digest is not None and not isinstance(spec.target_digest, str):
        raise ValueError("not a valid digest")
    if name == LOGITS:
        if (spec.target, spec.target_digest, spec.raw_channels) != (None, None, None):
            raise ValueError("logits cannot have a target function")
    elif not isinstance(spec.target, dict) or not isinstance(spec.target.get("name"), str):
        raise ValueError("not a valid description of a target function")
    else:
        _count(spec.raw_channels)
    if spec.explained is not None and not (isinstance(spec.explained, int | float) and math.isfinite(spec.explained)):
        raise ValueError("not a valid share of the variance")
    return spec


def _count(value: Any, *, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MAX_COUNT:
        raise ValueError(f"{value!r} is not a valid number of items")
    return value
