"""From a config to what it asks of a cache: the identity of the answers, and which samples, views and tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kd_accel.cache.compatibility import CacheRequest, OpenCache, largest_difference, tolerance
from kd_accel.cache.manifest import CachedSamples
from kd_accel.cache.spec import LOGITS, Split
from kd_accel.commands.networks import build_network
from kd_accel.commands.teacher import LayerPairs, TeacherNetwork, load_teacher, numeric_mode, pair_layers, ready_teacher
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import Data, load_data, num_views, view_transform
from kd_accel.data.hashing import hashed_order
from kd_accel.distributed import Accelerator
from kd_accel.errors import UserError
from kd_accel.models.preprocess import Normalize
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.types import Batch

_SAMPLE = 41
_SAMPLED = 8


@dataclass(frozen=True)
class CacheSetup:
    """A config's cache, and the teacher who answers for it."""

    config: RunConfig
    directory: Path
    data: Data
    teacher: TeacherNetwork
    model: torch.nn.Module
    normalize: Normalize
    pairs: LayerPairs
    request: CacheRequest
    accelerator: Accelerator


def cache_directory(config: RunConfig) -> Path:
    if config.teacher is None or config.teacher.outputs == "live" or config.teacher.cache_dir is None:
        raise UserError(
            "teacher.outputs: this config uses no cache; set teacher.outputs to cached or mixed, and teacher.cache_dir"
        )
    return Path(config.teacher.cache_dir)


def set_up_cache(config: RunConfig, accelerator: Accelerator) -> CacheSetup:
    """Read the data and the teacher, and pair its layers. Raises UserError for what does not fit together."""
    assert config.teacher is not None
    directory = cache_directory(config)
    data = load_data(config.data)
    network, _ = build_network(config, data)
    teacher = load_teacher(config.teacher, data)
    pairs = pair_layers(config, network, teacher.model) if config.teacher.outputs == "cached" else LayerPairs()
    views = num_views(config.data)
    assert views is not None, "checked by checks.problems"
    request = cache_request(config, data, teacher, pairs, accelerator.device, views=views)
    model, normalize = ready_teacher(config, teacher, accelerator, layers=pairs.teacher)
    return CacheSetup(config, directory, data, teacher, model, normalize, pairs, request, accelerator)


def cache_request(
    config: RunConfig, data: Data, teacher: TeacherNetwork, pairs: LayerPairs, device: torch.device, *, views: int
) -> CacheRequest:
    """What a training (or a build) with this config asks for. device: of the teacher. views: how many of the first ones."""
    assert config.teacher is not None
    has_features = config.teacher.outputs == "cached" and bool(pairs.teacher)
    if has_features and LOGITS in {*pairs.teacher, *pairs.teacher.values()}:
        raise UserError(
            f"distill.feature.layers: a module called {LOGITS} cannot be cached, since a cache keeps the logits under that name; "
            "layer a module inside it, or use teacher.outputs live or mixed"
        )
    feature = config.distill.feature if config.distill else None
    channels = pairs.pca_channels() if has_features else {}
    layers = pairs.teacher if has_features else {}
    return CacheRequest(
        fingerprint_fields={
            "teacher": teacher.fingerprint_fields(),
            "numeric": numeric_mode(config, teacher, layers, device),
            "data": {
                "label_names": list(data.label_names),
                "train_size": data.train.num_samples,
                "test_size": data.test.num_samples,
            },
            "views": view_transform(config.data).fingerprint_fields(),
        },
        samples=covered_samples(data),
        views=views,
        layers=layers,
        projected=channels,
        pca_images=feature.pca_images if feature and channels else None,
        dtype=config.teacher.dtype,
        any_memory_format=config.train.channels_last is None,
    )


def used_views(config: RunConfig) -> int:
    """How many of the first views a training sees."""
    views = num_views(config.data)
    assert views is not None, "checked by checks.problems"
    return min(views, config.train.epochs)


def covered_samples(data: Data) -> dict[Split, CachedSamples]:
    """The samples of each split, and what each of them is."""
    parts = {
        "train": (data.train, data.splits.train),
        "val": (data.train, data.splits.val),
        "test": (data.test, data.splits.test),
    }
    return {split: CachedSamples(samples, images.digests(samples)) for split, (images, samples) in parts.items()}  # type: ignore[misc]


def refuse_other_outputs(
    cache: OpenCache, live: LiveTeacher, config: RunConfig, data: Data, *, rank: int, device: torch.device
) -> float:
    """Let the teacher answer again for a few samples of the first and the last view. Returns the largest relative difference.

    Raises UserError where that is more than the storage type, the precision and another batch shape explain.
    """
    samples = sample_of(data.splits.train, rank=rank)
    source, worst = cache.source("train"), 0.0
    for view in {0, used_views(config) - 1}:
        batch = view_batch(config, data, samples, view).to(device)
        name, difference = largest_difference(source(batch), live(batch), source.ranges(batch))
        spec = cache.cache_spec.tensors[cache.layers.get(name, LOGITS)]
        allowed = tolerance(spec.dtype, config.train.precision)
        if not difference <= allowed:
            raise UserError(
                f"teacher.cache_dir: {cache.directory} does not hold what the teacher says here: {name} of samples "
                f"{samples.tolist()} in view {view} differs by {difference:.2g} of its largest value ({allowed:.2g} would be "
                "rounding). Run `kd-accel cache verify` with this config, or build another cache"
            )
        worst = max(worst, difference)
    return worst


def sample_of(samples: np.ndarray, *, rank: int) -> np.ndarray:
    """A few samples, other ones on each rank."""
    return np.sort(hashed_order((_SAMPLE, rank), samples)[:_SAMPLED])


def view_batch(config: RunConfig, data: Data, samples: np.ndarray, view: int) -> Batch:
    """A view of training samples, on the CPU."""
    pixels = view_transform(config.data)(data.train.pixels(samples), samples, view)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Batch(images, torch.from_numpy(data.train.labels[samples]), torch.from_numpy(samples), view)
