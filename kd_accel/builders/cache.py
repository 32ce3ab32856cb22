"""From a RunConfig to the directory of its cache, and to the request of a training or a build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from kd_accel.cache.compatibility import CacheRequest, create_request
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import DataModule
from kd_accel.errors import UserError
from kd_accel.losses.targets import TargetFunction
from kd_accel.teacher.teacher import Teacher


def cache_directory(config: RunConfig) -> Path:
    """Return the directory of the config's cache. Raises UserError if the config uses no cache."""
    teacher = config.teacher
    if teacher is None or teacher.outputs == "live" or teacher.cache.dir is None:
        raise UserError(
            "teacher.outputs: this config uses no cache; set teacher.outputs to cached or mixed, and teacher.cache.dir"
        )
    return Path(teacher.cache.dir)


def cache_request(
    config: RunConfig,
    data: DataModule,
    teacher: Teacher,
    targets: Mapping[str, TargetFunction],
    device: torch.device,
    *,
    views: int | None = None,
) -> CacheRequest:
    """Create the request of a config.

    Args:
        config: Config of the run.
        data: Its data.
        teacher: Its teacher.
        targets: Target functions of the compared layers; not requested by `outputs: mixed`, which computes features live.
        device: Device of the teacher.
        views: Number of views of the training split; None = those that the training uses.

    Raises:
        UserError: A layer cannot be stored under its name.
    """
    assert config.teacher is not None, "checked by config/validation.py"
    train = config.train
    return create_request(
        teacher,
        data,
        targets if config.teacher.outputs == "cached" else {},
        device=device,
        views=used_views(config, data) if views is None else views,
        dtype=config.teacher.cache.dtype,
        precision=train.precision,
        channels_last=train.channels_last,
        compiled=train.compile,
        tf32=train.tf32,
        cpu_kernels=train.cpu_kernels,
    )


def used_views(config: RunConfig, data: DataModule) -> int:
    """Return how many views a training uses, from view 0 on."""
    assert data.num_views is not None, "checked by config/validation.py"
    return min(data.num_views, config.train.epochs)
