"""What a cache holds and in which files: a pure function of its plan, so that no file name is ever believed.

    cache_dir/
      spec.json                                              identity and layout, written before any shard
      samples.safetensors                                       which samples, and a digest of the content of each
      targets.safetensors                                 the frozen projectors, if any
      train/view-0000/logits-00000-of-00049.safetensors      [n, C]
      train/view-0000/layer1-00000-of-00049.safetensors      [n, D, H, W], named for the teacher's layer
      val/view-0000/logits-..., test/view-0000/logits-...    held-out samples: logits, for the agreement with the student
      manifest.json                                          checksums of all shards and the teacher's accuracy, written last

All tensors of a split are cut at the same samples, so that one pass of the teacher fills a file of each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args
from urllib.parse import quote

from kd_accel.config.schema import StorageType
from kd_accel.io.hashing import settings_digest

VERSION = 1
LOGITS = "logits"
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
MAX_FILES = 400_000
"""As many as a manifest can list (MAX_JSON_BYTES in disk.py)."""
_MOST = 2**40


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is stored for each sample and view.

    shape: of one sample, [C] or [D, H, W]. dtype: on disk. projector: digest of the frozen projector that made it, None = raw.
    raw_channels, pca_images, explained: of that projector: the teacher's width, on how many images it was fitted, and the
    share of the variance that it keeps.
    """

    shape: tuple[int, ...]
    dtype: StorageType
    projector: str | None = None
    raw_channels: int | None = None
    pca_images: int | None = None
    explained: float | None = None

    @property
    def sample_bytes(self) -> int:
        values = 1
        for length in self.shape:
            values *= length
        return values * BYTES_PER_VALUE[self.dtype]

    @property
    def raw_sample_bytes(self) -> int:
        """What one sample of the raw features would take."""
        return self.sample_bytes * self.raw_channels // self.shape[0] if self.raw_channels else self.sample_bytes

    @property
    def is_scaled(self) -> bool:
        """Whether the file holds a scale per channel beside the values."""
        return self.dtype == "int8"


@dataclass(frozen=True)
class Shard:
    """One file: samples first..first+samples of a split (counted among those that the cache covers), one view, one tensor."""

    split: Split
    view: int
    tensor: str
    index: int
    count: int
    first: int
    samples: int

    @property
    def name(self) -> str:
        """Path below the cache's directory."""
        file = f"{quote(self.tensor, safe='')}-{self.index:05d}-of-{self.count:05d}.safetensors"
        return f"{self.split}/view-{self.view:04d}/{file}"


@dataclass(frozen=True)
class CacheSpec:
    """What a cache is and holds.

    identity: who answered and for which pixels (commands/wanted.py). samples: number of samples covered in each split. views: of
    the training split; held-out splits have one, without augmentation. tensors: by name: logits, and the teacher's layers.
    batch_samples: samples of one forward of the teacher when it was built. recorded: where and with what, for people to read.
    """

    fingerprint_fields: dict[str, Any]
    samples: dict[str, int]
    views: int
    tensors: dict[str, TensorSpec]
    samples_per_shard: int
    batch_samples: int
    recorded: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Of the identity: stands in every file."""
        return settings_digest(self.fingerprint_fields)

    def shards(self, split: Split, view: int, tensor: str) -> list[Shard]:
        samples, step = self.samples[split], self.samples_per_shard
        count = -(-samples // step)
        return [
            Shard(split, view, tensor, index, count, index * step, min(step, samples - index * step)) for index in range(count)
        ]

    def all_shards(self) -> Iterator[Shard]:
        for split in SPLITS:
            is_train = split == "train"
            for view in range(self.views if is_train else 1):
                for tensor in self.tensors if is_train else (LOGITS,):
                    yield from self.shards(split, view, tensor)

    def num_files(self) -> int:
        """Of all shards, without making them."""
        parts = {split: -(-samples // self.samples_per_shard) for split, samples in self.samples.items()}
        return parts["train"] * self.views * len(self.tensors) + parts["val"] + parts["test"]

    def sample_bytes(self) -> int:
        """Of one sample and one training view, all tensors."""
        return sum(spec.sample_bytes for spec in self.tensors.values())

    def total_bytes(self) -> int:
        held_out = self.samples["val"] + self.samples["test"]
        return self.samples["train"] * self.views * self.sample_bytes() + held_out * self.tensors[LOGITS].sample_bytes

    def extended(self, *, views: int, tensors: Mapping[str, TensorSpec]) -> CacheSpec:
        """With at least so many views, and these tensors besides its own."""
        return replace(self, views=max(self.views, views), tensors={**tensors, **self.tensors})


def samples_in_a_shard(tensors: Mapping[str, TensorSpec], *, shard_mib: float, batch_samples: int) -> int:
    """Whole batches of the teacher, the largest tensor's file at most `shard_mib` (one batch at least)."""
    largest = max(spec.sample_bytes for spec in tensors.values())
    return max(1, int(shard_mib * 2**20 / largest) // batch_samples) * batch_samples


def spec_to_json(cache_spec: CacheSpec) -> dict[str, Any]:
    content = asdict(cache_spec)
    return {"version": VERSION, "digest": cache_spec.digest, "checksum": settings_digest(content), **content}


def spec_from_json(content: Mapping[str, Any]) -> CacheSpec:
    """Raises KeyError, TypeError or ValueError for what no plan of this version says."""
    json.dumps(content, ensure_ascii=False).encode()  # a half of a character, which cannot be printed, is no ValueError later
    cache_spec = CacheSpec(
        fingerprint_fields=dict(content["fingerprint_fields"]),
        samples={split: _whole(content["samples"][split], least=0) for split in SPLITS},
        views=_whole(content["views"]),
        tensors={name: _spec_from_json(spec) for name, spec in content["tensors"].items()},
        samples_per_shard=_whole(content["samples_per_shard"]),
        batch_samples=_whole(content["batch_samples"]),
        recorded=dict(content["recorded"]),
    )
    if cache_spec.tensors[LOGITS].projector is not None or cache_spec.num_files() > MAX_FILES:
        raise ValueError("is no plan that a build could have followed")
    if cache_spec.digest != content["digest"] or settings_digest(asdict(cache_spec)) != content["checksum"]:
        raise ValueError("contradicts itself")
    return cache_spec


def _spec_from_json(content: Mapping[str, Any]) -> TensorSpec:
    spec = TensorSpec(**{**content, "shape": tuple(_whole(length) for length in content["shape"])})
    texts = (spec.projector is None or isinstance(spec.projector, str), spec.dtype in BYTES_PER_VALUE)
    counts = (_whole(value) for value in (spec.raw_channels, spec.pca_images) if value is not None)
    if not all(texts) or not all(counts) or not spec.shape or spec.sample_bytes > _MOST:
        raise ValueError("is no tensor of a cache")
    if spec.explained is not None and not (isinstance(spec.explained, int | float) and math.isfinite(spec.explained)):
        raise ValueError("explains no share of the variance")
    return spec


def _whole(value: Any, *, least: int = 1) -> int:
    """A whole number that something can have so many of."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
        raise ValueError(f"{value!r} is no such number")
    return value
