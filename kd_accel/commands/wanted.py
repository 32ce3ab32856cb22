"""From a config to what it asks of a cache: the identity of the answers, and which rows, views and tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kd_accel.commands.data import Data, load_data, num_views, view_function
from kd_accel.commands.networks import build_network
from kd_accel.commands.teacher import TapPairs, TeacherNetwork, load_teacher, numeric_mode, pair_taps, ready_teacher
from kd_accel.config import RunConfig
from kd_accel.data.hashing import hashed_order
from kd_accel.engine.setup import Accelerator
from kd_accel.models.preprocess import Normalize
from kd_accel.teacher.cached import OpenCache, Wanted, largest_difference, tolerance
from kd_accel.teacher.live import LiveTeacher
from kd_accel.teacher.store.layout import LOGITS, Split
from kd_accel.teacher.store.manifest import CachedRows
from kd_accel.types import Batch, UserError

_SAMPLE = 41
_SAMPLE_ROWS = 8


@dataclass(frozen=True)
class Asked:
    """A config's cache, and the teacher who answers for it."""

    config: RunConfig
    directory: Path
    data: Data
    teacher: TeacherNetwork
    model: torch.nn.Module
    normalize: Normalize
    pairs: TapPairs
    wanted: Wanted
    accelerator: Accelerator


def cache_directory(config: RunConfig) -> Path:
    if config.teacher is None or config.teacher.signals == "live" or config.teacher.cache_dir is None:
        raise UserError(
            "teacher.signals: this config uses no cache; set teacher.signals to cached or logits_cached, and teacher.cache_dir"
        )
    return Path(config.teacher.cache_dir)


def ask(config: RunConfig, accelerator: Accelerator) -> Asked:
    """Read the data and the teacher, and pair its taps. Raises UserError for what does not fit together."""
    assert config.teacher is not None
    directory = cache_directory(config)
    data = load_data(config.data)
    network, _ = build_network(config, data)
    teacher = load_teacher(config.teacher, data)
    pairs = pair_taps(config, network, teacher.model) if config.teacher.signals == "cached" else TapPairs()
    views = num_views(config.data)
    assert views is not None, "checked by checks.problems"
    wanted = wanted_from_cache(config, data, teacher, pairs, accelerator.device, views=views)
    model, normalize = ready_teacher(config, teacher, accelerator, taps=pairs.teacher)
    return Asked(config, directory, data, teacher, model, normalize, pairs, wanted, accelerator)


def wanted_from_cache(
    config: RunConfig, data: Data, teacher: TeacherNetwork, pairs: TapPairs, device: torch.device, *, views: int
) -> Wanted:
    """What a training (or a build) with this config asks for. device: of the teacher. views: how many of the first ones."""
    assert config.teacher is not None
    has_features = config.teacher.signals == "cached" and bool(pairs.teacher)
    if has_features and LOGITS in {*pairs.teacher, *pairs.teacher.values()}:
        raise UserError(
            f"distill.feature.taps: a module called {LOGITS} cannot be cached, since a cache keeps the logits under that name; "
            "tap a module inside it, or use teacher.signals live or logits_cached"
        )
    feature = config.distill.feature if config.distill else None
    channels = pairs.pca_channels() if has_features else {}
    taps = pairs.teacher if has_features else {}
    return Wanted(
        identity={
            "teacher": teacher.identity(),
            "numeric": numeric_mode(config, teacher, taps, device),
            "data": {
                "label_names": list(data.label_names),
                "train_size": data.train.num_rows,
                "test_size": data.test.num_rows,
            },
            "views": view_function(config.data).identity(),
        },
        rows=covered_rows(data),
        views=views,
        taps=taps,
        projected=channels,
        pca_images=feature.pca_images if feature and channels else None,
        dtype=config.teacher.dtype,
        any_layout=config.train.channels_last is None,
    )


def used_views(config: RunConfig) -> int:
    """How many of the first views a training sees."""
    views = num_views(config.data)
    assert views is not None, "checked by checks.problems"
    return min(views, config.train.epochs)


def covered_rows(data: Data) -> dict[Split, CachedRows]:
    """The rows of each split, and what each of them is."""
    parts = {"train": (data.train, data.rows.train), "val": (data.train, data.rows.val), "test": (data.test, data.rows.test)}
    return {split: CachedRows(rows, images.digests(rows)) for split, (images, rows) in parts.items()}  # type: ignore[misc]


def refuse_other_answers(
    cache: OpenCache, live: LiveTeacher, config: RunConfig, data: Data, *, rank: int, device: torch.device
) -> float:
    """Let the teacher answer again for a few rows of the first and the last view. Returns the largest relative difference.

    Raises UserError where that is more than the storage type, the precision and another batch shape explain.
    """
    rows = sample_of(data.rows.train, rank=rank)
    source, worst = cache.source("train"), 0.0
    for view in {0, used_views(config) - 1}:
        batch = view_batch(config, data, rows, view).to(device)
        name, difference = largest_difference(source(batch), live(batch), source.ranges(batch))
        spec = cache.plan.tensors[cache.taps.get(name, LOGITS)]
        allowed = tolerance(spec.dtype, config.train.precision)
        if not difference <= allowed:
            raise UserError(
                f"teacher.cache_dir: {cache.directory} does not hold what the teacher says here: {name} of rows "
                f"{rows.tolist()} in view {view} differs by {difference:.2g} of its largest value ({allowed:.2g} would be "
                "rounding). Run `kd-accel cache verify` with this config, or build another cache"
            )
        worst = max(worst, difference)
    return worst


def sample_of(rows: np.ndarray, *, rank: int) -> np.ndarray:
    """A few rows, other ones on each rank."""
    return np.sort(hashed_order((_SAMPLE, rank), rows)[:_SAMPLE_ROWS])


def view_batch(config: RunConfig, data: Data, rows: np.ndarray, view: int) -> Batch:
    """A view of training rows, on the CPU."""
    pixels = view_function(config.data)(data.train.pixels(rows), rows, view)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Batch(images, torch.from_numpy(data.train.labels[rows]), torch.from_numpy(rows), view)
